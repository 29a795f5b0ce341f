"""What the trainer trains: student, teacher and heads as one model, made from settings."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..images import PLAIN_FILTERS, ImageSpec
from ..method.distiller import Distiller, feature_weights
from ..method.heads import LinearHeads, MimickingHeads
from ..models.students import Student, load_student
from ..models.teachers import Teacher, is_own, load_teacher
from .backbones import logit_weight_of
from .config import ScaleKDConfig
from .config_checks import departures


__all__ = [
    "ScaleKDModel",
    "ScaleKDOutput",
    "asked_images",
    "attention_heads",
    "batch_of_one_explained",
    "build_model",
    "class_names",
]

logger = logging.getLogger(__name__)

PUBLISHED_HEADS = (16, 24)  # Swin-L: penultimate and last projectors


@dataclass
class ScaleKDOutput(ModelOutput):
    """Output of `ScaleKDModel`.

    Attributes:
        loss: the weighted sum, a scalar; None in eval mode without labels, but for a backbone.
        logits: the student's, (B, K); of a backbone its features, (B, C).
        losses: in training mode the unweighted terms by the names in `ALL_TERMS`, those that are in use.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    losses: dict[str, Tensor] | None = None


class ScaleKDModel(Distiller):
    """A `Distiller` as `Trainer` knows models. Arguments are those of `Distiller`.

    Attributes:
        autocast_to: the precision that its forward casts to by itself, under DeepSpeed and FSDP; None elsewhere.
    """

    main_input_name = "pixel_values"
    accepts_loss_kwargs = False
    _keys_to_ignore_on_save = None
    autocast_to: torch.dtype | None = None

    @property
    def config(self) -> Any:
        """The student's transformers configuration; None for a timm student."""
        return getattr(self.student.model, "config", None)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ScaleKDOutput:
        """See `Distiller.forward`."""
        if self.autocast_to is None:
            loss, logits, losses = super().forward(pixel_values, labels)
        else:
            with torch.autocast(pixel_values.device.type, self.autocast_to):
                loss, logits, losses = super().forward(pixel_values, labels)
        return ScaleKDOutput(loss=loss, logits=logits, losses=losses or None)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Compute the student's activations again in the backward pass instead of keeping them; called by the Trainer."""
        if every_n_layers != 1 or offload:
            raise ValueError(
                "`activation_checkpointing_kwargs` of a student know neither `every_n_layers` nor `offload`."
            )
        self.student.checkpoint_activations(activation_checkpointing_kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The same, by its former name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def synchronise_batchnorms(self, which: str) -> None:
        """Make the BatchNorms of the "student", or of "all" that trains, synchronised ones."""
        if which in ("student", "all"):
            self.student.synchronise_batchnorms()
        if which == "all" and self.heads is not None:
            convert_sync_batchnorm(self.heads)


def build_model(
    student: str | nn.Module | Student,
    teacher: str | nn.Module | Teacher | None,
    args: ScaleKDConfig,
    labels: list[str] | None = None,
    shown: list[str] | None = None,
) -> ScaleKDModel:
    """Student, teacher and heads as the settings describe them.

    Args:
        student, teacher, args: see `ScaleKDTrainer`.
        labels: class names of the data set, for a student that is built by name; without them the teacher's.
        shown: without these, too, what the data set shows.

    Raises:
        ValueError: models that do not fit each other, or settings that do not fit them.
    """
    if teacher is not None:
        teacher = _build_teacher(teacher, args)
        labels = labels or class_names(teacher)
    student = _build_student(student, teacher, args, labels or shown)
    if args.load_best_model_at_end and not args.has_labels and student.num_labels:
        raise ValueError("`load_best_model_at_end` needs labels to tell the best: `label_column` is 'none'.")
    settings: dict[str, Any] = {"task_loss": args.task_loss, "label_smoothing": args.label_smoothing_factor}
    if teacher is not None:
        settings |= {
            "spatial_weight": args.spatial_weight,
            "frequency_weight": args.frequency_weight,
            "last_frequency_weight": args.last_frequency_weight,
            "teacher_perception": args.teacher_perception,
            "logit_weight": logit_weight_of(args, student, teacher),
            "temperature": args.temperature,
            "logit_loss": args.logit_loss,
            "projector": args.projector,
        }
    heads = _build_heads(student, teacher, args) if teacher is not None else None
    for departure in departures(args) if teacher is not None else ():
        logger.warning("%s", departure)
    model = ScaleKDModel(student, teacher, heads, **settings)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    return model


def _build_teacher(teacher: str | nn.Module | Teacher, args: ScaleKDConfig) -> Teacher:
    takes_size = isinstance(teacher, str) or is_own(teacher)
    options: dict[str, Any] = {"image_size": args.teacher_image_size} if takes_size else {}
    options |= {
        "last_blocks": args.teacher_last_blocks,
        "drop_path": args.teacher_drop_path,
        "taps": args.teacher_taps,
    }
    loaded = load_teacher(teacher, **options)
    if not isinstance(teacher, str):
        _check_built_size("teacher_image_size", args.teacher_image_size, loaded)
    return loaded


def _build_student(
    student: str | nn.Module | Student, teacher: Teacher | None, args: ScaleKDConfig, labels: list[str] | None
) -> Student:
    options: dict[str, Any] = {"labels": labels, "image_size": args.image_size} if isinstance(student, str) else {}
    student = load_student(student, **options)
    frozen = {id(parameter) for parameter in teacher.parameters()} if teacher is not None else set()
    if shared := [name for name, parameter in student.named_parameters() if id(parameter) in frozen]:
        raise ValueError(
            f"`student` {student.name!r} and `teacher` {getattr(teacher, 'name', '')!r} share {len(shared)} parameters, which are frozen "
            "in the teacher. Give each a module of its own."
        )
    if "taps" in vars(student):
        _check_built_size("image_size", args.image_size, student)
    student.spec = asked_images(student, args)
    if args.student_taps:
        if "taps" in vars(student) and [tap.module for tap in student.taps] != list(args.student_taps):
            raise ValueError(
                f"`student_taps` are {args.student_taps}, but the student is tapped already at "
                f"{[tap.module for tap in student.taps]}. Give them to `load_student` as `taps`."
            )
        student.tap_names = (args.student_taps[0], args.student_taps[1])
    if unused := student.freeze_unused():
        output = "No logit depends" if student.num_labels else "The last map does not depend"
        logger.info("%s on %s of the student: frozen.", output, unused)
    return student


@contextmanager
def batch_of_one_explained(images: int) -> Iterator[None]:
    """Inside, what torch says of a BatchNorm that gets a single value is said by the setting.

    Raises:
        ValueError: a batch of one image, and a map of one cell.
    """
    try:
        yield
    except ValueError as error:
        if images > 1 or "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            "`per_device_train_batch_size` is 1, but a BatchNorm gets a map of a single cell, and one value has no variance. Take at "
            "least 2 images, or a larger `image_size`; accumulating gradients does not help."
        ) from error


