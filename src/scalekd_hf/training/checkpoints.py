"""Checkpoints of any run: where it stands, and whether it can go on from there.

A checkpoint is the folder of what is trained, the position of the run, and the files of `Trainer`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_pt_utils import safe_globals

from ..data.stream import ImageStream
from ..models.saving import broken_file
from .epochs import count_steps
from .loaders import Feed
from .loss_log import LossLog
from .pickles import check_pickles
from .position import RUN_STATE_FILE, RunPosition
from .run_config import RunConfig
from .settings import FIXED, settings_to_keep
from .stopwatch import Stopwatch


__all__ = ["Checkpoints", "RestoredSchedule", "optimizer_in_parts"]

OPTIMIZER_SETTINGS = (
    "lr",
    "weight_decay",
    "betas",
    "eps",
    "momentum",
)  # of a group, where some optimisers keep state, too

logger = logging.getLogger(__name__)


class Checkpoints:
    """Keeps what a run goes on from.

    Args:
        args: of the run.
        feed: knows, and is told, where the run stands in its images.
        progress: knows, and is told, the images seen.
        stopwatch: knows, and is told, the seconds of training.
        models: what the models are, as the run has to go on with them, by names that a refusal shows.
        is_sharded: whether DeepSpeed or FSDP keeps parameters and optimiser.

    Attributes:
        schedule: a callback of the trainer's.
    """

    made_for, trains, start_from = "Its optimiser is made for", "model", ""  # words of a refusal

    def __init__(
        self,
        args: RunConfig,
        feed: Feed,
        progress: LossLog,
        stopwatch: Stopwatch,
        models: dict[str, Any],
        is_sharded: bool,
    ):
        self.args, self.feed, self.progress, self.stopwatch = args, feed, progress, stopwatch
        self._models, self.is_sharded = models, is_sharded
        self.schedule = RestoredSchedule()

    @property
    def settings(self) -> dict[str, Any]:
        """Under which the run goes on now; those of `args` may have been set after the trainer was made."""
        return settings_to_keep(self.args) | self._models

    def start(self, checkpoint: str | None, dataset: Any, epochs: float | None) -> RunPosition:
        """Begin where a checkpoint stands, or at the beginning.

        Args:
            checkpoint: the folder, or None.
            dataset: to train on.
            epochs: to train for, if `max_steps` was derived from them; with another batch it is derived anew for the rest.
        """
        position, is_changed = RunPosition(), False
        in_parts = checkpoint is not None and optimizer_in_parts(checkpoint) and not self.is_sharded
        self.schedule.file = Path(str(checkpoint), "scheduler.pt") if in_parts else None
        order = self.feed.order_settings(dataset)  # as the data are now, for the checkpoints to come
        if checkpoint is not None:
            position, is_changed = self._read(Path(checkpoint), order, isinstance(dataset, ImageStream))
        if epochs is not None and (is_changed or position.layout_start):  # now, or before the checkpoint
            self.args.max_steps = position.step + count_steps(dataset, self.args, position.images_seen)
        self.feed.start_at(position)
        self.progress.reset(position.images_seen, position.log, self.args.train_batch_size * self.args.world_size)
        self.stopwatch.reset(position.seconds)
        return position

    def _read(self, checkpoint: Path, order: dict[str, Any], is_stream: bool) -> tuple[RunPosition, bool]:
        """Where a checkpoint stands, and whether its images come in another order from there on.

        Args:
            checkpoint: the folder.
            order: what the order of the images depends on now.
            is_stream: the data set's place can be found again in another order.

        Raises:
            ValueError: a damaged checkpoint, or one of another run.
        """
        accepts_loss = self.args.allow_data_mismatch and optimizer_in_parts(checkpoint)
        check_checkpoint(checkpoint, self.is_sharded or accepts_loss)
        position = RunPosition.read(checkpoint)
        changed = position.changes(order)
        self.check_models(checkpoint, position)
        self._check_settings(checkpoint, position)
        self.schedule.is_changed = bool(changed or position.changed_settings(self.settings))
        if changed and not (self.args.allow_data_mismatch and is_stream):
            commit = (position.data or {}).get("commit")
            at_commit = (
                f" (`revision={commit!r}` reads the data set of then)"
                if commit and commit != order.get("commit")
                else ""
            )
            raise ValueError(
                f"The checkpoint {str(checkpoint)!r} was written with other settings of the data: {', '.join(changed)}. "
                f"The images would come in another order. Go back to them{at_commit}, or accept it with "
                "`allow_data_mismatch=True`: the run then goes on at the same number of images seen."
            )
        processes = (position.data or {}).get("processes", order["processes"])
        check_processes(checkpoint, processes, self.args, self.is_sharded)
        if changed:
            position.layout_start = position.images_seen
        is_due = position.evaluation_is_due and self.args.eval_strategy != "no"
        return replace(position, data=order, evaluation_is_due=is_due), bool(changed)

    def check_models(self, checkpoint: Path, position: RunPosition) -> None:
        """Refuse a checkpoint that holds other models than this run has, before its settings are compared.

        Raises:
            ValueError: with what it holds.
        """

    def _check_settings(self, checkpoint: Path, position: RunPosition) -> None:
        """Refuse to go on with other settings than the checkpoint's, unless that is accepted.

        Raises:
            ValueError: with those that have changed.
        """
        settings = self.settings
        if fixed := position.changed_settings({name: settings[name] for name in FIXED if name in settings}):
            raise ValueError(
                f"The checkpoint {str(checkpoint)!r} was written with other settings: {', '.join(fixed)}. {self.made_for} "
                f"the former: go back to them, or begin a new run from its {self.trains}, with `{self.trains}` {str(checkpoint)!r}"
                f"{self.start_from}."
            )
        changed = position.changed_settings(settings)
        if changed and not self.args.allow_settings_mismatch:
            raise ValueError(
                f"The checkpoint {str(checkpoint)!r} was written with other settings: {', '.join(changed)}. Go back to them, or "
                "accept it with `allow_settings_mismatch=True`: the run then goes on with the new ones."
            )

    def before_saving(self, accelerator: Accelerator) -> None:
        """What the processes have to agree on before a checkpoint; every process must call it."""

    def write_beside(self, folder: Path, position: RunPosition) -> None:
        """Write what a checkpoint holds beside the model and the parent's files; every process must call it."""
        if self.args.should_save:
            position.write(folder)

    def position(self, trainer: Any, evaluation_is_due: bool = False) -> RunPosition:
        """Where a trainer stands; every process must call it."""
        order, log = self.feed.order_settings(trainer.train_dataset), self.progress.state(trainer.accelerator)
        seconds, start = round(self.stopwatch.seconds, 1), self.feed.position.layout_start
        where = (trainer.state.global_step, self.progress.images_seen, seconds, start, order)
        return RunPosition(*where, self.settings, log, evaluation_is_due)


