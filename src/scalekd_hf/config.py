"""`ScaleKDConfig`: `TrainingArguments` with the settings of the method and of the images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .losses import TASK_LOSSES
from .projector import STEM_NORMS


__all__ = ["ScaleKDConfig"]


@dataclass
class ScaleKDConfig(TrainingArguments):
    """All settings of a run but the models and the data sets.

    The defaults of the method are those published for Swin teachers (arXiv 2411.06786, section 4 and
    the authors' configurations).

    Args:
        spatial_weight (`float`, *optional*, defaults to `0.08`):
            Weight of the two spatial mimicking losses (section 3.4). Published: 0.08 for Swin teachers, 0.016 for
            EVA-L at 224 px, 0.008 at 336 px. 0 leaves the view out.
        frequency_weight (`float`, *optional*, defaults to `0.06`):
            Weight of the two frequency mimicking losses. Published: 0.06, 0.008 and 0.004. 0 leaves the view out.
        last_frequency_weight (`float`, *optional*):
            Another weight for the frequency view of the last stage. Published: 0 in the 100-epoch Swin-S to ResNet-50
            run. By default `frequency_weight`.
        logit_weight (`float`, *optional*, defaults to `0.5`):
            λ: the logit term weighs λ and the task term 1 - λ (section 3.4). 0 leaves the logit term out.
        temperature (`float`, *optional*, defaults to `1.0`):
            T, softens both distributions of the logit term (section 3.4).
        penultimate_num_heads (`int`, *optional*):
            Attention heads of the projectors to the teacher's penultimate stage; must divide its width. Published: 16
            for Swin-L, 8 for Swin-B and EVA-L, 3 for Swin-S. By default the largest divisor of the width up to 16.
        last_num_heads (`int`, *optional*):
            The same for the last stage. Published: 24 for Swin-L, 16 for Swin-B, 8 for EVA-L, 6 for Swin-S. By default
            the largest divisor of the width up to 24.
        softmax_scale (`float`, *optional*, defaults to `5.0`):
            Multiplies the attention's usual head_dim^-0.5 (authors' code). Published: 5; 1 for ConvNeXt-T and Swin-T.
        stem_norm (`str`, *optional*, defaults to `"batch"`):
            Norm of the projectors' stems, `"batch"` or `"layer"`. Published: `"layer"` for Swin-T only.
        learned_last_queries (`bool`, *optional*, defaults to `False`):
            Learned queries at the last stage instead of teacher parameter perception's (section 3.3). Published:
            `True` in the 100-epoch Swin-S to ResNet-50 run.
        teacher_last_blocks (`int`, *optional*, defaults to `2`):
            Blocks that count as the last stage of a plain ViT teacher (authors' code).
        task_loss (`str`, *optional*, defaults to `"cross_entropy"`):
            `"cross_entropy"`, or `"binary_cross_entropy"` over sigmoids. Published: the latter for ResNet-50, 300
            epochs. `label_smoothing_factor` applies to both.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column of the data set that holds the images.
        label_column (`str`, *optional*, defaults to `"label"`):
            Column that holds the class indices.
        image_size (`int`, *optional*):
            Side of the student's images in pixels. By default the student's own.
        teacher_image_size (`int`, *optional*):
            Side of the teacher's images in pixels; the student's are resized on the device. By default its own.
        crop_scale (`list[float]`, *optional*, defaults to `[0.08, 1.0]`):
            Range of the share of the area that a random crop keeps in training (published: 0.08 to 1).
        hflip (`float`, *optional*, defaults to `0.5`):
            Probability of a horizontal flip in training (published: 0.5).
        crop_pct (`float`, *optional*):
            Side of the centre crop over the shorter side after resizing, in evaluation. By default the student's own.
        shuffle_buffer_size (`int`, *optional*, defaults to `1000`):
            Images that a stream's shuffle buffer holds; shards are shuffled, too.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Delete the run that `output_dir` holds when training starts.

    > Parent defaults that differ here: `remove_unused_columns=False` (images are transformed on the fly),
    > `ddp_find_unused_parameters=False` (every trained parameter has a gradient; the search costs time),
    > `logging_nan_inf_filter=False` (it synchronises every step and hides what this trainer reports),
    > `logging_steps=50`.
    """

    # Method
    spatial_weight: float = field(
        default=0.08, metadata={"help": "Weight of the two spatial mimicking losses. 0 leaves the view out."}
    )
    frequency_weight: float = field(
        default=0.06, metadata={"help": "Weight of the two frequency mimicking losses. 0 leaves the view out."}
    )
    last_frequency_weight: float | None = field(
        default=None, metadata={"help": "Another weight for the frequency view of the last stage."}
    )
    logit_weight: float = field(
        default=0.5, metadata={"help": "Weight λ of the logit term; the task term weighs 1 - λ. 0 leaves it out."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature T of the logit term."})
    penultimate_num_heads: int | None = field(
        default=None,
        metadata={
            "help": "Heads of the penultimate projectors. By default the largest divisor of the width up to 16."
        },
    )
    last_num_heads: int | None = field(
        default=None,
        metadata={"help": "Heads of the last projectors. By default the largest divisor of the width up to 24."},
    )
    softmax_scale: float = field(default=5.0, metadata={"help": "Multiplies the attention's usual head_dim^-0.5."})
    stem_norm: str = field(
        default="batch", metadata={"help": "Norm of the projectors' stems.", "choices": list(STEM_NORMS)}
    )
    learned_last_queries: bool = field(
        default=False, metadata={"help": "Learned queries at the last stage instead of teacher-made ones."}
    )
    teacher_last_blocks: int = field(
        default=2, metadata={"help": "Blocks that count as the last stage of a plain ViT teacher."}
    )
    task_loss: str = field(
        default="cross_entropy", metadata={"help": "The student's own loss.", "choices": list(TASK_LOSSES)}
    )

    # Images
    image_column: str = field(default="image", metadata={"help": "Column of the data set that holds the images."})
    label_column: str = field(default="label", metadata={"help": "Column that holds the class indices."})
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the student's images in pixels. By default the student's own."}
    )
    teacher_image_size: int | None = field(
        default=None, metadata={"help": "Side of the teacher's images in pixels. By default its own."}
    )
    crop_scale: list[float] = field(
        default_factory=lambda: [0.08, 1.0],
        metadata={"help": "Range of the share of the area that a random crop keeps in training."},
    )
    hflip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip in training."})
    crop_pct: float | None = field(
        default=None, metadata={"help": "Centre crop over the shorter side in evaluation. By default the student's."}
    )
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "Images that a stream's shuffle buffer holds; shards are shuffled, too."}
    )

    # Run
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the run that `output_dir` holds when training starts."}
    )

    # Other defaults than the parent's
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: images are transformed on the fly."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every trained parameter has a gradient; the search costs time."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must stay off: it hides a loss that is not finite, and synchronises."}
    )
    logging_steps: float = field(
        default=50, metadata={"help": "Log every so many steps; below 1, a share of all training steps."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if str(self.resume_from_checkpoint).lower() in ("true", "false"):  # the parent's field knows paths only
            self.resume_from_checkpoint = str(self.resume_from_checkpoint).lower() == "true" or None  # type: ignore[assignment]
        for name in ("learning_rate", "weight_decay", "spatial_weight", "frequency_weight", "last_frequency_weight"):
            self._check(name, "must not be negative", lambda value: value >= 0)
        for name in ("logit_weight", "label_smoothing_factor", "hflip"):
            self._check(name, "must be between 0 and 1", lambda value: 0 <= value <= 1)
        for name in ("temperature", "softmax_scale"):
            self._check(name, "must be positive", lambda value: value > 0)
        sizes = ("penultimate_num_heads", "last_num_heads", "image_size", "teacher_image_size")
        for name in (*sizes, "teacher_last_blocks", "shuffle_buffer_size"):
            self._check(name, "must be at least 1", lambda value: value >= 1)
        self._check("crop_pct", "must be above 0 and at most 1", lambda value: 0 < value <= 1)
        self._check(
            "crop_scale",
            "must be two shares of the area, 0 < smallest <= largest <= 1",
            lambda value: len(value) == 2 and 0 < value[0] <= value[1] <= 1,
        )
        self._check("stem_norm", f"must be one of {STEM_NORMS}", lambda value: value in STEM_NORMS)
        self._check("task_loss", f"must be one of {TASK_LOSSES}", lambda value: value in TASK_LOSSES)
        for name in ("remove_unused_columns", "logging_nan_inf_filter"):
            self._check(name, f"must be False: {type(self).__dataclass_fields__[name].metadata['help']}", _is_off)

    def _check(self, name: str, requirement: str, holds: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if value is None:
            return
        try:
            valid = holds(value)
        except TypeError as error:
            raise ValueError(f"`{name}` {requirement}, got {value!r} ({type(value).__name__}).") from error
        if not valid:
            raise ValueError(f"`{name}` {requirement}, got {value!r}.")


def _is_off(value: bool) -> bool:
    return not value
