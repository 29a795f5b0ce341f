"""Draw where the teacher's features and the student's projected features agree, before and after training."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.loading import load_data
from ..data.preparation import collate
from ..data.stream import ImageStream
from ..models.students import Student
from ..tools.recipe import DistillArguments, parse_config
from ..tools.visualize import agreement_maps, draw_agreement
from ..training.config import ScaleKDConfig
from ..training.distillation_checkpoints import HEADS_FILE, check_taps, load_checkpoint
from ..training.feeding import prepare_images
from ..training.position import RunPosition
from .distill import fresh_model


__all__ = ["main"]


def parse(words: Sequence[str] | None) -> tuple[argparse.Namespace, DistillArguments, ScaleKDConfig]:
    """The recipe's own words, and the settings of the run."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("config", help="configuration of the run; further settings may follow, as for distill.py")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a `checkpoint-N` folder of the run")
    parser.add_argument("--images", type=int, default=4, help="how many, the first of the evaluation data; 4")
    parser.add_argument("--output", type=Path, help="the picture; `agreement.png` beside the checkpoint")
    own, settings = parser.parse_known_args(words)
    if own.images < 1:
        raise ValueError(f"`--images` is {own.images}, and a picture needs at least 1. Leave it out for 4.")
    check_checkpoint(own.checkpoint)
    return own, *parse_config(DistillArguments, [own.config, *settings])


def check_checkpoint(folder: Path) -> None:
    """Refuse a folder without the heads, before any model is loaded."""
    if (folder / HEADS_FILE).is_file():
        return
    reason = f"has no {HEADS_FILE} (a student alone cannot be compared)" if folder.is_dir() else "is not a folder"
    inside = ", ".join(sorted(str(path) for path in folder.glob("checkpoint-*")))
    raise ValueError(
        f"`--checkpoint` is {str(folder)!r}, which {reason}. Give a `checkpoint-N` folder of a distillation"
        f"{f'; in this one: {inside}' if inside else ', as it writes them with `save_strategy` steps or epoch'}."
    )


def first_images(evaluation: Any, count: int, student: Student, config: ScaleKDConfig) -> Tensor:
    """The first images (count, 3, height, width) of the evaluation data, uint8, prepared as for evaluation."""
    if evaluation is None:
        raise ValueError(
            "`--images` are taken from the evaluation data, but `eval_split` is 'none' or `eval_files` are missing: there "
            "are none. Name either of them, such as `--eval_split validation` or `--eval_files PATTERN`."
        )
    prepared = prepare_images(evaluation, "eval_dataset", student, config, labels_optional=True)
    if count > len(prepared):
        raise ValueError(
            f"`--images` is {count}, but the evaluation data holds {len(prepared)}. Ask for at most so many."
        )
    if isinstance(prepared, ImageStream):
        return next(iter(prepared.evaluation_loader(count, rank=0, world_size=1, collate_fn=collate)))["pixel_values"]
    return collate([prepared[number] for number in range(count)])["pixel_values"]


def report(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Print the table of mean cosines."""
    print(f"{'mean cosine similarity':<24}{'before':>8}{'after':>8}")
    for term in before:
        print(f"{term:<24}{before[term].mean():>8.3f}{after[term].mean():>8.3f}")


def main(words: Sequence[str] | None = None) -> None:
    """Draw as the words say; those of this process by default."""
    own, arguments, config = parse(words)
    train, evaluation = load_data(arguments)
    model = fresh_model(arguments, config, train)
    check_taps(own.checkpoint, model.student, RunPosition.read(own.checkpoint).settings)
    images = first_images(evaluation, own.images, model.student, config)
    pixel_values = model.normaliser.for_student(images).to(config.device)
    before = agreement_maps(model.to(config.device), pixel_values)
    load_checkpoint(model.student, model.heads, own.checkpoint)
    after = agreement_maps(model, pixel_values)
    file = own.output or own.checkpoint.resolve().parent / "agreement.png"
    draw_agreement(images, before, after, file)
    report(before, after)
    print(f"\nThe picture is {file}")
