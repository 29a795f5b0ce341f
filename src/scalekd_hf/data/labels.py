"""The one door through which labels come in: a label of the data means the same class to the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence


__all__ = ["class_order"]

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
