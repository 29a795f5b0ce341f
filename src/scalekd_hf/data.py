"""From `datasets` objects, map-style or streaming, to samples of `pixel_values` and `labels`.

Randomness belongs to the image: what augmentation draws depends on the seed, the pass over the data
and the image alone, and so not on the number of workers or ranks, nor on restarts. In a stream an image
is known by its encoded bytes, in a map-style data set by its row.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from .loading import ImageSpec


__all__ = ["ImageDataset", "ImageStream", "Preparation", "collate", "dataset_labels", "prepare_dataset"]

logger = logging.getLogger(__name__)

RAND_AUGMENT = "rand-m9-mstd0.5-inc1-n2"  # as published; the magnitude is set afterwards


def dataset_labels(dataset: Any, label_column: str) -> list[str] | None:
    """Class names of a `datasets` object with a `ClassLabel` column, else None."""
    features = getattr(dataset, "features", None) or {}
    feature = features.get(label_column)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Samples to a batch: pixel_values (B, 3, height, width) and, where there are any, labels (B,) or (B, K)."""
    batch = {"pixel_values": torch.stack([torch.as_tensor(sample["pixel_values"]) for sample in samples])}
    labels = [sample.get("labels", sample.get("label")) for sample in samples]
    missing = sum(label is None for label in labels)
    if missing == len(samples):
        return batch
    if missing:
        raise ValueError(
            f"{missing} of {len(samples)} images in a batch have no label. Leave them out, or all labels."
        )
    batch["labels"] = torch.stack([torch.as_tensor(label) for label in labels])
    if batch["labels"].ndim == 2:
        batch["labels"] = batch["labels"].float()  # soft labels, or several classes
    return batch


class Preparation:
    """A row of the data set to a sample: decode, transform (augment in training), normalise for the student.

    Args:
        spec: size, normalisation, interpolation and evaluation crop of the student.
        training: augment with a random resized crop and flips; otherwise resize and crop the centre.
        image_column, label_column: names in the row; None for images without labels.
        crop_scale: range of the area that the random crop keeps.
        hflip: probability of a horizontal flip.
        rand_augment: magnitude of RandAugment, of 10; None for none.
        random_erasing: probability of erasing a part with pixel noise.
        repeats: times that an image comes in a row, augmented anew.
        seed: of the augmentation.
    """

    def __init__(
        self,
        spec: ImageSpec,
        training: bool,
        image_column: str = "image",
        label_column: str | None = "label",
        crop_scale: tuple[float, float] = (0.08, 1.0),
        hflip: float = 0.5,
        rand_augment: float | None = None,
        random_erasing: float = 0.0,
        repeats: int = 1,
        seed: int = 0,
    ):
        self.training, self.seed, self.repeats = training, seed, repeats if training else 1
        self.image_column, self.label_column = image_column, label_column
        augmentation: dict[str, Any] = {}
        if training:
            augmentation = {"scale": tuple(crop_scale), "hflip": hflip, "color_jitter": None}
            augmentation |= {"re_prob": random_erasing, "re_mode": "pixel"}
            if rand_augment is not None:
                augmentation["auto_augment"] = RAND_AUGMENT
        self.transform = create_transform(
            (3, *spec.size),
            is_training=training,
            mean=spec.mean,
            std=spec.std,
            interpolation=spec.interpolation,
            crop_pct=spec.crop_pct,
            **augmentation,
        )
        if training and rand_augment is not None:
            _set_magnitude(self.transform, rand_augment)

    def __call__(self, row: dict[str, Any], pass_number: int, identity: Any) -> dict[str, Any]:
        image = _decode(row[self.image_column])
        if self.training:
            with _seeded(self.seed, pass_number, identity):
                pixel_values = self.transform(image)
        else:
            pixel_values = self.transform(image)
        sample = {"pixel_values": pixel_values}
        if self.label_column is not None and row.get(self.label_column) is not None:
            sample["labels"] = row[self.label_column]
        return sample


def _set_magnitude(transform: Any, magnitude: float) -> None:
    """Give timm's RandAugment a magnitude that is not whole, and a posterize that every Pillow takes.

    At magnitude 10 the increasing set asks to keep 0 bits, which Pillow 13 refuses.
    """
    (augment,) = (step for step in transform.transforms if isinstance(step, RandAugment))
    for operation in augment.ops:
        operation.magnitude = magnitude
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    mask = 256 - 2 ** (8 - bits_to_keep)
    return image.point(lambda value: value & mask)


