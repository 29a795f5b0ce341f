"""Ends a run after a step, or within an evaluation, with a checkpoint, on all processes at the same place."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from transformers import TrainerCallback


__all__ = ["EvaluationStopped", "RunInterrupted", "Stopping"]

logger = logging.getLogger(__name__)


class RunInterrupted(SystemExit):
    """Raised by `train()` after SIGTERM and a checkpoint; uncaught, the process exits with 75 ("try again later")."""

    def __init__(self) -> None:
        super().__init__(os.EX_TEMPFAIL)


class EvaluationStopped(Exception):  # noqa: N818
    """Ends an evaluation during training, on all processes before the same batch."""


class Stopping(TrainerCallback):
    """Asks all processes at the end of each step whether one of them must stop: for SIGTERM, or for want of images.

    Before each batch of an evaluation, too, which may take longer than a scheduler waits.

    The answer travels between the processes' CPUs; no device is waited for.

    Args:
        fetch_next: gets the images of the next step; what it raises as one of `failures` stops the run.
        failures: the errors after which the run stops with a checkpoint.
        epoch_has_ended: whether the epoch that ends has been ended before.
    """

    def __init__(
        self,
        fetch_next: Callable[[], None],
        failures: tuple[type[Exception], ...],
        epoch_has_ended: Callable[[], bool],
    ):
        self.fetch_next, self.failures, self.epoch_has_ended = fetch_next, failures, epoch_has_ended
        self.failure: Exception | None = None
        self.terminated = self.stopped = False
        self._handler: Any = None
        self._group: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.failure, self.terminated, self.stopped = None, False, False
        if args.world_size > 1 and self._group is None:
            timeout = timedelta(seconds=args.ddp_timeout)
            self._group = torch.distributed.new_group(backend="gloo", timeout=timeout)
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._terminate)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps:
            try:
                self.fetch_next()
            except self.failures as error:
                self.failure = error
        if not self.agreed(args.world_size):
            return
        self.stopped = True
        logger.warning("The run stops at step %d and saves a checkpoint.", state.global_step)
        control.should_training_stop = control.should_save = True
        control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped or self.epoch_has_ended():  # all is saved; there may be no time for more
            control.should_log = control.should_evaluate = control.should_save = False

    def release(self) -> None:
        """Give SIGTERM its former meaning back."""
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None

    def raise_reason(self) -> None:
        """Raise what stopped the run, if anything did.

        Raises:
            RunInterrupted: SIGTERM, to this process or another.
            Exception: the failure of this process.
        """
        if self.failure is not None:
            raise self.failure
        if self.stopped:
            raise RunInterrupted

    def _terminate(self, *_: Any) -> None:
        self.terminated = True

    def check_evaluation(self, world_size: int) -> None:
        """Leave an evaluation, where one of the processes must stop.

        Raises:
            EvaluationStopped: on all of them.
        """
        if self.agreed(world_size):
            raise EvaluationStopped

    def agreed(self, world_size: int) -> bool:
        """Whether one of the processes must stop; every one of them must ask."""
        stops = self.terminated or self.failure is not None
        if world_size == 1:
            return stops
        wanted = torch.tensor([int(stops)])
        torch.distributed.all_reduce(wanted, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(wanted.item())