def optimizer_in_parts(folder: str | Path) -> bool:
    """Whether a checkpoint's optimiser is kept by DeepSpeed or FSDP, in files of their own."""
    return any(any(Path(folder).glob(pattern)) for pattern in ("global_step*", "optimizer_0", "pytorch_model_fsdp*"))


def check_checkpoint(folder: str | Path, sharded: bool) -> None:
    """Refuse a checkpoint that training cannot go on from, before anything of it is loaded.

    Args:
        folder: the checkpoint.
        sharded: its optimiser is not in files of the Trainer's.

    Raises:
        ValueError: a folder without readable trainer state, optimiser or scheduler, or with what could run code.
    """
    folder = Path(folder)
    for name in ("trainer_state.json", RUN_STATE_FILE):
        try:
            json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(broken_file(folder, name, error)) from error
    check_pickles(folder)
    for name in () if sharded else ("optimizer.pt", "scheduler.pt"):
        _check_pickle(folder, name)


def _check_pickle(folder: Path, name: str) -> None:
    try:
        with safe_globals():
            torch.load(folder / name, map_location="meta", weights_only=True)
    except Exception as error:  # what torch raises depends on where the file was cut
        raise ValueError(broken_file(folder, name, error)) from error


def check_processes(folder: Path, then: int, args: RunConfig, sharded: bool) -> None:
    """Warn of what cannot be restored of a checkpoint that other processes or another launcher wrote.

    Args:
        folder: the checkpoint.
        then: processes that wrote it.
        args: of the run that goes on.
        sharded: whether its processes run under DeepSpeed or FSDP.

    Raises:
        ValueError: an optimiser in other parts than this launcher's, or as many processes without this one's random state.
    """
    now = args.world_size
    in_parts, changed = optimizer_in_parts(folder), then != now
    state = f"rng_state_{args.process_index}.pth" if now > 1 else "rng_state.pth"
    if not changed:
        _check_pickle(folder, state)
    if sharded and (changed or not in_parts):
        raise ValueError(
            f"The optimiser in {str(folder)!r} is {f'in parts for {then} processes' if in_parts else 'whole'}: "
            f"{now} processes under DeepSpeed or FSDP cannot take it. Launch as many processes in the "
            "same way, or go on without DeepSpeed or FSDP."
        )
    behind = (["the optimiser's state"] if in_parts and not sharded else []) + ["random states"] * changed
    if behind:
        logger.warning(
            "The checkpoint %r of %d processes starts %d: weights, average, step and schedule go on; %s cannot.",
            str(folder),
            then,
            now,
            " and ".join(behind),
        )


