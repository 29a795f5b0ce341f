"""Where a run stands, as its checkpoints keep it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


__all__ = ["RUN_STATE_FILE", "RunPosition"]

RUN_STATE_FILE = "scalekd_state.json"
LATER = ("content", "commit")  # what checkpoints of before do not tell


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
        log: see `LossLog.state`.
        evaluation_is_due: the run stopped at this step before its evaluation had come to its end.
    """

    step: int = 0
    images_seen: int = 0
    seconds: float = 0.0
    layout_start: int = 0
    data: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    log: dict[str, Any] | None = None
    evaluation_is_due: bool = False

    def write(self, folder: Path) -> None:
        """Into a checkpoint."""
        state = {name: value for name, value in vars(self).items() if name != "step"}
        (folder / RUN_STATE_FILE).write_text(json.dumps(state, indent=2), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> RunPosition:
        """Of a checkpoint that `check_checkpoint` has passed."""
        state = json.loads((folder / RUN_STATE_FILE).read_text(encoding="utf-8"))
        step = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        return cls(step, **{field.name: state[field.name] for field in fields(cls) if field.name in state})

    def changes(self, data: dict[str, Any]) -> list[str]:
        """Which settings of the data have changed since, in words; what the data hold only where both tell it."""
        then = self.data or {}
        return _changes(then, data, [name for name in data if name in then or name not in LATER])

    def changed_settings(self, settings: dict[str, Any]) -> list[str]:
        """Which others have changed since, in words; one that the checkpoint does not know has not."""
        then = self.settings or {}
        return _changes(then, settings, [name for name in settings if name in then])


def _changes(then: dict[str, Any], now: dict[str, Any], names: Iterable[str]) -> list[str]:
    return [f"{name} {then.get(name)} to {now[name]}" for name in names if now[name] != then.get(name)]
