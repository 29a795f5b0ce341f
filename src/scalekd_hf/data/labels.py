"""The one door through which labels come in: a label of the data means the same class to the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..images import IGNORED_LABEL


__all__ = ["LabelError", "check_batch", "class_order", "encoding", "read_label"]

logger = logging.getLogger(__name__)
SHOWN = 5  # names in a message


def class_order(
    name: str, names: Sequence[str] | None, model_names: Sequence[str] | None, num_labels: int
) -> list[int] | None:
    """The model's class for each label of a data set.

    Args:
        name: the argument that errors name.
        names: the data set's class names, in the order of its labels; None where it has none.
        model_names: the model's, or None.
        num_labels: classes of the model.

    Returns:
        A class for each label, or None where they are the same.

    Raises:
        ValueError: other classes than the model's.
    """
    if names is None:
        return None
    remedy = (
        "Evaluate on data with the model's classes, or build the student for these: give its name instead of a module, or a "
        "model with that many classes."
    )
    if model_names is None or len(names) != num_labels:
        if len(names) == num_labels:
            return None
        raise ValueError(
            f"`{name}` has {len(names)} classes and the model {num_labels}: the same label must mean the same to both."
            f"{_unshared(names, model_names)} {remedy}"
        )
    if list(names) == list(model_names):
        return None
    if sorted(names) == sorted(model_names) and len(set(names)) == len(names):
        logger.warning(
            "`%s` has the model's %d classes in another order: its labels are taken by name, so that label 0, %r, is the "
            "model's class %d.",
            name,
            len(names),
            names[0],
            model_names.index(names[0]),
        )
        return [model_names.index(label) for label in names]
    raise ValueError(
        f"`{name}` has other classes than the model: the same label must mean the same to both.{_unshared(names, model_names)} "
        f"{remedy}"
    )


def _unshared(names: Sequence[str], model_names: Sequence[str] | None) -> str:
    """The names that one side alone has, in words."""
    if model_names is None:
        return ""
    words = []
    for side, those, others in (("data", names, model_names), ("model", model_names, names)):
        alone = [label for label in those if label not in set(others)]
        if alone:
            more = f" and {len(alone) - SHOWN} more" if len(alone) > SHOWN else ""
            words.append(f" The {side} alone has {', '.join(map(repr, alone[:SHOWN]))}{more}.")
    return "".join(words)


class LabelError(ValueError):
    """A label that means no class of the model."""


def read_label(
    label: Any, column: str, row: Any, num_labels: int, training: bool, places: dict[str, int] | None = None
) -> Any:
    """A row's label as samples have it: a class index, or the shares of all classes.

    Args:
        label: as the data set has it.
        column, row: that errors name.
        num_labels: classes of the model.
        training: every image needs a label; in an evaluation, -1 and None mean that it has none.
        places: the model's classes by name, for labels that are names.

    Raises:
        LabelError: it is neither.
    """
    shown = f"{label[:SHOWN]}"[:-1] + ", ...]" if isinstance(label, list) and len(label) > SHOWN else repr(label)
    where = f"`label_column` {column!r} has {shown} in row {row}"
    if isinstance(label, (bool, np.bool_, float, np.floating)):
        raise LabelError(
            f"{where}: class indices are whole numbers. Cast the column: `dataset.cast_column({column!r}, "
            'datasets.Value("int64"))`.'
        )
    if isinstance(label, str):  # a name
        if places is None:
            raise LabelError(
                f"{where}: class indices are needed, not names, for the model names no classes. {encoding(column)}"
            )
        if label not in places:
            known = ", ".join(map(repr, list(places)[:SHOWN])) + (", ..." if len(places) > SHOWN else "")
            raise LabelError(f"{where}, which is no class of the model: {known}.")
        return places[label]
    if label is None or isinstance(label, (int, np.integer)):
        if label == IGNORED_LABEL or (not training and (label is None or label == -1)):
            return IGNORED_LABEL
        if label is None or label == -1:
            raise LabelError(
                f"{where}: an image to train on needs a label. Leave such rows out, or all labels with `label_column` none."
            )
        if not 0 <= label < num_labels:
            begin = " Labels that begin at 1 must be one less." if label == num_labels else ""
            raise LabelError(f"{where}, but the model's classes are 0 to {num_labels - 1}.{begin}")
        return label
    check_shares(np.asarray(label)[None], num_labels, where)
    return label


def check_shares(labels: np.ndarray, num_labels: int, where: str) -> None:
    """Refuse soft labels (B, K) that are no shares of the classes; rows of `IGNORED_LABEL` do not count.

    Raises:
        LabelError: one index in a list, lists of indices, or several classes of an image.
    """
    if labels.shape[1:] == (1,) and num_labels > 1:
        raise LabelError(f"{where}: a list with one index. Flatten the column to class indices.")
    if labels.shape[1:] != (num_labels,):
        raise LabelError(
            f"{where}: neither a class index nor a share for each of the {num_labels} classes. Lists of several classes "
            "(multi-label) are not supported."
        )
    counts = (labels != IGNORED_LABEL).all(axis=1)
    if (labels[counts] < 0).any() or (abs(labels[counts].sum(axis=1) - 1) > 0.01).any():
        raise LabelError(
            f"{where}: soft labels are shares of the classes that add up to 1. Several classes of an image (multi-label) "
            "are not supported: the teacher's logits and top-1 are about one."
        )


def check_batch(labels: Tensor, num_labels: int) -> None:
    """Refuse the labels of a batch of finished samples, (B,) or (B, K), before a GPU does.

    Raises:
        LabelError: one that means no class of the model.
    """
    where = "A batch has labels of which one is"
    if labels.ndim == 2:
        return check_shares(labels.numpy(), num_labels, f"{where} {labels[0].tolist()[:SHOWN]}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise LabelError(f"{where} of type {labels.dtype}: class indices are whole numbers.")
    wrong = labels[((labels < 0) | (labels >= num_labels)) & (labels != IGNORED_LABEL)]
    if len(wrong):
        raise LabelError(f"{where} {wrong[0]}, but the model's classes are 0 to {num_labels - 1}.")


def encoding(column: str) -> str:
    """What to do about names in place of indices, in words."""
    return (
        f"`dataset.class_encode_column({column!r})` makes them; of a stream, `dataset.map(lambda row: {{{column!r}: "
        f"names.index(row[{column!r}])}})` with your list of names."
    )
