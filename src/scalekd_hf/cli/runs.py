"""What the recipes that train have in common: beginning or going on, and saving."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback, TrainerState

from ..publishing.publisher import RESULTS_FILE, Publisher
from ..tools.recipe import resolved, write_config
from ..training.config_checks import check_processes
from ..training.run_config import RunConfig
from ..training.run_folder import check_output_dir, check_writable, finished, interrupted, last_checkpoint
from ..training.run_trainer import RunTrainer
from ..training.settings import REPORTING, WHERE, run_settings


__all__ = ["RESOLVED_FILE", "has_finished", "resume_or_refuse", "train_and_save"]

RESOLVED_FILE = "config_resolved.yaml"
# What a finished run may be called again with: its result does not depend on them.
WITHOUT_EFFECT = {
    *WHERE,
    "dataloader_num_workers",
    "evaluate_teacher",
    "license",
    "per_device_eval_batch_size",
    "plan_processes",
}


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
    pairs = _then_and_now(arguments, config)
    how = {"resume_from_checkpoint", "overwrite_output_dir"}  # the run was begun, which is nothing of its result
    same = pairs is not None and all(then == now for name, (then, now) in pairs.items() if name not in how)
    return same and finished(folder, config.max_steps) and Publisher(config, None, None).is_described() is not False


def check_same_settings(arguments: Any, config: RunConfig) -> None:
    """Refuse to take a finished run for one with other settings, whose place it would hold.

    Raises:
        ValueError: `output_dir` was trained with other settings, which are named. Where files lie may differ, not what they
            are called.
    """
    pairs = _then_and_now(arguments, config) or {}  # without any, a run of no recipe: nothing is known
    names = sorted(name for name in pairs.keys() - WITHOUT_EFFECT if not name.startswith(REPORTING))
    others = [name for name in names if _named(pairs[name][0]) != _named(pairs[name][1])]
    if others:
        told = ", ".join(f"`{name}` {pairs[name][0]!r} -> {pairs[name][1]!r}" for name in others)
        raise ValueError(
            f"`output_dir` {str(config.output_dir)!r} holds a finished run with other settings ({told}): nothing would be trained. Give "
            "its settings to go on with it, choose another `output_dir`, or set `overwrite_output_dir` without "
            "`resume_from_checkpoint` to train anew."
        )


def _then_and_now(arguments: Any, config: RunConfig) -> dict[str, tuple[Any, Any]] | None:
    """Each setting as `output_dir` keeps it and as it is; None where none are kept.

    What is not kept was nothing, or not known to the version of then: it is the default. What this version does not know is none.
    """
    try:
        kept = yaml.safe_load((Path(str(config.output_dir)) / RESOLVED_FILE).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError):
        return None
    now = resolved(arguments, config)
    default = {field.name: _default(field) for part in (arguments, config) for field in fields(part)}
    return {n: (kept.get(n, d), now.get(n, d)) for n, d in default.items() if n in kept or n in now}


class _KeepSettings(TrainerCallback):
    """Writes the settings of a run once nothing is left that could refuse it: those of before stay otherwise.

    The results of before go: they are not those of these settings.
    """

    def __init__(self, arguments: Any, config: RunConfig):
        self.arguments, self.config = arguments, config

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            Path(str(self.config.output_dir), RESULTS_FILE).unlink(missing_ok=True)
            write_config(self.arguments, self.config, Path(str(self.config.output_dir)) / RESOLVED_FILE)


def _default(field: Field) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def _named(value: Any) -> Any:
    """A setting, of paths their last parts."""
    if isinstance(value, list):
        return [_named(part) for part in value]
    return Path(value).name if isinstance(value, str) else value


def train_and_save(trainer: RunTrainer, arguments: Any, config: RunConfig) -> None:
    """Train and save as the settings say: from a checkpoint where one is to be resumed and is there; not at all where the
    run has finished.

    Args:
        trainer: of the model.
        arguments, config: of the whole run, kept in its folder as it begins to train.

    Raises:
        ValueError: the run has finished with other settings.
    """
    args = trainer.args
    checkpoint = args.resume_from_checkpoint
    if checkpoint is True:
        if finished(args.output_dir, args.max_steps):
            return check_same_settings(arguments, config)
        checkpoint = True if last_checkpoint(args.output_dir) else None  # none: the run was stopped before it began
    trainer.add_callback(_KeepSettings(arguments, config))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()  # with the evaluations on the way
