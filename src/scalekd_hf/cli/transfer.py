"""Teach a student to segment or to detect: train, save, and evaluate what was saved."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.utils import logging

from ..publishing.publisher import RESULTS_FILE
from ..tools.recipe import given_arguments, parse_config
from ..transfer.annotations import load_dense_data
from ..transfer.building import build_model
from ..transfer.card import METRICS
from ..transfer.config import TransferArguments, TransferConfig
from ..transfer.plan import plan_transfer
from ..transfer.trainer import TransferTrainer
from .distill import evaluated_of, source_of, take_plan
from .runs import has_finished, resume_or_refuse, train_and_save


__all__ = ["main"]


def main(words: Sequence[str] | None = None) -> None:
    """Transfer as the words say, of which the first is the task, or plan it; those of this process by default."""
    task, *rest = sys.argv[1:] if words is None else words
    plan_format, rest = take_plan(rest)
    arguments, config = parse_config(TransferArguments, rest, TransferConfig)
    if config.disable_tqdm:
        logging.disable_progress_bar()  # of loading weights
    arguments.head = head = arguments.head_of(task)  # by which a run of the other task is told apart
    folder = str(config.output_dir)
    if plan_format is not None:
        plan = plan_transfer(task, arguments, config)
        print(json.dumps(plan.to_dict(), indent=2) if plan_format == "json" else plan.to_text())
        raise SystemExit(int(plan.error is not None))
    if has_finished(arguments, config):
        if config.process_index == 0:
            print(f"The run in {folder} has come to its end with these settings: nothing is trained again.")
            show(json.loads(Path(folder, RESULTS_FILE).read_text(encoding="utf-8")), folder)
        return
    resume_or_refuse(config)
    data = load_dense_data(arguments, task, masks=head == "mask_rcnn")
    set_seed(config.seed)
    trainer = TransferTrainer(build_model(task, arguments, config, data.class_names), config, data)
    trainer.data, trainer.evaluated = trainer.data or source_of(arguments), evaluated_of(arguments, trainer.evaluated)
    trainer.publisher.arguments = given_arguments(arguments)
    train_and_save(trainer, arguments, config)
    trainer.accelerator.wait_for_everyone()
    results = evaluate(trainer) if data.evaluation is not None else {}
    if config.process_index == 0:
        show(results, folder)
    trainer.results = results
    trainer.create_model_card(license=arguments.license)
    if config.push_to_hub:
        trainer.push_to_hub(license=arguments.license)


def evaluate(trainer: TransferTrainer) -> dict[str, dict[str, float]]:
    """The metrics of what was saved, loaded as its users load it."""
    trainer.load_saved(str(trainer.args.output_dir))
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    named = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    return {"this model": {name: value for name, value in named.items() if name in METRICS}}


def show(results: dict[str, dict[str, float]], folder: str) -> None:
    """Print the table of metrics."""
    for name, row in results.items():
        shown: Any = [f"{METRICS[key]} {value:.2%}" for key, value in row.items() if key in METRICS]
        print(f"\n{name}: {', '.join(shown)}")
    print(f"\nThe model is in {folder}.")
