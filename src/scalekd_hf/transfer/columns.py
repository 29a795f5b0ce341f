"""Columns of masks and of objects in data sets that others have laid out: which they are, and whether they are what is said."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import datasets
import numpy as np
import pyarrow.compute

from ..data.decoding import BadImageError, open_image, to_rgb
from ..data.labels import some
from .preparation import BOX_FORMATS
from .targets import IGNORED_PIXEL, OVERHANG, corners, field_of, overhang, values_of


__all__ = [
    "OBJECTS",
    "MASKS",
    "check_masks",
    "check_objects",
    "check_categories",
    "check_values",
    "fitting_format",
    "label_column_of",
    "names_of_objects",
    "with_objects",
]

logger = logging.getLogger(__name__)

OBJECTS = ("objects",)
MASKS = ("annotation", "mask", "label", "labels", "semantic_mask")
LOOKED_AT = 64  # rows, to see whether boxes fit their form


def label_column_of(dataset: Any, image_column: str, label_column: str | None, usual: tuple[str, ...]) -> str:
    """The column of masks or of objects: the one that is stated, or the first with a usual name.

    Raises:
        ValueError: there is none, or no such column of images.
    """
    columns = list(dataset.features or next(iter(dataset), {}))
    chosen = label_column or next((name for name in usual if name in columns), None)
    for argument, column in (("image_column", image_column), ("label_column", chosen)):
        if column not in columns:
            raise ValueError(
                f"`{argument}` is {column!r}, but the columns of the data set are {columns}. Set it to one of them."
            )
    return str(chosen)


def names_of_objects(dataset: Any, label_column: str) -> list[str] | None:
    """The names of the categories in a column of objects, where the data set has them."""
    feature: Any = (getattr(dataset, "features", None) or {}).get(label_column)
    fields = _within_lists(feature)
    key = field_of(fields, "category") if isinstance(fields, dict) else None
    category = _within_lists(fields[key]) if key is not None else None
    return list(category.names) if isinstance(category, datasets.ClassLabel) else None


def _within_lists(feature: Any) -> Any:
    while hasattr(feature, "feature"):
        feature = feature.feature
    return feature


def _first_rows(dataset: Any, image_column: str, label_column: str) -> list[dict[str, Any]]:
    rows = dataset.select_columns([image_column, label_column])
    if rows.features:
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    return list(itertools.islice(rows, LOOKED_AT))


def fitting_format(dataset: Any, image_column: str, label_column: str, box_format: str | None) -> str:
    """The form of the boxes that is stated.

    Raises:
        ValueError: none is, or the first rows fit the other one better.
    """
    misfits = dict.fromkeys(BOX_FORMATS, 0)
    boxes = 0
    for row in _first_rows(dataset, image_column, label_column):
        try:
            image = to_rgb(open_image(row[image_column]))
            for name in BOX_FORMATS:
                found = corners(row[label_column], name)
                boxes += len(found) * (name == BOX_FORMATS[0])
                flat = (found[:, 2:] <= found[:, :2]).any(1)
                misfits[name] += int((flat | (overhang(found, (image.height, image.width)) > OVERHANG)).sum())
        except BadImageError:
            continue  # it is left out later, and counted
    told = ", ".join(f"{misfits[name]} as {name!r}" for name in BOX_FORMATS)
    if box_format is None:
        check = f"Of the first {boxes} boxes, {told} have no area or reach beyond their image."
        raise ValueError(
            f"`box_format` is not set, and a column of objects does not say what its boxes are. {check} Set it."
        )
    if misfits[box_format] > min(misfits.values()):
        raise ValueError(
            f"`box_format` is {box_format!r}, but of the first {boxes} boxes, {told} have no area or reach beyond their image. Set it "
            "to the other one."
        )
    return box_format


def check_masks(dataset: Any, image_column: str, label_column: str) -> None:
    """Refuse objects of which none of the first has a mask.

    Raises:
        ValueError: with the fields that they have.
    """
    first = [row[label_column] for row in _first_rows(dataset, image_column, label_column)]
    fields = [value if isinstance(value, dict) else value[0] for value in first if value]
    if fields and not any(field_of(entry, "segmentation") for entry in fields):
        raise ValueError(
            f"`label_column` {label_column!r} has boxes without a segmentation ({some(list(fields[0]))}), and the head learns masks. "
            "Choose a head without."
        )


def check_categories(dataset: Any, image_column: str, label_column: str, num_classes: int) -> None:
    """Refuse objects whose categories are counted from 1: each would be taken for the next. The first rows are looked at.

    Raises:
        ValueError: an object is of category `num_classes`, and none of 0.
    """
    seen: set[int] = set()
    for row in _first_rows(dataset, image_column, label_column):
        value = row[label_column]
        for fields in value if isinstance(value, list) else [value]:
            key = field_of(fields, "category") if isinstance(fields, dict) else None
            found = fields[key] if key is not None else None
            seen |= {one for one in (found if isinstance(found, list) else [found]) if isinstance(one, int)}
    if num_classes in seen and 0 not in seen:
        raise ValueError(
            f"The first objects have categories up to {num_classes}, and none is 0, but the {num_classes} classes are 0 to "
            f"{num_classes - 1}: each would be taken for the next one. Store the categories from 0 on, or their names, or put a name that no "
            "object has first in `class_names`."
        )


def check_values(dataset: Any, label_column: str, num_classes: int, zero_is_ignored: bool) -> None:
    """Refuse masks whose only object is 255, which means no class, or whose classes are counted from 1: the first of them are
    looked at.

    Raises:
        ValueError: of several classes one occurs, and 255; or `num_classes` occurs, and not 0, which is not ignored.
    """
    rows = dataset.select_columns([label_column])
    rows = rows.cast_column(label_column, datasets.Image(decode=False)) if rows.features else rows
    seen: set[int] = set()
    for row in itertools.islice(rows, LOOKED_AT):
        try:
            seen |= set(np.unique(values_of(row[label_column])).tolist())
        except BadImageError:
            continue  # it is left out later, and counted
    if not zero_is_ignored and num_classes in seen - {IGNORED_PIXEL} and 0 not in seen:
        raise ValueError(
            f"The first masks have values up to {num_classes}, and none is 0, but the {num_classes} classes are 0 to {num_classes - 1}: each would "
            "be taken for the next one. Set `zero_is_ignored`, with which the first class is 1."
        )
    if num_classes > 1 and IGNORED_PIXEL in seen and len(seen) == 2:
        (other,) = seen - {IGNORED_PIXEL}
        raise ValueError(
            f"The first masks have the values {other} and {IGNORED_PIXEL} alone, and {IGNORED_PIXEL} means that a pixel does not count: nothing but "
            f"class {other} would be learned. Where {IGNORED_PIXEL} is an object, store it as the index of its class, such as 1."
        )


def check_objects(dataset: Any, label_column: str) -> None:
    """Refuse evaluation data without one object, where they are no stream: nothing could be measured.

    Raises:
        ValueError: there is none.
    """
    if isinstance(dataset, datasets.Dataset) and not _object_counts(dataset, label_column).any():
        raise ValueError(
            f"Not one of the {len(dataset)} evaluation images has an object. Check the annotations, or set `eval_split` to none."
        )


def with_objects(dataset: Any, label_column: str) -> Any:
    """The training data without images that have no object, where they are no stream.

    Raises:
        ValueError: there is not one object.
    """
    if not isinstance(dataset, datasets.Dataset):
        logger.warning("Training images without objects stay in a stream, as images of nothing.")
        return dataset
    counts = _object_counts(dataset, label_column)
    kept = np.flatnonzero(counts)
    if not len(kept):
        raise ValueError(f"Not one of the {len(counts)} training images has an object. Check the annotations.")
    if len(kept) < len(counts):
        logger.warning(
            "%d of %d training images have no objects and are left out.", len(counts) - len(kept), len(counts)
        )
        return dataset.select(kept)
    return dataset


def _object_counts(dataset: datasets.Dataset, column: str) -> np.ndarray:
    """Objects of each row."""
    counts = []
    for batch in dataset.select_columns([column]).with_format("arrow").iter(1000):
        values = batch.column(column).combine_chunks()
        if isinstance(values.type, pyarrow.StructType):
            name = field_of([part.name for part in values.type], "bbox")
            values = pyarrow.compute.struct_field(values, name)
        counts.append(pyarrow.compute.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False))
    return np.concatenate(counts)
