"""A row of a data set to a sample: decode, augment or crop the centre, as uint8.

Randomness belongs to the image: what augmentation draws depends on the seed, the pass over the data and
the row alone, and so not on the number of workers or ranks, nor on restarts.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import InterpolationMode, functional

from ..images import IGNORED_LABEL, ImageSpec
from .augmentation import Augmentation
from .decoding import open_image, to_rgb
from .labels import check_batch, class_places, read_label


__all__ = ["Collator", "Preparation", "RowPreparation", "collate", "seed_of"]


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
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
        batch["labels"] = batch["labels"].float()  # soft labels
    return batch


class Collator:
    """A collator, whose labels are checked, and beside its batch what was found out about images that could not be decoded, and
    the places of blanks.

    Args:
        collator: samples to a batch.
        num_labels: classes of the model; None for no check.
    """

    def __init__(self, collator: Any, num_labels: int | None = None):
        self.collator, self.num_labels = collator, num_labels

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        dicts = [sample if isinstance(sample, dict) else {} for sample in samples]
        bad = [sample.pop("bad_image") for sample in dicts if "bad_image" in sample]
        blanks = [place for place, sample in enumerate(dicts) if sample.pop("blank", False)]
        batch: dict[str, Any] = self.collator(samples)
        labels = batch.get("labels")
        if self.num_labels is not None and isinstance(labels, Tensor) and labels.device.type == "cpu":
            check_batch(labels, self.num_labels)
        found = {"bad_images": bad, "blanks": blanks}
        return batch | {name: values for name, values in found.items() if values}


class RowPreparation(Protocol):
    """What streams and data sets ask of a preparation, that of a classifier or another.

    A sample is a dictionary with `pixel_values`. Where it is used although something about it is bad, its `bad_image` is the
    `BadImageError` that says so.
    """

    training: bool
    repeats: int
    image_column: str
    label_column: Any
    num_labels: Any
    class_order: Any
    places: Any

    @property
    def columns(self) -> list[str]:
        """The columns that it takes."""

    def __call__(self, row: dict[str, Any], pass_number: int, identity: Any) -> dict[str, Any]:
        """A row to a sample; what is random in it follows from the seed, the pass and the identity."""

    def blank(self, label: Any) -> dict[str, Any]:
        """A sample that does not count."""


class Preparation:
    """Makes samples of `pixel_values`, uint8 (3, height, width), and `labels`.

    Args:
        spec: size, normalisation, interpolation and evaluation crop of the student.
        training: augment with a random resized crop and flips; otherwise resize and crop the centre.
        image_column, label_column: names in the row; None for images without labels.
        crop_scale: range of the area that the random crop keeps.
        hflip: probability of a horizontal flip.
        rand_augment: magnitude of RandAugment, of 10; None for none. rand_augment_std: its standard deviation.
        random_erasing: probability of erasing a part with pixel noise.
        repeats: times that an image comes in a row, augmented anew.
        seed: of the augmentation.
        class_order: the model's class for each label, where they differ (see `labels.class_order`).
        num_labels: classes of the model, for which labels are checked; None for no check.
        names: of the model's classes, for labels that are names.
        pixel_range: see `open_image`.

    Raises:
        BadImageError: an image that cannot be decoded.
        LabelError: a label that means no class.
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
        rand_augment_std: float = 0.5,
        random_erasing: float = 0.0,
        repeats: int = 1,
        seed: int = 0,
        class_order: list[int] | None = None,
        num_labels: int | None = None,
        pixel_range: tuple[float, float] | None = None,
        names: list[str] | None = None,
    ):
        self.spec, self.training, self.pixel_range = spec, training, pixel_range
        self.class_order, self.num_labels = class_order, num_labels
        self.places = class_places(names) if names else None
        self.seed, self.repeats = seed, repeats if training else 1
        self.image_column, self.label_column = image_column, label_column
        self.transform: Any
        if training:
            self.transform = Augmentation(
                spec.size,
                spec.interpolation,
                spec.mean,
                spec.std,
                crop_scale,
                hflip,
                rand_augment,
                rand_augment_std,
                random_erasing,
                spec.antialias,
            )
        else:
            self.transform = _evaluation_transform(spec)

    @property
    def columns(self) -> list[str]:
        """The columns that it takes."""
        return [self.image_column] + ([self.label_column] if self.label_column is not None else [])

    def __call__(self, row: dict[str, Any], pass_number: int, identity: Any) -> dict[str, Any]:
        image = open_image(row[self.image_column], self.pixel_range)
        if self.training:
            with _seeded(self.seed, pass_number, identity):
                pixel_values = self.transform(image)
        else:
            pixel_values = self.transform(to_rgb(image))
        sample = {"pixel_values": pixel_values}
        if self.label_column is not None:
            label = self._label(row.get(self.label_column), identity)
            if label is not None:
                sample["labels"] = label
        return sample

    def _label(self, label: Any, identity: Any) -> Any:
        if self.num_labels is None:
            return label
        assert self.label_column is not None
        number = identity[0] if isinstance(identity, tuple) else identity
        label = read_label(label, self.label_column, number, self.num_labels, self.training, self.places)
        return label if self.class_order is None or label == IGNORED_LABEL else self.class_order[label]

    def blank(self, label: Any) -> dict[str, Any]:
        """A black image whose label does not count; `label` is any other, for its shape."""
        pixel_values = torch.zeros((3, *self.spec.size), dtype=torch.uint8)
        sample: dict[str, Any] = {"pixel_values": pixel_values, "blank": True}
        if self.label_column is not None and (label is not None or self.num_labels is not None):
            soft = isinstance(label, (list, np.ndarray))
            sample["labels"] = [float(IGNORED_LABEL)] * len(label) if soft else IGNORED_LABEL
        return sample


def _evaluation_transform(spec: ImageSpec) -> Any:
    """Resize and crop the centre, to uint8 pixels (3, height, width): timm's transform, or the same without antialiasing."""
    if spec.antialias:
        return create_transform(
            (3, *spec.size),
            is_training=False,
            interpolation=spec.interpolation,
            crop_pct=spec.crop_pct,
            crop_mode=spec.crop_mode,
            normalize=False,  # to uint8
        )
    return partial(_resize_and_crop, spec=spec)  # which workers of any kind can be sent


def _resize_and_crop(image: Image.Image, spec: ImageSpec) -> Tensor:
    height, width = (math.floor(side / spec.crop_pct) for side in spec.size)
    pixels = functional.pil_to_tensor(image)
    ratio = min(pixels.shape[1] / height, pixels.shape[2] / width)
    size = [round(side / ratio) for side in pixels.shape[1:]]
    resized = functional.resize(pixels, size, InterpolationMode(spec.interpolation), antialias=False)
    return functional.center_crop(resized, list(spec.size))


_GENERATOR = np.random.MT19937()  # NumPy's global state is swapped for it: saving and restoring costs 60 µs


def seed_of(*parts: Any) -> int:
    """A seed below 2**64 for what `parts` say: the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


@contextmanager
def _seeded(*parts: Any) -> Iterator[None]:
    """Seed Python and NumPy from `parts`, and put their states back afterwards."""
    seed = seed_of(*parts)
    python, numpy = random.getstate(), np.random.get_bit_generator()  # type: ignore[attr-defined]
    np.random.set_bit_generator(_GENERATOR)  # type: ignore[attr-defined]
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_bit_generator(numpy)  # type: ignore[attr-defined]
