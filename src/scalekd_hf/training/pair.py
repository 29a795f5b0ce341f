"""From the settings to student, teacher and heads."""

from __future__ import annotations

import logging
from typing import Any

from timm.layers import convert_sync_batchnorm
from torch import nn

from ..method.distiller import ScaleKDModel, feature_weights
from ..method.heads import MimickingHeads
from ..models.students import Student, load_student
from ..models.teachers import Teacher, load_teacher
from .config import ScaleKDConfig


__all__ = ["build_model", "class_names", "convert_batchnorms", "num_heads"]

logger = logging.getLogger(__name__)

PUBLISHED_HEADS = (16, 24)  # Swin-L: penultimate and last projectors


def build_model(
    student: str | nn.Module | Student,
    teacher: str | nn.Module | Teacher | None,
    args: ScaleKDConfig,
    labels: list[str] | None = None,
) -> ScaleKDModel:
    """Student, teacher and heads as the settings describe them.

    Args:
        student, teacher, args: see `ScaleKDTrainer`.
        labels: class names of the data set, for a student that is built by name; without them the teacher's.
    """
    if teacher is not None:
        if not isinstance(teacher, str):
            _check_built_size("teacher_image_size", args.teacher_image_size, teacher)
        size: dict[str, Any] = {"image_size": args.teacher_image_size} if isinstance(teacher, str) else {}
        teacher = load_teacher(teacher, last_blocks=args.teacher_last_blocks, drop_path=args.teacher_drop_path, **size)
        labels = labels or class_names(teacher)
    options: dict[str, Any] = {"labels": labels, "image_size": args.image_size} if isinstance(student, str) else {}
    student = load_student(student, **options)
    if "taps" in vars(student):
        _check_built_size("image_size", args.image_size, student)
    student.spec = student.spec.updated(size=args.image_size, crop_pct=args.crop_pct)
    if args.student_taps:
        if "taps" in vars(student) and [tap.module for tap in student.taps] != list(args.student_taps):
            raise ValueError(
                f"`student_taps` are {args.student_taps}, but the student is tapped already at "
                f"{[tap.module for tap in student.taps]}. Give them to `load_student` as `taps`."
            )
        student.tap_names = (args.student_taps[0], args.student_taps[1])
    if unused := student.freeze_unused():
        logger.info("No logit depends on %s of the student: frozen.", unused)
    settings: dict[str, Any] = {"task_loss": args.task_loss, "label_smoothing": args.label_smoothing_factor}
    if teacher is None:
        return ScaleKDModel(student, **settings)
    return ScaleKDModel(
        student,
        teacher,
        _build_heads(student, teacher, args),
        spatial_weight=args.spatial_weight,
        frequency_weight=args.frequency_weight,
        last_frequency_weight=args.last_frequency_weight,
        teacher_perception=args.teacher_perception,
        logit_weight=args.logit_weight,
        temperature=args.temperature,
        **settings,
    )


def _check_built_size(option: str, asked: int | None, model: Any) -> None:
    size = getattr(getattr(model, "spec", None), "size", None)
    if asked is not None and size != (asked, asked):
        raise ValueError(
            f"`{option}` is {asked}, but the model is a {type(model).__name__} that was made for "
            f"{f'{size[0]}x{size[1]} px' if size else 'a size of its own'}. Give its name, or leave `{option}` out."
        )


def _build_heads(student: Student, teacher: Teacher, args: ScaleKDConfig) -> MimickingHeads | None:
    weights = (args.spatial_weight, args.frequency_weight, args.last_frequency_weight)
    terms = tuple(feature_weights(*weights, args.teacher_perception))
    if not terms:
        return None
    return MimickingHeads(
        student.dims,
        student.grids,
        (teacher.penultimate_dim, teacher.dim),
        (teacher.penultimate_grid, teacher.grid),
        num_heads(teacher, args),
        softmax_scale=args.softmax_scale,
        stem_norm=args.stem_norm,
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


def num_heads(teacher: Teacher, args: ScaleKDConfig) -> tuple[int, int]:
    """Heads of the penultimate and the last projectors: as asked, else the largest divisors up to those of Swin-L."""
    return (
        args.penultimate_num_heads or _largest_divisor(teacher.penultimate_dim, PUBLISHED_HEADS[0]),
        args.last_num_heads or _largest_divisor(teacher.dim, PUBLISHED_HEADS[1]),
    )


def _largest_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)


def convert_batchnorms(distiller: ScaleKDModel, which: str) -> None:
    """Make the BatchNorms of the "student", or of "all" that trains, synchronised ones."""
    for name, module in distiller.trained_modules():
        if which in (name, "all"):
            convert_sync_batchnorm(module)  # timm's: it keeps activations that sit in its norms
