"""Make a student folder of a checkpoint that others have published, or a checkpoint for OpenMMLab of a student.

CHECKPOINT is a file of mmcls, mmpretrain or timm: of the student, or of a whole distillation with the student in it. With
`--to openmmlab` it is a student folder, which becomes `student.pth` for mmpretrain.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..tools.convert import convert, known_students, write_openmmlab
from ..tools.recipe import mapping


__all__ = ["main"]


def main(words: Sequence[str] | None = None) -> None:
    """Convert as the words say; those of this process by default.

    Raises:
        ValueError: see `convert`; and words that do not go together.
    """
    parser = argparse.ArgumentParser(prog="scalekd convert", description=__doc__)
    parser.add_argument("checkpoint", help="File to convert; with `--to openmmlab` the folder of a student.")
    parser.add_argument("--student", help=f"What it is of: {', '.join(known_students())}, or timm/<name>.")
    parser.add_argument("--teacher", help="For the card: swin_l or eva_l, or the recipe of the pair.")
    parser.add_argument("--output_dir", help="Folder to write into: a new or an empty one.", required=True)
    parser.add_argument("--raw", action="store_true", help="Take the last step's weights, not the moving average.")
    parser.add_argument("--student_args", help="Further arguments of the model, mean and std, as JSON.")
    parser.add_argument("--to", choices=["student", "openmmlab"], default="student", help="What to write.")
    arguments = parser.parse_args(words)
    is_folder = _is_student(Path(arguments.checkpoint))
    if arguments.to == "openmmlab":
        _to_openmmlab(arguments, is_folder)
        return
    if is_folder:
        print(
            f"{arguments.checkpoint} is a student folder already: nothing to convert. Evaluate it with: scalekd evaluate {arguments.checkpoint}"
        )
        return
    if arguments.student is None:
        raise ValueError(f"`--student` is missing: say what the file is of. Known are {', '.join(known_students())}.")
    converted = convert(
        arguments.checkpoint,
        arguments.student,
        arguments.output_dir,
        teacher=arguments.teacher,
        raw=arguments.raw,
        student_args=mapping(arguments.student_args, "student_args"),
    )
    student = converted.student
    millions = sum(parameter.numel() for parameter in student.parameters()) / 1e6
    print(
        f"{converted.folder}: {student.name}, {millions:.2f} M parameters, {student.num_labels} classes; weights of the file: {converted.weights}."
    )
    print(f"Mean and standard deviation of the images: {converted.normalised_by}.")
    if converted.passed_over:
        print(f"Objects in the file that were not made: {', '.join(converted.passed_over[:6])}.")
    print(f"Measure it: scalekd evaluate {converted.folder} --dataset FOLDER --update_card")


def _is_student(path: Path) -> bool:
    config = path / "config.json"
    return config.is_file() and bool(
        {"architecture", "model_type"} & set(json.loads(config.read_text(encoding="utf-8")))
    )


def _to_openmmlab(arguments: argparse.Namespace, is_folder: bool) -> None:
    from ..models.students import load_student

    if not is_folder:
        raise ValueError(
            f"`checkpoint` {arguments.checkpoint!r} is no student folder, which `--to openmmlab` converts."
        )
    file = write_openmmlab(load_student(arguments.checkpoint, pretrained=True), arguments.output_dir)
    print(f"{file}: for mmpretrain 1.x; docs/published.md has the models to build for it.")
