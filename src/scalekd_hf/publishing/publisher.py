"""What is published of a run: the student alone, with a card, from a finished run or while it goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, HfApi, ModelCard
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..manifest import STUDENT_FILE, digest
from ..texts import redacted, without_secrets
from .curves import draw_curves
from .hub import PushError, create_repository, failures_in_log, push_command, remote_card, upload
from .model_card import MARK, make_card
from .provenance import Source, model_source


__all__ = ["RESULTS_FILE", "Publisher"]

RESULTS_FILE = "results.json"  # metrics by the name of a model
RECORD_FILE = "training_config.yaml"  # its first line tells of which weights; written when all the others are there
WEIGHTS = ("config.json", "preprocessor_config.json", STUDENT_FILE)
ABOUT = ("README.md", RECORD_FILE, RESULTS_FILE, "curves.png")
STAGING = "_publishing"  # `_` as in the parent: what is on its way to the Hub

logger = logging.getLogger(__name__)


class Publisher:
    """Pushes what `from_pretrained` loads, and what describes it; never the teacher, a pickle or a token.

    Args:
        args: says where the student lies, and whether and where it is pushed.
        student, teacher: the models, for their origins.

    Attributes:
        repo: the repository's id, once it is known to exist.
        arguments: of the recipe that runs, beside the trainer's settings: what `training_config.yaml` rebuilds the run with.
    """

    def __init__(self, args: TrainingArguments, student: Any, teacher: Any):
        self.args = args
        self._student, self._teacher = student, teacher
        self.repo: str | None = None
        self.arguments: dict[str, Any] = {}
        self._in_progress: Future | None = None

    @property
    def folder(self) -> Path:
        return Path(str(self.args.output_dir))

    @property
    def name(self) -> str:
        """What the student is called."""
        return self.repo or self.args.hub_model_id or self.folder.resolve().name

    @cached_property
    def student_source(self) -> Source:
        return model_source(self._student)  # may ask the Hub: once

    @cached_property
    def teacher_source(self) -> Source | None:
        return model_source(self._teacher) if self._teacher is not None else None

    def create(self, token: str | None = None, private: bool | None = None, revision: str | None = None) -> str:
        """Make the repository, or the branch `revision` in it, where they do not exist; returns its id.

        Raises:
            ValueError: a wrong name, or a token that may not write.
            PushError: a Hub that does not answer.
        """
        name = self.repo or self.args.hub_model_id or self.folder.absolute().name
        private = self.args.hub_private_repo if private is None else private
        token, revision = token or self.args.hub_token, revision or self.args.hub_revision
        self.repo = create_repository(name, token, private, revision)
        return self.repo

    # The card

    def describe(
        self, facts: Any, history: list[dict[str, Any]], make: Callable[[Any], ModelCard] = make_card
    ) -> None:
        """Write curves.png, README.md, results.json and, last, training_config.yaml into the folder, each whole or not at all.

        A README.md that somebody has changed (whose first comment is gone) stays as it is.

        Args:
            facts: of the run, a dataclass; `results` are added to those in the folder.
            history: what was logged, for the curves.
            make: the card of the facts.
        """
        file, card = self.folder / RESULTS_FILE, self.folder / "README.md"
        results = (json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}) | facts.results
        with _whole(self.folder / "curves.png") as unfinished:
            curves = draw_curves(history, unfinished)
        if card.exists() and MARK not in card.read_text(encoding="utf-8"):
            logger.warning("%r was changed by somebody: it stays as it is.", str(card))
        else:
            _write(card, str(make(replace(facts, results=results, curves=curves))))
        if results:
            _write(file, json.dumps(results, indent=2) + "\n")
        models = {"student": facts.student.name} | ({"teacher": facts.teacher.name} if facts.teacher else {})
        settings = yaml.safe_dump({**models, **self.arguments, **facts.configuration}, sort_keys=False)
        _write(self.folder / RECORD_FILE, _weights_line(self.folder) + settings)

    def is_described(self) -> bool | None:
        """Whether what describes the student is of the very weights in the folder; None where it does not say of which."""
        if not (self.folder / "README.md").exists():
            return False
        record = self.folder / RECORD_FILE
        line = record.read_text(encoding="utf-8").partition("\n")[0] if record.exists() else ""
        return f"{line}\n" == _weights_line(self.folder) if line.startswith("#") else None

    # Pushing

    def push(
        self, message: str, blocking: bool = True, token: str | None = None, revision: str | None = None
    ) -> CommitInfo | None:
        """Commit the student and what describes it; returns the commit if it is waited for.

        Raises:
            PushError: it failed for good; in the background, the log says so.
        """
        self.wait()
        files = _existing(self.folder, (*WEIGHTS, *ABOUT))
        how: dict[str, Any] = {"token": token or self.args.hub_token, "revision": revision or self.args.hub_revision}
        if blocking:
            return self._commit(files, message, later=self.folder, **how)
        self._push_in_background([(files, message, "")], self.folder, None, **how)
        return None

    def is_busy(self) -> bool:
        """Whether a checkpoint is not pushed now: `hub_strategy` is "end", or an earlier push still runs."""
        if self.args.hub_strategy == HubStrategy.END:
            return True
        return not self.args.hub_always_push and self._in_progress is not None and not self._in_progress.done()

    def push_checkpoint(self, checkpoint: Path, message: str) -> None:
        """Push a checkpoint's student and, where `hub_strategy` asks for it, the checkpoint, while training goes on."""
        self.wait()
        staging = self.folder / STAGING
        shutil.rmtree(staging, ignore_errors=True)
        student = _link(_existing(checkpoint, WEIGHTS) + _existing(self.folder, ABOUT), staging / "student")
        jobs = [(student, message, "")]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if self.args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            rest = _link([file for file in checkpoint.iterdir() if file.is_file()], staging / "checkpoint")
            jobs.append((rest, f"{message}, checkpoint", f"{name}/"))
        self._push_in_background(jobs, checkpoint, staging, token=self.args.hub_token, revision=self.args.hub_revision)

    def wait(self) -> None:
        """Until nothing is being pushed any more."""
        if self._in_progress is not None:
            if not self._in_progress.done():
                logger.info("A push is still going on; waiting for its end.")
            if error := self._in_progress.exception():
                logger.error("A push has failed: %s", redacted(error, self.args.hub_token))
            self._in_progress = None

    def _push_in_background(self, jobs: list[tuple], later: Path, staging: Path | None, **how: Any) -> None:
        """Push while training goes on; the log says what fails."""

        def push_all() -> None:
            try:
                with failures_in_log():
                    for files, message, folder in jobs:
                        self._commit(files, message, later=later, folder=folder, **how)
            finally:
                if staging is not None:
                    shutil.rmtree(staging, ignore_errors=True)

        self._in_progress = HfApi().run_as_future(push_all)

    def _commit(
        self, files: list[Path], message: str, later: Path, token: str | None, revision: str | None, folder: str = ""
    ) -> CommitInfo:
        repo = str(self.repo)
        try:
            card = remote_card(repo, token, revision)
            if card is not None and MARK not in card:
                logger.warning("The card of %r was changed by somebody: it stays as it is.", repo)
                files = [file for file in files if file.name != "README.md"]
            return upload(repo, files, message, token=token, revision=revision, folder=folder)
        except PushError as error:
            names = [file.name for file in files]
            command = push_command(repo, later, names, self.args.hub_private_repo, revision)
            raise PushError(
                f"{error} Nothing is lost; {str(later)!r} is whole. Push it later with: {command}"
            ) from without_secrets(error, token)


def _existing(folder: Path, names: Iterable[str]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


def _weights_line(folder: Path) -> str:
    """A comment that names the student's weights as the Hub does, where they are there already."""
    file = folder / STUDENT_FILE
    return f"# {STUDENT_FILE}: {f'sha256 {digest(file, hashlib.sha256())}' if file.exists() else 'not yet'}\n"


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """A file to write instead, which takes the place of `file` once it is whole."""
    unfinished = file.with_name(f"_{file.name}")
    try:
        yield unfinished
        if unfinished.exists():
            unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _write(file: Path, text: str) -> None:
    with _whole(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="\n")


def _link(files: list[Path], folder: Path) -> list[Path]:
    """The same files under the same names in a folder that nobody cleans up meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        try:
            os.link(file, folder / file.name)
        except OSError:  # another file system, or one without links
            shutil.copy2(file, folder / file.name)
    return [folder / file.name for file in files]
