"""The segmenter or the detector that settings describe."""

from __future__ import annotations

from typing import Any

from ..models.students import load_student
from ..tools.recipe import mapping
from .config import TransferArguments, TransferConfig
from .detector import build_detector
from .segmenter import build_segmenter


__all__ = ["build_model"]


def build_model(task: str, arguments: TransferArguments, config: TransferConfig, class_names: list[str]) -> Any:
    """A student with a head on it.

    Args:
        task: "segment" or "detect".
        arguments, config: the settings.
        class_names: of the data.

    Raises:
        ValueError: see `build_segmenter` and `build_detector`.
    """
    options = {
        "image_size": config.image_size,
        "drop_path_rate": arguments.drop_path_rate,
        "pretrained": arguments.backbone_pretrained,
        **mapping(arguments.head_args, "head_args"),
    }
    student: Any = arguments.student
    if given := mapping(arguments.student_args, "student_args"):
        student = load_student(student, pretrained=arguments.backbone_pretrained, **given)
    head = arguments.head_of(task)
    if task == "segment":
        return build_segmenter(student, class_names, **options)
    return build_detector(student, class_names, head=head, **options)
