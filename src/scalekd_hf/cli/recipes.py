"""List the recipes that are shipped with the package, print one, or copy it."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..tools.words import find_config, paper_results, shipped_configs


__all__ = ["main", "published"]

TRANSFER = "transfer/"  # begins the names of recipes for backbones
PAIR = re.compile(r"# (?P<pair>.+?): as run by the authors")


def published(file: Path) -> tuple[str, str, str] | None:
    """Pair and the paper's accuracies, alone and distilled, where it has any; None for a file that is no published pair."""
    pair, results = PAIR.match(file.read_text(encoding="utf-8")), paper_results(file)
    return (pair["pair"], results.get("alone", ""), results.get("distilled", "")) if pair else None


def table() -> str:
    """The published pairs with the paper's numbers, and the other configurations."""
    rows = {name: published(file) for name, file in shipped_configs().items()}
    lines = [f"{'recipe':<36}{'pair':<44}{'alone':>7}{'ScaleKD':>9}"]
    lines += [f"{name:<36}{row[0]:<44}{row[1]:>7}{row[2]:>9}" for name, row in rows.items() if row]
    others = ", ".join(name for name, row in rows.items() if not row and not name.startswith(TRANSFER))
    transfers = ", ".join(name for name in rows if name.startswith(TRANSFER))
    return "\n".join(
        [
            *lines,
            "",
            "Top-1 on ImageNet-1K in per cent; all numbers are the paper's, none is reproduced.",
            f"Others: {others}.",
            f"Students as backbones: {transfers}.",
            "`scalekd recipes NAME` prints one, `--copy FILE` writes it; `scalekd distill NAME` runs it, and `scalekd transfer "
            "segment NAME` or `detect NAME` one of a backbone.",
        ]
    )


def main(words: Sequence[str] | None = None) -> None:
    """List, print or copy, as the words say.

    Raises:
        ValueError: a recipe that is not shipped, or a file that exists already.
    """
    parser = argparse.ArgumentParser(prog="scalekd recipes", description=__doc__)
    parser.add_argument("name", nargs="?", help="the recipe; without it, all are listed")
    parser.add_argument("--copy", type=Path, metavar="FILE", help="write it there, to be changed")
    arguments = parser.parse_args(words)
    if arguments.name is None:
        print(table())
        return
    file = find_config(arguments.name)
    if arguments.copy is None:
        print(file.read_text(encoding="utf-8"), end="")
        return
    target = arguments.copy / file.name if arguments.copy.is_dir() else arguments.copy
    if target.exists():
        raise ValueError(f"`--copy` {str(target)!r} exists already. Name another file.")
    shutil.copyfile(file, target)
    print(f"Written to {target}; run it with: scalekd distill {target}")
