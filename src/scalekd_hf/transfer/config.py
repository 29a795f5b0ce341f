"""Settings of a transfer: which student becomes the backbone of what, and how that is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..training.run_config import RunConfig
from .annotations import DenseDataArguments
from .detector import HEADS as DETECTORS


__all__ = ["HEADS", "TransferArguments", "TransferConfig"]

HEADS = {"segment": ("upernet",), "detect": DETECTORS}  # the first is the default


@dataclass
class TransferConfig(RunConfig):
    """All settings of a transfer but the model and the data.

    Args:
        image_size (`int`, *optional*, defaults to `512`):
            Of segmentation: side of the training crops, and the shorter side in evaluation. Of D-FINE: side of the square
            that images are squeezed to. Of Mask R-CNN: the shorter side in evaluation, at most which it has in training.
        layer_decay (`float`, *optional*, defaults to `1.0`):
            The learning rate of each block of the backbone is this share of the next one's; the head has `learning_rate`.
            Used for plain transformers (BEiT's fine-tuning: 0.65 to 0.95); 1 gives all blocks the same rate.
        backbone_lr_scale (`float`, *optional*, defaults to `1.0`):
            Share of `learning_rate` that the backbone has, as detectors of the DETR family use it (0.1).

    > Other fields are those of `RunConfig`, and of `TrainingArguments`. `metric_for_best_model` is by default "mean_iou", or
    > "box_ap".
    """

    # Transfer
    image_size: int = field(default=512, metadata={"help": "Side of the images in pixels; see the documentation."})
    layer_decay: float = field(
        default=1.0, metadata={"help": "Share of the next block's learning rate that a block of the backbone has."}
    )
    backbone_lr_scale: float = field(default=1.0, metadata={"help": "Share of `learning_rate` that the backbone has."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layer_decay", "backbone_lr_scale"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(f"`{name}` must be above 0 and at most 1, got {value!r}.")
        if self.image_size < 32 or self.image_size != int(self.image_size):
            raise ValueError(
                f"`image_size` must be a whole number of at least 32 px, got {self.image_size!r}: maps of stride 32 need a cell."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` is {self.label_smoothing_factor:g}, which is for classifiers: heads for dense tasks have "
                "losses of their own. Leave it out."
            )


@dataclass
class TransferArguments(DenseDataArguments):
    """The student, what is put on it, and the data.

    Args:
        student: name or folder, as `load_student` takes it.
        student_args: further arguments of the student, as JSON or a mapping.
        backbone_pretrained: begin with the student's weights; false for fresh ones, to compare with.
        head: of segmentation "upernet"; of detection "mask_rcnn", which papers compare, or "d_fine".
        head_args: further arguments of the head, as JSON or a mapping, such as its `hidden_size`.
        drop_path_rate: of stochastic depth in the backbone while it trains.
        license: of the model, for its card.
        plan_processes: processes that `--plan` counts with; by default those of the launch.
    """

    student: str = field(default="", metadata={"help": "Name or folder of the student."})
    student_args: dict | str | None = field(default=None, metadata={"help": "Arguments of the student, as JSON."})
    backbone_pretrained: bool = field(
        default=True, metadata={"help": "Begin with the student's weights; false for fresh ones, to compare with."}
    )
    head: str | None = field(
        default=None, metadata={"help": "What is put on the student; by default upernet or mask_rcnn."}
    )
    head_args: dict | str | None = field(default=None, metadata={"help": "Arguments of the head, as JSON."})
    drop_path_rate: float = field(default=0.0, metadata={"help": "Rate of stochastic depth in the backbone."})
    license: str | None = field(default=None, metadata={"help": "License of the model, for its card."})
    plan_processes: int | None = field(default=None, metadata={"help": "Processes that `--plan` counts with."})

    def __post_init__(self) -> None:
        if not self.student:
            raise ValueError("`student` is missing: name a student's folder, a Hub id or a model.")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"`drop_path_rate` must be at least 0 and below 1, got {self.drop_path_rate!r}.")

    def head_of(self, task: str) -> str:
        """The head that is put on the student.

        Raises:
            ValueError: one that the task has not.
        """
        head = self.head or HEADS[task][0]
        if head not in HEADS[task]:
            raise ValueError(
                f"`head` is {head!r}: heads that {task} are {', '.join(HEADS[task])}. Choose one of them."
            )
        return head


def chosen_metric(args: Any, best: str) -> None:
    """Have the best checkpoint be chosen by the metric of the task, where none is named."""
    if args.load_best_model_at_end and args.metric_for_best_model in (None, "loss"):
        args.metric_for_best_model, args.greater_is_better = best, True