def asked_images(student: Student, args: ScaleKDConfig) -> ImageSpec:
    """The student's images as the settings ask for them.

    Raises:
        ValueError: a filter that resizes with antialiasing alone.
    """
    resizing = {"interpolation": args.interpolation, "antialias": args.antialias}
    spec = student.spec.updated(size=args.image_size, crop_pct=args.crop_pct, **resizing)
    if not spec.antialias and spec.interpolation not in PLAIN_FILTERS:
        raise ValueError(
            f"`antialias` is false, which `interpolation` {spec.interpolation!r} cannot be: only {' and '.join(PLAIN_FILTERS)} "
            "can. Choose one of them, or leave `antialias` out."
        )
    return spec if spec.antialias else spec.updated(crop_mode="center")  # timm's other ways are antialiased


def _check_built_size(option: str, asked: int | None, model: Any) -> None:
    size = getattr(getattr(model, "spec", None), "size", None)
    if asked is not None and size != (asked, asked):
        raise ValueError(
            f"`{option}` is {asked}, but the model is a {type(model).__name__} that was made for "
            f"{f'{size[0]}x{size[1]} px' if size else 'a size of its own'}. Give its name, or leave `{option}` out."
        )


def _build_heads(student: Student, teacher: Teacher, args: ScaleKDConfig) -> MimickingHeads | LinearHeads | None:
    if args.projector == "linear":
        return LinearHeads(student.dims[1], teacher.dim, teacher.grid)
    weights = (args.spatial_weight, args.frequency_weight, args.last_frequency_weight)
    terms = tuple(feature_weights(*weights, args.teacher_perception))
    if not terms:
        return None
    return MimickingHeads(
        student.dims,
        student.grids,
        (teacher.penultimate_dim, teacher.dim),
        (teacher.penultimate_grid, teacher.grid),
        attention_heads(teacher, args),
        softmax_scale=args.softmax_scale,
        stem_norm=args.stem_norm,
        penultimate_norm=args.penultimate_norm,
        learned_last_queries=args.learned_last_queries or not args.teacher_perception,
        remove_direct_component=args.remove_direct_component,
        stem=args.stem,
        terms=terms,
    )


def class_names(teacher: Teacher | None) -> list[str] | None:
    """The teacher's class names, numbers where it has no names; None without a head or a teacher."""
    if teacher is None:
        return None
    return teacher.labels or [str(index) for index in range(teacher.num_labels)] or None


def attention_heads(teacher: Teacher, args: ScaleKDConfig) -> tuple[int, int]:
    """Heads of the penultimate and the last projectors: as asked, else the largest divisors up to those of Swin-L."""
    return (
        args.penultimate_num_heads or _largest_divisor(teacher.penultimate_dim, PUBLISHED_HEADS[0]),
        args.last_num_heads or _largest_divisor(teacher.dim, PUBLISHED_HEADS[1]),
    )


def _largest_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)
