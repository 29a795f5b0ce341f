"""Folders of images: what is a split, what a class, and which files are left out; said in one line."""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from ..texts import one_line
from .decoding import BadImageError, pillow_errors
from .formats import image_endings, package_for_ending, readable_formats


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
TABLE, BESIDE, NEEDS = "tables", "images beside the folders of classes", "images that need the package"


@dataclass
class ImageFolder:
    """Images of a folder by split and class, as `read_folder` has found them.

    Attributes:
        splits: files by class by split; the class of images outside of class folders is None. A folder without splits has
            "all" alone.
        has_splits: whether folders of splits were found.
        unused: files by the reason for which they are left out, below the root.
    """

    root: Path
    splits: dict[str, dict[str | None, list[str]]]
    has_splits: bool
    unused: dict[str, list[str]] = field(default_factory=dict)

    @property
    def classes(self) -> list[str]:
        """Names of the classes of all splits, sorted as text, by code point and not by a locale."""
        return sorted({name for files in self.splits.values() for name in files if name is not None})

    def describe(self) -> str:
        """One line for the log."""
        images = sum(len(files) for split in self.splits.values() for files in split.values())
        numbers = ", ".join(f"{split} {sum(map(len, files.values()))}" for split, files in self.splits.items())
        words = f"{len(self.classes) or 'no'} classes, {images} images, {f'splits: {numbers}' if self.has_splits else 'no splits'}"
        left = "; ".join(f"{len(names)} {reason}: {_first(names)}" for reason, names in sorted(self.unused.items()))
        return f"{words}{f'. Not used: {left}' if left else ''}"

    def list_unused(self, file: Path) -> None:
        """Write the files that are left out as JSON lines, each with its reason; where there are none, there is no such file."""
        lines = [
            json.dumps({"file": name, "reason": reason})
            for reason, names in sorted(self.unused.items())
            for name in names
        ]
        if not lines:
            file.unlink(missing_ok=True)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        logger.warning("The files that are not used are listed in %r.", str(file))

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
        ValueError: folders that can be read in two ways, or that are not what the argument says; or images of which none can be
            decoded here.
    """
    root = Path(root)
    unused: dict[str, list[str]] = defaultdict(list)
    above = frozenset({os.path.realpath(root)})
    folders_here = [entry for entry in _entries(root) if entry.is_dir()]
    found = {entry.name: list(_images(Path(entry.path), unused, above=above)) for entry in folders_here}
    loose = list(_images(root, unused, deep=False))
    if not (loose or any(found.values())):
        _check_decoders(root, unused)
    if TABLE in unused or not (loose or any(found.values())):
        return None
    with_images = [name for name, images in found.items() if images]
    is_split = {name: split_of(name) is not None for name in with_images}
    has_classes = {name: any(_below(root / name, image) for image in found[name]) for name in with_images}
    if folders == "splits" and not all(is_split.values()):
        raise ValueError(_unnamed_splits(root, [name for name in with_images if not is_split[name]]))
    if (
        folders == "auto"
        and not all(is_split.values())
        and any(has_classes[name] for name in with_images if is_split[name])
    ):
        raise ValueError(_two_readings(root, with_images, is_split))
    has_splits = folders != "classes" and bool(with_images) and all(is_split.values())
    splits: dict[str, dict[str | None, list[str]]] = {ALL: {None: loose}}
    if with_images:
        unused[BESIDE] += loose
        splits = _by_split(root, found, unused) if has_splits else {ALL: _by_class(root, found)}
    names = {reason: [os.path.relpath(file, root) for file in files] for reason, files in unused.items() if files}
    folder = ImageFolder(root, splits, has_splits, names)
    _say(folder)
    return folder


def _by_class(root: Path, found: dict[str, list[str]]) -> dict[str | None, list[str]]:
    for name, images in found.items():
        if not images and split_of(name) is None:
            logger.warning("The class folder %r holds no image: its class is there, without one.", str(root / name))
    return {name: sorted(images) for name, images in sorted(found.items())}


def _by_split(
    root: Path, found: dict[str, list[str]], unused: dict[str, list[str]]
) -> dict[str, dict[str | None, list[str]]]:
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
                unused[BESIDE].append(image)
            else:
                classes.setdefault(below, []).append(image)
        splits[split] = {key: sorted(files) for key, files in sorted(classes.items(), key=lambda item: str(item[0]))}
    return {split: splits[split] for split in SPLITS if split in splits}


def _say(folder: ImageFolder) -> None:
    """Say how a folder is read, and what is odd about it."""
    root, classes = str(folder.root), folder.classes
    logger.warning("%s: %s.", one_line(folder.root.name), folder.describe())
    if len(classes) == 1:
        logger.warning("%r has a single class, %r: there is nothing to tell apart.", root, classes[0])
    if all(name.isdecimal() for name in classes) and classes != sorted(classes, key=int):
        logger.warning("The classes of %r are sorted as text: %s.", root, ", ".join(classes[:SHOWN]))


def _check_decoders(root: Path, unused: dict[str, list[str]]) -> None:
    """Refuse a folder of images of which none can be decoded here."""
    reasons = [f"{len(files)} {reason}" for reason, files in unused.items() if reason.startswith(NEEDS)]
    if reasons:
        raise ValueError(f"{str(root)!r} holds no image that can be decoded here: {'; '.join(reasons)}. Install it.")


def _entries(folder: Path) -> list[os.DirEntry]:
    """What a folder shows, sorted by code point."""
    return [entry for entry in _sorted(folder) if not entry.name.startswith(".")]


def _sorted(folder: Path) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _images(
    folder: Path, unused: dict[str, list[str]], deep: bool = True, above: frozenset[str] = frozenset()
) -> Iterator[str]:
    """Images in a folder and, if `deep`, in those below it, links followed; what else is there is noted."""
    here = os.path.realpath(folder)
    for entry in _sorted(folder):
        if entry.name.startswith("."):
            unused["hidden files or folders"].append(entry.path)
        elif entry.is_dir():
            if deep and os.path.realpath(entry.path) not in above | {here}:  # no link in a circle
                yield from _images(Path(entry.path), unused, above=above | {here})
        elif (reason := _unused_for(entry)) is None:
            yield entry.path
        else:
            unused[reason].append(entry.path)


def _unused_for(entry: os.DirEntry) -> str | None:
    """Why a file is no image to read; None where it is one."""
    ending = Path(entry.name).suffix.lower()
    if ending in TABLES or entry.name in METADATA:
        return TABLE
    if ending in image_endings() or (not ending and _is_image(entry.path)):
        return None
    package = package_for_ending(ending)
    if package is not None:
        return f"{NEEDS} {package} ({ending})"
    return f"files that are no images here ({ending or 'without an ending'})"


def _is_image(path: str) -> bool:
    try:
        with pillow_errors(), Image.open(path, formats=readable_formats()):
            return True
    except BadImageError as error:
        return error.kind == "too large"


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


def _first(names: list[str]) -> str:
    return ", ".join(map(one_line, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
