"""Dense data as people have it: COCO files, ADE20K and folders of masks, and data sets of the Hub, as `datasets` objects."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from ..data.formats import image_endings
from ..data.holdout import held_out_share, hold_out
from ..data.labels import read_class_names, some, unshared
from ..data.loading import DataArguments, load_data, matching_files
from . import columns
from .coco import CocoFile, coco_files, of_split
from .preparation import BOX_FORMATS, DensePreparation, DetectionPreparation, SegmentationPreparation, check_box_format
from .targets import MAX_CLASSES


__all__ = ["TASKS", "DenseData", "DenseDataArguments", "load_dense_data"]

logger = logging.getLogger(__name__)

TASKS = ("segment", "detect")
FOLDERS = ("annotations", "masks", "labels")  # folders of masks, beside `images`
MASK_ENDINGS = (".png", ".bmp", ".tif", ".tiff")
ADE_NAMES, ADE_CLASSES, ADE_FILE = "objectInfo150.txt", 150, "ADE_"


@dataclass
class DenseDataArguments(DataArguments):
    """Where images and their annotations come from.

    Args:
        dataset: a data set on the Hub, or a local folder: of COCO, of ADE20K, of `images` and `annotations`, `masks` or `labels`, or
            one that `datasets.load_dataset` understands.
        train_files, eval_files: COCO files, or patterns of Parquet, WebDataset or Arrow files, instead of `dataset`.
        train_images, eval_images: folders of the images of COCO files; by default beside them or where COCO has them.
        image_column: of the images.
        label_column: of the masks, or of the objects; by default the one with a usual name.
        class_names, num_classes: as for a teacher, see `data.labels.read_class_names`; needed where the data name no classes.
        box_format: "xywh" or "xyxy" of the boxes of a data set with a column of objects, in pixels. COCO files have "xywh".
        zero_is_ignored: whether 0 in masks means no class, and 1 the first; by default in ADE20K's folder alone.
        others: see `DataArguments`.
    """

    train_images: str | None = field(default=None, metadata={"help": "Folder of the images of a COCO file."})
    eval_images: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    image_column: str = field(default="image", metadata={"help": "Column of the data set that holds the images."})
    label_column: str | None = field(default=None, metadata={"help": "Column that holds masks, or objects."})
    class_names: list | str | None = field(default=None, metadata={"help": "Names of the classes, or their file."})
    num_classes: int | None = field(default=None, metadata={"help": "Number of classes, where they have no names."})
    box_format: str | None = field(
        default=None, metadata={"help": "What the four numbers of a box are.", "choices": list(BOX_FORMATS)}
    )
    zero_is_ignored: bool | None = field(default=None, metadata={"help": "Whether 0 in masks means no class."})


@dataclass
class DenseData:
    """Data sets of one task, and how their rows are read.

    Attributes:
        train, evaluation: `datasets` objects; the second may be None.
        class_names: K, in the order of their indices.
    """

    train: Any
    evaluation: Any
    class_names: list[str]
    task: str
    image_column: str
    label_column: str
    box_format: str = "xywh"
    zero_is_ignored: bool = False

    def preparation(self, spec: Any, training: bool, **options: Any) -> DensePreparation:
        """What makes samples of the rows; further options are those of `SegmentationPreparation` or `DetectionPreparation`."""
        options |= {"image_column": self.image_column, "label_column": self.label_column}
        count = len(self.class_names)
        if self.task == "segment":
            return SegmentationPreparation(spec, training, count, zero_is_ignored=self.zero_is_ignored, **options)
        names = self.class_names
        return DetectionPreparation(spec, training, count, box_format=self.box_format, class_names=names, **options)


def load_dense_data(arguments: DenseDataArguments, task: str, masks: bool = False) -> DenseData:
    """The training and the evaluation data, and the classes.

    Training images without objects are left out, as torchvision's reference does, but in streams, where they stay as images of
    nothing; evaluation keeps them, for what is found in them is wrong.

    Args:
        arguments: where the data come from.
        task: "segment" or "detect".
        masks: whether a detector learns masks of its objects.

    Raises:
        ValueError: no data, files that are not what they should be, no classes, classes that differ between training and
            evaluation, boxes that do not fit their format, or not one annotation to train on.
    """
    if task not in TASKS:
        raise ValueError(f"`task` is {task!r}: the tasks are {', '.join(TASKS)}.")
    if arguments.box_format is not None:
        check_box_format(arguments.box_format)
    data = _loaded(arguments, task, masks)
    if task == "detect":
        data.train = columns.with_objects(data.train, data.label_column)
        columns.check_objects(data.evaluation, data.label_column)
    elif len(data.class_names) > MAX_CLASSES:
        raise ValueError(
            f"`class_names` has {len(data.class_names)} names; masks have at most {MAX_CLASSES} classes. Merge some."
        )
    if task == "segment":
        columns.check_values(data.train, data.label_column, len(data.class_names), data.zero_is_ignored)
    logger.info("%d classes: %s.", len(data.class_names), some(data.class_names))
    return data


def _loaded(arguments: DenseDataArguments, task: str, masks: bool) -> DenseData:
    root = Path(str(arguments.dataset))
    local = arguments.dataset is not None and root.is_dir()
    stated = read_class_names(arguments.class_names, arguments.num_classes)
    if task == "segment":
        folder = next(
            (root / name for name in FOLDERS if local and (root / "images").is_dir() and (root / name).is_dir()), None
        )
        return (
            _of_hub(arguments, task, stated, masks) if folder is None else _of_masks(arguments, root, folder, stated)
        )
    named = [pattern for pattern in (arguments.train_files, arguments.eval_files) if pattern]
    known = coco_files(root) if local else {}
    if known or (named and all(file.endswith(".json") for file in named)):
        return _of_coco(arguments, root, known, stated, masks)
    return _of_hub(arguments, task, stated, masks)


def _divided(arguments: DenseDataArguments, load: Callable[[str, str], Any]) -> tuple[Any, Any]:
    """The splits to train and to evaluate on, where `load` gives the one of a name, for an argument."""
    share = held_out_share(arguments.eval_split)
    if share is not None and arguments.eval_files is not None:
        raise ValueError(
            f"`eval_split` {arguments.eval_split!r} holds out a share, but there are `eval_files`, too: which is meant? Leave one out."
        )
    if share is not None:
        return hold_out(load(arguments.train_split, "train_split"), share)
    train = load(arguments.train_split, "train_split")
    if arguments.eval_split.lower() == "none" and arguments.eval_files is None:
        return train, None
    return train, load(arguments.eval_split, "eval_split")


# COCO files


def _of_coco(
    arguments: DenseDataArguments, root: Path, known: dict[str, Path], stated: list[str] | None, masks: bool
) -> DenseData:
    if arguments.box_format == "xyxy":
        raise ValueError(
            "`box_format` is 'xyxy', but boxes of COCO files are left, top, width and height. Leave it out."
        )
    label_column = arguments.label_column or columns.OBJECTS[0]
    names: list[str] = []

    def load(split: str, argument: str) -> datasets.Dataset:
        files, images = (
            (arguments.train_files, arguments.train_images)
            if argument == "train_split"
            else (arguments.eval_files, arguments.eval_images)
        )
        file = _one(files) if files else of_split(known, split, argument, root)
        content = CocoFile(file, images)
        if not names:
            names.extend(_agreed(content.names, stated, arguments.num_classes))
        if set(content.names) != set(names):
            raise ValueError(
                f"{str(file)!r} has other classes than the training data.{unshared(content.names, names, 'Training')} Use files with "
                "the same categories."
            )
        return content.table(names, arguments.image_column, label_column, masks)

    if arguments.train_files and not arguments.eval_files and not known:
        if held_out_share(arguments.eval_split) is None and arguments.eval_split.lower() != "none":
            raise ValueError(
                f"There are `train_files`, but no `eval_files`, and `eval_split` is {arguments.eval_split!r}. Name files, a share to "
                "hold out (`--eval_split 0.1`), or none."
            )
    train, evaluation = _divided(arguments, load)
    return DenseData(train, evaluation, names, "detect", arguments.image_column, label_column)


def _one(pattern: str) -> Path:
    files = matching_files(pattern)
    if len(files) != 1:
        raise ValueError(f"{pattern!r} matches {len(files)} files, seen from {str(Path.cwd())!r}. Name one COCO file.")
    return Path(files[0])


# Folders of masks


def _of_masks(arguments: DenseDataArguments, root: Path, folder: Path, stated: list[str] | None) -> DenseData:
    splits = [
        entry.name
        for entry in sorted((root / "images").iterdir())
        if entry.is_dir() and (folder / entry.name).is_dir()
    ]
    known = {name: name for name in splits} or {"train": "."}
    is_ade = next((root / "images").rglob(f"{ADE_FILE}*"), None) is not None
    names = stated or _ade_names(root, is_ade)
    if names is None and arguments.num_classes is not None:
        names = [str(number) for number in range(arguments.num_classes)]
    if names is None:
        raise _without_names(str(root), "masks")
    zero = is_ade if arguments.zero_is_ignored is None else arguments.zero_is_ignored
    label_column = arguments.label_column or columns.MASKS[0]

    def load(split: str, argument: str) -> datasets.Dataset:
        name = of_split(known, split, argument, root / "images")
        pairs = _pairs(root / "images" / name, folder / name)
        features = datasets.Features({arguments.image_column: datasets.Image(), label_column: datasets.Image()})
        images, found = zip(*pairs, strict=True)
        return datasets.Dataset.from_dict(
            {arguments.image_column: list(images), label_column: list(found)}, features=features
        )

    train, evaluation = _divided(arguments, load)
    return DenseData(train, evaluation, names, "segment", arguments.image_column, label_column, zero_is_ignored=zero)


def _ade_names(root: Path, is_ade: bool) -> list[str] | None:
    """ADE20K's classes: the first of the names in its table, or numbers."""
    file = root / ADE_NAMES
    if not file.is_file():
        return [str(number) for number in range(ADE_CLASSES)] if is_ade else None
    lines = file.read_text(encoding="utf-8").splitlines()[1:]
    return [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]


