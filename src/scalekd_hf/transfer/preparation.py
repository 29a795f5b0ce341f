"""Rows of a dense data set to samples: image and annotation go through the same transforms, those of torchvision.

Randomness belongs to the image, as in `data.preparation`: it depends on the seed, the pass and the row alone. Pixels stay uint8
and are not padded: `DenseCollator` pads, and says with `pixel_mask` where there is image.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from ..data.decoding import BadImageError, is_reducible, jpeg_pixels, open_image, to_rgb
from ..data.labels import class_places
from ..data.preparation import seed_of
from ..images import ImageSpec
from .targets import IGNORED_PIXEL, MAX_CLASSES, Objects, decode_masks, mask_api, read_mask, read_objects


__all__ = ["BOX_FORMATS", "DensePreparation", "DetectionPreparation", "SegmentationPreparation", "check_box_format"]

logger = logging.getLogger(__name__)

BOX_FORMATS = ("xywh", "xyxy")
# mmsegmentation's recipe for ADE20K: the shorter side is scaled by 0.5 to 2, the longer one is at most 4 times the crop, and a
# crop has at most three quarters of one class, if ten tries find one. Each change of colour has an even chance.
SCALES = (0.5, 2.0)
LONGEST = 4.0
MOST_OF_ONE_CLASS, TRIES = 0.75, 10
COLOURS: list[dict[str, Any]] = [{"brightness": 0.125}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 0.1}]
# Detectron2's for Mask R-CNN, relative to 800 pixels: the shorter side is one of 640, 672, ... 800, the longer at most 1333.
SHORTER_SIDES = (0.8, 0.84, 0.88, 0.92, 0.96, 1.0)
LONGER_SIDE = 1333 / 800


class DensePreparation:
    """What preparations of both tasks share; the interface of `data.preparation.Preparation`.

    Args:
        spec: the size of training crops, or of squares, and the mean by which pixels are filled up.
        training: transform at random; otherwise resize alone, and keep the annotation of the original as `target`.
        num_classes: K.
        image_column, label_column: names in the row.
        seed: of the transforms.
        class_order: the model's class for each label, where they differ (see `data.labels.class_order`).
    """

    repeats = 1
    num_labels: Any = None  # labels are checked here, against num_classes
    places: dict[str, int | None] | None = None

    def __init__(
        self,
        spec: ImageSpec,
        training: bool,
        num_classes: int,
        image_column: str = "image",
        label_column: str = "label",
        seed: int = 0,
        class_order: list[int] | None = None,
    ):
        self.spec, self.training, self.num_classes, self.seed = spec, training, num_classes, seed
        self.image_column, self.label_column = image_column, label_column
        self.class_order = class_order
        self.order = None if class_order is None else torch.tensor(class_order)

    @property
    def columns(self) -> list[str]:
        """The columns that it takes."""
        return [self.image_column, self.label_column]

    def _black(self) -> dict[str, Any]:
        """An image that does not count, without its labels."""
        sample: dict[str, Any] = {"pixel_values": torch.zeros((3, *self.spec.size), dtype=torch.uint8), "blank": True}
        return sample if self.training else sample | {"target": None}


class SegmentationPreparation(DensePreparation):
    """Makes samples of `pixel_values`, uint8 (3, h, w), and `labels`, uint8 (h, w) with 255 where nothing counts.

    In training h and w are those of `spec.size`, or less where the scaled image is smaller. In evaluation the shorter side is that
    of `spec.size` and the longer one at most four times as long, and `target` has the `mask`, uint8 (H, W), of the original `size`.

    Args:
        zero_is_ignored: see `read_mask`.
        square: squeeze images of an evaluation to `spec.size`, for networks of one size.
        others: see `DensePreparation`.

    Raises:
        BadImageError: an image or a mask that cannot be used.
        ValueError: more than 255 classes.
    """

    def __init__(
        self,
        spec: ImageSpec,
        training: bool,
        num_classes: int,
        zero_is_ignored: bool = False,
        square: bool = False,
        **others: Any,
    ):
        super().__init__(spec, training, num_classes, **others)
        if num_classes > MAX_CLASSES:
            raise ValueError(
                f"`num_classes` is {num_classes}, but masks have at most {MAX_CLASSES} classes: {IGNORED_PIXEL} is for pixels that do "
                "not count. Merge some."
            )
        self.zero_is_ignored = zero_is_ignored
        shorter = min(spec.size)
        whole = v2.RandomShortestSize(shorter, round(LONGEST * shorter))
        self.resize = v2.Resize(list(spec.size)) if square else whole
        changes = [v2.RandomApply([v2.ColorJitter(**change)]) for change in COLOURS]
        self.distort = v2.Compose([v2.RandomHorizontalFlip(), *changes])

    def __call__(self, row: dict[str, Any], pass_number: int, identity: Any) -> dict[str, Any]:
        pixels = _pixels(row[self.image_column])
        size = (pixels.shape[1], pixels.shape[2])
        found = read_mask(row[self.label_column], size, self.num_classes, self.zero_is_ignored)
        mask = torch.from_numpy(found)
        if self.order is not None:
            table = torch.full((256,), IGNORED_PIXEL, dtype=torch.uint8)
            table[: len(self.order)] = self.order.to(torch.uint8)
            mask = table[mask.long()]
        if self.training and bool((mask == IGNORED_PIXEL).all()):
            raise BadImageError(
                "A mask has no pixel of a class, so that nothing can be learned from it. Leave the image out.",
                "mask without a class",
            )
        image, labels = tv_tensors.Image(pixels), tv_tensors.Mask(mask)
        if self.training:
            with _seeded(self.seed, pass_number, identity):
                image, labels = self.distort(*self._crop(image, labels))
            return {"pixel_values": _plain(image), "labels": _plain(labels)}
        with _seeded(self.seed):  # it may draw one of one, from the generator that a run draws from
            image, labels = self.resize(image, labels)
        return {"pixel_values": _plain(image), "labels": _plain(labels), "target": {"mask": mask}, "size": size}

    def _crop(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """A random part at a random scale. It is cut out before it is scaled, which gives the same and costs less."""
        height, width = mask.shape
        scale = float(torch.empty(()).uniform_(*SCALES)) * min(
            min(self.spec.size) / min(height, width), LONGEST * min(self.spec.size) / max(height, width)
        )
        part = [min(side, round(wanted / scale)) for side, wanted in zip((height, width), self.spec.size, strict=True)]
        box = [0, 0, *part]
        for _ in range(TRIES):
            top, left = (
                int(torch.randint(whole - side + 1, ())) for whole, side in zip(mask.shape, part, strict=True)
            )
            box = [top, left, *part]
            inner = mask[top : top + part[0], left : left + part[1]]
            counts = torch.bincount(inner.flatten(), minlength=256)[:IGNORED_PIXEL]
            if int((counts > 0).sum()) > 1 and int(counts.max()) < MOST_OF_ONE_CLASS * int(counts.sum()):
                break
        if not int(counts.sum()):  # a part of which nothing would be learned, whose loss would be no number
            learned = (mask != IGNORED_PIXEL).nonzero()
            middle = learned[int(torch.randint(len(learned), ()))].tolist()
            sides = zip(middle, part, mask.shape, strict=True)
            box = [*(min(max(0, place - side // 2), whole - side) for place, side, whole in sides), *part]
        size = [min(round(side * scale), wanted) for side, wanted in zip(part, self.spec.size, strict=True)]
        return tuple(
            functional.resized_crop(values, *box, [max(1, side) for side in size]) for values in (image, mask)
        )

    def blank(self, label: Any) -> dict[str, Any]:
        """A black image of which no pixel counts."""
        return self._black() | {"labels": torch.full(self.spec.size, IGNORED_PIXEL, dtype=torch.uint8)}


class DetectionPreparation(DensePreparation):
    """Makes samples of `pixel_values`, uint8 (3, h, w), and `labels`, a dictionary of the n objects.

    `labels` has `class_labels` int64 (n,), `boxes` float32 (n, 4), centre, width and height relative to the image, and for a head
    that learns masks `masks` uint8 (n, h, w). Crowds are not learned, as in torchvision's reference. In evaluation `target` has
    `boxes` (n, 4) by their corners in pixels of the original image, `labels`, `iscrowd`, `area` and, with masks, `masks` uint8
    (n, H, W), `size` is the original (H, W), and `labels` has no masks, of which no head makes a loss there.

    Args:
        box_format: "xywh" or "xyxy" of the data.
        masks: whether the head learns them.
        square: squeeze images to `spec.size`, with zooming out and crops by overlap in training, as RT-DETR does; otherwise the
            shorter side is that of `spec.size`, in training 0.8 to 1 times it, and the longer one at most 5/3, as in Mask R-CNN.
        class_names: for categories that are names.
        others: see `DensePreparation`.

    Raises:
        BadImageError: an image or an annotation that cannot be used.
        ImportError: masks without faster-coco-eval.
    """

    def __init__(
        self,
        spec: ImageSpec,
        training: bool,
        num_classes: int,
        box_format: str = "xywh",
        masks: bool = False,
        square: bool = False,
        class_names: list[str] | None = None,
        **others: Any,
    ):
        super().__init__(spec, training, num_classes, **others)
        check_box_format(box_format)
        if masks:
            mask_api()  # here, and not first in a worker
        self.box_format, self.masks = box_format, masks
        self.places = class_places(class_names) if class_names else None
        random = _at_random(spec, square) if training else []
        self.transform = v2.Compose([*random, *_sized(spec, training, square)])

    def __call__(self, row: dict[str, Any], pass_number: int, identity: Any) -> dict[str, Any]:
        pixels = _pixels(row[self.image_column])
        size = (pixels.shape[1], pixels.shape[2])
        objects = read_objects(row[self.label_column], size, self.num_classes, self.box_format, self.places)
        if objects.clipped:
            _say_clipped(self.label_column)
        target = self._target(objects, size)
        kept = ~target["iscrowd"]
        entry = {"boxes": tv_tensors.BoundingBoxes(target["boxes"][kept], format="XYXY", canvas_size=size)}
        entry["labels"] = target["labels"][kept]
        if self.masks and self.training:
            entry["masks"] = tv_tensors.Mask(target["masks"][kept])
        with _seeded(self.seed, pass_number, identity):
            image, entry = self.transform(tv_tensors.Image(pixels), entry)
        sample = {"pixel_values": _plain(image), "labels": _relative(entry, image.shape[1:])}
        if not self.training:
            sample |= {"target": target, "size": size}
        if objects.left_out:
            sample["bad_image"] = BadImageError(objects.left_out, "objects left out")
        return sample

    def _target(self, objects: Objects, size: tuple[int, int]) -> dict[str, Tensor]:
        target = {
            "boxes": torch.from_numpy(objects.boxes),
            "labels": torch.from_numpy(objects.labels),
            "iscrowd": torch.from_numpy(objects.iscrowd),
            "area": torch.from_numpy(objects.area),
        }
        if self.order is not None:
            target["labels"] = self.order[target["labels"]]
        if self.masks:
            target["masks"] = torch.from_numpy(decode_masks(objects.segmentations, size))
        return target

    def blank(self, label: Any) -> dict[str, Any]:
        """A black image without objects that does not count."""
        boxes, labels = torch.zeros((0, 4)), torch.zeros(0, dtype=torch.int64)
        objects = {"class_labels": labels, "boxes": boxes}
        if self.masks and self.training:
            objects["masks"] = torch.zeros((0, *self.spec.size), dtype=torch.uint8)
        return self._black() | {"labels": objects}


def check_box_format(box_format: Any) -> None:
    """Refuse what is no known form of boxes.

    Raises:
        ValueError: it is neither "xywh" nor "xyxy".
    """
    if box_format not in BOX_FORMATS:
        raise ValueError(
            f"`box_format` is {box_format!r}: 'xywh' is for left, top, width and height, as in COCO, and 'xyxy' for left, top, "
            "right and bottom, both in pixels. Set one of them; a wrong one is found where boxes reach beyond their images."
        )


@cache
def _say_clipped(column: str) -> None:
    logger.warning("Boxes in %r that reach more than a pixel beyond their image end at its border.", column)


def _at_random(spec: ImageSpec, square: bool) -> list[Any]:
    """What a detector's training images go through before they are resized."""
    if not square:
        return [v2.RandomHorizontalFlip()]
    fill = {tv_tensors.Image: [round(255 * value) for value in spec.mean], "others": 0}
    return [
        v2.RandomPhotometricDistort(),
        v2.RandomZoomOut(fill=fill),
        v2.RandomApply([v2.RandomIoUCrop()], p=0.8),
        v2.SanitizeBoundingBoxes(),
        v2.RandomHorizontalFlip(),
    ]


