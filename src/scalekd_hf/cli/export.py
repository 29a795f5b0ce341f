"""Write a student as ONNX and as a `torch.export` program, and check both against it.

STUDENT is a folder, a Hub id, `timm/<name>` or `hf-hub:<id>`. The files go into its folder, or into `export/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..models.students import load_student
from ..tools.export import FORMATS, export_student


__all__ = ["main"]


def main(words: Sequence[str] | None = None) -> None:
    """Export as the words say; those of this process by default."""
    parser = argparse.ArgumentParser(prog="scalekd export", description=__doc__)
    parser.add_argument("student", help="Folder or name of the student.")
    parser.add_argument("--output_dir", help="Folder to write into. By default the student's own, else `export`.")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS), help="What to write.")
    arguments = parser.parse_args(words)
    own = arguments.student if Path(arguments.student).is_dir() else "export"
    folder = Path(arguments.output_dir or own)
    student = load_student(arguments.student, pretrained=True)
    for name, difference in export_student(student, folder, tuple(arguments.formats)).items():
        size = (folder / name).stat().st_size / 1e6
        print(f"{folder / name}: {size:.1f} MB, differs by {difference:.1e} of the largest logit on random images")
