"""ImageNet's 1000 classes by name, and the labelled sets that are made for classifiers of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from timm.data import ImageNetInfo

from ..borrowed.timm import IMAGENET_INFO


__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "ReaL",
    "benchmark",
    "check_classes",
    "check_usual_order",
    "class_names",
    "class_places",
    "label_places",
    "read_real_labels",
]

CLASSES = 1000
IN_PLACE = 0.9  # share of 1000 names that must be known for the others to stand where they stand
VALIDATION_FILE = re.compile(r"ILSVRC2012_val_(\d{8})")
SHOWN = 5


@dataclass(frozen=True)
class Benchmark:
    """A labelled set: on the Hub, or the folder that its authors publish.

    Attributes:
        folder: what that folder is called and holds, for errors.
        hub_id: where it is the default to read; None where a folder has to be named.
        subset: timm's list of the classes that it has, if it has not all.
    """

    name: str
    folder: str
    hub_id: str | None = None
    subset: str | None = None

    @property
    def classes(self) -> list[int] | None:
        """Places of its classes among the 1000, ascending; None for all."""
        return (
            sorted(class_places((IMAGENET_INFO / self.subset).read_text(encoding="utf-8").split(), self.name))
            if self.subset
            else None
        )


IMAGENET = "ILSVRC/imagenet-1k"
WORDNET = "with one folder for each WordNet id"
BENCHMARKS = (
    Benchmark("imagenet-1k", f"the validation images {WORDNET}", IMAGENET),  # Russakovsky et al. 2015
    Benchmark("imagenet-v2", "imagenetv2-matched-frequency-format-val, with folders 0 to 999"),  # Recht et al. 2019
    Benchmark("imagenet-real", f"the validation images {WORDNET}", IMAGENET),  # Beyer et al. 2020
    Benchmark("imagenet-a", f"imagenet-a, {WORDNET}", subset="imagenet_a_synsets.txt"),  # Hendrycks et al. 2021
    Benchmark("imagenet-r", f"imagenet-r, {WORDNET}", subset="imagenet_r_synsets.txt"),  # Hendrycks et al. 2021
    Benchmark("imagenet-sketch", f"sketch, {WORDNET}"),  # Wang et al. 2019
)


def benchmark(name: str) -> Benchmark:
    """The labelled set of this name.

    Raises:
        ValueError: there is none.
    """
    for known in BENCHMARKS:
        if known.name == name:
            return known
    raise ValueError(f"`benchmark` {name!r} is not known; known: {', '.join(known.name for known in BENCHMARKS)}.")


@cache
def _synsets() -> dict[str, int]:
    return {name: place for place, name in enumerate(ImageNetInfo().label_names())}


@cache
def _words() -> dict[str, list[int]]:
    """Places by the words for a class in lower case: all of them, or the first, where that is no other's whole name."""
    descriptions = [words.lower() for words in ImageNetInfo().label_descriptions()]
    places: dict[str, list[int]] = {}
    for place, words in enumerate(descriptions):
        places.setdefault(words, []).append(place)
    whole = set(places)
    for place, words in enumerate(descriptions):
        first = words.split(",")[0]
        if first not in whole:
            places.setdefault(first, []).append(place)
    return places


def class_names() -> list[str]:
    """The 1000 classes by the words for them, in their usual order; a second one of the same words has its WordNet id behind them."""
    info, seen, names = ImageNetInfo(), set[str](), []
    for synset, words in zip(info.label_names(), info.label_descriptions(), strict=True):
        names.append(f"{words} ({synset})" if words in seen else words)
        seen.add(words)
    return names


def class_places(names: list[str], role: str) -> list[int]:
    """Places of classes among ImageNet's 1000 in their usual order (ascending WordNet ids).

    Args:
        names: WordNet ids ("n01440764"), numbers ("0" to "999"), or ImageNet's own words ("tench, Tinca tinca"). Of
            1000 names in words those that are not known stand where they stand, if the others do.
        role: what errors name.

    Raises:
        ValueError: names that mean no class of ImageNet.
    """
    if all(name in _synsets() for name in names):
        return [_synsets()[name] for name in names]
    if all(name.isdecimal() and int(name) < CLASSES for name in names):
        return [int(name) for name in names]
    found = [_words().get(name.lower(), _words().get(name.lower().split(",")[0], [])) for name in names]
    known = [place if place in places else places[0] for place, places in enumerate(found) if places]
    unknown = [name for name, places in zip(names, found, strict=True) if not places]
    in_place = sum(place in places for place, places in enumerate(found))
    if unknown and (len(names) != CLASSES or in_place < IN_PLACE * CLASSES):
        raise ValueError(
            f"{role} has classes that are not ImageNet's: {_some(unknown)} ({len(unknown)} of {len(names)}). WordNet ids "
            "such as n01440764, the numbers 0 to 999 and ImageNet's own names are understood."
        )
    rest = iter(known)
    return [next(rest) if places else place for place, places in enumerate(found)]


