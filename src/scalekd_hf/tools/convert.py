"""A checkpoint of others as a student folder, and a student of ours as a checkpoint of OpenMMLab's."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import ModelCard
from timm.models import get_pretrained_cfg
from torch import Tensor

from ..data.imagenet import class_names
from ..manifest import digest
from ..models import mixers, variants
from ..models.foreign_pickle import read_foreign
from ..models.openmmlab import (
    FAMILIES,
    classes_in,
    family_of,
    find_weights,
    from_openmmlab,
    is_openmmlab,
    to_openmmlab,
)
from ..models.saving import check_rebuildable, replacing, save_student
from ..models.students import Student, load_student
from ..publishing.model_card import CardFacts, make_card
from ..publishing.provenance import Source, versions
from .told import (
    POOLED_FIRST,
    check_class_token,
    classes_of,
    configuration_of,
    is_distillation,
    norm_before_pooling,
    normalisation_of,
)
from .words import nearest, paper_results, read_config, shipped_configs


__all__ = ["Converted", "convert", "known_students", "write_openmmlab"]

PAIR = re.compile(r"(swin_[slb]|eva_l)_to_(\w+?)(_traditional|_600_epochs)?$")
PREPARATION = ("crop_pct", "interpolation", "antialias")  # settings of a recipe, beside `student_args`
# What the authors' code builds where a recipe names what timm has: the recipes' student, and the name in timm.
AS_THE_AUTHORS = {
    "resnet50d": ("resnet50", "timm/resnet50d"),
    "vit_b14": ("vit_b14", "timm/vit_base_patch14_224_openmmlab"),
    "eva02_s": ("eva02_s", "timm/eva02_small_patch14_336_openmmlab"),
}
# Of the arguments that a recipe gives its student, where the authors' is another.
KEPT = ("mean", "std", "drop_path_rate")
OWN = (*mixers.__all__, *variants.__all__)  # that timm does not know
WRITTEN = "student.pth"


@dataclass(frozen=True)
class Build:
    """A network that a checkpoint may be of.

    Attributes:
        name: as `load_student` takes it.
        arguments: for `load_student`, those of its images included.
        spec: how its images are prepared, beside these.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Converted:
    """What `convert` has made.

    Attributes:
        folder: of the student.
        student: loaded with the weights.
        weights: which of the file they are, see `find_weights`.
        passed_over: kinds of objects in the file that were not read.
        normalised_by: where the images' mean and standard deviation are from.
    """

    folder: Path
    student: Student
    weights: str
    passed_over: list[str]
    normalised_by: str


def known_students() -> list[str]:
    """The names of the published students, as `convert` takes them."""
    return sorted({match[2] for name in shipped_configs() if (match := PAIR.match(name))} | set(AS_THE_AUTHORS))


def convert(
    checkpoint: str | Path,
    student: str,
    folder: str | Path,
    *,
    teacher: str | None = None,
    raw: bool = False,
    student_args: Mapping[str, Any] | None = None,
) -> Converted:
    """Write the student folder of a checkpoint of mmcls, mmpretrain or timm, as the trainer would write it, with a card.

    Args:
        checkpoint: a file of a classifier, or of a whole distillation with the student in it.
        student: one of `known_students`, which sets the authors' preparation of images, too; or a model, as `load_student` takes it.
        folder: made where it does not exist; it must be empty.
        teacher: "swin_l" and so on, or the name of a recipe: whose student it is, for the card.
        raw: the weights of the last step, where the file has a moving average, too.
        student_args: further arguments of the model.

    Raises:
        ValueError: a folder that is not empty, a file that cannot be read, weights that are missing, left over or of other shapes, or a student of another name.
    """
    folder = Path(folder)
    _check_empty(folder)
    recipe = _recipe(student, teacher)
    content, passed_over = read_foreign(checkpoint)
    weights, which = find_weights(content, raw)
    theirs, given = is_openmmlab(weights), dict(student_args or {})
    file = _File(weights, configuration_of(content), given, student in known_students(), is_distillation(content))
    builds = [Build(build.name, {**build.arguments, **given}, build.spec) for build in _builds(student)]
    made, state = _fitting([_settled(build, file) for build in builds], file, student)
    names = classes_of(content, made.num_labels)
    if names is not None and (made.labels is None or names != class_names()):
        made.name_labels(names)
    normalised_by = _normalise(made, file)
    made.model.load_state_dict(state, strict=True)
    check_rebuildable(made)
    facts = {
        "checkpoint": f"`{Path(checkpoint).name}`",
        "its SHA-256": f"`{digest(Path(checkpoint), hashlib.sha256())}`",
        "its layout": "OpenMMLab's (mmcls, mmpretrain)" if theirs else "the library's own",
        "its weights": {"only ones": None}.get(which, which),
    }
    with replacing(folder) as unfinished:
        save_student(made, unfinished)
        card = _card(made, folder.resolve().name, recipe, Path(checkpoint).name, facts)
        (unfinished / "README.md").write_text(str(card), encoding="utf-8", newline="\n")
    return Converted(folder, made, which, passed_over, normalised_by)