def _decode(image: Any) -> Image.Image:
    if isinstance(image, dict):
        image = Image.open(io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"])
    elif isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
    elif isinstance(image, str):
        image = Image.open(image)
    elif isinstance(image, (list, np.ndarray)):
        array = np.asarray(image)
        if array.dtype.kind == "f":
            array = array * (255 if array.max() <= 1 else 1)
        image = Image.fromarray(array.astype(np.uint8))
    if image.mode.startswith("I;16"):  # Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    return image.convert("RGB")


@contextmanager
def _seeded(*parts: Any) -> Iterator[None]:
    """Seed Python, NumPy and torch from `parts`, and put their states back afterwards."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little")
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.random.default_generator.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


class ImageDataset(Dataset):
    """A map-style `datasets.Dataset` with its preparation."""

    def __init__(self, rows: datasets.Dataset, preparation: Preparation):
        self.rows, self.preparation = rows, preparation
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that live on see it change

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of each pass."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Repeated augmentation counts on behind the last row: the same row, another draw.
        return self.preparation(self.rows[index % len(self.rows)], int(self._epoch), index)


class RepeatSampler(Sampler[int]):
    """Each row of an `ImageDataset` several times in a row, a pass as long as without (repeated augmentation)."""

    def __init__(self, data: ImageDataset):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[int]:
        rows, preparation = len(self.data), self.data.preparation
        generator = torch.Generator().manual_seed(preparation.seed + int(self.data._epoch))
        order = torch.randperm(rows, generator=generator).tolist()
        repeated = (row + again * rows for row in order for again in range(preparation.repeats))
        return itertools.islice(repeated, rows)


class ImageStream(IterableDataset):
    """A streaming data set, read once by ranks x workers; endless and reshuffled each pass in training.

    Each reader takes every n-th shard, or every n-th row where there are fewer shards than readers (then
    every reader reads all bytes; only its own rows are decoded). Batches come from the workers in turn,
    so the position of a stopped run follows from the number of batches it consumed.

    Args:
        stream: a `datasets.IterableDataset`.
        preparation: row to sample.
        seed, buffer_size: of the shuffle of each pass.
    """

    def __init__(self, stream: datasets.IterableDataset, preparation: Preparation, seed: int, buffer_size: int = 1):
        self.stream = _undecoded(stream, preparation.image_column)
        self.preparation, self.seed, self.buffer_size = preparation, seed, buffer_size
        self.rank, self.world_size = 0, 1
        self.batch_size, self.consumed_batches = 1, 0

    def known_length(self) -> int | None:
        """Images in a pass, where the data set's own metadata say so."""
        splits, split = self.stream.info.splits, self.stream.split
        if not splits or split is None or str(split) not in splits:
            return None
        return splits[str(split)].num_examples or None

    def loader(self, batch_size: int, rank: int, world_size: int, consumed_batches: int, **options: Any) -> DataLoader:
        """The training data loader of one rank, `consumed_batches` batches after the start."""
        self.rank, self.world_size = rank, world_size
        self.batch_size, self.consumed_batches = batch_size, consumed_batches
        readers = world_size * max(1, options.get("num_workers", 0))
        if self.stream.num_shards < readers:
            logger.warning(
                "The stream has %d shards for %d readers (ranks x workers): each reader reads all bytes and decodes "
                "its share. More shards, or fewer workers, save reading.",
                self.stream.num_shards,
                readers,
            )
        return DataLoader(self, batch_size=batch_size, **{"collate_fn": collate, **options})

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, workers = _worker()
        if not self.preparation.training:
            yield from (self._prepare(row, 0) for row in _share(self.stream, worker, workers))
            return
        worker = (worker + self.consumed_batches) % workers  # the worker whose turn it is comes first
        done = (self.consumed_batches - worker + workers - 1) // workers  # batches this worker gave before
        reader, readers = self.rank * workers + worker, self.world_size * workers
        yield from self._endless(reader, readers, done * self.batch_size)

    def _endless(self, reader: int, readers: int, skip: int) -> Iterator[dict[str, Any]]:
        shuffled = self.stream.shuffle(seed=self.seed, buffer_size=self.buffer_size, max_buffer_input_shards=1)
        for pass_number in itertools.count():
            shuffled.set_epoch(pass_number)
            seen = 0
            for row in _share(shuffled, reader, readers):
                seen += 1
                for repeat in range(self.preparation.repeats):
                    if skip:
                        skip -= 1  # bytes are read, nothing is decoded
                    else:
                        yield self._prepare(row, pass_number, repeat)
            if not seen and not pass_number:
                raise ValueError(
                    f"Reader {reader} of {readers} (ranks x workers) found no image in the stream: it has fewer rows or "
                    "shards than readers. Use fewer workers."
                )

    def _prepare(self, row: dict[str, Any], pass_number: int, repeat: int = 0) -> dict[str, Any]:
        column = self.preparation.image_column
        if isinstance(row[column], dict) and row[column].get("bytes") is None:
            row = {**row, column: {"bytes": Path(row[column]["path"]).read_bytes()}}
        return self.preparation(row, pass_number, (_fingerprint(row[column]), repeat))


def _fingerprint(image: Any) -> bytes:
    """What an image is known by: its encoded bytes, or its pixels where it comes decoded."""
    if isinstance(image, dict):
        content, shape = image["bytes"], ""
    elif isinstance(image, Image.Image):
        content, shape = image.tobytes(), f"{image.mode}{image.size}"
    else:
        array = np.asarray(image)
        content, shape = array.tobytes(), f"{array.dtype}{array.shape}"
    return hashlib.blake2b(content, digest_size=8, person=shape.encode()[:16]).digest()


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info is not None else (0, 1)


def _undecoded(stream: datasets.IterableDataset, image_column: str) -> datasets.IterableDataset:
    features = stream.features or {}
    return stream.decode(False) if isinstance(features.get(image_column), datasets.Image) else stream


def _share(stream: datasets.IterableDataset, reader: int, readers: int) -> Iterator[dict[str, Any]]:
    """Every row that one of `readers` takes. `iter` with batches does not split by worker a second time."""
    if readers > 1 and stream.num_shards >= readers:
        stream, readers = stream.shard(readers, reader, contiguous=False), 1
    rows = (row for batch in stream.iter(batch_size=64) for row in _rows(batch))
    yield from rows if readers == 1 else itertools.islice(rows, reader, None, readers)


def _rows(batch: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))


