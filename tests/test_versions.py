"""The versions that pyproject.toml lets in, and those that are tried."""

import re
import sys

from helpers import ROOT
from packaging.requirements import Requirement
from packaging.version import Version


if sys.version_info < (3, 11):
    import tomli as tomllib
else:
    import tomllib


TOOLS = ("dev", "docs")  # not of the package
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_oldest_versions_that_are_tried_are_those_that_are_let_in():
    extras = [words for name, words in PROJECT["optional-dependencies"].items() if name not in TOOLS]
    needed = [Requirement(word) for words in (PROJECT["dependencies"], *extras) for word in words]
    lines = (ROOT / "tests" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    oldest = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for requirement in needed:
        if requirement.name == PROJECT["name"]:
            continue
        (floor,) = requirement.specifier
        assert floor.operator == ">=", requirement
        # The first release of that number: of 3.6 it may be 3.6.1.
        release, wanted = Version(oldest[requirement.name]).release, Version(floor.version).release
        assert release[: len(wanted)] == wanted, f"{requirement}, but tests/oldest.txt has {oldest[requirement.name]}"
    assert set(oldest) == {requirement.name for requirement in needed} - {PROJECT["name"]}


def test_the_oldest_python_is_one_for_all_tools():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert f'python_version = "{oldest}"' in text and f'target-version = "py{oldest.replace(".", "")}"' in text
    assert f"python{oldest}" in (ROOT / "Makefile").read_text(encoding="utf-8")
    told = re.findall(r"Programming Language :: Python :: (3\.\d+)", text)
    assert told[0] == oldest and told == sorted(told, key=Version)
