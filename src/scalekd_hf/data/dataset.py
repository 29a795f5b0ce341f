"""From `datasets` objects, map-style or streaming, to prepared images for the trainer."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from ..borrowed.datasets import unshuffled
from .labels import read_label, some, unshared
from .preparation import RowPreparation
from .sources import Shards, Table, distinct_values, retrying
from .stream import ImageStream, prepare_or_blank


__all__ = [
    "ImageDataset",
    "check_dataset",
    "dataset_labels",
    "has_names",
    "is_of_pairs",
    "prepare_dataset",
    "shown_labels",
]

logger = logging.getLogger(__name__)


def dataset_labels(dataset: Any, label_column: str) -> list[str] | None:
    """Class names of a `datasets` object with a `ClassLabel` column, or of pairs as torchvision has them; else None."""
    if is_of_pairs(dataset):
        names = getattr(dataset, "classes", None) or getattr(getattr(dataset, "dataset", None), "classes", None)
        return list(names) if names and all(isinstance(name, str) for name in names) else None
    features = getattr(dataset, "features", None) or {}
    feature = features.get(label_column)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def shown_labels(
    dataset: Any, label_column: str, num_classes: int | None = None, class_names: list[str] | None = None
) -> list[str] | None:
    """Names of the classes of a data set: those that are stated, or its own, else what its labels show.

    Args:
        dataset: a `datasets` object. Labels on disk, and in streams of local Parquet and Arrow files, are looked through:
            integers count up to the highest, names are sorted as text, by code point.
        label_column: of class indices or names.
        num_classes, class_names: that are stated; indices without names are then numbers, up to the one, or named by the other.

    Returns:
        The names; None where nothing tells.

    Raises:
        ValueError: other classes are stated than the data set has.
    """
    names = dataset_labels(dataset, label_column)
    if class_names is not None:
        _check_stated(dataset, label_column, class_names, names)
        return list(class_names)
    if names is None and num_classes is not None and not has_names(dataset, label_column):
        return [str(number) for number in range(num_classes)]
    if names is None:
        names = _looked_through(dataset, label_column)
    if names is not None and num_classes not in (None, len(names)):
        raise ValueError(f"`num_classes` is {num_classes}, but the data set names {len(names)} classes. Leave it out.")
    return names or None


def _looked_through(dataset: Any, label_column: str) -> list[str] | None:
    """The classes that labels without a list of names show."""
    labels = _labels(dataset, label_column)
    if labels is None:
        return None
    if has_names(dataset, label_column):
        logger.info("The labels are names, sorted as text: %d classes.", len(labels))
        return sorted(labels)
    highest = max(labels, default=-1)
    logger.info("The labels have no names; the highest is %d, so that there are %d classes.", highest, highest + 1)
    return [str(number) for number in range(highest + 1)]


def _labels(dataset: Any, label_column: str) -> set[Any] | None:
    """The labels of a data set, names or integers; None where they cannot be known, or are neither."""
    feature = (getattr(dataset, "features", None) or {}).get(label_column)
    is_integer = isinstance(feature, datasets.Value) and "int" in str(feature.dtype)
    if not is_integer and not has_names(dataset, label_column):
        return None
    labels = distinct_values(dataset, label_column)
    if labels is None or not all(isinstance(label, int if is_integer else str) for label in labels):
        return None
    return labels if is_integer else {label.strip() for label in labels}


def _check_stated(dataset: Any, label_column: str, stated: list[str], own: list[str] | None) -> None:
    """Refuse `class_names` that are not those of the data set; warn of those that no image has."""
    labels, known = _labels(dataset, label_column) or set(), set(stated)
    if own is not None and (len(own) != len(stated) or set(own) != known):
        raise ValueError(
            f"`class_names` has {len(stated)} names, and the data set names {len(own)} classes of its own."
            f"{unshared(own, stated, '`class_names`')} Leave it out, or list the same names."
        )
    if has_names(dataset, label_column):
        unknown, unused = sorted(labels - known), sorted(known - labels) if labels else []
        if unknown:
            raise ValueError(
                f"`class_names` has {len(stated)} names, and `label_column` {label_column!r} others: {some(unknown)}. Add them to "
                "the list, or leave out their rows."
            )
    else:
        highest = max(labels, default=-1)
        if highest >= len(stated):
            raise ValueError(
                f"`class_names` has {len(stated)} names, but `label_column` {label_column!r} has labels up to {highest}: label "
                f"{highest} has no name. List {highest + 1} names at least, that of label 0 first."
            )
        unused = [name for place, name in enumerate(stated) if place not in labels] if labels else []
    if unused:
        logger.warning("`class_names` has classes of which there is no image: %s.", some(unused))


def has_names(dataset: Any, label_column: str) -> bool:
    """Whether the labels are names, as strings."""
    return "string" in str(getattr((getattr(dataset, "features", None) or {}).get(label_column), "dtype", ""))


def is_of_pairs(dataset: Any) -> bool:
    """Whether a torch data set gives (image, class index), as those of torchvision do.

    Raises:
        ValueError: its images are tensors already.
    """
    if isinstance(dataset, (datasets.Dataset, datasets.IterableDataset, ImageStream, ImageDataset)):
        return False
    if (
        not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"))
        or isinstance(dataset, dict)
        or not len(dataset)
    ):
        return False
    first = dataset[0]
    if not isinstance(first, (tuple, list)) or len(first) != 2:
        return False
    if isinstance(first[0], torch.Tensor):
        raise ValueError(
            "The data set gives (tensor, label): whether its pixels are normalised, and how, cannot be known. Leave its "
            "`transform` out, so that it gives images, or give samples of `pixel_values`, normalised for the student, and `labels`."
        )
    return True


class Pairs(Table):
    """A torch data set of (image, class index) as a table of two columns."""

    def __init__(self, pairs: Any, columns: list[str]):
        self.pairs, self.columns = pairs, columns
        self._order = ((-1, -1), np.empty(0))

    content = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return dict(zip(self.columns, self.pairs[number], strict=False))


class ImageDataset(Dataset):
    """A map-style `datasets.Dataset` with its preparation, for evaluation; undecodable images are blanks."""

    def __init__(self, table: Table, preparation: RowPreparation, label: Any = 0):
        self.table, self.preparation, self.label = table, preparation, label

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return prepare_or_blank(self.preparation, self.table[number], number, self.label, {})


def check_dataset(dataset: Any, name: str, preparation: RowPreparation, labels_optional: bool = False) -> Any:
    """Look at the first row of a raw data set, whose images then stay as they are stored.

    Args:
        dataset: a `datasets.Dataset` or `datasets.IterableDataset`.
        name: the argument that errors name.
        preparation: what its rows are for.
        labels_optional: a missing label column means images without labels.

    Returns:
        The data set, and its first row; a row with `pixel_values` means that it is prepared already.

    Raises:
        ValueError: an empty data set, one without the image or label column, or labels that are no class indices.
    """
    streaming = isinstance(dataset, datasets.IterableDataset)
    if streaming or dataset.format["type"] != "custom":
        dataset = _undecoded(dataset.with_format(None))
    if streaming and preparation.training:
        dataset = unshuffled(dataset)
    if streaming:
        first = retrying(lambda: next(iter(dataset.take(1)), None), f"the first row of `{name}`")
    else:
        first = dataset[0] if len(dataset) else None
    if first is None:
        raise ValueError(f"`{name}` is empty: there is not one image in it. Check its files and its split.")
    if "pixel_values" not in first:
        if labels_optional and preparation.label_column not in first:
            preparation.label_column = None
        _check_columns(first, name, preparation)
    return dataset, first


def prepare_dataset(
    dataset: Any,
    name: str,
    preparation: RowPreparation,
    shuffle: tuple[int, int] = (0, 1000),
    max_bad_images: float = 0.01,
    labels_optional: bool = False,
    one_first: AbstractContextManager | None = None,
) -> Any:
    """Check a data set and give it its preparation; one that yields `pixel_values` already stays as it is.

    Args:
        dataset: a `datasets.Dataset`, a `datasets.IterableDataset`, or a torch data set of pairs or of finished samples.
        name: the argument that errors name.
        preparation: row to sample.
        shuffle: seed of the shuffle of each pass, and rows of a stream that are shuffled together.
        max_bad_images: share of the images that may be undecodable in training.
        labels_optional: a missing label column means images without labels.
        one_first: lets one process count a stream before the others, which find the result in the cache.

    Raises:
        ValueError: see `check_dataset`.
    """
    if is_of_pairs(dataset):
        columns = [preparation.image_column, preparation.label_column or "label"]
        pairs = Pairs(dataset, columns)
        _check_row(pairs[0], preparation)
        return _of_table(pairs, preparation, shuffle, max_bad_images, pairs[0][columns[1]])
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        return dataset
    given = dataset
    dataset, first = check_dataset(dataset, name, preparation, labels_optional)
    if "pixel_values" in first:
        if preparation.class_order is not None:
            raise ValueError(
                f"`{name}` holds finished samples, whose labels stay as they are, but names the model's classes in another order. "
                "Give its images as they are stored, or its labels in the model's order."
            )
        mapped = isinstance(given, datasets.Dataset) and given.format["type"] == "custom"
        return given if mapped else given.with_format("torch")
    label = first[preparation.label_column] if preparation.label_column is not None else None
    if isinstance(dataset, datasets.Dataset):
        return _of_table(Table(dataset, preparation.columns), preparation, shuffle, max_bad_images, label)
    image = first[preparation.image_column]
    if preparation.training and dataset.num_shards == 1 and isinstance(image, dict) and image["bytes"] is None:
        logger.warning(
            "`%s` streams a folder of images in the order of its names and shuffles them within %d only "
            "(`shuffle_buffer_size`). Load it with `streaming=False`: nothing is copied, and passes are shuffled whole.",
            name,
            shuffle[1],
        )
    with one_first or nullcontext():
        source = Shards(dataset, preparation.columns)
    return ImageStream(source, preparation, *shuffle, max_bad_images, label)


def _of_table(
    table: Table, preparation: RowPreparation, shuffle: tuple[int, int], max_bad_images: float, label: Any
) -> ImageDataset | ImageStream:
    if not preparation.training:
        return ImageDataset(table, preparation, label)
    return ImageStream(table, preparation, *shuffle, max_bad_images, label)


def _undecoded(dataset: Any) -> Any:
    """The data set with its images, also those within lists and structures, as they are stored."""
    for name, feature in (dataset.features or {}).items():
        stored = _stored(feature)
        if stored != feature:
            dataset = dataset.cast_column(name, stored)
    return dataset


def _stored(feature: Any) -> Any:
    """The type of a column without decoding."""
    if isinstance(feature, dict):
        return {name: _stored(part) for name, part in feature.items()}
    if isinstance(feature, (list, tuple)):
        return [_stored(part) for part in feature]
    if hasattr(feature, "feature"):
        return replace(feature, feature=_stored(feature.feature))
    return replace(feature, decode=False) if getattr(feature, "decode", False) is True else feature


def _check_columns(first: dict[str, Any], name: str, preparation: RowPreparation) -> None:
    for argument in ("image_column", "label_column"):
        column = getattr(preparation, argument)
        if column is not None and column not in first:
            raise ValueError(
                f"`{name}` has no column {column!r}, its columns are {list(first)}. Set `{argument}` to one of them"
                f"{', or to none to train without labels' if argument == 'label_column' else ''}."
            )
    _check_row(first, preparation)


def _check_row(first: dict[str, Any], preparation: RowPreparation) -> None:
    column, num_labels = preparation.label_column, preparation.num_labels
    if num_labels is not None and column is not None:
        read_label(first[column], column, 0, num_labels, preparation.training, preparation.places)
