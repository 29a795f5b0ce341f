"""The losses of ScaleKD, unweighted, as pure functions (arXiv 2411.06786, sections 3.2 and 3.4), and one to compare with.

All are computed in float32 (float64 stays), also under autocast: unit vectors and sums over hundreds of tokens
lose too much in half precision.

Shapes in this file: B images, N = H*W tokens, D channels, K classes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import counted


__all__ = [
    "LOGIT_LOSSES",
    "TASK_LOSSES",
    "counted_in_loss",
    "frequency_mimicking_loss",
    "logit_distillation_loss",
    "mimicking_loss",
    "mimicking_target",
    "relational_logit_loss",
    "spatial_mimicking_loss",
    "task_loss",
    "unit_tokens",
]

TASK_LOSSES = ("cross_entropy", "binary_cross_entropy")
LOGIT_LOSSES = ("kl", "dist")
SMALL = 1e-8  # under the fraction of a correlation, as in the code of DIST's authors


def _at_least_float32(*tensors: Tensor) -> tuple[AbstractContextManager, list[Tensor]]:
    device = tensors[0].device.type
    context = (
        nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
    )  # which a plan's does not have
    return context, [tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors]


def unit_tokens(tokens: Tensor, remove_direct_component: bool) -> Tensor:
    """Tokens (B, N, D) as unit vectors in float32, as a view sees them: the frequency view without its direct component."""
    context, (tokens,) = _at_least_float32(tokens)
    with context:
        if remove_direct_component:
            tokens = tokens - tokens.mean(1, keepdim=True)
        return F.normalize(tokens, dim=-1)


def mimicking_target(teacher_map: Tensor, remove_direct_component: bool) -> Tensor:
    """The teacher's side of a view, for `mimicking_loss`; every loss of the view may share it.

    Args:
        teacher_map: (B, D, H, W), the teacher's last map.
        remove_direct_component: in the frequency view, see `frequency_mimicking_loss`.

    Returns:
        (B, H*W, D) unit vectors in float32.
    """
    return unit_tokens(teacher_map.flatten(2).transpose(1, 2), remove_direct_component)


def mimicking_loss(tokens: Tensor, target: Tensor, remove_direct_component: bool) -> Tensor:
    """1/B · Σ ||p/||p|| − t/||t|| ||², a sum over tokens and channels, a mean over images only (section 3.2).

    Args:
        tokens: (B, N, D), the projected student tokens.
        target: (B, N, D), the unit vectors of `mimicking_target`.
        remove_direct_component: as for the target.

    Returns:
        A float32 scalar in [0, 4 * N].

    Raises:
        ValueError: tokens of another shape than the target's.
    """
    if tokens.shape != target.shape:
        raise ValueError(
            f"`tokens` must be (B, H*W, D) = {tuple(target.shape)} as the teacher's last map is, got "
            f"{tuple(tokens.shape)}."
        )
    context, (target,) = _at_least_float32(target)
    with context:
        return (unit_tokens(tokens, remove_direct_component) - target).square().sum() / tokens.shape[0]


def spatial_mimicking_loss(tokens: Tensor, teacher_map: Tensor) -> Tensor:
    """Distance of unit vectors, token by token (section 3.2, the original view).

    Args:
        tokens: (B, H*W, D), the projected student tokens.
        teacher_map: (B, D, H, W), the teacher's last map.

    Returns:
        A float32 scalar in [0, 4 * H * W]: a sum over tokens, a mean over images.
    """
    return mimicking_loss(tokens, mimicking_target(teacher_map, False), False)


def frequency_mimicking_loss(tokens: Tensor, teacher_map: Tensor) -> Tensor:
    """The same distance after each channel's direct component is removed (section 3.2, the second view).

    The paper transforms the grid with a 2-D DCT-II, sets coefficient [0, 0] of every channel to zero
    and transforms back. The basis function of that coefficient is constant and the DCT is orthonormal,
    so this is exactly the subtraction of the channel's mean over the grid; no transform is needed.

    Args and returns are those of `spatial_mimicking_loss`.
    """
    return mimicking_loss(tokens, mimicking_target(teacher_map, True), True)


def logit_distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · cross_entropy(softmax(t/T), log_softmax(s/T)), averaged over images (section 3.4).

    The cross-entropy form: the KL divergence plus the teacher's entropy, hence not 0 at equality.

    Args:
        student_logits, teacher_logits: (B, K).
        temperature: T, softens both distributions.
    """
    _check_same_classes(student_logits, teacher_logits)
    context, (student_logits, teacher_logits) = _at_least_float32(student_logits, teacher_logits)
    with context:
        target = F.softmax(teacher_logits / temperature, dim=-1)
        return F.cross_entropy(student_logits / temperature, target) * temperature**2