def _sized(spec: ImageSpec, training: bool, square: bool) -> list[Any]:
    if square:
        resize: Any = v2.Resize(list(spec.size))
    else:
        longest = round(LONGER_SIDE * min(spec.size))
        shares = SHORTER_SIDES if training else (1.0,)
        resize = v2.RandomShortestSize([round(share * min(spec.size)) for share in shares], longest)
    return [resize, v2.SanitizeBoundingBoxes()] if training else [resize]


def _relative(entry: dict[str, Any], size: Any) -> dict[str, Tensor]:
    """A detector's labels, their boxes relative to an image of `size` (height, width)."""
    height, width = size
    boxes = box_convert(_plain(entry["boxes"]).float(), "xyxy", "cxcywh") / torch.tensor(
        [width, height, width, height]
    )
    labels = {"class_labels": entry["labels"], "boxes": boxes}
    return labels | ({"masks": _plain(entry["masks"])} if "masks" in entry else {})


def _pixels(value: Any) -> Tensor:
    """An image as uint8 (3, height, width)."""
    image = open_image(value)
    pixels = jpeg_pixels(image) if is_reducible(image) else None
    return functional.pil_to_tensor(to_rgb(image)) if pixels is None else pixels.contiguous()


def _plain(values: Tensor) -> Tensor:
    return values.as_subclass(Tensor).contiguous()


@contextmanager
def _seeded(*parts: Any) -> Iterator[None]:
    """Seed torch's generator on the CPU, from which torchvision draws, and put its state back afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed_of(*parts))
    try:
        yield
    finally:
        torch.set_rng_state(state)
