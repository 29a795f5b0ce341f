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
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ..models.saving import load_strictly, load_student_weights, read_student, read_tensors
from ..models.students import Student
from .sharding import full_state, local_part, part_of_whole, whole_of_part


__all__ = ["TRAINED_FILE", "AveragedStudent"]

TRAINED_FILE = "trained_student.safetensors"  # the weights that training goes on with


class AveragedStudent(TrainerCallback):
    """Keeps timm's exponential moving average of weights and buffers, updated after each optimiser step.

    Of a student that FSDP2 has divided, each process averages its own part: nothing is gathered in a step, but before the
    average is evaluated or saved.
    """

    def __init__(self, student: Student, decay: float):
        self.student = student
        self.average = ModelEmaV3(student.model, decay=decay)
        self._parts: ModelEmaV3 | None = None  # of this process, where they are newer than the whole

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not any(isinstance(parameter, DTensor) for parameter in self.student.model.parameters()):
            # timm's update asks for nothing but the state dict; that of ZeRO-3's partitions is gathered.
            self.average.update(SimpleNamespace(state_dict=partial(full_state, self.student.model)))
            return
        trained = self.student.model.state_dict()
        if self._parts is None:
            whole = self.average.module.state_dict()
            parts = [part_of_whole(whole[name], like) for name, like in trained.items()]
            self._parts = ModelEmaV3(_module_of(parts), decay=self.average.decay)
        self._parts.update(_module_of([local_part(tensor) for tensor in trained.values()]))

    def _gather(self) -> None:
        """Bring the processes' parts together."""
        if self._parts is None:
            return
        whole = self.average.module.state_dict()
        parts = self._parts.module.state_dict().values()
        for (name, like), part in zip(self.student.model.state_dict().items(), parts, strict=True):
            whole[name].copy_(whole_of_part(part, like))

    def synchronise(self, accelerator: Accelerator) -> None:
        """Take the buffers of the first process everywhere: BatchNorm's statistics differ between processes."""
        self.average.to(accelerator.device)
        self._gather()
        if accelerator.num_processes > 1:
            for buffer in self.average.module.buffers():
                torch.distributed.broadcast(buffer, 0)

    def state_dict(self) -> dict[str, Tensor]:
        """The average, by the names of the student's weights; every process must call it."""
        self._gather()
        state: dict[str, Tensor] = self.average.module.state_dict()
        return state

    def restart(self, device: torch.device) -> None:
        """Start again from the student as it is."""
        self._parts = None
        self.average.module.load_state_dict(full_state(self.student.model))
        self.average.to(device)

    @contextmanager
    def in_place(self, accelerator: Accelerator) -> Iterator[None]:
        """The student is the averaged one inside of this context, a copy of it: evaluation may change its precision."""
        self.synchronise(accelerator)
        trained, self.student.model = self.student.model, copy.deepcopy(self.average.module)
        is_tapped = not self.student.num_labels  # a backbone is evaluated by its maps
        try:
            if is_tapped:
                self.student.tap_again()
            yield
        finally:
            self.student.model = trained
            if is_tapped:
                self.student.tap_again()

    def restore(self, folder: Path) -> None:
        """Load the average of a checkpoint whose other weights the engine loads."""
        self._parts = None
        load_strictly(self.average.module, read_student(self.student, folder), folder)

    def load(self, folder: Path, resume: bool) -> None:
        """Load the average of a checkpoint, and into the student what it trains on with, or the average itself."""
        self._parts = None
        load_student_weights(self.student, folder)
        self.average.module.load_state_dict(full_state(self.student.model))
        if resume:
            load_strictly(self.student.model, read_tensors(folder, TRAINED_FILE), folder)


def _module_of(tensors: list[Tensor]) -> nn.Module:
    """Tensors as timm's average takes them."""
    return nn.ParameterList([nn.Parameter(tensor, requires_grad=False) for tensor in tensors])
