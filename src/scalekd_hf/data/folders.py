"""Folders of images: what is a split, what a class, and which files are left out; said in one line."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, UnidentifiedImageError


__all__ = ["ALL", "FOLDERS", "ImageFolder", "read_folder", "split_of"]

logger = logging.getLogger(__name__)

FOLDERS = ("auto", "classes", "splits")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
ALL = "all"  # where there are no splits
# What `datasets` reads: tables, archives, and labels beside the images.
TABLES = (".parquet", ".arrow", ".tar", ".zip")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SHOWN = 5


@dataclass
class ImageFolder:
    """Images of a folder by split and class, as `read_folder` has found them.

    Attributes:
        splits: files by class by split; the class of images outside of class folders is None. A folder without splits has
            "all" alone.
        has_splits: whether folders of splits were found.
        unused: number of files by the reason for which they are left out.
    """

    root: Path
    splits: dict[str, dict[str | None, list[str]]]
    has_splits: bool
    unused: Counter[str] = field(default_factory=Counter)

    @property
    def classes(self) -> list[str]:
        """Names of the classes of all splits, sorted as text, by code point and not by a locale."""
        return sorted({name for files in self.splits.values() for name in files if name is not None})

    def describe(self) -> str:
        """One line for the log."""
        images = sum(len(files) for split in self.splits.values() for files in split.values())
        numbers = ", ".join(f"{split} {sum(map(len, files.values()))}" for split, files in self.splits.items())
        words = f"{len(self.classes) or 'no'} classes, {images} images, {f'splits: {numbers}' if self.has_splits else 'no splits'}"
        left = "; ".join(f"{number} {reason}" for reason, number in sorted(self.unused.items()))
        return f"{words}{f'. Not used: {left}' if left else ''}"

    def tables(self) -> dict[str, datasets.Dataset]:
        """A map-style data set for each split; nothing is copied."""
        return {split: self._table(files) for split, files in self.splits.items()}

    def _table(self, files: dict[str | None, list[str]]) -> datasets.Dataset:
        classes = self.classes
        rows: dict[str, list[Any]] = {"image": [path for paths in files.values() for path in paths]}
        features = {"image": datasets.Image()}
        if any(name is not None for name in files):  # of a split without class folders, no label is known
            places = {name: place for place, name in enumerate(classes)}
            rows["label"] = [places[str(name)] for name, paths in files.items() for _ in paths]
            features["label"] = datasets.ClassLabel(names=classes)
        return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def read_folder(root: str | Path, folders: str = "auto") -> ImageFolder | None:
    """Read the structure of a folder of images. A class is everything below its folder, however deep.

    Args:
        root: the folder.
        folders: what the folders under the root are: "classes", "splits", or "auto". They are splits if all that hold images
            are named like splits and at least one of them holds folders of images, or if nothing but "train", "validation"
            and "test" stands there.

    Returns:
        None for what `datasets` reads: tables, archives, images with a table of metadata, no images at all.

    Raises:
        ValueError: folders that can be read in two ways, or that are not what the argument says.
    """
    root = Path(root)
    unused: Counter[str] = Counter()
    found = {entry.name: list(_images(Path(entry.path), unused)) for entry in _entries(root) if entry.is_dir()}
    loose = list(_images(root, unused, deep=False))
    if unused["tables"] or not (loose or any(found.values())):
        return None
    with_images = [name for name, images in found.items() if images]
    is_split = {name: split_of(name) is not None for name in with_images}
    has_classes = {name: any(_below(root / name, image) for image in found[name]) for name in with_images}
    if folders == "splits" and not all(is_split.values()):
        raise ValueError(_unnamed_splits(root, [name for name in with_images if not is_split[name]]))
    if folders != "classes" and with_images and all(is_split.values()):
        return _with_splits(root, found, unused, len(loose))
    if (
        folders == "auto"
        and any(is_split.values())
        and any(has_classes[name] for name in with_images if is_split[name])
    ):
        raise ValueError(_two_readings(root, with_images, is_split))
    if not with_images:
        return _said(root, ImageFolder(root, {ALL: {None: loose}}, False, unused))
    _leave_out(unused, len(loose))
    for name, images in found.items():
        if not images and split_of(name) is None:
            logger.warning("The class folder %r holds no image: its class is there, without one.", str(root / name))
    classes: dict[str | None, list[str]] = {name: sorted(images) for name, images in sorted(found.items())}
    return _said(root, ImageFolder(root, {ALL: classes}, False, unused))


def _with_splits(root: Path, found: dict[str, list[str]], unused: Counter[str], loose: int) -> ImageFolder:
    _leave_out(unused, loose)
    splits: dict[str, dict[str | None, list[str]]] = {}
    for name, images in sorted(found.items()):
        split = split_of(name)
        if split is None or not images:
            continue
        if split in splits:
            raise ValueError(
                f"{str(root)!r} has two folders of the split {split!r}, one of them {name!r}. Rename one."
            )
        classes: dict[str | None, list[str]] = {entry.name: [] for entry in _entries(root / name) if entry.is_dir()}
        has_classes = bool(classes)
        for image in images:
            below = _below(root / name, image)
            if below is None and has_classes:
                unused["images beside the folders of classes"] += 1
            else:
                classes.setdefault(below, []).append(image)
        splits[split] = {key: sorted(files) for key, files in sorted(classes.items(), key=lambda item: str(item[0]))}
    ordered = {split: splits[split] for split in SPLITS if split in splits}
    return _said(root, ImageFolder(root, ordered, True, unused))


def _said(root: Path, folder: ImageFolder) -> ImageFolder:
    logger.info("%s: %s.", root.name, folder.describe())
    classes = folder.classes
    if len(classes) == 1:
        logger.warning("%r has a single class, %r: there is nothing to tell apart.", str(root), classes[0])
    if all(name.isdecimal() for name in classes) and classes != sorted(classes, key=int):
        logger.warning("The classes of %r are sorted as text: %s.", str(root), ", ".join(classes[:SHOWN]))
    return folder


def _leave_out(unused: Counter[str], loose: int) -> None:
    if loose:
        unused["images beside the folders of classes"] += loose


def _entries(folder: Path) -> list[os.DirEntry]:
    """What a folder shows, sorted by code point."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _images(
    folder: Path, unused: Counter[str], deep: bool = True, above: frozenset[str] = frozenset()
) -> Iterator[str]:
    """Images in a folder and, if `deep`, in those below it, links followed; what else is there is counted."""
    here = os.path.realpath(folder)
    for entry in _entries(folder):
        if entry.is_dir():
            if deep and os.path.realpath(entry.path) not in above | {here}:  # no link in a circle
                yield from _images(Path(entry.path), unused, above=above | {here})
            continue
        ending = Path(entry.name).suffix.lower()
        if ending in TABLES or entry.name in METADATA:
            unused["tables"] += 1
        elif ending in _image_endings() or (not ending and _is_image(entry.path)):
            yield entry.path
        else:
            unused[f"files that are no images here ({ending or 'without an ending'})"] += 1


