"""Student, frozen teacher and mimicking heads, from images to one weighted loss.

Source: ScaleKD (arXiv 2411.06786), section 3.4. With λ = `logit_weight`:

    (1 - λ) · task + λ · logit + Σ_v w_v (L_v(P_v, T_l) + L_v(M_v, T_l))

A backbone, a student without a classifier, has the sum over v alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..images import Normaliser
from .heads import FEATURE_TERMS, LINEAR_TERM, LinearHeads, MimickingHeads
from .losses import LOGIT_LOSSES, logit_distillation_loss, relational_logit_loss, task_loss
from .protocols import StudentModel, TeacherModel


__all__ = ["ALL_TERMS", "LOSS_TERMS", "Distiller", "check_labels", "feature_weights"]

LOSS_TERMS = ("task", "logit", *FEATURE_TERMS)
ALL_TERMS = (*LOSS_TERMS, LINEAR_TERM)  # those of plain feature matching, too


def feature_weights(
    spatial_weight: float,
    frequency_weight: float,
    last_frequency_weight: float | None = None,
    teacher_perception: bool = True,
    projector: str = "cross_attention",
) -> dict[str, float]:
    """The weight of each feature term that is not zero; `last_frequency_weight` defaults to `frequency_weight`.

    Without `teacher_perception` the penultimate terms, which pass through the teacher's last stage, are left out. With the
    `projector` "linear" there is one term, `LINEAR_TERM`, of `spatial_weight`.
    """
    if projector == "linear":
        return {LINEAR_TERM: spatial_weight} if spatial_weight else {}
    weights = dict(zip(FEATURE_TERMS, (spatial_weight, frequency_weight) * 2, strict=True))
    if last_frequency_weight is not None:
        weights["last_frequency"] = last_frequency_weight
    used = FEATURE_TERMS if teacher_perception else FEATURE_TERMS[2:]
    return {term: weights[term] for term in used if weights[term]}


class Distiller(nn.Module):
    """Student, teacher and heads in one trainable module, so that DDP, FSDP and DeepSpeed see all that trains.

    The teacher stays frozen and in eval mode (but for stochastic depth, where that was asked for). It moves with the
    module but is no child of it, so that it is in no optimiser, no saved file and no engine's checkpoint, and no wrapper
    broadcasts its buffers. Without a teacher this is the student alone, trained with the task loss: the baseline.
    In eval mode only the student runs; the loss of a backbone takes teacher and heads there, too.

    Args:
        student: the student to train. Of a backbone (`num_labels` 0) the feature terms are the whole loss.
        teacher: the frozen teacher, or None.
        heads: the mimicking heads, needed with a teacher unless all feature weights are zero.
        spatial_weight, frequency_weight: weights of the two views (section 3.4; 0.08 and 0.06 for Swin teachers).
        last_frequency_weight: another weight for the frequency view of the last stage.
        teacher_perception: with the penultimate terms (section 3.3).
        logit_weight: λ. The task loss weighs 1 - λ. 0 for a backbone, which has neither.
        temperature: T of the logit term.
        logit_loss: "kl", the paper's, or "dist", see `relational_logit_loss`.
        projector: "cross_attention", the paper's, or "linear", for `LinearHeads`.
        task_loss: "cross_entropy" or "binary_cross_entropy" over sigmoids.
        label_smoothing: of the task loss, in [0, 1).

    Raises:
        ValueError: an unknown loss, heads that compute other terms than the weights ask for, a teacher of logits with other classes, or a
            backbone that is to learn from logits, or from nothing.
    """

    def __init__(
        self,
        student: StudentModel,
        teacher: TeacherModel | None = None,
        heads: MimickingHeads | LinearHeads | None = None,
        *,
        spatial_weight: float = 0.08,
        frequency_weight: float = 0.06,
        last_frequency_weight: float | None = None,
        teacher_perception: bool = True,
        logit_weight: float = 0.5,
        temperature: float = 1.0,
        logit_loss: str = "kl",
        projector: str = "cross_attention",
        task_loss: str = "cross_entropy",
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.student: Any = student
        self.teacher: Any
        self.__dict__["teacher"] = teacher  # past Module's bookkeeping, so that it is no child
        self.heads = heads
        self.temperature, self.task_loss, self.label_smoothing = temperature, task_loss, label_smoothing
        if logit_loss not in LOGIT_LOSSES:
            raise ValueError(f"`logit_loss` must be one of {LOGIT_LOSSES}, got {logit_loss!r}.")
        self.logit_loss = relational_logit_loss if logit_loss == "dist" else logit_distillation_loss
        self.normaliser = Normaliser(student.spec, teacher.spec if teacher is not None else None)
        self.weights = {"task": float(self.has_classifier)}
        if teacher is not None:
            weights = (spatial_weight, frequency_weight, last_frequency_weight)
            features = feature_weights(*weights, teacher_perception, projector)
            if set(features) != set(heads.terms if heads is not None else ()):
                raise ValueError(
                    f"`heads` compute {heads.terms if heads is not None else 'nothing'}, but the weights ask for "
                    f"{tuple(features)}: build them with `terms=tuple(feature_weights(...))`."
                )
            if not self.has_classifier:
                check_backbone(logit_weight, features)
            self.weights["task"] *= 1.0 - logit_weight
            self.weights |= {"logit": logit_weight, **features}
            if logit_weight:
                check_labels(teacher.num_labels, teacher.labels, student.num_labels, student.labels)
        if heads is not None:
            student.taps  # noqa: B018  taps are found and hooked before any wrapper sees the module

    @property
    def has_classifier(self) -> bool:
        """False of a backbone."""
        return bool(self.student.num_labels)

    def train(self, mode: bool = True) -> Any:
        """See `Module.train`; of the teacher, only stochastic depth follows, where it was asked for."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """The teacher goes where the module goes, and takes its precision; not to the meta device, from which a wrapper
        would not bring it back."""
        super()._apply(fn, recurse)
        if self.teacher is not None and not fn(torch.empty(0)).is_meta:
            self.teacher._apply(fn, recurse)
        return self

    def trained_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The children whose parameters train: student and, with a teacher, heads."""
        yield "student", self.student
        if self.heads is not None:
            yield "heads", self.heads

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        """Compute the weighted loss and its terms in training mode; logits and task loss in eval mode.

        Args:
            pixel_values: (B, 3, height, width), normalised and sized for the student, or as uint8.
            labels: (B,) class indices or (B, K) soft labels. Without them the task term is absent. A backbone takes no heed
                of them.

        Returns:
            The loss, a scalar or in eval mode without labels None; the student's logits (B, K); and, in training mode,
            the unweighted terms by the names in `ALL_TERMS`, those that are in use. Of a backbone with a teacher the loss
            is that of the features in eval mode, too; instead of logits it has pooled features (B, C).

        Raises:
            ValueError: in training mode, neither labels nor a teacher to learn from.
        """
        pixel_values = self.normaliser.for_student(pixel_values)
        losses: dict[str, Tensor] = {}
        if self.teacher is not None and (self.training or not self.has_classifier):
            logits = self._distil(pixel_values, losses)
        else:
            run = self.student.classify if self.has_classifier else self.student.features
            logits = run(pixel_values)
        if labels is not None and self.has_classifier and (self.weights["task"] or not self.training):
            smoothing = self.label_smoothing if self.training else 0.0
            losses["task"] = task_loss(logits, labels, self.task_loss, smoothing)
        if not self.training and self.has_classifier:
            return losses.get("task"), logits, {}
        losses = {term: losses[term] for term in ALL_TERMS if term in losses}
        if not losses and not self.training:
            return None, logits, {}
        if not losses:
            missing = (
                "`labels` are missing" if self.has_classifier else "`teacher` is None, and there is no classifier"
            )
            raise ValueError(f"{missing}: without a teacher there is no other loss than the task's.")
        loss = torch.stack([self.weights[term] * value for term, value in losses.items()]).sum()
        if not self.training:
            return loss, logits, {}
        if "task" not in losses and "logit" not in losses:
            loss = loss + 0.0 * logits.float().sum()  # DDP wants a gradient for the classifier, too
        return loss, logits, losses

    def _distil(self, pixel_values: Tensor, losses: dict[str, Tensor]) -> Tensor:
        teacher_last, teacher_logits = self.teacher(self.normaliser.for_teacher(pixel_values))
        if self.heads is not None:
            penultimate, last, logits = self.student(pixel_values)
            losses |= self.heads(penultimate, last, teacher_last, self.teacher.last_stage)
        else:
            logits = self.student.classify(pixel_values)
        if self.weights["logit"]:
            losses["logit"] = self.logit_loss(logits, teacher_logits, self.temperature)
        return logits


