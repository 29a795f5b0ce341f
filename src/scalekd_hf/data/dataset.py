"""From `datasets` objects, map-style or streaming, to prepared images for the trainer."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import datasets
from torch.utils.data import Dataset

from ..borrowed.datasets import unshuffled
from .labels import encoding, read_label
from .preparation import Preparation
from .sources import Shards, Table, retrying
from .stream import ImageStream, prepare_or_blank


__all__ = ["ImageDataset", "check_dataset", "dataset_labels", "prepare_dataset", "shown_labels"]

logger = logging.getLogger(__name__)


def dataset_labels(dataset: Any, label_column: str) -> list[str] | None:
    """Class names of a `datasets` object with a `ClassLabel` column, else None."""
    features = getattr(dataset, "features", None) or {}
    feature = features.get(label_column)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def shown_labels(dataset: Any, label_column: str, stated: int | None = None) -> list[str] | None:
    """Names of the classes that a data set shows: its own, else numbers, as many as are stated or counted.

    Args:
        dataset: a `datasets` object; the labels of one on disk are counted, up to the highest.
        label_column: of class indices.
        stated: the number of classes.

    Returns:
        The names; None of a stream that says nothing.

    Raises:
        ValueError: another number is stated than the data set names.
    """
    names = dataset_labels(dataset, label_column)
    if names is not None and stated not in (None, len(names)):
        raise ValueError(f"`num_classes` is {stated}, but the data set names {len(names)} classes. Leave it out.")
    if names is None and stated is not None:
        names = [str(number) for number in range(stated)]
    if names is None and isinstance(dataset, datasets.Dataset) and _is_integer(dataset.features.get(label_column)):
        highest = max((label for label in dataset.unique(label_column) if label is not None), default=-1)
        names = [str(number) for number in range(highest + 1)]
        logger.info("The labels have no names; the highest is %d, so that there are %d classes.", highest, len(names))
    return names or None


def _is_integer(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and "int" in str(feature.dtype)


class ImageDataset(Dataset):
    """A map-style `datasets.Dataset` with its preparation, for evaluation; undecodable images are blanks."""

    def __init__(self, table: Table, preparation: Preparation, label: Any = 0):
        self.table, self.preparation, self.label = table, preparation, label

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return prepare_or_blank(self.preparation, self.table[number], number, self.label, {})


def check_dataset(dataset: Any, name: str, preparation: Preparation, labels_optional: bool = False) -> Any:
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
    preparation: Preparation,
    shuffle: tuple[int, int] = (0, 1000),
    max_bad_images: float = 0.01,
    labels_optional: bool = False,
    one_first: AbstractContextManager | None = None,
) -> Any:
    """Check a data set and give it its preparation; one that yields `pixel_values` already stays as it is.

    Args:
        dataset: a `datasets.Dataset`, a `datasets.IterableDataset`, or a torch data set of finished samples.
        name: the argument that errors name.
        preparation: row to sample.
        shuffle: seed of the shuffle of each pass, and rows of a stream that are shuffled together.
        max_bad_images: share of the images that may be undecodable in training.
        labels_optional: a missing label column means images without labels.
        one_first: lets one process count a stream before the others, which find the result in the cache.

    Raises:
        ValueError: see `check_dataset`.
    """
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        return dataset
    given = dataset
    dataset, first = check_dataset(dataset, name, preparation, labels_optional)
    if "pixel_values" in first:
        mapped = isinstance(given, datasets.Dataset) and given.format["type"] == "custom"
        return given if mapped else given.with_format("torch")
    label = first[preparation.label_column] if preparation.label_column is not None else None
    source: Table | Shards
    if isinstance(dataset, datasets.Dataset):
        source = Table(dataset, preparation.columns)
        if not preparation.training:
            return ImageDataset(source, preparation, label)
    else:
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


def _undecoded(dataset: Any) -> Any:
    """The data set with its images as they are stored."""
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def _check_columns(first: dict[str, Any], name: str, preparation: Preparation) -> None:
    for argument in ("image_column", "label_column"):
        column = getattr(preparation, argument)
        if column is not None and column not in first:
            raise ValueError(
                f"`{name}` has no column {column!r}, its columns are {list(first)}. Set `{argument}` to one of them"
                f"{', or to none to train without labels' if argument == 'label_column' else ''}."
            )
    label = first[preparation.label_column] if preparation.label_column is not None else None
    if isinstance(label, str):
        raise ValueError(
            f"`{name}` has labels such as {label!r}: class indices are needed. {encoding(str(preparation.label_column))}"
        )
    if preparation.num_labels is not None and preparation.label_column is not None:
        read_label(label, preparation.label_column, "0", preparation.num_labels, preparation.training)
