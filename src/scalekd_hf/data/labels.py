"""The one door through which labels come in: a label of the data means the same class to the model."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..images import IGNORED_LABEL


__all__ = [
    "LabelError",
    "check_batch",
    "class_order",
    "class_places",
    "read_class_names",
    "read_label",
    "some",
    "unshared",
]

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
            f"{unshared(names, model_names)} {remedy}"
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
        f"`{name}` has other classes than the model: the same label must mean the same to both.{unshared(names, model_names)} "
        f"{remedy}"
    )


def unshared(names: Sequence[str], model_names: Sequence[str] | None, model: str = "The model") -> str:
    """The names that one side alone has, in words."""
    if model_names is None:
        return ""
    words = []
    for side, those, others in (("The data", names, model_names), (model, model_names, names)):
        known = set(others)
        alone = [label for label in those if label not in known]
        if alone:
            words.append(f" {side} alone has {some(alone)}.")
    return "".join(words)


def some(names: Sequence[str]) -> str:
    """The first few of the names, in words."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(map(repr, names[:SHOWN]))}{more}"


def class_places(names: Sequence[str]) -> dict[str, int | None]:
    """The class that each name means; None for a name that several classes have."""
    number = Counter(names)
    return {name: place if number[name] == 1 else None for place, name in enumerate(names)}


def read_class_names(value: Any, num_classes: int | None = None) -> list[str] | None:
    """The names of the classes that the setting `class_names` states, in the order of their indices.

    Args:
        value: a list of names, JSON for one, the path of a text file (UTF-8) with one name a line, or None.
        num_classes: that is stated beside it.

    Returns:
        The names; None where none are stated.

    Raises:
        ValueError: a file that cannot be read, names that are not text, empty or there twice, or another number of them.
    """
    if value is None:
        return None
    names = _names_in(value) if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not names:
        raise ValueError(
            f"`class_names` is {value!r}, which lists no names. Give a list, or a file with one name a line."
        )
    for place, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(
                f"`class_names` has {name!r} as class {place}: a name is a text and not empty. In YAML, put it in quotes."
            )
    twice = next((name for name, place in class_places(names).items() if place is None), None)
    if twice is not None:
        places = [place for place, name in enumerate(names) if name == twice]
        raise ValueError(
            f"`class_names` has {twice!r} as classes {places[0]} and {places[1]}: a label of that name would mean two. Give each "
            "class a name of its own."
        )
    if num_classes not in (None, len(names)):
        raise ValueError(
            f"`num_classes` is {num_classes}, but `class_names` has {len(names)} names. Leave `num_classes` out, or mend the list."
        )
    return list(names)


def _names_in(value: str) -> Any:
    """What is listed in JSON, or in a file of the name."""
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"`class_names` {value!r} is no list in JSON ({error}).") from error
    try:
        return [line.strip() for line in Path(value).read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"`class_names` {value!r} cannot be read as a text file in UTF-8 with one name a line: {error}. Give the path of one, "
            "or the names as a list."
        ) from error


class LabelError(ValueError):
    """A label that means no class of the model."""


def read_label(
    label: Any, column: str, row: Any, num_labels: int, training: bool, places: dict[str, int | None] | None = None
) -> Any:
    """A row's label as samples have it: a class index, or the shares of all classes.

    Args:
        label: as the data set has it.
        column, row: that errors name.
        num_labels: classes of the model.
        training: every image needs a label; in an evaluation, -1 and None mean that it has none.
        places: the model's classes by name, for labels that are names, see `class_places`.

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
                f"{where}: class indices are needed, not names, for the model names no classes. Name them, in their order: with "
                "the setting `class_names`, or in Python with `load_student(name, labels=names)`."
            )
        label = label if label in places else label.strip()  # text files end in a line break
        if label not in places:
            raise LabelError(
                f"{where}, which is no class of the model: {some(list(places))}. A new student's classes are named by `class_names`."
            )
        if places[label] is None:
            raise LabelError(f"{where}, which several of the model's classes are called. Give class indices instead.")
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
    if isinstance(label, dict):
        key = next(iter(label), "label")
        raise LabelError(
            f"{where}, in which one entry may be the label. Take it out: `dataset.map(lambda row: {{'label': row[{column!r}][{key!r}]}})`."
        )
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