def relational_logit_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · (mean over images of 1 − r + mean over classes of 1 − r), r the correlation of probabilities: the loss of DIST.

    An image's relations are between its classes; a class's are between the images of the batch that is given, under DDP each
    process's own. Every image counts, with a label or without, as in `logit_distillation_loss`.

    Source: Huang et al., *Knowledge Distillation from A Stronger Teacher*, NeurIPS 2022 (arXiv 2205.10536); the two
    relations weigh the same (its β and γ are 1), and T² as well as the 1e-8 that takes the weight of classes of which both
    say next to nothing are those of its authors' code.

    Args:
        student_logits, teacher_logits: (B, K).
        temperature: T, softens both distributions.

    Returns:
        A float32 scalar in [0, 4 T²], 0 at equality. Of a single image the relations of classes are a constant T².

    Raises:
        ValueError: logits of different shapes.
    """
    _check_same_classes(student_logits, teacher_logits)
    context, logits = _at_least_float32(student_logits, teacher_logits)
    with context:
        student, teacher = (F.softmax(values / temperature, dim=-1) for values in logits)
        of_images, of_classes = correlation(student, teacher), correlation(student.T, teacher.T)
        return (2 - of_images.mean() - of_classes.mean()) * temperature**2


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation, row by row: (R, C) and (R, C) to (R,) in [-1, 1]; 0 of rows that do not vary."""
    first, second = (values - values.mean(1, keepdim=True) for values in (first, second))
    return (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1) + SMALL)


def _check_same_classes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"`student_logits` {tuple(student_logits.shape)} and `teacher_logits` {tuple(teacher_logits.shape)} "
            "must have the same shape: the two models must know the same classes. "
            "With `logit_weight=0` the teacher teaches through its features alone."
        )


def task_loss(logits: Tensor, labels: Tensor, kind: str = "cross_entropy", label_smoothing: float = 0.0) -> Tensor:
    """The student's own loss against the labels.

    Args:
        logits: (B, K).
        labels: (B,) class indices or (B, K) soft labels; -100, or a row of it, where an image does not count. Where none does, the
            loss is 0.
        kind: "cross_entropy", or "binary_cross_entropy" over sigmoids: a sum over classes and a mean
            over images, as the published ResNet-50 runs use it.
        label_smoothing: in [0, 1), the share of the target spread evenly over the classes.
    """
    if kind not in TASK_LOSSES:
        raise ValueError(f"`task_loss` must be one of {TASK_LOSSES}, got {kind!r}.")
    context, (logits,) = _at_least_float32(logits)
    with context:
        counts = counted_in_loss(labels, kind)
        if kind == "cross_entropy" and labels.ndim == 1:
            loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
            return torch.where(counts.any(), loss, 0.0)  # torch divides by their number
        num_classes, images = logits.shape[-1], counts.sum().clamp(min=1)
        target = labels.clamp(min=0)
        target = (F.one_hot(target, num_classes) if labels.ndim == 1 else target).to(logits.dtype)
        if kind == "cross_entropy":
            if label_smoothing:
                target = (target * (1 - label_smoothing) + label_smoothing / num_classes) * counts[:, None]
            return F.cross_entropy(logits, target, reduction="sum") / images
        target = target * (1 - label_smoothing) + label_smoothing / num_classes
        losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
        return (losses * counts).sum() / images


def counted_in_loss(labels: Tensor, kind: str = "cross_entropy") -> Tensor:
    """Over which images (B,) `task_loss` is a mean: not blanks, nor, in cross-entropy, soft labels without any class."""
    if labels.ndim == 1:
        return labels >= 0
    return counted(labels) & labels.any(dim=1) if kind == "cross_entropy" else counted(labels)
