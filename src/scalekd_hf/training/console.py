"""The log on the screen: one line for each step that is logged."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback

from ..method.distiller import ALL_TERMS
from .backbones import FEATURES_ALONE


__all__ = ["leave_closed_outputs", "use_readable_log"]

SAME_MOMENT = 0.2  # seconds in which what has got the same signal ends
HIDDEN = ("model_preparation_time", "steps_per_second")


def use_readable_log(trainer: Trainer) -> None:
    """Replace the Trainer's own screen log, where it is the usual one, and keep TensorBoard's files in the output folder."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            # An evaluation without training would write into the working directory.
            callback.logging_dir = str(Path(str(trainer.args.output_dir), "runs"))
    for theirs, ours in ((ProgressCallback, BarLog), (PrinterCallback, LineLog)):
        if any(type(callback) is theirs for callback in trainer.callback_handler.callbacks):
            trainer.remove_callback(theirs)
            trainer.add_callback(ours)


class Clock:
    """When training began, and at which step."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, step: int) -> None:
        self._step, self._time = step, time.monotonic()

    def left(self, state: TrainerState) -> str:
        """Time until the last step at the pace so far, as h:mm:ss."""
        done = state.global_step - self._step
        seconds = (time.monotonic() - self._time) / max(done, 1) * (state.max_steps - state.global_step)
        return str(timedelta(seconds=round(seconds)))


def line(logs: dict[str, Any], state: TrainerState, clock: Clock, name: str | None = None) -> str:
    """One line for what was logged: a training step, an evaluation of the model of this name, or the end."""
    place = f"step {state.global_step:,}/{state.max_steps:,}" if state.max_steps > 0 else f"step {state.global_step:,}"
    if "loss" in logs:
        terms = " ".join(f"{term} {logs[term]:.4g}" for term in ALL_TERMS if term in logs)
        parts = [place, f"loss {logs['loss']:.4g}", terms, f"rate {logs['learning_rate']:.3g}"]
        if "images_per_second" in logs:
            parts.append(f"{logs['images_per_second']:,.0f} images/s")
        if logs.get("data_wait", 0) >= 0.01:
            parts.append(f"{logs['data_wait']:.0%} waiting for data")
        return " | ".join(part for part in (*parts, f"{clock.left(state)} left") if part)
    evaluated = {name: value for name, value in logs.items() if name.startswith("eval_") and not name.endswith(HIDDEN)}
    ended = "train_runtime" in logs
    shown = evaluated or {name: value for name, value in logs.items() if name not in ("epoch", "total_flos")}
    values = ", ".join(f"{name.removeprefix('eval_')} {_number(name, value)}" for name, value in shown.items())
    evaluation = f"evaluation of {name}" if name else "evaluation"
    return f"{place} | {'end of training' if ended else evaluation if evaluated else 'log'}: {values}"


def tapped(student: Any) -> str:
    """Where a student is tapped, as a line; of a backbone also what it learns from."""
    maps = [f"{tap.module} ({tap.dim} channels, {tap.grid[0]}x{tap.grid[1]})" for tap in student.taps]
    text = f"The student is tapped at {' and '.join(maps)}."
    return text if student.num_labels else f"{text} It has no classifier: {FEATURES_ALONE}."


def _number(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2%}" if name.endswith(("top1", "top5")) else f"{value:.4g}"


def leave_closed_outputs() -> None:
    """Write nowhere what would go to a terminal that is gone, or to a `tee` that the same signal has ended: it would raise."""
    if not hasattr(select, "poll"):  # Windows
        return
    time.sleep(SAME_MOMENT)
    for descriptor in (1, 2):
        output = select.poll()
        output.register(descriptor, 0)
        if output.poll(0):  # of errors, which are asked for in any case
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), descriptor)


@contextmanager
def _outliving_readers() -> Iterator[None]:
    """No run ends because nobody reads its log any more: a terminal that is gone, or a `tee` that has died."""
    try:
        yield
    except OSError:
        leave_closed_outputs()


class _Readable(TrainerCallback):
    """What both logs share; `write` puts a line on the screen."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.clock.start(state.global_step)
        if state.is_world_process_zero and getattr(model, "heads", None) is not None:
            with _outliving_readers():
                self.write(tapped(model.student))

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, model: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            name = getattr(getattr(model, "student", None), "name", None)
            with _outliving_readers():
                self.write(line(logs or {}, state, self.clock, name))

    def write(self, text: str) -> None:
        raise NotImplementedError


class BarLog(_Readable, ProgressCallback):
    """The Trainer's progress bar, with a readable line above it."""

    on_step_end = _outliving_readers()(ProgressCallback.on_step_end)
    on_prediction_step = _outliving_readers()(ProgressCallback.on_prediction_step)
    on_evaluate = _outliving_readers()(ProgressCallback.on_evaluate)
    on_predict = _outliving_readers()(ProgressCallback.on_predict)
    on_train_end = _outliving_readers()(ProgressCallback.on_train_end)

    def write(self, text: str) -> None:
        """Above the bar; nothing without one, as the parent."""
        if self.training_bar is not None:
            self.training_bar.write(text)


class LineLog(_Readable, PrinterCallback):
    """The same without a bar."""

    def write(self, text: str) -> None:
        """To the standard output."""
        print(text, flush=True)  # noqa: T201
