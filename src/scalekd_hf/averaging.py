"""A moving average of the student, evaluated and saved in its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import nn
from transformers import TrainerCallback

from .saving import load_strictly, load_student_weights, read_tensors
from .students import Student


__all__ = ["AveragedStudent"]

TRAINED_FILE = "trained_student.safetensors"  # the weights that training goes on with


class AveragedStudent(TrainerCallback):
    """Keeps timm's exponential moving average of weights and buffers, updated after each optimiser step."""

    def __init__(self, student: Student, decay: float):
        self.student = student
        self.average = ModelEmaV3(student.model, decay=decay)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average.update(self.student.model)

    def synchronise(self, accelerator: Accelerator) -> None:
        """Take the buffers of the first process everywhere: BatchNorm's statistics differ between processes."""
        if accelerator.num_processes > 1:
            for buffer in self.average.module.buffers():
                torch.distributed.broadcast(buffer, 0)

    def restart(self) -> None:
        """Start again from the student as it is."""
        self.average.module.load_state_dict(self.student.model.state_dict())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The student has the averaged weights inside of this context."""
        trained = {name: tensor.clone() for name, tensor in self.student.model.state_dict().items()}
        _copy(self.average.module, self.student.model)
        try:
            yield
        finally:
            for name, tensor in self.student.model.state_dict().items():
                tensor.copy_(trained[name])

    def save_trained(self, folder: Path) -> None:
        """Write the weights that training goes on with beside the averaged student of a checkpoint."""
        trained = {name: tensor.contiguous() for name, tensor in self.student.model.state_dict().items()}
        save_file(trained, folder / TRAINED_FILE)

    def load(self, folder: Path, resume: bool) -> None:
        """Load the average of a checkpoint, and into the student what it trains on with, or the average itself."""
        load_student_weights(self.student, folder)
        self.restart()
        if resume:
            load_strictly(self.student.model, read_tensors(folder, TRAINED_FILE), folder)


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module) -> None:
    for mine, theirs in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
        mine.copy_(theirs)
