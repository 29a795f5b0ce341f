"""The settings of the commands, read from the source of their dataclasses: importing them would take many seconds."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


__all__ = ["Field", "fields_of", "launcher_options", "settings_of"]

HERE = Path(__file__).parent
TRAINING = HERE.parent / "training"
CONFIG = [(TRAINING / "config.py", "ScaleKDConfig"), (TRAINING / "run_config.py", "RunConfig")]
DATA = (HERE.parent / "data" / "loading.py", "DataArguments")
TRANSFER = HERE.parent / "transfer"
OWN = {
    "distill": [(HERE / "recipe.py", "DistillArguments"), DATA, *CONFIG],
    "train-teacher": [(HERE / "recipe.py", "TeacherArguments"), DATA, *CONFIG],
    "transfer": [
        (TRANSFER / "config.py", "TransferArguments"),
        (TRANSFER / "annotations.py", "DenseDataArguments"),
        DATA,
        (TRANSFER / "config.py", "TransferConfig"),
        CONFIG[1],
    ],
    "evaluate": [(HERE / "evaluation.py", "EvaluateArguments"), DATA, *CONFIG],
}


@dataclass(frozen=True)
class Field:
    """A setting.

    Attributes:
        name, help: its name, and what it is in a sentence.
        default: as written, or nothing.
        group: the heading that it stands under, or the dataclass.
    """

    name: str
    help: str
    default: str
    group: str


def settings_of(command: str) -> tuple[list[Field], list[Field]]:
    """The settings of a command: this project's, and those that transformers' `TrainingArguments` adds."""
    own = [field for file, name in OWN[command] for field in fields_of(file, name)]
    groups = list(dict.fromkeys(field.group for field in own))  # the same heading may be in two files
    own.sort(key=lambda field: groups.index(field.group))
    spec = find_spec("transformers")
    folders = spec.submodule_search_locations if spec is not None else None
    parents = fields_of(Path(next(iter(folders))) / "training_args.py", "TrainingArguments") if folders else []
    names = {field.name for field in own}
    return own, [field for field in parents if field.name not in names]


@cache
def fields_of(file: Path, name: str) -> list[Field]:
    """The fields of a dataclass in a file, without those of its parents."""
    source = file.read_text(encoding="utf-8")
    lines = source.splitlines()
    (body,) = [
        node.body for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef) and node.name == name
    ]
    found, group, seen = [], name, body[0].lineno
    for node in body:
        for line in lines[seen : node.lineno]:  # headings are comments, which the tree does not know
            if line.startswith("    # "):
                group = line[6:].strip()
        seen = node.lineno
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.append(Field(node.target.id, *_help_and_default(node.value), group))
    return found


def _help_and_default(value: ast.expr | None) -> tuple[str, str]:
    if not isinstance(value, ast.Call):
        return "", ast.unparse(value) if value is not None else ""
    arguments = {keyword.arg: keyword.value for keyword in value.keywords}
    default = arguments.get("default")
    factory = arguments.get("default_factory")
    if isinstance(factory, ast.Lambda):
        default = factory.body
    return _text(arguments.get("metadata")), ast.unparse(default) if default is not None else ""


def _text(metadata: ast.expr | None) -> str:
    if isinstance(metadata, ast.Dict):
        for key, value in zip(metadata.keys, metadata.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "help" and isinstance(value, ast.Constant):
                return " ".join(str(value.value).split())
    return ""


@cache
def launcher_options() -> dict[str, bool]:
    """Options of `accelerate launch` by name, and whether a value follows."""
    spec = find_spec("accelerate")
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        return {}
    tree = ast.parse((Path(next(iter(folders))) / "commands" / "launch.py").read_text(encoding="utf-8"))
    return {name: takes for call in ast.walk(tree) for name, takes in _option(call)}


def _option(call: Any) -> Iterator[tuple[str, bool]]:
    if not isinstance(call, ast.Call) or getattr(call.func, "attr", "") != "add_argument":
        return
    action = next((keyword.value for keyword in call.keywords if keyword.arg == "action"), None)
    takes = not (isinstance(action, ast.Constant) and str(action.value).startswith("store_"))
    for argument in call.args:
        if isinstance(argument, ast.Constant) and str(argument.value).startswith("--"):
            yield str(argument.value)[2:].replace("-", "_"), takes
