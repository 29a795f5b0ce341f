"""COCO files: JSON with images, annotations and categories, beside a folder of images."""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import datasets

from ..data.decoding import BadImageError
from ..data.folders import split_of
from ..data.labels import some
from .targets import OVERHANG, corners, overhang


__all__ = ["CocoFile", "coco_files", "of_split"]

logger = logging.getLogger(__name__)

LISTED = "_annotations.coco.json"  # of Roboflow, beside the images
PREFIX = "instances_"
ANNOTATIONS = "annotations"
LOOKED_FOR = 20  # images, to find their folder


def coco_files(root: Path) -> dict[str, Path]:
    """The annotation files of a folder by their splits: `annotations/instances_<split>.json`, other JSON in `annotations`,
    `<split>/_annotations.coco.json`, or `instances_<split>.json` in the folder itself; none where it is laid out otherwise."""
    for folder in (root / ANNOTATIONS, root):
        files = sorted(folder.glob(f"{PREFIX}*.json"))
        if files:
            return {file.stem.removeprefix(PREFIX): file for file in files}
    files = sorted(root.glob(f"*/{LISTED}"))
    if files:
        return {file.parent.name: file for file in files}
    return {file.stem: file for file in sorted((root / ANNOTATIONS).glob("*.json"))}


def of_split(known: dict[str, Any], split: str, argument: str, root: Path) -> Any:
    """What is known of a split by its name, or one that means the same: `val2017` is a `validation`.

    Raises:
        ValueError: there is none, or more than one.
    """
    meant = split_of(split) or split
    fitting = [name for name in known if name == split] or [
        name for name in known if split_of(name.rstrip("0123456789").rstrip("_-")) == meant
    ]
    if len(fitting) != 1:
        found = f"{len(fitting)} of that name, {some(fitting)}" if fitting else f"only {some(list(known)) or 'none'}"
        none = (
            ", or hold out a share of the others (`--eval_split 0.1`), or set it to none"
            if argument == "eval_split"
            else ""
        )
        raise ValueError(f"`{argument}` is {split!r}, and in {str(root)!r} there is {found}. Name one of these{none}.")
    return known[fitting[0]]


def _check_ids(file: Path, ids: list[Any], what: str, unknown: str, one: str) -> None:
    """Refuse entries that share an id.

    Raises:
        ValueError: with the id.
    """
    number, times = next(iter(Counter(ids).most_common(1)), (None, 0))
    if times > 1:
        raise ValueError(
            f"{str(file)!r} has {times} {what} of the id {number!r}, as files that were merged without new ids: which objects {unknown} is not "
            f"known. Give each {one} an id of its own."
        )


