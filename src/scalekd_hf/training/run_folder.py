"""The output folder of a run: who writes into it, what it holds, and checkpoints that are whole or not there."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from ..manifest import MANIFEST_FILE, damage, seal
from ..models.saving import STUDENT_FILE, broken_checkpoint
from ..publishing.publisher import RESULTS_FILE


__all__ = ["RunFolder", "check_output_dir", "check_writable", "finished", "interrupted", "last_checkpoint"]

# Names that begin with `_` are never pushed to the Hub.
LOCK_FILE = "_lock"
UNFINISHED_FOLDER = "_unfinished_checkpoint"  # holds a checkpoint until it is whole
LEFT = "_left-"  # before the name of a checkpoint that a run has gone back from
REPLACED = "_replaced-"  # before the name of a checkpoint while another takes its place
INTERRUPTED_FILE = "_interrupted.json"  # the run was stopped by SIGTERM, with these settings

logger = logging.getLogger(__name__)


class RunFolder:
    """`output_dir`, on every process of a run.

    Args:
        args: of the run.
        settings: see `run_settings`, as they were asked for.
        accelerator: of the trainer.
    """

    def __init__(self, args: TrainingArguments, settings: dict[str, Any], accelerator: Accelerator):
        self.args, self.settings, self.accelerator = args, settings, accelerator

    @property
    def path(self) -> Path:
        return Path(str(self.args.output_dir))

    def begin(self, asked: str | bool | None) -> str | None:
        """The checkpoint that a run goes on from: the named one, or the last where `asked` is true or where the same run
        was stopped here by SIGTERM. None for a new run, which the folder is cleared for.

        Raises:
            ValueError: the last is asked for, and none is whole; the named one is damaged; or a run is not to be resumed, and
                not to be overwritten.
        """
        if not asked and interrupted(self.path, self.settings):
            logger.warning("The run in %r was stopped before its end: it is resumed.", str(self.path))
            asked = True
        if not asked:
            self._clear()
        if not asked:
            return None
        if asked is not True:
            return str(self.whole(asked))
        last_checkpoint(self.path)  # puts back what was being replaced
        paths = sorted(filter(_step, self.path.glob("checkpoint-*")), key=_step, reverse=True)
        names = gather_object([[path.name for path in paths if path.is_dir()]])[0]  # the same on every node
        checkpoints = [self.path / name for name in names]
        for checkpoint in checkpoints:
            if not (what := self._damage(checkpoint)):
                return str(checkpoint)
            logger.warning("%s It is passed over for the one before.", broken_checkpoint(checkpoint, what))
        raise ValueError(
            f"There is no {'whole ' if checkpoints else ''}checkpoint to resume from in `output_dir` {str(self.path)!r}."
        )

    def leave_later(self, checkpoint: str | Path, step: int) -> None:
        """Rename the checkpoints of other steps than those before a named one, which the run goes back to: none of them may be
        taken for its last.

        Args:
            checkpoint: that was named, here or elsewhere.
            step: at which it was written.
        """
        best = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json"))).best_model_checkpoint
        kept = {Path(path).resolve() for path in (checkpoint, best) if path is not None}
        later = sorted(
            path for path in self.path.glob("checkpoint-*") if _step(path) >= step and path.resolve() not in kept
        )
        self.accelerator.wait_for_everyone()  # everyone has looked before anything goes
        for path in later if self.args.should_save else []:
            numbers = (f"-{number}" if number > 1 else "" for number in itertools.count(1))
            names = (path.with_name(f"{LEFT}{path.name}{number}") for number in numbers)
            aside = next(name for name in names if not name.exists())
            path.rename(aside)
            logger.warning("The run goes back to %r: %s is kept as %s.", str(checkpoint), path.name, aside.name)
        self.accelerator.wait_for_everyone()

    def whole(self, checkpoint: str | Path) -> Path:
        """A checkpoint, before anything of it is loaded; every process must ask.

        Raises:
            ValueError: it is damaged.
        """
        if found := self._damage(Path(checkpoint)):
            raise ValueError(
                f"{broken_checkpoint(Path(checkpoint), found)} If you changed it yourself, remove its {MANIFEST_FILE}."
            )
        return Path(checkpoint)

    def _damage(self, checkpoint: Path) -> str:
        """See `manifest.damage`; each node looks at its disk, and all processes hear of what one has found."""
        found = damage(checkpoint) if self.accelerator.is_local_main_process else ""
        return next(filter(None, gather_object([found])), "")

    def _clear(self) -> None:
        """Make room for a new run."""
        held = check_output_dir(self.path, bool(getattr(self.args, "overwrite_output_dir", False)))
        self.accelerator.wait_for_everyone()  # everyone has looked before anything goes
        if self.args.should_save:
            for path in held:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if held:
                for path in [self.path / RESULTS_FILE, *self.path.glob("bad_images*.jsonl")]:
                    path.unlink(missing_ok=True)  # the former run's
            self.forget_interruption()
        self.accelerator.wait_for_everyone()

    def note_interruption(self) -> None:
        """Leave word that the same command is to resume this run."""
        if self.args.should_save:
            file, checkpoint = self.path / INTERRUPTED_FILE, last_checkpoint(self.path)
            unfinished, step = file.with_suffix(".part"), _step(Path(checkpoint)) if checkpoint else 0
            try:
                unfinished.write_text(
                    json.dumps({"step": step, "settings": self.settings}, indent=2), encoding="utf-8"
                )
                unfinished.replace(file)
            except OSError as error:
                logger.warning(
                    "No word is left in %r (%s): give `resume_from_checkpoint=True`.", str(self.path), error
                )

    def forget_interruption(self) -> None:
        """The run has ended, or another begins."""
        if self.args.should_save:
            (self.path / INTERRUPTED_FILE).unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else trains into the folder inside of this context. The lock goes with the process, however it ends.

        Raises:
            ValueError: somebody does.
        """
        lock, free = None, [True]
        if self.args.should_save:
            self.path.mkdir(parents=True, exist_ok=True)
            # The file stays: one that is unlinked could be locked twice. A mere marker would outlive its process.
            lock = FileLock(self.path / LOCK_FILE, fallback_to_soft=False)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                free = [False]
            except (OSError, NotImplementedError) as error:  # a file system without locks
                logger.warning("Nothing keeps another run out of %r: it cannot be locked (%s).", str(self.path), error)
        try:
            if self.args.world_size > 1:
                torch.distributed.broadcast_object_list(free, 0)
            if not free[0]:
                raise ValueError(
                    f"`output_dir` {str(self.path)!r} is being written by another run. Wait for it, or choose another folder."
                )
            yield
        finally:
            if lock is not None:
                lock.release()

    @contextmanager
    def new_checkpoint(
        self, parent: Path, state: TrainerState, is_last: bool, agree: Callable[[Exception | None], str]
    ) -> Iterator[Path]:
        """A folder to write a checkpoint into, on every process; it takes its place in `parent` once it is whole.

        Args:
            parent: holds the checkpoints.
            state: of the trainer: it says which step this is, and which checkpoint is the best.
            is_last: of a run that stops: it goes on from here, even if it saves only models otherwise.
            agree: see `Stopping.first_failure`.

        Raises:
            OSError: on all processes, where one cannot write. What was written of it is removed.
        """
        self._remove_unfinished(parent)
        name = f"checkpoint-{state.global_step}"
        unfinished, place = parent / UNFINISHED_FOLDER / name, parent / name
        only_model, self.args.save_only_model = self.args.save_only_model, self.args.save_only_model and not is_last
        try:
            with self._on_all_or_none(place, agree):
                yield unfinished
                if state.best_model_checkpoint == str(unfinished):
                    state.best_model_checkpoint = str(place)
                    if self.args.should_save:
                        state.save_to_json(str(unfinished / "trainer_state.json"))
            with self._on_all_or_none(place, agree):
                if self.args.should_save:
                    self.put_in_place(unfinished, place)
            with self._on_all_or_none(place, agree):
                if self.accelerator.is_local_main_process and unfinished.exists():  # a node with a disk of its own
                    self.put_in_place(unfinished, place)
        finally:
            self.args.save_only_model = only_model
        if self.args.should_save:
            _make_latest(place)
            rotate_checkpoints(str(parent), self.args.save_total_limit, state.best_model_checkpoint, use_mtime=True)

    @contextmanager
    def _on_all_or_none(self, place: Path, agree: Callable[[Exception | None], str]) -> Iterator[None]:
        """Every process has written what is written inside, or all of them hear why not."""
        failure: Exception | None = None
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is one or the other
            failure = error
        if reason := agree(failure):
            shutil.rmtree(place.parent / UNFINISHED_FOLDER, ignore_errors=True)
            raise OSError(
                f"Writing {place.name!r} into {str(place.parent)!r} failed ({reason}). What was written of it is removed; the last "
                f"whole checkpoint is {last_checkpoint(place.parent) or 'none'}. Make room, and resume from it."
            ) from failure

    def put_in_place(self, unfinished: Path, place: Path) -> None:
        """Move a checkpoint in place, once every process has written its part."""
        seal(unfinished)
        _move(unfinished, place)

    def _remove_unfinished(self, parent: Path) -> None:
        """Remove what a process that died while saving has left."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_local_main_process:
            last_checkpoint(parent)  # puts back what was being replaced
            for left in (parent / UNFINISHED_FOLDER, *parent.glob(f"{REPLACED}*")):
                shutil.rmtree(left, ignore_errors=True)
        self.accelerator.wait_for_everyone()


def check_writable(folder: str | Path) -> None:
    """Refuse an output folder that nothing can be written into, before any work is done; it is made where it does not exist.

    Raises:
        ValueError: with the reason.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # the latter of a name with a zero byte
        raise ValueError(f"`output_dir` {str(folder)!r} cannot be written: {error}. Choose another folder.") from error


