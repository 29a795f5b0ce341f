"""Distil a teacher into a student: alone first where that is asked for, then with the teacher, saved and evaluated."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoModelForImageClassification, set_seed
from transformers.utils import logging

from ..borrowed.transformers import whole_models
from ..data.dataset import dataset_labels
from ..data.holdout import held_out_share
from ..data.loading import DataArguments, load_data
from ..models.students import Student, load_student
from ..models.teachers import Teacher, load_teacher
from ..publishing.provenance import Source
from ..publishing.publisher import RESULTS_FILE
from ..tools.plan import classes_of, plan_words
from ..tools.recipe import (
    DistillArguments,
    as_words,
    given_arguments,
    mapping,
    parse_config,
    student_options,
)
from ..training.config import ScaleKDConfig
from ..training.model import ScaleKDModel, build_model
from ..training.trainer import ScaleKDTrainer
from .runs import has_finished, resume_or_refuse, train_and_save


__all__ = ["fresh_model", "main", "take_plan"]


def run(
    arguments: DistillArguments, whole: ScaleKDConfig, data: tuple, alone: ScaleKDConfig | None = None
) -> tuple[dict[str, float], ScaleKDTrainer]:
    """Train one student of the whole run, with its teacher or `alone`, save it, and evaluate what was saved."""
    (train, evaluation), distil, config = data, alone is None, alone or whole
    if config.process_index == 0:
        print(f"\nThe student {'with its teacher' if distil else 'alone'}, in {config.output_dir}:", flush=True)
    labels = dataset_labels(train, config.label_column)
    teacher = load_teacher_of(arguments, config) if distil or labels is None else None
    student = new_student(arguments, config, classes_of(arguments, config, train, teacher))
    trainer = ScaleKDTrainer(student, teacher if distil else None, config, train, evaluation)
    trainer.publisher.arguments = given_arguments(arguments)
    trainer.data, trainer.evaluated = trainer.data or source_of(arguments), evaluated_of(arguments, trainer.evaluated)
    train_and_save(trainer, arguments, whole)
    trainer.accelerator.wait_for_everyone()
    if evaluation is None or not config.has_labels:
        return {}, trainer
    # What was saved is evaluated, loaded as its users load it.
    with whole_models():
        student = users_class(arguments).from_pretrained(str(config.output_dir))
    return evaluate(student, config, evaluation), trainer


def users_class(arguments: DistillArguments) -> Any:
    """What of transformers loads the student."""
    return AutoModel if arguments.num_classes == 0 else AutoModelForImageClassification


def load_teacher_of(arguments: DistillArguments, config: ScaleKDConfig) -> Teacher:
    """The teacher that the settings name."""
    return load_teacher(
        arguments.teacher,
        last_blocks=config.teacher_last_blocks,
        drop_path=config.teacher_drop_path,
        image_size=config.teacher_image_size,
        taps=config.teacher_taps,
        **mapping(arguments.teacher_args, "teacher_args"),
    )


def new_student(arguments: DistillArguments, config: ScaleKDConfig, labels: list[str] | None) -> Student:
    """The student that the settings name; alone and distilled start from the same weights."""
    set_seed(config.seed)
    return load_student(
        arguments.student,
        pretrained=arguments.student_pretrained,
        labels=labels,
        image_size=config.image_size,
        **student_options(arguments),
    )


def fresh_model(arguments: DistillArguments, config: ScaleKDConfig, train: Any) -> ScaleKDModel:
    """Student, teacher and heads as a run starts with them."""
    teacher = load_teacher_of(arguments, config)
    student = new_student(arguments, config, classes_of(arguments, config, train, teacher))
    set_seed(config.seed)  # as the trainer does before it builds the heads
    return build_model(student, teacher, config)


def evaluate(model: Any, config: ScaleKDConfig, evaluation: Any) -> dict[str, float]:
    """Accuracy of a classifier, with its own images: size, resizing and evaluation crop."""
    own: dict[str, Any] = {"image_size": None, "crop_pct": None, "interpolation": None, "antialias": None}
    config = dataclasses.replace(config, **own, push_to_hub=False, report_to="none")
    metrics = ScaleKDTrainer(model, None, config, eval_dataset=evaluation).evaluate()
    return {key.removeprefix("eval_"): value for key, value in metrics.items()}


def main(words: Sequence[str] | None = None) -> None:
    """Distil as the words say, or plan it; those of this process by default."""
    plan_format, words = take_plan(sys.argv[1:] if words is None else words)
    if plan_format is not None:
        raise SystemExit(print_plan(words, plan_format))
    arguments, config = parse_config(DistillArguments, words)
    if config.disable_tqdm:
        logging.disable_progress_bar()  # of loading weights
    if has_finished(arguments, config):
        if config.process_index == 0:
            print(
                f"The run in {config.output_dir} has come to its end with these settings: nothing is trained again, but with "
                "`--overwrite_output_dir true`."
            )
            show(json.loads(Path(str(config.output_dir), RESULTS_FILE).read_text(encoding="utf-8")), arguments, config)
        return
    alone = [baseline_config(words, arguments, config)] if arguments.baseline else []
    resume_or_refuse(config, *alone)
    data = load_data(arguments, config.output_dir if config.process_index == 0 else None)
    results = {}
    for baseline in alone:
        fresh_model(arguments, config, data[0])  # what is wrong with the pair is said before one of them is trained
        results["student alone"], _ = run(arguments, config, data, baseline)
    results["student distilled"], trainer = run(arguments, config, data)
    shares_labels = trainer.args.logit_weight and arguments.num_classes != 0  # with the teacher, as the data does
    if arguments.evaluate_teacher and data[1] is not None and config.has_labels and shares_labels:
        teacher = load_student(
            arguments.teacher,
            pretrained=True,
            image_size=config.teacher_image_size,
            **mapping(arguments.teacher_args, "teacher_args"),
        )
        results = {"teacher": evaluate(teacher, config, data[1]), **results}
    trainer.results = results
    if config.process_index == 0:
        report(results, arguments, config)
    describe(trainer, arguments, config)


def baseline_config(words: Sequence[str], arguments: DistillArguments, config: ScaleKDConfig) -> ScaleKDConfig:
    """The settings of the student alone: those of the run, but for `baseline_args`."""
    given = mapping(arguments.baseline_args, "baseline_args")
    _, changed = parse_config(DistillArguments, [*words, *as_words(given)])
    own: dict[str, Any] = {name: getattr(changed, name) for name in given}
    own["resume_from_checkpoint"] = True if config.resume_from_checkpoint else None  # a named one is the distilled's
    own |= {"output_dir": str(Path(str(config.output_dir), "alone")), "push_to_hub": False}
    return dataclasses.replace(config, **own)


def describe(trainer: ScaleKDTrainer, arguments: DistillArguments, config: ScaleKDConfig) -> None:
    """Write the model card, and push it with the student where that was asked for."""
    if trainer.state.global_step or trainer.publisher.is_described() is False:  # else an earlier call has done both
        trainer.create_model_card(license=arguments.license)
    if config.push_to_hub:
        trainer.push_to_hub(license=arguments.license)


def source_of(arguments: DataArguments) -> Source:
    """What the model card calls the data: the data set on the Hub, or the folder of the files."""
    if arguments.dataset is None or Path(arguments.dataset).is_dir():
        folder = Path(arguments.dataset) if arguments.dataset else Path(str(arguments.train_files)).parent
        return Source(folder.resolve().name, is_local="://" not in str(arguments.train_files))
    return Source(arguments.dataset, arguments.dataset, arguments.revision, config=arguments.dataset_config)


def evaluated_of(arguments: DataArguments, known: Source | None) -> Source:
    """What the model card calls the evaluated images.

    Args:
        known: where they come from on the Hub, as the data tell.
    """
    share = held_out_share(arguments.eval_split)
    known = known and dataclasses.replace(known, config=arguments.dataset_config)
    if arguments.eval_files is not None:
        name = Path(str(arguments.eval_files)).parent.resolve().name
        return known or Source(name, is_local="://" not in str(arguments.eval_files))
    if share is not None:
        return dataclasses.replace(
            known or source_of(arguments), split=f"{share:g} held out of {arguments.train_split}"
        )
    return dataclasses.replace(known or source_of(arguments), split=arguments.eval_split)


def print_plan(words: list[str], plan_format: str) -> int:
    """Print what the run would do; 1 if it would fail."""
    plan = plan_words(words)
    print(json.dumps(plan.to_dict(), indent=2) if plan_format == "json" else plan.to_text())
    return int(plan.error is not None)


def report(results: dict[str, dict[str, float]], arguments: DistillArguments, config: ScaleKDConfig) -> None:
    """Print the table of accuracies and write them to results.json."""
    Path(str(config.output_dir), RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    show(results, arguments, config)


def show(results: dict[str, dict[str, float]], arguments: DistillArguments, config: ScaleKDConfig) -> None:
    """Print the table of accuracies."""
    rows = {name: metrics for name, metrics in results.items() if "top1" in metrics}
    if rows:
        print(f"\n{'':<20}{'top-1':>8}{'top-5':>8}")
    for name, metrics in rows.items():
        print(f"{name:<20}{metrics['top1']:>8.2%}{metrics['top5']:>8.2%}")
    folder, what = str(config.output_dir), "student"
    if arguments.num_classes == 0:
        what = "student, a backbone without a classifier,"
        for name, metrics in results.items():
            if "neighbours_top1" in metrics:
                share = f"{metrics['neighbours_top1']:.2%}"
                print(
                    f"\n{name}: {share} of the evaluation images are of the class that their 20 nearest among the others"
                )
                print("vote for. `scalekd evaluate` measures k-NN and a linear probe that know the training images.")
    print(f"\nThe {what} is in {folder}: {users_class(arguments).__name__}.from_pretrained({folder!r})")


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
