"""A run as a recipe describes it: the pair, its data and its settings, from a YAML file and the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from ..data.labels import read_class_names
from ..data.loading import DataArguments
from ..texts import redacted
from ..training.config import ScaleKDConfig
from ..training.run_config import RunConfig
from .words import check_known, check_words, read_config, shipped_folder, take_configs


__all__ = [
    "DistillArguments",
    "TeacherArguments",
    "as_words",
    "given_arguments",
    "mapping",
    "parse_config",
    "resolved",
    "student_options",
    "write_config",
]


# What belongs to the run as a whole.
NOT_OF_BASELINE = {
    "output_dir",
    "push_to_hub",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "label_column",
    "deepspeed",
}


@dataclass
class DistillArguments(DataArguments):
    """The pair, and whether the student is first trained alone.

    Args:
        student, teacher: names as `load_student` and `load_teacher` take them.
        student_args, teacher_args: further arguments of the models, as JSON or a mapping.
        student_pretrained: start from the student's published weights.
        plan_processes: processes that `--plan` counts with; by default those of the launch.
        baseline: first train the same student alone, with the same data, budget and settings, and report both.
        baseline_args: settings of `ScaleKDConfig` that the student alone has of its own, as JSON or a mapping: the best learning
            rate and weight decay often differ between the two.
        evaluate_teacher: measure the teacher on the evaluation data, too; once is enough for many runs with the same.
        num_classes: of labels without names; by default those of the teacher, or as many as the labels on disk show. 0 for a
            student without a classifier, a backbone that learns from the teacher's features alone.
        class_names: the classes in the order of their indices, as a list (JSON on a command line) or a text file with one name a
            line: what labels that are names mean, or what labels 0, 1, ... are called. By default those of the data, then of
            the teacher.
        license: of the student, for its model card.
    """

    student: str = field(default="", metadata={"help": "Name or folder of the student."})
    student_args: dict | str | None = field(default=None, metadata={"help": "Arguments of the student, as JSON."})
    student_pretrained: bool = field(default=False, metadata={"help": "Start from the student's published weights."})
    teacher: str = field(default="", metadata={"help": "Name or folder of the teacher."})
    teacher_args: dict | str | None = field(default=None, metadata={"help": "Arguments of the teacher, as JSON."})
    plan_processes: int | None = field(default=None, metadata={"help": "Processes that `--plan` counts with."})
    baseline: bool = field(
        default=False, metadata={"help": "First train the same student alone with the same settings; report both."}
    )
    baseline_args: dict | str | None = field(
        default=None, metadata={"help": "Settings of the student alone, as JSON."}
    )
    evaluate_teacher: bool = field(default=True, metadata={"help": "Measure the teacher on the evaluation data, too."})
    num_classes: int | None = field(
        default=None, metadata={"help": "Number of classes, of labels without names; 0 for a backbone."}
    )
    class_names: list | str | None = field(
        default=None, metadata={"help": "Names of the classes in their order: a list, or a file with one a line."}
    )
    license: str | None = field(default=None, metadata={"help": "License of the student, for its model card."})

    def __post_init__(self) -> None:
        self.baseline_args = mapping(self.baseline_args, "baseline_args")
        known = {f.name for f in fields(ScaleKDConfig) if f.init and not f.name.startswith("hub_")} - NOT_OF_BASELINE
        for name, value in self.baseline_args.items():
            check_known(name, known, f"`{name}` of `baseline_args`")
            if value is None:
                raise ValueError(
                    f"`{name}` of `baseline_args` is null, which says nothing. Leave it out, or give it a value."
                )
        self.student_args = mapping(self.student_args, "student_args")
        self.teacher_args = mapping(self.teacher_args, "teacher_args")
        if self.student_args.get("num_classes") == 0:
            self.num_classes = self.student_args.pop("num_classes")
        check_num_classes(self.num_classes, 0)
        self.class_names = read_class_names(self.class_names, self.num_classes)
        if self.num_classes == 0 and self.baseline:
            raise ValueError(
                "`baseline` is on, but `num_classes` is 0: without a classifier the student alone has nothing to learn from. Set "
                "`baseline` to false."
            )
        for name in ("student", "teacher"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is missing: name a model, a Hub id or a folder.")


@dataclass
class TeacherArguments(DataArguments):
    """The classifier that becomes a teacher.

    Args:
        model: name as `load_student` takes it.
        model_args: further arguments of the model, as JSON or a mapping.
        pretrained: start from its published weights, with a new head for the data's classes.
        num_classes: of labels without names; by default as many as the labels on disk show.
        class_names: see `DistillArguments`.
    """

    model: str = field(default="", metadata={"help": "Name or folder of the classifier."})
    model_args: dict | str | None = field(default=None, metadata={"help": "Arguments of the model, as JSON."})
    pretrained: bool = field(default=True, metadata={"help": "Start from its published weights."})
    num_classes: int | None = field(default=None, metadata={"help": "Number of classes, of labels without names."})
    class_names: list | str | None = field(
        default=None, metadata={"help": "Names of the classes in their order: a list, or a file with one a line."}
    )

    def __post_init__(self) -> None:
        self.model_args = mapping(self.model_args, "model_args")
        self.class_names = read_class_names(self.class_names, self.num_classes)
        if not self.model:
            raise ValueError("`model` is missing: name a model, a Hub id or a folder.")
        check_num_classes(self.num_classes, 1)


def check_num_classes(value: int | None, least: int) -> None:
    """Refuse a number of classes that none can be.

    Raises:
        ValueError: below `least`.
    """
    if value is not None and value < least:
        what = "Give the number of the data's classes, or leave it out"
        raise ValueError(f"`num_classes` is {value}, but must be at least {least}. {what}.")


def mapping(value: Any, name: str) -> dict[str, Any]:
    """A setting that is a mapping, or JSON for one; empty for None.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"`{name}` must be a mapping or JSON, got {value!r} ({error}).") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"`{name}` must be a mapping, got {value!r}.")
    return dict(value or {})