class RestoredSchedule(TrainerCallback):
    """What the parent does not restore as it should: it takes optimiser and schedule of a checkpoint, or neither.

    Attributes:
        file: of the schedule of a checkpoint whose optimiser stays behind, or None.
        is_changed: the settings of the optimiser are to be the new ones, not the checkpoint's.
        asked: these settings, by group of parameters.
    """

    file: Path | None = None
    is_changed = False
    asked: Sequence[dict[str, Any]] = ()

    def remember(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Keep the settings of an optimiser, before the state of a checkpoint takes their place; returns the optimiser."""
        groups = getattr(optimizer, "param_groups", ())  # DeepSpeed makes one of its file's later
        self.asked = [{key: group[key] for key in OPTIMIZER_SETTINGS if key in group} for group in groups]
        return optimizer

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)  # Accelerate may have wrapped it
        if self.file is not None and self.file.exists():
            schedule.load_state_dict(torch.load(self.file, weights_only=True))
            for group, rate in zip(schedule.optimizer.param_groups, schedule.get_last_lr(), strict=True):
                group["lr"] = rate
        if not self.is_changed:
            return
        groups = getattr(getattr(schedule, "optimizer", None), "param_groups", ())
        if not groups or len(groups) != len(self.asked):
            logger.warning(
                "The settings of the optimiser stay those of the checkpoint: it is not made by these settings."
            )
            return
        for group, asked in zip(groups, self.asked, strict=True):
            group |= {name: value for name, value in asked.items() if name != "lr"}
        if isinstance(schedule, LambdaLR):
            for group, asked, factor in zip(groups, self.asked, schedule.lr_lambdas, strict=True):
                group |= {"initial_lr": asked["lr"], "lr": asked["lr"] * factor(schedule.last_epoch)}
            rates = {"base_lrs": [asked["lr"] for asked in self.asked], "_last_lr": [group["lr"] for group in groups]}
            schedule.load_state_dict(schedule.state_dict() | rates)
        else:
            logger.warning("The learning rate stays the checkpoint's: %s cannot begin anew.", type(schedule).__name__)
