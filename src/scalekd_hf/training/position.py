"""Where a run stands, as its checkpoints keep it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


__all__ = ["RUN_STATE_FILE", "RunPosition"]

RUN_STATE_FILE = "scalekd_state.json"


@dataclass
class RunPosition:
    """Where a run stands.

    Attributes:
        step: optimiser steps.
        images_seen: of the endless sequence, by all processes.
        seconds: of training so far.
        layout_start: the image from which on the sequence is dealt out as it is now.
        data: settings that the order of the images depends on.
        settings: see `settings_to_keep`; None in checkpoints of before November 2026.
    """

    step: int = 0
    images_seen: int = 0
    seconds: float = 0.0
    layout_start: int = 0
    data: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None

    def write(self, folder: Path) -> None:
        """Into a checkpoint."""
        state = {name: value for name, value in vars(self).items() if name != "step"}
        (folder / RUN_STATE_FILE).write_text(json.dumps(state, indent=2), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> RunPosition:
        """Of a checkpoint that `check_checkpoint` has passed."""
        state = json.loads((folder / RUN_STATE_FILE).read_text(encoding="utf-8"))
        step = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        where = (state["images_seen"], state.get("seconds", 0.0), state.get("layout_start", 0))
        return cls(step, *where, state["data"], state.get("settings"))

    def changes(self, data: dict[str, Any]) -> list[str]:
        """Which settings of the data have changed since, in words."""
        return _changes(self.data or {}, data, data)

    def changed_settings(self, settings: dict[str, Any]) -> list[str]:
        """Which others have changed since, in words; one that the checkpoint does not know has not."""
        then = self.settings or {}
        return _changes(then, settings, [name for name in settings if name in then])


def _changes(then: dict[str, Any], now: dict[str, Any], names: Iterable[str]) -> list[str]:
    return [f"{name} {then.get(name)} to {now[name]}" for name in names if now[name] != then.get(name)]
