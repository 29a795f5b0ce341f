"""Distil a strong vision transformer into a student with ScaleKD.

    accelerate launch recipes/distill.py [CONFIG.yaml] [--any_field value ...]

Without a configuration this is the quickstart: handwritten digits, a small Swin teacher, a small CNN student, first
alone, then distilled; minutes on a CPU. `--baseline` adds the student alone to any other run. `--plan` (or
`--plan json`) prints what the run would do, in seconds and without weights, data or GPU, and stops.
"""

import dataclasses
import json
import sys
from pathlib import Path

from transformers import AutoModelForImageClassification, set_seed

from scalekd_hf import ScaleKDConfig, ScaleKDTrainer, Teacher, load_student, load_teacher
from scalekd_hf.data.dataset import dataset_labels
from scalekd_hf.models.saving import check_output_dir, interrupted, run_settings
from scalekd_hf.tools.plan import plan_words
from scalekd_hf.tools.recipe import DistillArguments, load_data, parse_config, take_plan, train_and_save, write_config
from scalekd_hf.training.gathering import whole_models
from scalekd_hf.training.pair import class_names


QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


def run(
    arguments: DistillArguments, config: ScaleKDConfig, data: tuple, distil: bool
) -> tuple[dict[str, float], ScaleKDTrainer]:
    """Train one student, with a teacher or alone, save it, and evaluate what was saved."""
    train, evaluation = data
    labels = dataset_labels(train, config.label_column)
    teacher = load_teacher_of(arguments, config) if distil or labels is None else None
    set_seed(config.seed)  # alone and distilled start from the same weights
    student = load_student(
        arguments.student,
        pretrained=arguments.student_pretrained,
        labels=labels or class_names(teacher),
        image_size=config.image_size,
        **arguments.student_args,
    )
    trainer = ScaleKDTrainer(student, teacher if distil else None, config, train, evaluation)
    train_and_save(trainer)
    trainer.accelerator.wait_for_everyone()
    if evaluation is None or not config.has_labels:
        return {}, trainer
    # What was saved is evaluated, loaded as its users load it.
    with whole_models():
        student = AutoModelForImageClassification.from_pretrained(config.output_dir)
    return evaluate(student, config, evaluation), trainer


def load_teacher_of(arguments: DistillArguments, config: ScaleKDConfig) -> Teacher:
    """The teacher that the settings name."""
    return load_teacher(
        arguments.teacher,
        last_blocks=config.teacher_last_blocks,
        drop_path=config.teacher_drop_path,
        image_size=config.teacher_image_size,
        **arguments.teacher_args,
    )


def evaluate(model: object, config: ScaleKDConfig, evaluation: object) -> dict[str, float]:
    """Accuracy of a classifier, with its own image size and evaluation crop."""
    config = dataclasses.replace(config, image_size=None, crop_pct=None, push_to_hub=False, report_to="none")
    metrics = ScaleKDTrainer(model, None, config, eval_dataset=evaluation).evaluate()
    return {key.removeprefix("eval_"): value for key, value in metrics.items()}


def main() -> None:
    plan_format, words = take_plan(sys.argv[1:])
    if plan_format is not None:
        raise SystemExit(print_plan(words, plan_format))
    arguments, config = parse_config(DistillArguments, words, default_config=QUICKSTART)
    folders = (Path(config.output_dir), Path(config.output_dir, "alone"))
    if any(interrupted(folder, run_settings(config)) for folder in folders):
        print(f"The run in {config.output_dir} was stopped before its end: it is resumed.")
        config.resume_from_checkpoint = True
    if not config.resume_from_checkpoint:
        check_output_dir(config.output_dir, config.overwrite_output_dir)
    data = load_data(arguments)
    if config.process_index == 0:
        write_config(arguments, config, Path(config.output_dir) / "config_resolved.yaml")
    results = {}
    if arguments.baseline:
        resume = True if config.resume_from_checkpoint else None  # a named checkpoint is the distilled student's
        alone = dataclasses.replace(
            config, output_dir=str(folders[1]), resume_from_checkpoint=resume, push_to_hub=False
        )
        results["student alone"], _ = run(arguments, alone, data, distil=False)
    results["student distilled"], trainer = run(arguments, config, data, distil=True)
    if data[1] is not None and config.logit_weight and config.has_labels:  # then its labels are the data's
        teacher = load_student(
            arguments.teacher, pretrained=True, image_size=config.teacher_image_size, **arguments.teacher_args
        )
        results = {"teacher": evaluate(teacher, config, data[1]), **results}
    trainer.results = results
    if config.process_index == 0:
        report(results, Path(config.output_dir))
    describe(trainer, arguments, config)


def describe(trainer: ScaleKDTrainer, arguments: DistillArguments, config: ScaleKDConfig) -> None:
    """Write the model card, and push it with the student where that was asked for."""
    trainer.data = trainer.data or arguments.source
    if trainer.state.global_step:  # else an earlier call has trained and described it
        trainer.create_model_card(license=arguments.license)
    if config.push_to_hub:
        trainer.push_to_hub(license=arguments.license)


def print_plan(words: list[str], plan_format: str) -> int:
    """Print what the run would do; 1 if it would fail."""
    plan = plan_words(words, QUICKSTART)
    print(json.dumps(plan.to_dict(), indent=2) if plan_format == "json" else plan.to_text())
    return int(plan.error is not None)


def report(results: dict[str, dict[str, float]], folder: Path) -> None:
    """Print the table of accuracies and write them to results.json."""
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    rows = {name: metrics for name, metrics in results.items() if "top1" in metrics}
    if rows:
        print(f"\n{'':<20}{'top-1':>8}{'top-5':>8}")
    for name, metrics in rows.items():
        print(f"{name:<20}{metrics['top1']:>8.2%}{metrics['top5']:>8.2%}")
    print(f"\nThe student is in {folder}: AutoModelForImageClassification.from_pretrained({str(folder)!r})")


if __name__ == "__main__":
    main()
