"""What the recipes that train have in common: beginning or going on, and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..publishing.publisher import RESULTS_FILE, Publisher
from ..tools.recipe import resolved
from ..training.config_checks import check_processes
from ..training.run_config import RunConfig
from ..training.run_folder import check_output_dir, check_writable, finished, interrupted, last_checkpoint
from ..training.run_trainer import RunTrainer
from ..training.settings import run_settings


__all__ = ["RESOLVED_FILE", "has_finished", "resume_or_refuse", "train_and_save"]

RESOLVED_FILE = "config_resolved.yaml"


def resume_or_refuse(*configs: RunConfig) -> None:
    """Have a run that was stopped resumed; refuse a folder that holds another, before any work is done.

    Args:
        configs: of all that the run trains; `resume_from_checkpoint` is set where one of them was stopped.

    Raises:
        ValueError: a folder holds a run, and neither resuming nor overwriting was asked for; or processes that would each train
            alone.
    """
    check_processes(configs[0])
    if configs[0].should_save:
        check_writable(str(configs[0].output_dir))
    if any(interrupted(str(config.output_dir), run_settings(config)) for config in configs):
        if configs[0].process_index == 0:
            print(f"The run in {configs[0].output_dir} was stopped before its end: it is resumed.")
        for config in configs:
            config.resume_from_checkpoint = True  # type: ignore[assignment]
    for config in configs:
        if not config.resume_from_checkpoint:
            check_output_dir(str(config.output_dir), config.overwrite_output_dir)


def has_finished(arguments: Any, config: RunConfig) -> bool:
    """Whether `output_dir` holds a run with these very settings that has come to its end, results and all, and no more is asked
    for: to resume it, to overwrite it or to push it."""
    folder = Path(str(config.output_dir))
    more = config.resume_from_checkpoint or config.overwrite_output_dir or config.push_to_hub
    if more or not (folder / RESULTS_FILE).exists():
        return False
    try:
        kept = yaml.safe_load((folder / RESOLVED_FILE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return False
    now = resolved(arguments, config)
    how = {"resume_from_checkpoint", "overwrite_output_dir"}  # the run was begun, which is nothing of its result
    same = all(kept.get(name) == now.get(name) for name in {*kept, *now} - how)
    return same and finished(folder, config.max_steps) and Publisher(config, None, None).is_described() is not False


def train_and_save(trainer: RunTrainer) -> None:
    """Train and save as the settings say: from a checkpoint where one is to be resumed and is there; not at all where the
    run has finished."""
    config = trainer.args
    checkpoint = config.resume_from_checkpoint
    if checkpoint is True:
        if finished(config.output_dir, config.max_steps):
            return
        checkpoint = True if last_checkpoint(config.output_dir) else None  # none: the run was stopped before it began
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()  # with the evaluations on the way