def write_openmmlab(student: Student, folder: str | Path) -> Path:
    """Write a student as a checkpoint that mmpretrain 1.x loads into the classifier of the same architecture.

    Returns:
        The file, `student.pth` in the folder.

    Raises:
        ValueError: a folder that is not empty, or a student of an architecture that OpenMMLab has not under these names.
        OSError: the file cannot be written; nothing is left of it.
    """
    family = family_of(student.model)
    if family is None:
        raise ValueError(
            f"`student` {student.name!r} is a {type(student.model).__name__} of {student.classifier.library}, which cannot be written for "
            f"OpenMMLab. Those of timm that can, with its parts and activations: {', '.join(FAMILIES)}."
        )
    file = Path(folder, WRITTEN)
    _check_empty(file.parent)
    meta = {"CLASSES": student.labels, "student": student.classifier.module.pretrained_cfg.get("architecture")}
    with replacing(file.parent) as unfinished:
        torch.save(
            {"meta": meta, "state_dict": to_openmmlab(family, student.model.state_dict())}, unfinished / WRITTEN
        )
    return file


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"`output_dir` {str(folder)!r} holds something already, which stays as it is. Name another folder."
        )


# Which student it is


@cache
def _published(student: str) -> tuple[Build, ...]:
    """The builds of a published student: what its recipe names, and what the authors' code builds."""
    of, name = AS_THE_AUTHORS.get(student, (student, ""))
    recipes = sorted(
        name for name in shipped_configs() if (match := PAIR.match(name)) and match[2] == of and not match[3]
    )
    settings = read_config(recipes[-1])
    arguments = dict(settings.get("student_args") or {})
    spec = {name: settings[name] for name in PREPARATION if name in settings}
    build = Build(settings["student"], arguments, spec)
    if not name:
        return (build,)
    theirs = Build(name, {key: value for key, value in arguments.items() if key in KEPT}, spec)
    return (theirs,) if of != student else (theirs, build)


def _builds(student: str) -> tuple[Build, ...]:
    if student in known_students():
        return _published(student)
    if "/" in student or Path(student).is_dir():
        return (Build(student),)
    raise ValueError(
        f"`student` {student!r} is not known.{nearest(student, known_students())} Known are {', '.join(known_students())}; "
        "`timm/<name>` is any other."
    )


def _recipe(student: str, teacher: str | None) -> str | None:
    """The recipe of a published pair, for the card.

    Raises:
        ValueError: no published pair of the two.
    """
    if teacher is None:
        return None
    of = AS_THE_AUTHORS.get(student, (student,))[0]
    pairs = {name: match for name in shipped_configs() if (match := PAIR.match(name)) and match[2] == of}
    name = teacher if teacher in pairs else f"{teacher}_to_{of}"
    if name not in pairs:
        known = sorted({match[1] for match in pairs.values()} | {name for name in pairs if pairs[name][3]})
        raise ValueError(
            f"`teacher` is {teacher!r}, but no published pair has it with `student` {student!r}. Those with it: {', '.join(known) or 'none'}. "
            "Leave it out where the student had none, or another."
        )
    return name


@dataclass(frozen=True)
class _File:
    """What is known of a checkpoint: its weights, the text of its configuration, what the user adds; whether it is of the authors' students."""

    weights: dict[str, Tensor]
    text: str
    given: dict[str, Any]
    published: bool
    distillation: bool


def _settled(build: Build, file: _File) -> Build:
    """A build of a ConvNeXt with the place of its last norm, where the weights do not show it."""
    if "backbone.downsample_layers.0.0.weight" not in file.weights or _shape(build, file.weights).kind != "ConvNeXt":
        return build
    authors = file.published and file.distillation and "backbone.norm2.weight" in file.weights
    first = norm_before_pooling(file.text, file.given, authors)
    return Build(build.name, {**build.arguments, POOLED_FIRST: first}, build.spec)


def _normalise(student: Student, file: _File) -> str:
    """Give a student the file's mean and standard deviation; which ones it has, in words."""
    if {"mean", "std"} & set(file.given):
        return "as given"
    if file.published:
        return "the authors'"
    if (found := normalisation_of(file.text, file.weights)) is None:
        return "the model's own, assumed: the checkpoint says nothing of it, or several things"
    student.spec = student.classifier.spec = student.spec.updated(**found)
    return "the checkpoint's"


