"""What a transfer would do and cost, or why it would fail."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import set_seed

from ..tools.flops import flops_of
from ..tools.plan_text import shown
from .annotations import DenseData, load_dense_data
from .building import build_model
from .config import TransferArguments, TransferConfig
from .tasks import backbone_of, task_of


__all__ = ["TransferPlan", "plan_transfer"]

NAMES = 3  # of tensors that are shown


@dataclass
class TransferPlan:
    """What is known before anything is trained; what is empty could not be found out.

    Attributes:
        model: names, parameters, maps and where the weights come from.
        data: images and classes.
        work: GFLOP of the forward of one image.
        schedule: steps, epochs and batches.
        error: why the run would fail.
    """

    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    work: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """As a table for people."""
        lines = []
        for title in ("model", "data", "work", "schedule"):
            rows = getattr(self, title)
            lines += (
                [title, *(f"  {name:<26}{shown(value, '{:.2f}')}" for name, value in rows.items())] if rows else []
            )
        return "\n".join([*lines, *([f"This run would fail: {self.error}"] if self.error else [])])


def plan_transfer(task: str, arguments: TransferArguments, config: TransferConfig) -> TransferPlan:
    """Build the model, look at the data, and run one batch without values.

    Args:
        task: "segment" or "detect".
        arguments, config: the settings.
    """
    plan = TransferPlan()
    try:
        data = load_dense_data(arguments, task, masks=arguments.head_of(task) == "mask_rcnn")
        set_seed(config.seed)
        model = build_model(task, arguments, config, data.class_names)
        task_of(model, data, config.image_size).check_batch(config.per_device_train_batch_size)
        _of_model(plan, model, config.image_size)
        _of_data(plan, data)
        _of_schedule(plan, data, config, arguments.plan_processes or config.world_size)
    except (ValueError, OSError, ImportError) as error:
        plan.error = str(error)
    return plan


def _of_model(plan: TransferPlan, model: Any, image_size: int) -> None:
    backbone = backbone_of(model)
    origin, tensors = backbone.origin, len(backbone.state_dict())
    of_backbone = sum(parameter.numel() for parameter in backbone.parameters())
    maps = ", ".join(
        f"{width} at /{stride:g}" for width, stride in zip(backbone.channels, origin.strides, strict=True)
    )
    plan.model = {
        "head": type(model).__name__,
        "backbone": f"{type(backbone).__name__} of {origin.student}",
        "its maps (channels, stride)": maps,
        "tensors from the student": f"{tensors - len(origin.new)} of {tensors}",
        "left out": _some(origin.left_out),
        "M parameters, backbone": of_backbone / 1e6,
        "M parameters, head": (sum(parameter.numel() for parameter in model.parameters()) - of_backbone) / 1e6,
    }
    shadow = backbone.to("meta").eval()
    pixels = torch.zeros(1, 3, image_size, image_size, device="meta")
    plan.work = {
        "pixels of an image": f"{image_size} x {image_size}",
        "GFLOP forward, backbone": flops_of(lambda: shadow(pixels)) / 1e9,
    }


def _of_data(plan: TransferPlan, data: DenseData) -> None:
    plan.data = {"classes": f"{len(data.class_names)}: {_some(data.class_names)}"}
    for name, dataset in (("training images", data.train), ("evaluation images", data.evaluation)):
        if hasattr(dataset, "__len__"):
            plan.data[name] = len(dataset)


def _of_schedule(plan: TransferPlan, data: DenseData, config: TransferConfig, processes: int) -> None:
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    plan.schedule = {"processes": processes, "global batch": batch}
    images = len(data.train) if hasattr(data.train, "__len__") else None
    steps = config.max_steps if config.max_steps > 0 else None
    if images is not None:
        steps = steps or math.ceil(config.num_train_epochs * images / batch)
        plan.schedule["epochs"] = steps * batch / images
    if steps is not None:
        plan.schedule |= {"steps": steps, "warm-up steps": config.get_warmup_steps(steps)}


def _some(names: list[str]) -> str:
    rest = len(names) - NAMES
    return ", ".join(names[:NAMES]) + (f" and {rest} more" if rest > 0 else "") if names else "nothing"