def _pairs(images: Path, masks: Path) -> list[tuple[str, str]]:
    """Images and masks with the same path but for its ending; what has no counterpart is left out and counted.

    Raises:
        ValueError: there is not one pair.
    """
    endings = image_endings()
    found = {_stem(file, images): file for file in sorted(images.rglob("*")) if file.suffix.lower() in endings}
    known = {_stem(file, masks): file for file in sorted(masks.rglob("*")) if file.suffix.lower() in MASK_ENDINGS}
    pairs = [(str(file), str(known[stem])) for stem, file in found.items() if stem in known]
    if not pairs:
        raise ValueError(
            f"{str(images)!r} has {len(found)} images and {str(masks)!r} {len(known)} masks, but not one of the same name. Call a mask as "
            "its image, with the ending .png."
        )
    if len(found) < (count := sum(file.suffix.lower() in endings for file in images.rglob("*"))):
        raise ValueError(
            f"{str(images)!r} has {count - len(found)} images of the same name as another, but for the ending: which belongs to the mask is "
            "not known. Rename or remove them."
        )
    for what, alone in (
        ("images without a mask", found.keys() - known),
        ("masks without an image", known.keys() - found),
    ):
        if alone:
            logger.warning("%r: %d %s are left out: %s.", str(images), len(alone), what, some(sorted(alone)))
    return pairs