def prepare_dataset(
    dataset: Any,
    name: str,
    make: Callable[[], Preparation],
    seed: int = 0,
    buffer_size: int = 1000,
    labels_optional: bool = False,
) -> Any:
    """Check a data set and give it its preparation; one that yields `pixel_values` already stays as it is.

    Args:
        dataset: a `datasets.Dataset`, a `datasets.IterableDataset`, or a torch data set of finished samples.
        name: the argument that errors name.
        make: builds the preparation.
        seed, buffer_size: of a stream's shuffle.
        labels_optional: a missing label column means images without labels.

    Raises:
        ValueError: an empty data set, one without the image or label column, or labels that are no class indices.
    """
    streaming = isinstance(dataset, datasets.IterableDataset)
    if not streaming and hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(_empty(name))
    if not streaming and not isinstance(dataset, datasets.Dataset):
        return dataset
    transformed = not streaming and dataset.format["type"] == "custom"
    if not streaming and not transformed:
        dataset = dataset.with_format(None)
    first = next(iter(dataset.take(1)), None) if streaming else dataset[0]
    if first is None:
        raise ValueError(_empty(name))
    if "pixel_values" in first:
        return dataset if transformed else dataset.with_format("torch")
    preparation = make()
    if labels_optional and preparation.label_column not in first:
        preparation.label_column = None
    _check_columns(first, name, preparation)
    return ImageStream(dataset, preparation, seed, buffer_size) if streaming else ImageDataset(dataset, preparation)


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
            f"`{name}` has labels such as {label!r}: class indices are needed. `dataset.class_encode_column("
            f"{preparation.label_column!r})` makes them."
        )


def _empty(name: str) -> str:
    return f"`{name}` is empty: there is not one image in it. Check its files and its split."
