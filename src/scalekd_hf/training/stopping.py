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
from transformers.trainer_utils import IntervalStrategy

from ..data.bad_images import TooManyBadImagesError
from ..data.labels import LabelError
from ..data.sources import StreamReadError
from .console import leave_closed_outputs
from .run_folder import RunFolder


__all__ = ["STOPPING_FAILURES", "EvaluationStopped", "MissedEvaluation", "RunCancelled", "RunInterrupted", "Stopping"]

STOPPING_FAILURES = (StreamReadError, TooManyBadImagesError, LabelError)  # the images have ended
TRY_AGAIN_LATER = 75  # exit status, EX_TEMPFAIL of sysexits.h
PATIENCE = timedelta(minutes=1)  # of a process that cannot go on, with those that may never hear of it
HANG_UP = getattr(signal, "SIGHUP", None)  # a terminal has closed; Windows has no such signal
SAME_KEY = 1.0  # seconds within which a launcher passes on what the terminal has sent already

logger = logging.getLogger(__name__)


class RunInterrupted(SystemExit):
    """Raised by `train()` after SIGTERM or SIGHUP and a checkpoint; uncaught, the process exits with 75 ("try again later")."""

    def __init__(self) -> None:
        super().__init__(TRY_AGAIN_LATER)


class RunCancelled(KeyboardInterrupt):
    """Raised by `train()` after Ctrl-C and a checkpoint. The same call resumes the run."""


class EvaluationStopped(Exception):  # noqa: N818
    """Ends an evaluation during training, on all processes before the same batch."""


class Stopping(TrainerCallback):
    """Has all processes stop where one of them must: for SIGTERM, Ctrl-C or a closed terminal, or for want of images.

    They ask each other before each step, before each batch of an evaluation, which may take longer than a scheduler
    waits, and after the last step. The answer travels between the processes' CPUs; no device is waited for.

    Args:
        epoch_end_is_repeated: whether callbacks have been told of this epoch's end already.

    Attributes:
        failure: of this process, which then must stop.
        terminated: this process got SIGTERM, Ctrl-C or SIGHUP.
        cancelled: one of the processes got Ctrl-C.
        stopped: the run ends, on all processes.
        saved_step: of the last checkpoint that the run can go on from.
        evaluation_is_due: at the step where the run stops, one of its own was left out or cut short.
    """

    def __init__(self, epoch_end_is_repeated: Callable[[], bool]):
        self.epoch_end_is_repeated = epoch_end_is_repeated
        self.failure: Exception | None = None
        self.terminated = self.cancelled = self.stopped = False
        self.saved_step = self._began_at = 0
        self.evaluation_is_due = False
        self._is_training = self._is_watched = False  # training goes on; an evaluation may end it
        self._handlers: dict[int, Any] = {}
        self._pressed = -math.inf  # when Ctrl-C came first
        self._group: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.failure, self.terminated, self.cancelled, self.stopped = None, False, False, False
        self._pressed = -math.inf
        self.saved_step = self._began_at = state.global_step
        self.evaluation_is_due = False
        if args.world_size > 1 and self._group is None:
            timeout = timedelta(seconds=args.ddp_timeout)
            self._group = torch.distributed.new_group(backend="gloo", timeout=timeout)
        if threading.current_thread() is threading.main_thread():
            reactions = {signal.SIGTERM: self._terminate, signal.SIGINT: self._cancel}
            if HANG_UP and signal.getsignal(HANG_UP) != signal.SIG_IGN:  # as it is after `nohup`
                reactions[HANG_UP] = self._terminate
            self._handlers = {number: signal.signal(number, handler) for number, handler in reactions.items()}
        self._is_training = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:  # no other step will ask
            evaluates = control.should_evaluate or args.eval_strategy == IntervalStrategy.EPOCH
            self.evaluation_is_due = self.stop_if_asked(args.world_size, control) and evaluates

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        nothing_new = state.global_step == self._began_at or self.epoch_end_is_repeated()
        if self.stopped or nothing_new:  # nothing more to do, or no time for it
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
    def within_evaluation(self, accelerator: Accelerator, save: Callable[[], None], is_own: bool) -> Iterator[None]:
        """An evaluation; in training it ends where a process must stop, the run is saved, and the reason raised.

        Once the run stops, evaluations that callbacks start are not cut short.

        Args:
            accelerator: of the trainer.
            save: the run.
            is_own: the settings ask for it at this step; one that is cut short is due.

        Raises:
            RunInterrupted, RunCancelled, StreamReadError, TooManyBadImagesError: in training, after `save` has run on all
                processes.
        """
        was_watched, self._is_watched = self._is_watched, self._is_training and not self.stopped
        is_whole = self._is_watched and not was_watched  # and not that of one data set of several
        if is_whole:
            self.evaluation_is_due = is_own
        try:
            yield
            if is_whole:
                self.evaluation_is_due = False
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

    def first_failure(self, failure: Exception | None) -> str:
        """What has failed on one of the processes, in words, "" where nothing has; in training, where every process must ask.

        A process that has failed waits for the others no longer than `PATIENCE`: they may be waiting for it elsewhere.
        """
        reason = f"{type(failure).__name__}: {failure}" if failure is not None else ""
        if self._group is None:
            return reason
        rank = torch.distributed.get_rank()
        failed = torch.tensor([rank + 1 if reason else 0])
        try:
            work = torch.distributed.all_reduce(
                failed, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
            )
            work.wait(*[PATIENCE] * bool(reason))
        except RuntimeError as error:
            return reason or f"another process has ended ({error})"
        if not failed.item():
            return ""
        told = [f"process {rank}: {reason}"]
        torch.distributed.broadcast_object_list(told, int(failed.item()) - 1, group=self._group)
        return str(told[0])

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
        leave_closed_outputs()
        self.terminated = True

    def _cancel(self, *_: Any) -> None:
        """The first time as SIGTERM; the second time at once."""
        now = time.monotonic()
        if self._pressed == -math.inf:  # `cancelled` may be another process's
            leave_closed_outputs()
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


class MissedEvaluation(TrainerCallback):
    """Makes up for an evaluation that a signal cut short or left out, where its run goes on.

    Args:
        evaluate: takes the checkpoint that lacks it.

    Attributes:
        checkpoint: that lacks an evaluation, or None.
        was_due: the run went on from a checkpoint that lacked one.
        is_made_up: one is being made up for.
    """

    def __init__(self, evaluate: Callable[[str], None]):
        self.evaluate = evaluate
        self.checkpoint: str | None = None
        self.was_due = self.is_made_up = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:  # there may be no epoch any more
            self._make_up(state)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._make_up(state)  # every callback knows by now that training has begun

    def _make_up(self, state: Any) -> None:
        checkpoint, self.checkpoint = self.checkpoint, None
        if checkpoint is None:
            return
        partial = [
            entry for entry in state.log_history if entry["step"] == state.global_step and _of_evaluation(entry)
        ]
        for entry in partial:  # of one data set of several
            state.log_history.remove(entry)
        self.is_made_up = True
        try:
            self.evaluate(checkpoint)
        finally:
            self.is_made_up = False

    def ends(self, state: Any, control: Any) -> bool:
        """Whether such an evaluation was all that was left to do, or has had a callback end the run; asked before each step."""
        control.should_training_stop = control.should_training_stop or state.global_step >= state.max_steps
        return bool(control.should_training_stop)


def _of_evaluation(entry: dict[str, Any]) -> bool:
    return any(name.startswith("eval_") for name in entry)