def check_backbone(logit_weight: float, features: dict[str, float]) -> None:
    """Refuse weights that a student without a classifier cannot have.

    Raises:
        ValueError: a logit term, or no feature term.
    """
    if logit_weight:
        raise ValueError(
            f"`logit_weight` is {logit_weight:g}, but the student has no classifier, and so no logits: it learns from the "
            "teacher's features alone. Set it to 0, or give the student a number of classes."
        )
    if not features:
        raise ValueError(
            "`spatial_weight` and `frequency_weight` are 0, but the student has no classifier: the feature terms are all that "
            "it can learn from. Give one of them a weight."
        )


def check_labels(
    num_labels: int, labels: list[str] | None, student_num_labels: int, student_labels: list[str] | None
) -> None:
    """Refuse a teacher whose classes are not the student's.

    Raises:
        ValueError: different numbers of classes, or different names where both are known.
    """
    remedy = (
        "With `logit_weight=0` the teacher teaches through its features alone; recipes/train_teacher.py makes a teacher "
        "that knows your labels."
    )
    if num_labels != student_num_labels:
        raise ValueError(
            f"The teacher has {num_labels} classes and the student {student_num_labels}: the same label must mean the "
            f"same to both. {remedy}"
        )
    if labels and student_labels and labels != student_labels:
        index = next(i for i, (a, b) in enumerate(zip(labels, student_labels, strict=True)) if a != b)
        reordered = " The names are the same in another order." if sorted(labels) == sorted(student_labels) else ""
        raise ValueError(
            f"Label {index} is {labels[index]!r} to the teacher and {student_labels[index]!r} to the student: the same "
            f"label must mean the same to both.{reordered} {remedy}"
        )
