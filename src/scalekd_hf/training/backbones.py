"""Runs of a backbone, a student without a classifier: what it may be trained with, and its evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..images import IGNORED_LABEL
from ..models.students import Student
from ..models.taps import ends_in_one_cell
from .config import ScaleKDConfig


__all__ = ["FEATURES_ALONE", "backbone_prediction", "check_backbone_run", "logit_weight_of", "resolved_logit_weight"]

FEATURES_ALONE = "its loss is the sum of the feature terms; labels and `logit_weight` have no part in it"
PUBLISHED_LOGIT_WEIGHT = 0.5

logger = logging.getLogger(__name__)


def logit_weight_of(args: ScaleKDConfig, student: Student, teacher: Any) -> float:
    """λ as it was given; else 0.5, as published, and 0 where there are no logits to compare, which the log says.

    Raises:
        ValueError: it was given above 0 for a pair without logits.
    """
    has_none = [role for role, model in (("student", student), ("teacher", teacher)) if model and not model.num_labels]
    if not has_none or teacher is None:
        return PUBLISHED_LOGIT_WEIGHT if args.logit_weight is None else args.logit_weight
    if args.logit_weight:
        raise ValueError(
            f"`logit_weight` is {args.logit_weight:g}, but the {' and the '.join(has_none)} has no classifier, and so no logits. Set "
            "it to 0 or leave it out: the features teach alone. recipes/train_teacher.py makes a teacher that knows your labels."
        )
    if student.num_labels and not args.has_labels and args.logit_weight is None:
        raise ValueError(
            f"The teacher has no classifier, and `label_column` is 'none': the classifier of `student` {student.name!r} would learn "
            "nothing. Give labels, or a student without a classifier (`num_classes` 0)."
        )
    if args.logit_weight is None:
        logger.warning("`logit_weight` is 0, for the %s has no classifier.", " and the ".join(has_none))
    return 0.0


def resolved_logit_weight(args: ScaleKDConfig, distiller: Any) -> float:
    """λ of a run that has been built; without a teacher, which knows none, as it was given, or as published."""
    given = PUBLISHED_LOGIT_WEIGHT if args.logit_weight is None else args.logit_weight
    weight: float = distiller.weights.get("logit", given)
    return weight


def check_backbone_run(student: Student, teacher: Any, args: ScaleKDConfig) -> None:
    """Refuse what a student without a classifier cannot be trained with, and say what has no part in its training.

    Raises:
        ValueError: no teacher, a last stage of which the feature terms see nothing, or mixing of images, which would mix labels.
    """
    if teacher is None:
        raise ValueError(
            f"`student` {student.name!r} has no classifier, and `teacher` is None: nothing is left to learn from. Give it a "
            "teacher, or a number of classes."
        )
    if student.tap_names is None and ends_in_one_cell(student):
        raise ValueError(
            f"`student` {student.name!r} ends in a single cell at {student.spec.size[0]}x{student.spec.size[1]} px, which has no "
            "place to compare: without a classifier its last stage would learn nothing. Give larger images with `image_size`."
        )
    for name in ("mixup_alpha", "cutmix_alpha"):
        if value := getattr(args, name):
            raise ValueError(
                f"`{name}` is {value:g}, but the student has no classifier: mixing images is for their labels, of which it "
                "learns nothing. Set it to 0."
            )
    logger.info("The student %r has no classifier: %s.", student.name, FEATURES_ALONE)
    if prefix := student.taps[1].prefix:
        logger.warning(
            "Of the student's tokens the feature terms teach those of patches; %d before them, such as a class token, learn "
            "nothing of their own. Its features are the mean over the patches.",
            prefix,
        )


def backbone_prediction(
    trainer: Any, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, **_: Any
) -> tuple:
    """`prediction_step` of a trainer whose student is a backbone: its loss needs no labels.

    Returns:
        The loss, features (B, C) and labels, as far as there are any and they are asked for.
    """
    blanks = inputs.get("blanks", [])
    inputs = trainer.feed.evaluation_inputs(inputs)
    with torch.no_grad(), trainer.compute_loss_context_manager():
        loss, features, counts = _evaluated(model, inputs["pixel_values"], blanks)
    trainer.feed.add_evaluated(loss, torch.where(counts, 0, IGNORED_LABEL))
    return (loss, None, None) if prediction_loss_only else (loss, features, inputs.get("labels"))


def _evaluated(
    model: Callable[[Tensor], Any], pixel_values: Tensor, blanks: list[int]
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The mean loss and the features of a batch.

    Args:
        model: a `ScaleKDModel` of a backbone in eval mode, however it is wrapped.
        pixel_values: (B, 3, height, width), normalised.
        blanks: places of those that stand for no image.

    Returns:
        The loss over the images, a scalar, None without a teacher; features (B, C) in float32, 0 of blanks; and which are
        images, (B,) booleans.
    """
    counts = torch.ones(len(pixel_values), dtype=torch.bool)
    counts[blanks] = False
    counts = counts.to(pixel_values.device)
    # A batch of blanks alone is run as well: the processes must keep step.
    kept = counts if len(blanks) < len(counts) else torch.ones_like(counts)
    output = model(pixel_values[kept])
    features = pixel_values.new_zeros((len(counts), output.logits.shape[1]), dtype=torch.float32)
    features[kept] = output.logits.float()
    return output.loss, features, counts