def check_usual_order(names: list[str], whose: str, other: str) -> None:
    """Refuse ImageNet's 1000 classes in another order than the usual one, which a network without names has.

    Args:
        names: of 1000 classes; others than ImageNet's are not looked at.
        whose: the side that has them, and `other` the network, as errors call them.

    Raises:
        ValueError: with a class that stands elsewhere.
    """
    try:
        places = class_places(names, whose)
    except ValueError:
        return
    words = [name.lower() for name in class_names()]
    order = enumerate(zip(names, places, strict=True))  # two classes may share a first word
    moved = next((at for at, (name, place) in order if at != place and not words[at].startswith(name.lower())), None)
    if len(names) == CLASSES and moved is not None:
        raise ValueError(
            f"Class {moved} is {names[moved]!r} in {whose}, and {class_names()[moved]!r} to {other}, whose classes are ImageNet's in their "
            "usual order (ascending WordNet ids): the same label must mean the same to both. Call folders by their WordNet ids, or "
            "store labels in that order; with `logit_weight=0` the teacher teaches through its features alone."
        )


def check_classes(model: str, names: list[str] | None, count: int) -> None:
    """Refuse a model that does not have ImageNet's 1000 classes in their usual order.

    Args:
        model: its name.
        names, count: of its classes.

    Raises:
        ValueError: another number of classes, or names that say otherwise.
    """
    if count != CLASSES:
        raise ValueError(
            f"`model` {model!r} has {count} classes, but `benchmark` needs ImageNet's {CLASSES}. Evaluate "
            "it on data with its own classes: `dataset` or `eval_files` without `benchmark`."
        )
    places = class_places(names or [], f"`model` {model!r}")
    wrong = [place for place, other in enumerate(places) if place != other]
    if wrong:
        raise ValueError(
            f"`model` {model!r} has ImageNet's classes in another order: its class {wrong[0]} is "
            f"{(names or [])[wrong[0]]!r}, which is usually {places[wrong[0]]}. Only the usual order can be compared."
        )


def label_places(names: list[str] | None, which: Benchmark) -> list[int]:
    """The place among the 1000 classes of each label of a data set.

    Args:
        names: its class names, or None where its labels are bare numbers.

    Raises:
        ValueError: classes that the set does not have, or bare numbers where they may count 200 classes or 1000.
    """
    if names is None and which.subset:
        raise ValueError(
            f"`benchmark` {which.name!r} has 200 of the 1000 classes, and the labels of this data are numbers without names: "
            f"they may count either. Give the folder that its authors publish as `dataset` ({which.folder})."
        )
    if names is None:
        return list(range(CLASSES))
    places = class_places(names, f"`dataset` for {which.name!r}")
    known = which.classes
    if known and (outside := [name for name, place in zip(names, places, strict=True) if place not in known]):
        raise ValueError(
            f"`benchmark` {which.name!r} has {len(known)} classes, and {_some(outside)} are none of them: this is another data set. "
            f"Give as `dataset` {which.folder}."
        )
    return places


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")


def read_real_labels(file: str | None) -> list[list[int]]:
    """The reassessed labels of the validation images (Beyer et al. 2020, arXiv 2006.07159), in the order of their numbers.

    Args:
        file: the authors' `real.json`; None for the copy that timm brings.

    Raises:
        ValueError: a file that is no such list.
    """
    try:
        labels = json.loads(
            (Path(file) if file else IMAGENET_INFO / "imagenet_real_labels.json").read_text(encoding="utf-8")
        )
        if not all(isinstance(label, int) and 0 <= label < CLASSES for image in labels for label in image):
            raise ValueError("there are other things in it than class numbers from 0 to 999")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"`real_labels` {file!r} must be a JSON list with a list of class numbers for each validation image: {error}"
        ) from error
    return labels


class ReaL:
    """Accuracy by reassessed labels: right is any of an image's, and images without any are left out.

    Args:
        labels: see `read_real_labels`.
        dataset: a `datasets` object; its images' names, or else their order, say which is which.
        image_column: of the data set; a column `file_name` wins.
        images: how many it holds.

    Raises:
        ValueError: names without a number where the order cannot be it, or numbers without labels.
    """

    def __init__(self, labels: list[list[int]], dataset: Any, image_column: str, images: int):
        numbers = [VALIDATION_FILE.search(name) for name in _file_names(dataset, image_column)]
        if all(numbers):
            places = [int(match[1]) - 1 for match in numbers if match]
        elif images == len(labels):
            places = list(range(images))
        else:
            raise ValueError(
                f"`real_labels` has {len(labels)} images and `dataset` {images}, not all with a name such as "
                "ILSVRC2012_val_00000001.JPEG: nothing says which is which. Give all validation images in their order, or with "
                "their names."
            )
        if max(places) >= len(labels):
            raise ValueError(f"`real_labels` ends at image {len(labels)}, but `dataset` has image {max(places) + 1}.")
        self.labels = [labels[place] for place in places]

    def __call__(self, first: np.ndarray, counts: np.ndarray) -> dict[str, float]:
        """`top1` and `images` of predictions (N,) in the order of the rows, of which `counts` (N,) count."""
        rows = [row for row, labels in enumerate(self.labels) if labels and counts[row]]
        if not rows:
            raise ValueError("`dataset` has no image with a label in `real_labels`: nothing can be counted.")
        return {"images": len(rows), "top1": float(np.mean([first[row] in self.labels[row] for row in rows]))}


def _file_names(dataset: Any, image_column: str) -> Iterable[str]:
    features = dataset.features or {}
    column = "file_name" if "file_name" in features else image_column
    if isinstance(features.get(column), datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    for batch in dataset.select_columns([column]).iter(batch_size=100):
        for value in batch[column]:
            yield str((value.get("path") if isinstance(value, dict) else value) or "")
