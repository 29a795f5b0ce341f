"""What the recipes share: settings from YAML and the command line, and data sets from names or files."""

from __future__ import annotations

import difflib
import glob
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow.parquet
import yaml
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from transformers import HfArgumentParser

from ..models.saving import finished, last_checkpoint
from ..publishing.provenance import Source
from ..training.config import ScaleKDConfig
from ..training.trainer import ScaleKDTrainer


__all__ = [
    "DataArguments",
    "count_images",
    "DistillArguments",
    "TeacherArguments",
    "holds_classes",
    "load_data",
    "load_split",
    "mapping",
    "parse_config",
    "take_plan",
    "train_and_save",
    "write_config",
]

SPLIT = re.compile(r"(^|[^a-z])(train(ing)?|val(id(ation)?)?|dev|test(ing)?|eval(uation)?)([^a-z]|$)", re.IGNORECASE)
TABLES = (".csv", ".jsonl", ".parquet", ".arrow", ".tar", ".zip")
FORMATS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}


@dataclass
class DataArguments:
    """Where the images come from.

    Args:
        dataset: data set on the Hub, or a local folder that `datasets.load_dataset` understands.
        train_files, eval_files: glob patterns, or URLs, of Parquet, WebDataset or Arrow files, instead of `dataset`.
        dataset_config, revision: configuration and revision (branch, tag or commit) of the data set.
        cache_dir: where downloads are kept; by default the cache of `datasets`.
        train_split, eval_split: its splits; `none` to evaluate on nothing.
        streaming: read while training, without a download first; a local folder of images is never copied anyway.
    """

    dataset: str | None = field(default=None, metadata={"help": "Data set on the Hub, or a local folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    revision: str | None = field(default=None, metadata={"help": "Revision of the data set: branch, tag or commit."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads of the data set are kept."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    train_files: str | None = field(default=None, metadata={"help": "Files to train on, instead of `dataset`."})
    eval_files: str | None = field(default=None, metadata={"help": "Files to evaluate on, instead of `dataset`."})
    streaming: bool = field(default=True, metadata={"help": "Read while training, without a download first."})

    @property
    def source(self) -> Source:
        """What the model card calls the data: the data set on the Hub, or the folder of the files."""
        if self.dataset is None or Path(self.dataset).is_dir():
            folder = Path(self.dataset) if self.dataset else Path(str(self.train_files)).parent
            return Source(folder.resolve().name)
        return Source(self.dataset, self.dataset, self.revision)


@dataclass
class DistillArguments(DataArguments):
    """The pair, and whether the student is first trained alone.

    Args:
        student, teacher: names as `load_student` and `load_teacher` take them.
        student_args, teacher_args: further arguments of the models, as JSON or a mapping.
        student_pretrained: start from the student's published weights.
        plan_processes: processes that `--plan` counts with; by default those of the launch.
        baseline: first train the same student alone, with the same data, budget and settings, and report both.
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
    license: str | None = field(default=None, metadata={"help": "License of the student, for its model card."})

    def __post_init__(self) -> None:
        self.student_args = mapping(self.student_args, "student_args")
        self.teacher_args = mapping(self.teacher_args, "teacher_args")
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
    """

    model: str = field(default="", metadata={"help": "Name or folder of the classifier."})
    model_args: dict | str | None = field(default=None, metadata={"help": "Arguments of the model, as JSON."})
    pretrained: bool = field(default=True, metadata={"help": "Start from its published weights."})

    def __post_init__(self) -> None:
        self.model_args = mapping(self.model_args, "model_args")
        if not self.model:
            raise ValueError("`model` is missing: name a model, a Hub id or a folder.")


def mapping(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"`{name}` must be a mapping or JSON, got {value!r} ({error}).") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"`{name}` must be a mapping, got {value!r}.")
    return dict(value or {})


def parse_config(
    arguments_class: type, argv: Sequence[str] | None = None, default_config: Path | None = None
) -> tuple[Any, ScaleKDConfig]:
    """Read `[CONFIG.yaml] [--any_field value ...]`; the command line wins over the file.

    Args:
        arguments_class: the recipe's own dataclass, beside `ScaleKDConfig`.
        argv: the words after the script; those of this process by default.
        default_config: the file to read where none is named.

    Returns:
        An instance of `arguments_class`, and the `ScaleKDConfig`.

    Raises:
        ValueError: a file that cannot be read, an unknown key or a value of the wrong kind.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    config_file = words.pop(0) if words and not words[0].startswith("-") else default_config
    parser = HfArgumentParser([arguments_class, ScaleKDConfig])  # type: ignore[list-item]
    known = {f.name for cls in (arguments_class, ScaleKDConfig) for f in fields(cls) if f.init}
    settings = _read_yaml(Path(config_file)) if config_file else {}
    for key in settings:
        _check_known(key, known, f"{config_file}: `{key}`")
    for word in words:
        if word.startswith("--") and word not in ("--help", "--no-help"):
            name = word[2:].split("=")[0].replace("-", "_")
            _check_known(name.removeprefix("no_"), known | {name} & {f"no_{k}" for k in known}, f"`--{name}`")
    arguments, config = parser.parse_args_into_dataclasses([*as_words(settings), *words])
    return arguments, config


def take_plan(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take `--plan` or `--plan json` out of the words: "table", "json" or None, and the rest."""
    rest = list(words)
    if "--plan" not in rest:
        return None, rest
    place = rest.index("--plan")
    rest.pop(place)
    if place < len(rest) and rest[place] in ("table", "json"):
        return rest.pop(place), rest
    return "table", rest


def _check_known(name: str, known: set[str], shown: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise ValueError(f"{shown} is not a setting.{f' Did you mean `{close[0]}`?' if close else ''}")


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(file.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"The configuration {str(file)!r} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"The configuration {str(file)!r} must be a mapping of settings, got {settings!r}.")
    return settings


def as_words(settings: dict[str, Any]) -> list[str]:
    """A mapping as command line words, so that one parser converts both (YAML reads 1e-4 as text)."""
    words: list[str] = []
    for key, value in settings.items():
        if value is None:
            continue
        if value is False and key.endswith("_strategy"):
            value = "no"  # YAML reads a bare no as false
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        words += [f"--{key}", *(str(item) for item in values)]
    return words


def write_config(arguments: Any, config: ScaleKDConfig, file: str | Path) -> None:
    """Write every setting of a run as YAML that `parse_config` reads again; tokens are left out."""
    settings = {**{f.name: getattr(arguments, f.name) for f in fields(arguments)}, **config.to_dict()}
    known = {f.name for cls in (type(arguments), ScaleKDConfig) for f in fields(cls) if f.init}
    kept = {key: value for key, value in settings.items() if key in known and value not in (None, [], {})}
    kept = {key: value for key, value in kept.items() if not key.endswith("_token")}
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(kept, sort_keys=True))


def load_data(arguments: DataArguments) -> tuple[Any, Any]:
    """The training and the evaluation data set.

    Raises:
        ValueError: no source, files that do not exist, or a data set that cannot be loaded.
    """
    if arguments.dataset is None and arguments.train_files is None:
        raise ValueError("There is no data: set `dataset`, or `train_files` and `eval_files`.")
    train = load_split(arguments, arguments.train_files, arguments.train_split)
    evaluation = None
    evaluate = arguments.eval_split.lower() != "none"
    if arguments.eval_files is not None or (arguments.dataset is not None and evaluate):
        evaluation = load_split(arguments, arguments.eval_files, arguments.eval_split)
    return train, evaluation


def train_and_save(trainer: ScaleKDTrainer) -> None:
    """Train and save as the settings say: from a checkpoint where one is to be resumed and is there; not at all where the
    run has finished."""
    config = trainer.args
    checkpoint = config.resume_from_checkpoint
    if checkpoint is True:
        if finished(config.output_dir, config.max_steps):
            return
        checkpoint = last_checkpoint(config.output_dir)  # none yet: the run was stopped before it began
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()  # with the evaluations on the way


def count_images(arguments: DataArguments) -> int | None:
    """Images in the training files, where they are Parquet and say so."""
    files = sorted(glob.glob(arguments.train_files, recursive=True)) if arguments.train_files else []
    if not files or any(Path(file).suffix != ".parquet" for file in files):
        return None
    return sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)


def load_split(arguments: DataArguments, pattern: str | None, split: str) -> Any:
    options: dict[str, Any] = {"cache_dir": arguments.cache_dir, "streaming": arguments.streaming}
    if options["streaming"] and "[" in split:
        raise ValueError(f"The split {split!r} is a slice, which a stream does not know: set `streaming` to false.")
    if pattern is not None:
        files = [pattern] if "://" in pattern else sorted(glob.glob(pattern, recursive=True))
        if not files:
            raise ValueError(f"No file matches {pattern!r}, seen from {str(Path.cwd())!r}.")
        suffix = Path(files[0]).suffix
        if suffix not in FORMATS:
            raise ValueError(f"{files[0]!r} is not of a known kind; known: {', '.join(FORMATS)}.")
        return datasets.load_dataset(FORMATS[suffix], data_files=files, split="train", **options)
    source = {"path": arguments.dataset, "name": arguments.dataset_config, "revision": arguments.revision}
    try:
        folder = Path(str(arguments.dataset))
        if split == "train" and folder.is_dir() and holds_classes(folder):
            # `datasets` would take a word such as "test" in a file's name for a split and leave the other images out.
            every = {split: str(folder.resolve() / "*" / "*")}
            return datasets.load_dataset("imagefolder", data_files=every, split=split, cache_dir=arguments.cache_dir)
        if arguments.streaming and folder.is_dir():
            # A stream of a folder knows no random access, which files on a disk allow.
            options["streaming"] = not isinstance(datasets.load_dataset_builder(**source), ImageFolder)
        return datasets.load_dataset(**source, split=split, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`dataset` {arguments.dataset!r} (configuration {arguments.dataset_config!r}, revision {arguments.revision!r}, "
            f"split {split!r}) cannot be loaded: {error} {_access(str(arguments.dataset), error)}"
        ) from error


def _access(dataset: str, error: Exception) -> str:
    """What to do about a data set that the Hub does not give out."""
    if not isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return ""
    page = f"{huggingface_hub.constants.ENDPOINT}/datasets/{dataset}"
    account = "with an account that may read it: `hf auth login`, or its token in HF_TOKEN"
    if "gated" in str(error):
        return f"Accept its terms on {page}, then log in {account}."
    return f"Check the name on {page}. If it is private or gated, log in {account}."


def holds_classes(folder: Path) -> bool:
    """Whether a folder holds one folder of images for each class, and neither splits nor tables."""
    inside = list(folder.iterdir())
    files = [path for path in folder.glob("*/*") if not path.name.startswith(".")]
    return (
        not any(SPLIT.search(path.name) for path in inside if path.is_dir())
        and not any(path.suffix in TABLES for path in [*inside, *files])
        and any(path.suffix.lower() in ImageFolder.EXTENSIONS for path in files)
        and not any(path.is_dir() for path in files)
    )