def _fitting(builds: list[Build], file: _File, student: str) -> tuple[Student, dict[str, Tensor]]:
    """The first of the builds that the weights fit, and the weights in its names."""
    errors = []
    for build in builds:
        try:
            state = _renamed(build, file.weights, file)
        except _Unfit as error:
            errors.append(f"{build.name}: {error}")
            continue
        made = load_student(build.name, **_arguments(build, file.weights))
        made.spec = made.classifier.spec = made.spec.updated(**build.spec)
        return made, state
    other = next((name for name in known_students() if name != student and _fits_any(name, file.weights)), None)
    remedy = f"It fits `--student {other}`." if other else f"It fits none of {', '.join(known_students())}."
    raise ValueError(f"The checkpoint does not fit `student` {student!r} ({'; '.join(errors)}). {remedy}")


class _Unfit(ValueError):
    """Weights of another network."""


def _arguments(build: Build, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Those of `load_student`, with as many classes as the weights have."""
    classes = classes_in(weights)
    return build.arguments if classes is None else {**build.arguments, "num_classes": classes}


class _Shape(NamedTuple):
    """Class, family and shapes of a network, and what a ViT's classifier reads."""

    kind: str
    family: str | None
    shapes: dict[str, tuple[int, ...]]
    pool: str


@cache
def _network(name: str, arguments: str) -> _Shape:
    """A network of which no weight is made; `arguments` as JSON."""
    with torch.device("meta"):
        module = load_student(name, **json.loads(arguments)).model
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    return _Shape(type(module).__name__, family_of(module), shapes, str(getattr(module, "global_pool", "")))


def _shape(build: Build, weights: dict[str, Tensor]) -> _Shape:
    return _network(build.name, json.dumps(_arguments(build, weights)))


def _renamed(build: Build, weights: dict[str, Tensor], file: _File | None = None) -> dict[str, Tensor]:
    """Weights in the names of a network; of a `file` it is checked, too, what their names do not show.

    Raises:
        _Unfit: they are of another one.
        ValueError: the file does not say what has to be known.
    """
    kind, family, shapes, pool = _shape(build, weights)
    if is_openmmlab(weights):
        if family is None:
            raise _Unfit(f"OpenMMLab has no such {kind}, with these parts and activations, that is known here")
        try:
            renamed = from_openmmlab(family, shapes, weights, without_token=True)
        except ValueError as error:
            raise _Unfit(str(error)) from error
        if file is not None and family in ("VisionTransformer", "NormedTwice"):
            check_class_token(file.text, weights, pool, "cls_token" in shapes, file.given, file.published)
        return renamed
    wrong = sorted(set(shapes) ^ set(weights)) or [n for n in shapes if shapes[n] != tuple(weights[n].shape)]
    if wrong:
        raise _Unfit(
            f"{len(wrong)} weights are missing, left over or of another shape, such as {', '.join(wrong[:6])}"
        )
    return weights


def _fits_any(student: str, weights: dict[str, Tensor]) -> bool:
    """Whether weights are of one of the builds of a published student."""
    shapes = {name: value.to("meta") for name, value in weights.items()}
    for build in _published(student):
        try:
            _renamed(build, shapes)
            return True
        except _Unfit:
            continue
    return False


# The card


def _teacher(recipe: str | None) -> Source | None:
    if recipe is None:
        return None
    name = str(read_config(recipe)["teacher"])
    config = get_pretrained_cfg(name.removeprefix("timm/"), allow_unregistered=True)
    return Source(name, name, None, getattr(config, "license", None), name.removeprefix("timm/"))


def _card(student: Student, repo: str, recipe: str | None, checkpoint: str, facts: dict[str, Any]) -> ModelCard:
    name = (
        Path(student.name).resolve().name if Path(student.name).is_dir() else student.name
    )  # no path of this machine
    spec, classifier = student.spec, student.classifier
    architecture = getattr(student.model, "pretrained_cfg", {}).get("architecture", "")
    named = student.labels == class_names()
    side = int(min(spec.size) / spec.crop_pct)
    known = {name: value for name, value in classifier.model_args.items() if name != "num_classes"}
    card = CardFacts(
        repo=repo,
        library=classifier.library,
        student=Source(name, architecture=architecture),
        parameters=sum(parameter.numel() for parameter in student.parameters()),
        num_labels=student.num_labels,
        teacher=_teacher(recipe),
        facts={
            "student": name,
            "its arguments": f"`{known}`" if known else None,
            **facts,
            "classes": "1000, ImageNet-1K's in their usual order, as the file says or as is assumed without names"
            if named
            else None,
            "recipe of the pair": f"`{recipe}`" if recipe else None,
            "before it is loaded": f"`from scalekd_hf import {architecture}`" if architecture in OWN else None,
            "images": f"shorter side to {side} px ({spec.interpolation}), centre crop {spec.size[0]}x{spec.size[1]}",
            "mean and std": f"{list(spec.mean)}, {list(spec.std)}",
            "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        },
        converted=checkpoint,
        paper=paper_results(shipped_configs()[recipe]) if recipe else {},
        tags=["converted"],
    )
    return make_card(card)
