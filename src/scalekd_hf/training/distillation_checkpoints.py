"""Checkpoints of a distillation.

Beside what those of any run hold it is a student's folder, the mimicking heads, and with `ema_decay` the weights that training
continues from (the student's folder holds the average). The teacher is not in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from ..method.heads import MimickingHeads
from ..models.saving import load_strictly, load_student_weights, read_tensors, save_tensors
from ..models.students import Student
from ..models.taps import find_taps
from .averaging import TRAINED_FILE, AveragedStudent
from .checkpoints import Checkpoints
from .config import ScaleKDConfig
from .feeding import ImageFeed
from .loss_log import LossLog
from .model import ScaleKDModel, attention_heads
from .position import RunPosition
from .settings import models_to_keep
from .sharding import full_state
from .stopwatch import Stopwatch


__all__ = ["HEADS_FILE", "DistillationCheckpoints", "check_taps", "load_checkpoint"]

HEADS_FILE = "mimicking_heads.safetensors"


class DistillationCheckpoints(Checkpoints):
    """Keeps what a distillation goes on from.

    Args:
        args: of the run.
        model: that trains, before anything of it is sharded.
        feed, progress, stopwatch, is_sharded: see `Checkpoints`.
        averaged: the averaged student, where there is one.
    """

    made_for = "Its optimiser and its projectors are made for"
    trains, start_from = "student", " and `student_pretrained`"

    def __init__(
        self,
        args: ScaleKDConfig,
        model: ScaleKDModel,
        feed: ImageFeed,
        progress: LossLog,
        stopwatch: Stopwatch,
        averaged: AveragedStudent | None,
        is_sharded: bool,
    ):
        mimics = isinstance(model.heads, MimickingHeads) and model.teacher is not None
        heads = attention_heads(model.teacher, args) if mimics else None
        super().__init__(args, feed, progress, stopwatch, models_to_keep(model, heads), is_sharded)
        self.averaged, self.model, self.student = averaged, model, model.student

    def start(self, checkpoint: str | None, dataset: Any, epochs: float | None) -> RunPosition:
        """See `Checkpoints.start`."""
        if self.averaged is not None:
            self.averaged.restart(self.args.device)
        position = super().start(checkpoint, dataset, epochs)
        if checkpoint is not None and self.is_sharded:
            self.restore_average(Path(checkpoint))
        return position

    def check_models(self, checkpoint: Path, position: RunPosition) -> None:
        """See `Checkpoints.check_models`."""
        if (checkpoint / TRAINED_FILE).exists() != (self.averaged is not None):
            what = (
                "no average: leave `ema_decay` out"
                if self.averaged is not None
                else "an averaged student: set its `ema_decay` again"
            )
            raise ValueError(f"The checkpoint {str(checkpoint)!r} holds {what}.")
        if position.settings is None and self.model.heads is not None:
            check_taps(checkpoint, self.student, None)

    def before_saving(self, accelerator: Accelerator) -> None:
        """The average is the first process's on all."""
        if self.averaged is not None:
            self.averaged.synchronise(accelerator)

    def write_beside(self, folder: Path, position: RunPosition) -> None:
        """Write what a checkpoint holds beside the student; every process must call it."""
        model = self.model
        heads = full_state(model.heads) if model.heads is not None else None
        trained = full_state(model.student.model) if self.averaged is not None else None
        if not self.args.should_save:
            return
        for tensors, name in ((trained, TRAINED_FILE), (heads, HEADS_FILE)):
            if tensors is not None:
                save_tensors(tensors, folder / name)
        super().write_beside(folder, position)

    def load(self, folder: Path, resume: bool) -> None:
        """Load student and heads; with an average, to resume the weights that training continues from, else the average itself."""
        load_checkpoint(self.student, self.model.heads, folder)
        if self.averaged is not None:
            self.averaged.load(folder, resume)

    def restore_average(self, folder: Path) -> None:
        """Load the average alone, where an engine loads the other weights."""
        if self.averaged is not None:
            self.averaged.restore(folder)


def check_taps(folder: Path, student: Student, settings: dict[str, Any] | None) -> None:
    """Refuse heads that were trained at other taps of a student.

    Args:
        folder: the checkpoint.
        student: as it is tapped now.
        settings: that the checkpoint tells; None for one of before, when a mixer was tapped after its final norm.

    Raises:
        ValueError: with both.
    """
    now = [tap.module for tap in student.taps]
    if settings is not None:
        then = settings["student_taps"]
    else:
        then = now if student.tap_names is not None else [tap.module for tap in find_taps(student, True)[0]]
    if then is not None and then != now:
        raise ValueError(
            f"The checkpoint {str(folder)!r} is of a student that was tapped at {', '.join(then)}; it would be tapped at "
            f"{', '.join(now)} now. Set `student_taps` to the former to go on with this run."
        )


def load_checkpoint(student: Student, heads: nn.Module | None, folder: str | Path) -> None:
    """Load student and heads of a checkpoint.

    Raises:
        ValueError: a checkpoint with a missing, unreadable or unsuitable file.
    """
    load_student_weights(student, folder)
    if heads is not None:
        load_strictly(heads, read_tensors(Path(folder), HEADS_FILE), Path(folder))