class CocoFile:
    """A COCO file, read.

    Args:
        file: the JSON file.
        images: folder of its images; by default where its first images are found: beside it, or where COCO has them.

    Attributes:
        categories: names by id, in the order of the ids, which may have gaps.

    Raises:
        ValueError: it is no COCO file, names a category or its id twice, or its images are not found.
    """

    def __init__(self, file: Path, images: str | Path | None = None):
        self.file = file
        try:
            self.content = json.loads(file.read_text(encoding="utf-8"))
            self.categories = {int(entry["id"]): str(entry["name"]) for entry in self.content["categories"]}
            self.images = {_number(entry["id"]): _checked(entry) for entry in self.content["images"]}
            self.annotations = list(self.content["annotations"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{str(file)!r} cannot be read as a COCO file ({type(error).__name__}, {error}): that is JSON with `images`, "
                "`annotations` and `categories`. Check which file is named."
            ) from error
        _check_ids(file, [_number(entry["id"]) for entry in self.content["images"]], "images", "are whose", "image")
        ids = [int(entry["id"]) for entry in self.content["categories"]]
        _check_ids(file, ids, "categories", "are of which class", "category")
        self.categories = dict(sorted(self.categories.items()))
        twice = [name for name, number in Counter(self.categories.values()).items() if number > 1]
        if twice or not self.categories or not self.images:
            what = f"several categories {some(twice)}" if twice else "no categories, or no images"
            raise ValueError(f"{str(file)!r} has {what}. Mend the file: each class has one name, and one id.")
        self.folder = self._folder(images)

    @property
    def names(self) -> list[str]:
        """The classes, in the order of the ids of their categories."""
        return list(self.categories.values())

    def table(self, names: list[str], image_column: str, label_column: str, masks: bool) -> datasets.Dataset:
        """A row for each image, with its path and its objects.

        Args:
            names: all classes, in the order of their indices.
            image_column, label_column: of the images and their objects.
            masks: keep the segmentations.

        Raises:
            ValueError: masks are wanted and no object has one.
        """
        places = {number: names.index(name) for number, name in self.categories.items()}
        by_image = self._by_image()
        rows = [self._objects(image, by_image.get(number, []), places, masks) for number, image in self.images.items()]
        if masks and self.annotations and not any(any(row["segmentation"]) for row in rows):
            raise ValueError(
                f"{str(self.file)!r} has boxes without a segmentation, and the head learns masks. Choose a head without, or annotate "
                "masks."
            )
        self._say_clipped(rows)
        listed = {"bbox": datasets.List(datasets.List(datasets.Value("float64")))}
        listed["category"] = datasets.List(datasets.ClassLabel(names=names))
        for name, kind in (("area", "float64"), ("iscrowd", "bool"), ("segmentation", "string")):
            listed[name] = datasets.List(datasets.Value(kind))
        sides = {side: datasets.Value("int64") for side in ("height", "width")}
        paths = [str(self.folder / image["file_name"]) for image in self.images.values()]
        return datasets.Dataset.from_dict(
            {image_column: paths, label_column: rows},
            features=datasets.Features({image_column: datasets.Image(), label_column: listed | sides}),
        )

    def _say_clipped(self, rows: list[dict[str, Any]]) -> None:
        """Count the boxes that reach beyond their image, where the file says how large that is."""
        count = 0
        for row in rows:
            try:
                if row["height"] and row["width"]:
                    over = overhang(corners(row, "xywh"), (row["height"], row["width"]))
                    count += int((over > OVERHANG).sum())
            except BadImageError:
                continue  # which its reader refuses
        if count:
            logger.warning(
                "%r has %d boxes that reach more than a pixel beyond their image: they end at its border.",
                str(self.file),
                count,
            )

    def _by_image(self) -> dict[Any, list[dict[str, Any]]]:
        by_image = defaultdict(list)
        for annotation in self.annotations:
            by_image[_number(annotation.get("image_id"))].append(annotation)
        lost = [number for number in by_image if number not in self.images]
        if lost:
            objects = sum(len(by_image[number]) for number in lost)
            logger.warning(
                "%r has %d objects of images that it does not list, such as %r.", str(self.file), objects, lost[0]
            )
        return by_image

    def _objects(
        self, image: dict[str, Any], annotations: list[dict[str, Any]], places: dict[int, int], masks: bool
    ) -> dict[str, Any]:
        """The objects of an image, as `targets.read_objects` takes them; -1 is for a category that is not listed."""
        shapes = [entry.get("segmentation") if masks else None for entry in annotations]
        return {
            "bbox": [_numbers(entry.get("bbox")) for entry in annotations],
            "category": [places.get(_number(entry.get("category_id", -1)), -1) for entry in annotations],
            "area": [entry.get("area") for entry in annotations],
            "iscrowd": [str(entry.get("iscrowd") or 0) not in ("0", "False", "false") for entry in annotations],
            "segmentation": [json.dumps(shape) if shape else None for shape in shapes],
            "height": image.get("height"),
            "width": image.get("width"),
        }

    def _folder(self, images: str | Path | None) -> Path:
        """Where the images are."""
        names = [entry["file_name"] for entry in list(self.images.values())[:LOOKED_FOR]]
        beside, split = self.file.parent, self.file.stem.removeprefix(PREFIX)
        above = beside.parent
        tried = [above / split, above / "images" / split, above / "images", above]
        if beside.name != ANNOTATIONS:  # where masks may lie by the names of their images
            tried = [beside / split, beside, beside / "images", *tried]
        tried = tried if images is None else [Path(images)]
        found = next((folder for folder in tried if any((folder / name).is_file() for name in names)), None)
        if found is None:
            argument = "none" if images is None else repr(str(images))
            raise ValueError(
                f"The images of {str(self.file)!r}, such as {names[0]!r}, are not in {some([str(folder) for folder in tried])}. Name "
                f"their folder with `train_images` or `eval_images`, which is {argument}."
            )
        return found


def _number(value: Any) -> Any:
    """An id, also one that is written as text."""
    return int(value) if isinstance(value, str) and value.lstrip("-").isdigit() else value


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    """An image's entry, with sides that are numbers.

    Raises:
        KeyError, TypeError, ValueError: it has no name, or sides that are none.
    """
    if not isinstance(entry["file_name"], str) or not entry["file_name"]:
        raise ValueError(f"the `file_name` of an image is {entry['file_name']!r}")
    sides = {side: int(entry[side]) for side in ("height", "width") if entry.get(side) is not None}
    return {**entry, **sides}


def _numbers(box: Any) -> list[float]:
    """A box as Arrow can hold it; one that is none is empty, which its reader refuses."""
    try:
        return [float(value) for value in box]
    except (TypeError, ValueError):
        return []