def _stem(file: Path, folder: Path) -> str:
    return file.relative_to(folder).with_suffix("").as_posix()


# Data sets of the Hub, and others that `datasets` reads


def _of_hub(arguments: DenseDataArguments, task: str, stated: list[str] | None, masks: bool) -> DenseData:
    train, evaluation = load_data(arguments)
    label_column = columns.label_column_of(
        train, arguments.image_column, arguments.label_column, columns.MASKS if task == "segment" else columns.OBJECTS
    )
    own = columns.names_of_objects(train, label_column) if task == "detect" else None
    if own is None and stated is None and arguments.num_classes is None:
        raise _without_names("the data set", "objects" if task == "detect" else "masks")
    names = _agreed(own, stated, arguments.num_classes)
    others = (
        columns.names_of_objects(evaluation, label_column) if task == "detect" and evaluation is not None else None
    )
    if others is not None and others != names:
        raise ValueError(
            f"The evaluation data have other classes than the training data, or another order: {some(others)}, and {some(names)}."
            f"{unshared(others, names, 'Training')} Store both with the same list of names."
        )
    data = DenseData(train, evaluation, names, task, arguments.image_column, label_column)
    data.zero_is_ignored = bool(arguments.zero_is_ignored)
    if task == "detect":
        columns.check_categories(train, arguments.image_column, label_column, len(names))
        data.box_format = columns.fitting_format(train, arguments.image_column, label_column, arguments.box_format)
        if masks:
            columns.check_masks(train, arguments.image_column, label_column)
    return data


def _agreed(own: list[str] | None, stated: list[str] | None, num_classes: int | None) -> list[str]:
    """The names of the classes: the data's, which those that are stated must not contradict, or numbers."""
    if own is not None and stated is not None and own != stated:
        raise ValueError(
            f"`class_names` has {len(stated)} names, and the data have {len(own)} classes of their own, or another order."
            f"{unshared(own, stated, '`class_names`')} Leave it out, or list {some(own)}."
        )
    names = own or stated or [str(number) for number in range(num_classes or 0)]
    if num_classes not in (None, len(names)):
        raise ValueError(f"`num_classes` is {num_classes}, but the data name {len(names)} classes. Leave it out.")
    return names


def _without_names(where: str, what: str) -> ValueError:
    return ValueError(
        f"Nothing tells the classes of the {what} in {where}. List them as `class_names`, or set `num_classes` to their number."
    )
