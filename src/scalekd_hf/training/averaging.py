"""A moving average of the student, evaluated and saved in its place."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor
from transformers import TrainerCallback

from ..models.saving import load_strictly, load_student_weights, read_student, read_tensors
from ..models.students import Student
from .sharding import full_state


__all__ = ["TRAINED_FILE", "AveragedStudent"]

TRAINED_FILE = "trained_student.safetensors"  # the weights that training goes on with


class AveragedStudent(TrainerCallback):
    """Keeps timm's exponential moving average of weights and buffers, updated after each optimiser step."""

    def __init__(self, student: Student, decay: float):
        self.student = student
        self.average = ModelEmaV3(student.model, decay=decay)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # timm's update asks for nothing but the state dict; that of a sharded student is gathered.
        self.average.update(SimpleNamespace(state_dict=partial(full_state, self.student.model)))

    def synchronise(self, accelerator: Accelerator) -> None:
        """Take the buffers of the first process everywhere: BatchNorm's statistics differ between processes."""
        self.average.to(accelerator.device)
        if accelerator.num_processes > 1:
            for buffer in self.average.module.buffers():
                torch.distributed.broadcast(buffer, 0)

    def state_dict(self) -> dict[str, Tensor]:
        """The average, by the names of the student's weights."""
        state: dict[str, Tensor] = self.average.module.state_dict()
        return state

    def restart(self, device: torch.device) -> None:
        """Start again from the student as it is."""
        self.average.module.load_state_dict(full_state(self.student.model))
        self.average.to(device)

    @contextmanager
    def in_place(self, accelerator: Accelerator) -> Iterator[None]:
        """The student is the averaged one inside of this context, a copy of it: evaluation may change its precision."""
        self.synchronise(accelerator)
        trained, self.student.model = self.student.model, copy.deepcopy(self.average.module)
        try:
            yield
        finally:
            self.student.model = trained

    def restore(self, folder: Path) -> None:
        """Load the average of a checkpoint whose other weights the engine loads."""
        load_strictly(self.average.module, read_student(self.student, folder), folder)

    def load(self, folder: Path, resume: bool) -> None:
        """Load the average of a checkpoint, and into the student what it trains on with, or the average itself."""
        load_student_weights(self.student, folder)
        self.average.module.load_state_dict(full_state(self.student.model))
        if resume:
            load_strictly(self.student.model, read_tensors(folder, TRAINED_FILE), folder)