def student_options(arguments: DistillArguments) -> dict[str, Any]:
    """The arguments of the student, no classifier included where it is to have none."""
    options = mapping(arguments.student_args, "student_args")
    return options | {"num_classes": 0} if arguments.num_classes == 0 else options


class _Parser(HfArgumentParser):
    """Raises what argparse would print together with a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[:1].upper()}{message[1:].rstrip('.')}.")


def parse_config(
    arguments_class: type, argv: Sequence[str] | None = None, config_class: type[RunConfig] = ScaleKDConfig
) -> tuple[Any, Any]:
    """Read `[CONFIG.yaml ...] [--any_field value ...]`; a later file wins over an earlier one, the command line over all.

    Args:
        arguments_class: the recipe's own dataclass, beside that of the trainer.
        argv: the words after the script; those of this process by default.
        config_class: of the trainer.

    Returns:
        An instance of `arguments_class`, and one of `config_class`.

    Raises:
        ValueError: a file that cannot be read, an unknown key or a value of the wrong kind.
    """
    files, words = take_configs(sys.argv[1:] if argv is None else argv)
    classes: list[Any] = [arguments_class, config_class]
    parser = _Parser(classes)
    known = {f.name for cls in classes for f in fields(cls) if f.init}
    settings: dict[str, Any] = {}
    for file in files:
        read = read_config(file)
        for key in read:
            check_known(key, known, f"{file}: `{key}`")
        settings |= read
    check_words(words, known)
    arguments, config = parser.parse_args_into_dataclasses([*as_words(settings), *words])
    return arguments, config


def as_words(settings: dict[str, Any]) -> list[str]:
    """A mapping as command line words, so that one parser converts both (YAML reads 1e-4 as text)."""
    words: list[str] = []
    for key, value in settings.items():
        if value is None:
            continue
        if value is False and key.endswith("_strategy"):
            value = "no"  # YAML reads a bare no as false
        if isinstance(value, dict) or (isinstance(value, list) and key == "class_names"):
            value = json.dumps(value)
        if isinstance(value, list):
            words += [f"--{key}", *map(_word, value)]
        else:
            words.append(f"--{key}={value}")  # which may begin with a dash
    return words


def _word(value: Any) -> str:
    """One of several values; argparse takes a negative number with an exponent for an option."""
    return format(Decimal(repr(value)), "f") if isinstance(value, float) and value < 0 else str(value)


def given_arguments(arguments: Any) -> dict[str, Any]:
    """The arguments of a recipe that are not the defaults, for a configuration that gives the same run elsewhere."""
    folder = str(shipped_folder())
    found: dict[str, Any] = {}
    for field_ in fields(arguments):
        value = getattr(arguments, field_.name)
        if value not in (None, {}, field_.default):
            is_shipped = isinstance(value, str) and value.startswith(folder)
            found[field_.name] = f"recipes{value[len(folder) :]}" if is_shipped else _without_secrets(value)
    return found


def resolved(arguments: Any, config: RunConfig) -> dict[str, Any]:
    """Every setting of a run, as YAML holds them and `parse_config` reads them again; tokens are left out, also of URLs."""
    settings = {**{f.name: getattr(arguments, f.name) for f in fields(arguments)}, **config.to_dict()}
    settings["report_to"] = settings["report_to"] or "none"  # none given is the default
    known = {f.name for cls in (type(arguments), type(config)) for f in fields(cls) if f.init}
    kept = {key: value for key, value in settings.items() if key in known and value not in (None, [], {})}
    kept = {key: value for key, value in kept.items() if not key.endswith("_token")}
    held: dict[str, Any] = yaml.safe_load(yaml.safe_dump(kept))
    return {key: _without_secrets(value) for key, value in held.items()}


def _without_secrets(value: Any) -> Any:
    """A setting, without what opens or signs a URL."""
    return redacted(value) if isinstance(value, str) and "://" in value else value


def write_config(arguments: Any, config: RunConfig, file: str | Path) -> None:
    """Write every setting of a run as YAML."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(resolved(arguments, config), sort_keys=True), encoding="utf-8")
