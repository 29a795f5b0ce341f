"""Ends a run before a step, or within an evaluation, with a checkpoint, on all processes at the same place."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from transformers import TrainerCallback

from ..data.bad_images import TooManyBadImagesError
from ..data.labels import LabelError
from ..data.sources import StreamReadError
from .run_folder import RunFolder


__all__ = ["STOPPING_FAILURES", "EvaluationStopped", "RunCancelled", "RunInterrupted", "Stopping"]

STOPPING_FAILURES = (StreamReadError, TooManyBadImagesError, LabelError)  # the images have ended
TRY_AGAIN_LATER = 75  # exit status, EX_TEMPFAIL of sysexits.h
SAME_KEY = 1.0  # seconds within which a launcher passes on what the terminal has sent already

logger = logging.getLogger(__name__)


class RunInterrupted(SystemExit):
    """Raised by `train()` after SIGTERM and a checkpoint; uncaught, the process exits with 75 ("try again later")."""

    def __init__(self) -> None:
        super().__init__(TRY_AGAIN_LATER)


class RunCancelled(KeyboardInterrupt):
    """Raised by `train()` after Ctrl-C and a checkpoint. The same call resumes the run."""


class EvaluationStopped(Exception):  # noqa: N818
    """Ends an evaluation during training, on all processes before the same batch."""


class Stopping(TrainerCallback):
    """Has all processes stop where one of them must: for SIGTERM or Ctrl-C, or for want of images.

    They ask each other before each step, before each batch of an evaluation, which may take longer than a scheduler
    waits, and after the last step. The answer travels between the processes' CPUs; no device is waited for.

    Args:
        epoch_end_is_repeated: whether callbacks have been told of this epoch's end already.

    Attributes:
        failure: of this process, which then must stop.
        terminated: this process got SIGTERM or Ctrl-C.
        cancelled: one of the processes got Ctrl-C.
        stopped: the run ends, on all processes.
        saved_step: of the last checkpoint that the run can go on from.
    """

    def __init__(self, epoch_end_is_repeated: Callable[[], bool]):
        self.epoch_end_is_repeated = epoch_end_is_repeated
        self.failure: Exception | None = None
        self.terminated = self.cancelled = self.stopped = False
        self.saved_step = 0
        self._is_training = self._is_watched = False  # training goes on; an evaluation may end it
        self._handlers: dict[int, Any] = {}
        self._pressed = -math.inf  # when Ctrl-C came first
        self._group: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.failure, self.terminated, self.cancelled, self.stopped = None, False, False, False
        self.saved_step = state.global_step
        if args.world_size > 1 and self._group is None:
            timeout = timedelta(seconds=args.ddp_timeout)
            self._group = torch.distributed.new_group(backend="gloo", timeout=timeout)
        if threading.current_thread() is threading.main_thread():
            for number, handler in ((signal.SIGTERM, self._terminate), (signal.SIGINT, self._cancel)):
                self._handlers[number] = signal.signal(number, handler)
        self._is_training = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:  # no other step will ask
            self.stop_if_asked(args.world_size, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped or self.epoch_end_is_repeated():  # nothing more to do, or no time for it
            control.should_log = control.should_evaluate = False
            control.should_save = self.stopped and state.global_step != self.saved_step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped or not args.save_only_model:
            self.saved_step = state.global_step

    @contextmanager
    def at_the_end_of_images(self) -> Iterator[None]:
        """Images that end inside are a reason to stop; ask afterwards whether any process has one."""
        try:
            yield
        except STOPPING_FAILURES as error:
            self.failure = error

    def stop_if_asked(self, world_size: int, control: Any) -> bool:
        """Whether the run stops here; its checkpoint is saved as its epoch ends. Every process must ask."""
        if self.any_must_stop(world_size):
            self.stopped = True
            control.should_training_stop, control.should_evaluate = True, False
            logger.warning("The run stops here; what has changed since its last checkpoint is saved.")
        return self.stopped

    @contextmanager
    def within_evaluation(self, accelerator: Accelerator, save: Callable[[], None]) -> Iterator[None]:
        """An evaluation; in training it ends where a process must stop, the run is saved, and the reason raised.

        Once the run stops, evaluations that callbacks start are not cut short.

        Raises:
            RunInterrupted, RunCancelled, StreamReadError, TooManyBadImagesError: in training, after `save` has run on all
                processes.
        """
        was_watched, self._is_watched = self._is_watched, self._is_training and not self.stopped
        try:
            yield
            return
        except (*STOPPING_FAILURES, EvaluationStopped) as error:
            if not self._is_watched or self.stopped:
                raise
            if not isinstance(error, EvaluationStopped):
                self.failure = error
                self.any_must_stop(accelerator.num_processes)  # the others ask this before their next batch
        finally:
            self._is_watched = was_watched
        self.stopped = True
        save()
        self.raise_reason(accelerator)

    def leave_evaluation_if_asked(self, world_size: int) -> None:
        """Asked before each batch by every process, within an evaluation in training.

        Raises:
            EvaluationStopped: on all of them, where one must stop.
        """
        if self._is_watched and self.any_must_stop(world_size):
            raise EvaluationStopped

    def any_must_stop(self, world_size: int) -> bool:
        """Whether one of the processes must stop; every one of them must ask."""
        stops = self.terminated or self.failure is not None
        if world_size > 1:
            wanted = torch.tensor([int(stops), int(self.cancelled)])
            torch.distributed.all_reduce(wanted, torch.distributed.ReduceOp.MAX, group=self._group)
            stops, self.cancelled = (bool(value) for value in wanted.tolist())
        return stops

    @contextmanager
    def within_training(self, folder: RunFolder) -> Iterator[None]:
        """After the training inside, signals have their former meaning again, and the folder of a stopped run says so."""
        self.stopped = False
        try:
            yield
        finally:
            self._is_training = False
            self._restore_handlers()
            if self.stopped:
                folder.note_interruption()

    def raise_reason(self, accelerator: Accelerator) -> None:
        """Raise what stopped the run, if anything did, on all processes.

        Raises:
            RunInterrupted, RunCancelled: SIGTERM or Ctrl-C, to this process or another.
            Exception: the failure of this process.
        """
        if not self.stopped:
            return
        accelerator.wait_for_everyone()  # a process that leaves early has its launcher end the others
        if self.failure is not None:
            raise self.failure
        raise RunCancelled if self.cancelled else RunInterrupted

    def _terminate(self, *_: Any) -> None:
        self.terminated = True

    def _cancel(self, *_: Any) -> None:
        """The first time as SIGTERM; the second time at once."""
        now = time.monotonic()
        if not self.cancelled:
            self.terminated = self.cancelled = True
            self._pressed = now
            logger.warning("Ctrl-C: the run stops after this step, with a checkpoint. Once more ends it at once.")
        elif now > self._pressed + SAME_KEY:
            self._restore_handlers()
            raise KeyboardInterrupt

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
