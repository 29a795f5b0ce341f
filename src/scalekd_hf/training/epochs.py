"""Epochs of an endless stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import CallbackHandler

from ..data.stream import ImageStream
from .loss_log import LossLog
from .run_config import RunConfig


__all__ = ["EpochCounter", "count_epochs", "count_steps", "images_per_step", "steps_per_epoch"]


class EpochCounter(TrainerCallback):
    """Tells the parent, which takes a stream for a single endless epoch, where one ends: after so many images.

    Args:
        images_per_epoch: that count as one.
        epochs: to train for; None where the steps are given instead.
        progress: knows the images seen.
        callbacks: hear of each end and each beginning.
    """

    def __init__(self, images_per_epoch: int, epochs: float | None, progress: LossLog, callbacks: CallbackHandler):
        self.images_per_epoch, self.epochs = images_per_epoch, epochs
        self.progress, self.callbacks = progress, callbacks
        self._announced_at = -1  # the step at which this last told callbacks of an epoch's end
        self.end_is_repeated = False  # the parent announces an end that this has announced already

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._announced_at = -1
        left = (state.max_steps - state.global_step) * images_per_step(args)
        epochs = (self.progress.images_seen + left) / self.images_per_epoch if self.epochs is None else self.epochs
        state.num_train_epochs = math.ceil(epochs)
        state.epoch = self.progress.images_seen / self.images_per_epoch

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        seen = self.progress.images_seen
        before = seen - images_per_step(args)
        state.epoch = seen / self.images_per_epoch
        if seen // self.images_per_epoch > before // self.images_per_epoch and state.global_step < state.max_steps:
            # The parent ends the last one. What callbacks do at the end of an epoch they do here, too.
            self.callbacks.on_epoch_end(args, state, control)
            self.callbacks.on_epoch_begin(args, state, control)
            self._announced_at = state.global_step

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.end_is_repeated = self._announced_at == state.global_step


def count_epochs(trainer: Trainer, epochs: float | None, progress: LossLog) -> Callable[[], bool]:
    """Tell a trainer's callbacks of epochs of a stream; returns a function: whether an end is told of a second time.

    Args:
        trainer: with its training set.
        epochs, progress: see `EpochCounter`.
    """
    stream, args = trainer.train_dataset, trainer.args
    if not isinstance(stream, ImageStream):
        return lambda: False
    images = epoch_images(stream, args)
    counter = EpochCounter(images, epochs, progress, trainer.callback_handler)
    trainer.callback_handler.callbacks.insert(0, counter)  # the others find the right epoch
    return lambda: counter.end_is_repeated


def count_steps(stream: ImageStream, args: RunConfig, images_seen: int = 0) -> int:
    """Steps for what is left of `num_train_epochs`.

    Raises:
        ValueError: epochs that are not positive.
    """
    if args.num_train_epochs <= 0:
        raise ValueError(f"`num_train_epochs` must be positive, got {args.num_train_epochs}.")
    images = epoch_images(stream, args)
    return math.ceil((args.num_train_epochs * images - images_seen) / images_per_step(args))


def epoch_images(stream: ImageStream, args: Any) -> int:
    """Images that count as an epoch of a stream."""
    return int(getattr(args, "images_per_epoch", None) or len(stream.source))


def steps_per_epoch(dataset: Any, args: Any) -> float:
    """Optimiser steps of an epoch: of a stream so many images, of other data sets whole batches.

    Raises:
        ValueError: a data set of unknown length.
    """
    if isinstance(dataset, ImageStream):
        return epoch_images(dataset, args) / images_per_step(args)
    try:
        count = len(dataset)
    except TypeError:
        raise ValueError(
            "`lr_by_epoch` needs to know an epoch, and `train_dataset` does not tell its length."
        ) from None
    batch = args.train_batch_size * args.world_size
    batches = count // batch if args.dataloader_drop_last else math.ceil(count / batch)
    return max(1, math.ceil(batches / args.gradient_accumulation_steps))


def images_per_step(args: Any) -> int:
    """Images of an optimiser step on all processes."""
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)