def check_output_dir(folder: str | Path, overwrite: bool) -> list[Path]:
    """Refuse an output folder that holds a run, before any work is done.

    Returns:
        The checkpoints and the student in it, which are to go when `overwrite` is true.

    Raises:
        ValueError: it holds a run and `overwrite` is false.
    """
    folder = Path(folder)
    held = sorted(path for path in (*folder.glob("checkpoint-*"), folder / STUDENT_FILE) if path.exists())
    if held and not overwrite:
        raise ValueError(
            f"`output_dir` {str(folder)!r} holds a run already ({', '.join(path.name for path in held)}). Resume it with "
            "`resume_from_checkpoint=True`, delete it with `overwrite_output_dir=True`, or choose another."
        )
    return held


def interrupted(folder: str | Path, settings: dict[str, Any]) -> bool:
    """Whether a folder holds a run with these settings that SIGTERM stopped."""
    try:
        note = json.loads(Path(folder, INTERRUPTED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(note["settings"] == settings and last_checkpoint(folder) is not None)


def finished(folder: str | Path, max_steps: int) -> bool:
    """Whether a folder holds a student that was trained to the end, whatever checkpoints lie beside it."""
    try:
        steps = json.loads(Path(folder, "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError):
        steps = 0 if last_checkpoint(folder) else max_steps
    return Path(folder, STUDENT_FILE).exists() and bool(steps >= max_steps)


def last_checkpoint(folder: str | Path) -> str | None:
    """The last whole checkpoint in a folder, None where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        return None
    for replaced in folder.glob(f"{REPLACED}checkpoint-*"):  # a process died between two renames
        place = folder / replaced.name.removeprefix(REPLACED)
        if not place.exists():
            with contextlib.suppress(OSError):  # another process was first
                replaced.rename(place)
    found: str | None = get_last_checkpoint(str(folder))
    return found


def _step(checkpoint: Path) -> int:
    """That a checkpoint was written after, 0 of another folder."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else 0


def _make_latest(checkpoint: Path) -> None:
    """Have no other checkpoint look younger, as where a clock was set back: the oldest are removed."""
    with contextlib.suppress(OSError):  # one that goes meanwhile, or a file system that keeps its own times
        others = [path for path in checkpoint.parent.glob("checkpoint-*") if path != checkpoint and path.is_dir()]
        latest = max((path.stat().st_mtime for path in others), default=0.0)
        if latest >= checkpoint.stat().st_mtime:
            os.utime(checkpoint, (latest + 1, latest + 1))


def _move(unfinished: Path, place: Path) -> None:
    replaced = place.with_name(REPLACED + place.name)
    if place.exists():  # the same step once more, after a resume from before it
        place.rename(replaced)
    unfinished.rename(place)
    for left in (replaced, unfinished.parent):
        shutil.rmtree(left, ignore_errors=True)
