"""The part of the trainer that keeps a run: checkpoints that are whole or not there, and going on from them."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from ..data.dataset import ImageStream
from ..models.saving import (
    HEADS_FILE,
    INTERRUPTED_FILE,
    REPLACED,
    RESULTS_FILE,
    RUN_STATE_FILE,
    UNFINISHED_FOLDER,
    check_output_dir,
    last_checkpoint,
    load_checkpoint,
    optimizer_in_parts,
    save_student,
    save_tensors,
)
from .averaging import TRAINED_FILE, AveragedStudent
from .feeding import STOPPING_FAILURES, ImageTrainer, count_steps
from .gathering import full_state
from .stopping import EvaluationStopped


__all__ = ["CheckpointTrainer"]

LOCK_FILE = "_lock"

logger = logging.getLogger(__name__)


class CheckpointTrainer(ImageTrainer):
    """Writes a checkpoint beside the others and moves it in place once it is whole.

    The folder is `checkpoint-N` as everywhere: the student's files, the mimicking heads, and the trainer's own.
    """

    averaged: AveragedStudent | None = None
    settings: dict[str, Any]  # of this run, as it was asked for
    _seconds_before: float = 0.0
    _started: float | None = None  # of training: before this call of `train`, and when it began
    _unfinished: Path | None = None  # where a checkpoint is being written

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._unfinished or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._stop_if_not_finite()  # before a good checkpoint is rotated away
        if self.averaged is not None:
            self.averaged.synchronise(self.accelerator)
        output_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._remove_unfinished(output_dir)
        self._unfinished = output_dir / UNFINISHED_FOLDER
        only_model, self.args.save_only_model = self.args.save_only_model, False
        if not self.stopping.stopped:  # else the run is to go on from here
            self.args.save_only_model = only_model
        try:
            with self.loss_log.paused():
                super()._save_checkpoint(model, trial)
                self._finish_checkpoint(self._unfinished / name, output_dir / name)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is one or the other
            shutil.rmtree(self._unfinished, ignore_errors=True)
            last = last_checkpoint(output_dir)
            raise OSError(
                f"Writing {name!r} into {str(output_dir)!r} failed ({error}). What was written of it is removed; the last whole "
                f"checkpoint is {last or 'none'}. Make room, and resume from it."
            ) from error
        finally:
            self._unfinished, self.args.save_only_model = None, only_model
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(output_dir / name))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(output_dir), self.args.save_total_limit, best, use_mtime=True)

    def _evaluate(self, trial: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The parent's, in training; where SIGTERM comes, or the images of a process fail, all save the run and stop."""
        self._evaluates_in_training = True
        try:
            return super()._evaluate(trial, *args, **kwargs)
        except STOPPING_FAILURES as error:
            self.stopping.failure = error
            self.stopping.agreed(self.args.world_size)  # answers what the others ask before their next batch
        except EvaluationStopped:
            pass
        finally:
            self._evaluates_in_training = False
        logger.warning("The run stops in the evaluation at step %d.", self.state.global_step)
        self.stopping.stopped = True
        has_stepped = not kwargs.get("skip_scheduler")  # else this is the evaluation before the first step
        if has_stepped or not Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}").exists():
            self._save_checkpoint(cast(nn.Module, self.model), trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self._note_interruption()
        self.accelerator.wait_for_everyone()  # a process that leaves early has its launcher end the others
        self.stopping.raise_reason()
        raise AssertionError("a run that stops has a reason")

    def _finish_checkpoint(self, unfinished: Path, place: Path) -> None:
        """Move a checkpoint in place, once every process has written its part."""
        if self.state.best_model_checkpoint == str(unfinished):
            self.state.best_model_checkpoint = str(place)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / "trainer_state.json"))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            _flush(unfinished)
            _move(unfinished, place)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_local_main_process and unfinished.exists():  # a node with a disk of its own
            _move(unfinished, place)

    def _remove_unfinished(self, output_dir: Path) -> None:
        """Remove what a process that died while saving has left."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_local_main_process:
            last_checkpoint(output_dir)  # puts back what was being replaced
            for left in (output_dir / UNFINISHED_FOLDER, *output_dir.glob(f"{REPLACED}*")):
                shutil.rmtree(left, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student, in full precision, under every launcher; every process must call it.

        In checkpoints also the heads, what an averaged student trains on with, and the images seen. Never the teacher.
        """
        folder, model = Path(output_dir or str(self.args.output_dir)), self._distiller()
        student = full_state(model.student.model)
        average = self.averaged.average.module.state_dict() if self.averaged is not None else None
        heads = full_state(model.heads) if model.heads is not None and self._unfinished else None
        if self.args.should_save:
            save_student(model.student, folder, student if average is None else average)
            if self._unfinished is not None:
                self._save_rest(folder, student if average is not None else None, heads)

    def _save_rest(self, folder: Path, trained: dict[str, Tensor] | None, heads: dict[str, Tensor] | None) -> None:
        if trained is not None:
            save_tensors(trained, folder / TRAINED_FILE)
        if heads is not None:
            save_tensors(heads, folder / HEADS_FILE)
        run_state = {
            "images_seen": self.loss_log.images_seen,
            "seconds": round(self._seconds(), 1),
            "layout_start": self._layout_start,
            "data": self._data_settings(),
        }
        (folder / RUN_STATE_FILE).write_text(json.dumps(run_state, indent=2))

    def _seconds(self) -> float:
        """Time of training so far, over all calls that went on from one another."""
        return self._seconds_before + (time.monotonic() - self._started if self._started is not None else 0.0)

    def _engine_runs(self) -> bool:
        """Whether DeepSpeed or FSDP holds the parameters: from the start of training on, not in an evaluation alone."""
        return self.deepspeed is not None or isinstance(self.model, (FSDPModule, FullyShardedDataParallel))

    def _distiller(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    # Going on

    def _read_run_state(self, checkpoint: Path) -> int:
        """Images seen and data settings of a checkpoint; returns its step."""
        run_state = json.loads((checkpoint / RUN_STATE_FILE).read_text())
        now, then = self._data_settings(), run_state["data"]
        changed = [f"{name} {then.get(name)} to {now[name]}" for name in now if now[name] != then.get(name)]
        if changed and not (self.args.allow_data_mismatch and isinstance(self.train_dataset, ImageStream)):
            raise ValueError(
                f"The checkpoint {str(checkpoint)!r} was written with other settings of the data: {', '.join(changed)}. "
                "The images would come in another order. Go back to them, or accept it with `allow_data_mismatch=True`: the "
                "run then goes on at the same number of images seen."
            )
        if (checkpoint / TRAINED_FILE).exists() and self.averaged is None:
            raise ValueError(
                f"The checkpoint {str(checkpoint)!r} holds an averaged student: set its `ema_decay` again."
            )
        self._say_what_stays_behind(checkpoint, then.get("processes", now["processes"]))
        images_seen: int = run_state["images_seen"]
        self._images_seen_before = images_seen
        self._seconds_before = run_state.get("seconds", 0.0)
        self._layout_start = images_seen if changed else run_state.get("layout_start", 0)
        self.loss_log.reset(images_seen)
        step: int = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
        if (
            changed and self._epochs_were_counted and isinstance(self.train_dataset, ImageStream)
        ):  # the epochs that are left, in steps of the new batch
            self.args.max_steps = step + count_steps(self.train_dataset, self.args, images_seen)
        return step

    def _say_what_stays_behind(self, checkpoint: Path, processes: int) -> None:
        """Of a checkpoint that other processes or another launcher wrote.

        Raises:
            ValueError: an optimiser in other parts than this launcher's.
        """
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        in_parts, changed = optimizer_in_parts(checkpoint), processes != self.args.world_size
        if sharded and (changed or not in_parts):
            raise ValueError(
                f"The optimiser in {str(checkpoint)!r} is {f'in parts for {processes} processes' if in_parts else 'whole'}: "
                f"{self.args.world_size} processes under DeepSpeed or FSDP cannot take it. Launch as many processes in the "
                "same way, or go on without DeepSpeed or FSDP."
            )
        behind = (["the optimiser's state"] if in_parts and not sharded else []) + ["random states"] * changed
        if behind:
            logger.warning(
                "The checkpoint %r of %d processes starts %d: weights, average, step and schedule go on; %s cannot.",
                str(checkpoint),
                processes,
                self.args.world_size,
                " and ".join(behind),
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The parent's; where the optimiser stays behind, the schedule goes on all the same."""
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = Path(checkpoint or "", "scheduler.pt")
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if checkpoint is None or sharded or not optimizer_in_parts(checkpoint) or not schedule.exists():
            return
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(torch.load(schedule, weights_only=True))
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_finished(self, checkpoint: str, step: int) -> TrainOutput:
        """A run that needs no more steps: load what it ended with."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None and Path(best).is_dir():
            self._load_best_model()
        return TrainOutput(step, float("nan"), {})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_weights(resume_from_checkpoint, resume=True)

    def _load_best_model(self) -> None:
        if self._engine_runs():
            super()._load_best_model()
            if self.averaged is not None:
                self.averaged.restore(Path(str(self.state.best_model_checkpoint)))
        else:
            self._load_weights(str(self.state.best_model_checkpoint), resume=False)

    def _load_weights(self, folder: str, resume: bool) -> None:
        distiller = self._distiller()
        load_checkpoint(distiller.student, distiller.heads, folder)
        if self.averaged is not None:
            self.averaged.load(Path(folder), resume)

    def _note_interruption(self) -> None:
        """Leave word that the same command is to resume this run."""
        if self.args.should_save:
            file = Path(str(self.args.output_dir), INTERRUPTED_FILE)
            unfinished = file.with_suffix(".part")
            unfinished.write_text(json.dumps({"step": self.state.global_step, "settings": self.settings}, indent=2))
            unfinished.replace(file)

    def _forget_interruption(self) -> None:
        if self.args.should_save:
            Path(str(self.args.output_dir), INTERRUPTED_FILE).unlink(missing_ok=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else trains into the output folder inside of this context.

        Raises:
            ValueError: somebody does.
        """
        folder, holds = Path(str(self.args.output_dir)), [True]
        lock = None
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / LOCK_FILE).open("a")
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however it ends
            except (BlockingIOError, PermissionError):
                holds = [False]
            except OSError as error:  # a file system without locks
                logger.warning("Nothing keeps another run out of %r: it cannot be locked (%s).", str(folder), error)
        mine = holds[0]
        if self.args.world_size > 1:
            torch.distributed.broadcast_object_list(holds, 0)
        try:
            if not holds[0]:
                raise ValueError(
                    f"`output_dir` {str(folder)!r} is being written by another run. Wait for it, or choose another folder."
                )
            yield
        finally:
            if lock is not None:
                if mine:
                    (folder / LOCK_FILE).unlink(missing_ok=True)
                lock.close()

    def _clear_output_dir(self) -> None:
        held = check_output_dir(str(self.args.output_dir), self.args.overwrite_output_dir)
        self.accelerator.wait_for_everyone()  # everyone has looked before anything goes
        if self.args.should_save:
            for path in held:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if held:
                Path(str(self.args.output_dir), RESULTS_FILE).unlink(missing_ok=True)  # the former run's
            self._forget_interruption()
        self.accelerator.wait_for_everyone()

    def _stop_if_not_finite(self) -> None:
        self.loss_log.stop_if_not_finite(self.accelerator, last_checkpoint(str(self.args.output_dir)))


def _flush(folder: Path) -> None:
    """Have the files of a folder on the disk, so that a machine that loses power does not lose them."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _move(unfinished: Path, place: Path) -> None:
    replaced = place.with_name(REPLACED + place.name)
    if place.exists():  # the same step once more, after a resume from before it
        place.rename(replaced)
    unfinished.rename(place)
    for left in (replaced, unfinished.parent):
        shutil.rmtree(left, ignore_errors=True)
