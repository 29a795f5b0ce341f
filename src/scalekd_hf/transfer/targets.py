"""What a row says of an image beside its class: a mask of class indices, or objects with boxes and masks.

Faults of an annotation are of two kinds. Objects that cannot be seen, with boxes without area or outside of the image, are left
out, and the image stays. Whatever else is wrong may hide a visible object, and leaves out the image.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ImageOps

from ..data.decoding import BadImageError, open_image, pillow_errors
from ..data.labels import some


__all__ = [
    "IGNORED_PIXEL",
    "MAX_CLASSES",
    "Objects",
    "corners",
    "decode_masks",
    "field_of",
    "mask_api",
    "overhang",
    "read_mask",
    "read_objects",
    "values_of",
]

IGNORED_PIXEL = 255  # of a mask, where no class is to be learned and none counts
MAX_CLASSES = 255  # of masks, so that this stays free
SHOWN = 5  # boxes in a message
FARTHEST = 10  # that a point may be, in sides of its image: a polygon takes memory for its length
OVERHANG = 1.0  # pixels that a box may reach beyond its image for its rounding
# What data sets call them, within the column of objects.
FIELDS = {
    "bbox": ("bbox", "bboxes", "boxes"),
    "category": ("category", "categories", "category_id", "label", "labels"),
    "segmentation": ("segmentation", "segmentations"),
    "iscrowd": ("iscrowd", "is_crowd"),
    "area": ("area",),
}


# Masks of classes


def read_mask(value: Any, size: tuple[int, int], num_classes: int, zero_is_ignored: bool) -> np.ndarray:
    """The class of each pixel of an image.

    Args:
        value: an image of class indices, in any form that `open_image` takes: grey, or with a palette.
        size: (height, width) of the image that it belongs to.
        num_classes: K, at most 255.
        zero_is_ignored: 0 means no class, and 1 to K the classes, as in ADE20K. 255 means none in any case.

    Returns:
        uint8 (height, width) of 0 to K - 1, and 255 for pixels that do not count.

    Raises:
        BadImageError: a mask that cannot be read, is of another size than the image, or has values that are no classes.
    """
    indices = values_of(value)
    if indices.shape != size:
        raise _mask_of_another_size(indices.shape, size)
    if zero_is_ignored:
        indices = np.where(indices == 0, IGNORED_PIXEL, indices - (indices != IGNORED_PIXEL)).astype(np.uint8)
    beyond = np.unique(indices[(indices >= num_classes) & (indices != IGNORED_PIXEL)]) + int(zero_is_ignored)
    if len(beyond):
        classes = f"{int(zero_is_ignored)} to {num_classes - 1 + int(zero_is_ignored)}"
        raise BadImageError(
            f"A mask has the values {some(beyond.tolist())}, but the classes are {classes}, and {IGNORED_PIXEL} is for pixels that "
            "do not count. Mend the mask, or list all classes with `class_names`.",
            "mask value beyond the classes",
        )
    return indices


def values_of(value: Any) -> np.ndarray:
    """The values of a mask, uint8 (height, width)."""
    try:
        image = open_image(value, pixel_range=(0, 255))
        if image.format == "JPEG":
            raise _bad_mask("a JPEG, which changes values: class indices are lost. Store masks as PNG")
        with pillow_errors():
            pixels = np.asarray(ImageOps.exif_transpose(image))  # as its image is turned
    except BadImageError as error:
        kind = error.kind if error.kind.startswith("mask") else f"mask {error.kind}"
        raise BadImageError(f"The mask of an image: {error}", kind) from error
    if pixels.ndim == 3 and image.mode in ("RGB", "RGBA") and (pixels[..., :3] == pixels[..., :1]).all():
        pixels = pixels[..., 0]  # grey, stored as colours
    if pixels.ndim != 2:
        raise _bad_mask(
            f"in colours (mode {image.mode}): class indices are needed. Map each colour to the index of its class"
        )
    return pixels.astype(np.uint8)


def _bad_mask(what: str) -> BadImageError:
    return BadImageError(f"A mask is {what}.", "mask without class indices")


def _mask_of_another_size(found: Any, size: tuple[int, int]) -> BadImageError:
    return BadImageError(
        f"A mask has {found[1]} x {found[0]} pixels and its image {size[1]} x {size[0]}. Mend one of them, or leave the image out.",
        "mask of another size",
    )


# Objects


@dataclass
class Objects:
    """The objects of an image, n of them.

    Attributes:
        boxes: float32 (n, 4), left, top, right and bottom in pixels, within the image.
        labels: int64 (n,), classes.
        iscrowd: bool (n,), several objects in one.
        area: float32 (n,), in square pixels, as the data say it, or that of the box.
        segmentations: n, as the data have them; None where they have none.
        left_out: objects that cannot be seen, in words; empty where there are none.
        clipped: boxes that reached beyond the image by more than a pixel and end at its border now.
    """

    boxes: np.ndarray
    labels: np.ndarray
    iscrowd: np.ndarray
    area: np.ndarray
    segmentations: list[Any] | None
    left_out: str = ""
    clipped: int = 0


def read_objects(
    value: Any, size: tuple[int, int], num_classes: int, box_format: str, places: dict[str, int | None] | None = None
) -> Objects:
    """The objects of a row, checked.

    Args:
        value: a dictionary of lists, or a list of dictionaries, with `bbox`, `category`, and where there are any `area`,
            `iscrowd` and `segmentation` (polygons or RLE as in COCO, or the same as JSON). `width` and `height` beside lists are
            those of the image that was annotated.
        size: (height, width) of the image.
        num_classes: K.
        box_format: "xywh" or "xyxy", both in pixels.
        places: classes by name, for categories that are names.

    Raises:
        BadImageError: objects that cannot be read, a category that is no class, or an image of another size.
    """
    fields = _as_lists(value)
    annotated = fields.get("height"), fields.get("width")
    if None not in annotated and annotated != size:
        raise BadImageError(
            f"An image has {size[1]} x {size[0]} pixels and was annotated with {annotated[1]} x {annotated[0]}. Fetch the image "
            "that was annotated, or leave it out.",
            "annotation of another size",
        )
    boxes = _boxes(fields, box_format)
    count = len(boxes)
    labels = np.array([_class(name, num_classes, places) for name in _listed(fields, "category", count)], np.int64)
    over, clipped = overhang(boxes, size), boxes.clip(0, np.array([size[1], size[0]] * 2))
    seen = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
    sides = clipped[:, 2:] - clipped[:, :2]
    crowds = np.array(_listed(fields, "iscrowd", count, False)).astype(bool)
    areas = np.array(_listed(fields, "area", count, None), object)
    areas = np.where(areas == None, sides.prod(1), areas).astype(np.float32)  # noqa: E711
    segmentations = _listed(fields, "segmentation", count, None)
    some_shape = any(shape is not None for shape in segmentations)
    return Objects(
        clipped[seen].astype(np.float32),
        labels[seen],
        crowds[seen],
        areas[seen],
        [shape for shape, keep in zip(segmentations, seen, strict=True) if keep] if some_shape or not count else None,
        _left_out(boxes[~seen], count),
        int((seen & (over > OVERHANG)).sum()),
    )


def corners(value: Any, box_format: str) -> np.ndarray:
    """The boxes of a row's objects as they are given, (n, 4) by their corners in pixels; see `read_objects`.

    Raises:
        BadImageError: objects that cannot be read.
    """
    return _boxes(_as_lists(value), box_format)


def overhang(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """How far boxes (n, 4), by their corners, reach beyond an image of `size` (height, width), in pixels (n,)."""
    limits = np.array([size[1], size[0]])
    return np.maximum(-boxes[:, :2], boxes[:, 2:] - limits).max(1, initial=0)


def field_of(fields: Any, name: str) -> str | None:
    """What `fields` call the field of that name; None where they have none."""
    return next((known for known in FIELDS[name] if known in fields), None)


def _as_lists(value: Any) -> dict[str, Any]:
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        names = list(dict.fromkeys(name for entry in value for name in entry))
        return {name: [entry.get(name) for entry in value] for name in names} | ({} if value else {"bbox": []})
    if isinstance(value, dict):
        return value
    raise _bad_objects(f"a {type(value).__name__} instead of lists of boxes and categories")


def _bad_objects(what: str) -> BadImageError:
    return BadImageError(
        f"The objects of an image are {what}. Mend them, or leave the image out.", "malformed objects"
    )


def _listed(fields: dict[str, Any], name: str, count: int, default: Any = ...) -> list[Any]:
    """A field of all objects; `default` for each of them where there is none."""
    key = field_of(fields, name)
    values = fields[key] if key is not None else None
    if values is None:
        if default is ... and count:
            raise _bad_objects(f"without `{name}`; there is {some(list(fields))}")
        return [default] * count
    if len(values) != count:
        raise _bad_objects(f"{count} boxes, but {len(values)} of `{key}`")
    return [default if value is None and default is not ... else value for value in values]


def _boxes(fields: dict[str, Any], box_format: str) -> np.ndarray:
    """Boxes (n, 4) by their corners, as they are given."""
    key = field_of(fields, "bbox")
    if key is None or fields[key] is None:
        raise _bad_objects(f"without `bbox`; there is {some(list(fields))}")
    try:
        boxes = np.array(fields[key], np.float64).reshape(-1, 4) if len(fields[key]) else np.zeros((0, 4))
    except (TypeError, ValueError):
        boxes = np.full((1, 4), np.nan)
    if len(boxes) != len(fields[key]) or not np.isfinite(boxes).all():
        raise _bad_objects("with boxes that are not four numbers each")
    if box_format == "xywh":
        boxes[:, 2:] += boxes[:, :2]
    return boxes


def _class(value: Any, num_classes: int, places: dict[str, int | None] | None) -> int:
    place = (places or {}).get(value) if isinstance(value, str) else value
    if not isinstance(place, (int, np.integer)) or not 0 <= place < num_classes:
        raise BadImageError(
            f"An object is of category {value!r}, but the classes are 0 to {num_classes - 1}, or their names. Mend the annotation, "
            "or list all classes with `class_names`.",
            "unknown category",
        )
    return int(place)


def _left_out(boxes: np.ndarray, count: int) -> str:
    if not len(boxes):
        return ""
    shown = [tuple(round(float(value), 1) for value in box) for box in boxes[:SHOWN]]
    return (
        f"{len(boxes)} of {count} objects have boxes without area, or wholly outside of the image, and are left out; the image stays. "
        f"Left, top, right, bottom: {shown}. Mend the annotations."
    )


# Masks of objects


def decode_masks(segmentations: list[Any] | None, size: tuple[int, int]) -> np.ndarray:
    """Masks of objects from polygons, or from run lengths (RLE), compressed or not, as COCO has them.

    Args:
        segmentations: n, or the same as JSON.
        size: (height, width) of the image.

    Returns:
        uint8 (n, height, width) of 0 and 1.

    Raises:
        BadImageError: a segmentation that is missing or malformed, or of an image of another size.
        ImportError: without faster-coco-eval.
    """
    if segmentations is None:
        raise _bad_segmentation(
            "missing, and the head learns masks. Choose a head without, such as one of boxes alone"
        )
    masks = [_decoded(segmentation, size) for segmentation in segmentations]
    return np.stack(masks) if masks else np.zeros((0, *size), np.uint8)


def _decoded(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    api = mask_api()
    try:
        shape = json.loads(segmentation) if isinstance(segmentation, str) else segmentation
        if isinstance(shape, dict):
            runs = _runs(api, shape, size)
        else:
            polygons = [[float(value) for value in polygon] for polygon in shape or []]
            if not polygons or any(len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
                raise ValueError("polygons are lists of x, y, of three points or more")
            if not (np.abs(np.concatenate(polygons)) <= FARTHEST * max(size)).all():
                raise ValueError("a point is no number, or far outside of the image")
            runs = api.merge(api.frPyObjects(polygons, *size))
        mask: np.ndarray = api.decode(runs)
        return mask
    except BadImageError:
        raise
    except Exception as error:  # what the library raises depends on what it is given
        raise _bad_segmentation(f"malformed ({type(error).__name__}, {error})") from error


def _runs(api: Any, shape: dict[str, Any], size: tuple[int, int]) -> Any:
    """Run lengths in the library's own form."""
    found = tuple(int(side) for side in shape["size"])
    if found != size:
        raise _mask_of_another_size(found, size)
    if not isinstance(shape["counts"], (list, tuple)):
        return {"size": list(size), "counts": shape["counts"]}
    counts = [int(count) for count in shape["counts"]]
    if min(counts) < 0:
        raise ValueError("a run is of less than nothing")
    return api.frPyObjects({"size": list(size), "counts": counts}, *size)


def _bad_segmentation(what: str) -> BadImageError:
    return BadImageError(
        f"The segmentation of an object is {what}. Mend it, or leave the image out.", "malformed segmentation"
    )


def mask_api() -> Any:
    """The library that decodes masks. It measures run lengths first, where pycocotools leaves memory as it was behind runs that are too short.

    Raises:
        ImportError: without it.
    """
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise ImportError("Masks of objects need faster-coco-eval: `pip install 'scalekd-hf[transfer]'`.") from error
    return mask
