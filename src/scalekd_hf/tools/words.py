"""Configurations and words of a command line, read without loading anything that they are for.

A configuration is a YAML file by its path, or a recipe that is shipped with the package by its name.
"""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml


__all__ = [
    "check_known",
    "check_words",
    "find_config",
    "installed",
    "nearest",
    "paper_results",
    "read_config",
    "shipped_configs",
    "shipped_folder",
    "take_configs",
]

RESULT = re.compile(r"# Top-1 of the paper: alone (?P<alone>[\d.]+), ScaleKD (?P<distilled>[\d.]+)")
SHIPPED = "recipes/"  # begins the paths of files beside the shipped configurations, in these


def shipped_folder() -> Path:
    """The folder of recipes, launch files and the quickstart's data and teacher, as installed."""
    spec = find_spec("scalekd_hf.recipes")
    if spec is None or spec.origin is None:
        raise ValueError("This installation of scalekd-hf has no recipes. Install its wheel, or `pip install -e .`.")
    return Path(spec.origin).parent


def shipped_configs() -> dict[str, Path]:
    """The shipped configurations by name."""
    folder = shipped_folder() / "configs"
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.glob("**/*.yaml"))}


def paper_results(recipe: Path) -> dict[str, str]:
    """The paper's top-1 of a published pair, in per cent as it has them: "alone" and "distilled"; empty where it has none."""
    found = RESULT.search(recipe.read_text(encoding="utf-8"))
    return found.groupdict() if found else {}


def find_config(name: str | Path) -> Path:
    """The file that a path or the name of a shipped recipe means.

    Raises:
        ValueError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    configs = shipped_configs()
    short = path.as_posix().removeprefix(f"{SHIPPED}configs/").removesuffix(".yaml")
    if short in configs:
        return configs[short]
    raise ValueError(
        f"The configuration {str(name)!r} cannot be read: there is no such file, and no recipe of that name is shipped."
        f"{nearest(short, configs)} `scalekd recipes` lists them."
    )


def read_config(name: str | Path) -> dict[str, Any]:
    """The settings in a configuration, see `find_config`.

    Paths in `recipes/` are those of the installation, in a shipped configuration, and where there are no such files here.

    Raises:
        ValueError: it cannot be read, or is no mapping.
    """
    file = find_config(name)
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"The configuration {str(file)!r} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"The configuration {str(file)!r} must be a mapping of settings, got {settings!r}.")
    is_shipped = shipped_folder().resolve() in file.resolve().parents
    return {key: installed(value, is_shipped) if isinstance(value, str) else value for key, value in settings.items()}


def installed(path: str, always: bool = False) -> str:
    """A path in `recipes/` as that of the installation, `always` or where there is no such file here; any other as it is."""
    option, equals, value = path.rpartition("=") if path.startswith("--") else ("", "", path)
    if value.startswith(SHIPPED) and (always or not glob.glob(value)):
        value = str(shipped_folder() / value.removeprefix(SHIPPED))
    return f"{option}{equals}{value}"


def take_configs(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The configurations that a command line begins with, and the rest of its words."""
    count = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    return list(words[:count]), list(words[count:])


def check_known(name: str, known: Collection[str], shown: str) -> None:
    """Refuse a setting that does not exist.

    Raises:
        ValueError: with the nearest that does.
    """
    if name not in known:
        raise ValueError(f"{shown} is not a setting.{nearest(name, known)}")


def check_words(words: Sequence[str], known: Collection[str]) -> None:
    """Refuse options that are no settings.

    Raises:
        ValueError: with the first.
    """
    for word in words:
        if word.startswith("--") and word not in ("--help", "--no-help"):
            name = word[2:].split("=")[0].replace("-", "_")
            if not (name.startswith("no_") and name.removeprefix("no_") in known):
                check_known(name, known, f"`--{name}`")


def nearest(name: str, known: Collection[str]) -> str:
    """A question after the known name that is most like this one, or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean `{close[0]}`?" if close else ""