def _is_image(path: str) -> bool:
    try:
        with Image.open(path):
            return True
    except (OSError, UnidentifiedImageError, ValueError):
        return False


def _below(folder: Path, image: str) -> str | None:
    """The folder right below `folder` that an image lies in; None where it lies in `folder` itself."""
    parts = Path(image).relative_to(folder).parts
    return parts[0] if len(parts) > 1 else None


def split_of(name: str) -> str | None:
    """The split that a folder of that name holds, if it is the name of one."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def _unnamed_splits(root: Path, names: list[str]) -> str:
    known = ", ".join(name for names in SPLITS.values() for name in names)
    return f"`folders` is 'splits', but {names[0]!r} in {str(root)!r} is no split's name. Known are {known}."


def _two_readings(root: Path, names: list[str], is_split: dict[str, bool]) -> str:
    splits = [name for name in names if is_split[name]]
    return (
        f"{str(root)!r} can be read in two ways: {', '.join(map(repr, splits[:SHOWN]))} as splits that hold folders of classes, "
        f"or {', '.join(map(repr, names[:SHOWN]))} as classes. Set `folders` to 'splits', after the others are moved away, or to "
        "'classes'."
    )


@cache
def _image_endings() -> set[str]:
    """Endings of the files that Pillow can open."""
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
