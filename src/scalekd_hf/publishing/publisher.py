"""The part of the trainer that publishes: the student alone, with a card, from a finished run or while it runs."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import MISSING, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..models.saving import RESULTS_FILE, STUDENT_FILE
from ..training.checkpoints import CheckpointTrainer
from ..training.config import ScaleKDConfig
from .curves import draw_curves
from .hub import PushError, create_repository, push_command, remote_card, upload
from .model_card import ALONE, DISTILLED, MARK, CardFacts, make_card
from .provenance import Source, hardware, model_source, versions


__all__ = ["PublishingTrainer"]

WEIGHTS = ("config.json", "preprocessor_config.json", STUDENT_FILE)
ABOUT = ("README.md", "training_config.yaml", RESULTS_FILE, "curves.png")
STAGING = "_publishing"  # `_` as in the parent: what is on its way to the Hub
PARENT_SETTINGS = (
    *("seed", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "optim", "bf16", "fp16"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor", "gradient_checkpointing", "torch_compile"),
)
NOT_OF_THE_METHOD = (
    "overwrite_output_dir",
    "allow_data_mismatch",
    "channels_last",
    "dataloader_num_workers",
    "logging_steps",
    "report_to",
)

logger = logging.getLogger(__name__)


class PublishingTrainer(CheckpointTrainer):
    """Pushes what `from_pretrained` loads, and what describes it; never the teacher, a pickle or a token.

    Attributes:
        results: metrics that the card's table shows beside the trainer's own, by the name of the row: "teacher",
            "student alone".
        data: the data set that the card names.
    """

    results: dict[str, dict[str, float]]
    data: Source | None
    hub_model_id: Any
    push_in_progress: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, before any work, so that a token that may not write is known at once.

        Raises:
            ValueError: a wrong name or token.
            PushError: a Hub that does not answer.
        """
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
        private = self.args.hub_private_repo if private is None else private
        self.hub_model_id = create_repository(name, token or self.args.hub_token, private, self.args.hub_revision)
        self.push_in_progress = None

    def create_model_card(  # type: ignore[override]
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        dataset: str | None = None,
    ) -> None:
        """Write README.md, training_config.yaml, results.json and curves.png into `output_dir`.

        A README.md that somebody has changed (whose first comment is gone) stays as it is.

        Args:
            language, license, tags: for the card's metadata.
            model_name: instead of the name of the repository.
            dataset: id or name of the data set, where the data itself does not tell.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        curves = draw_curves(self.state.log_history, folder / "curves.png")
        results = self._write_results(folder / RESULTS_FILE)
        student = self._student_source
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        facts = CardFacts(
            repo=model_name or self.hub_model_id or self.args.hub_model_id or folder.resolve().name,
            library=self.student.classifier.library,
            student=student,
            parameters=sum(
                getattr(p, "ds_numel", p.numel()) for p in self.student.parameters()
            ),  # ZeRO-3 empties them
            num_labels=self.student.num_labels,
            teacher=self._teacher_source,
            data=self.data or (Source(dataset) if dataset else None),
            student_pretrained=self.student.pretrained,
            results=results,
            facts=self._run_facts(dataset),
            settings=self._changed_settings(),
            curves=curves,
            license=license,
            language=language,
            tags=tags,
        )
        models = {"student": student.name, "teacher": facts.teacher.name if facts.teacher else None}
        (folder / "training_config.yaml").write_text(yaml.safe_dump({**models, **facts.settings}, sort_keys=False))
        card = folder / "README.md"
        if card.exists() and MARK not in card.read_text():
            logger.warning("%r was changed by somebody: it stays as it is.", str(card))
            return
        make_card(facts).save(card)

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> CommitInfo | None:
        """Save the student, describe it, and push both; every process must call it.

        A trainer that has trained nothing, over a folder that holds a student, pushes what the folder holds.

        Args:
            commit_message, token, revision, private: as `Trainer.push_to_hub` takes them.
            blocking: wait for it; otherwise it goes on beside, and the log says where it fails.
            **card: see `create_model_card`.

        Returns:
            The commit; None in other processes than the first, or if it is not waited for.

        Raises:
            PushError: it failed for good. What is on the disk is whole; the message has the command to push it later.
            ValueError: a wrong name or token.
        """
        folder = Path(str(self.args.output_dir))
        as_it_is = self.state.global_step == 0 and (folder / STUDENT_FILE).exists()
        self.accelerator.wait_for_everyone()  # everyone has looked before the first process writes
        if not as_it_is:
            self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if revision not in (None, self.args.hub_revision):
            create_repository(str(self.hub_model_id), token or self.args.hub_token, private, revision)
        if not as_it_is:
            self.create_model_card(**card)
        self._finish_current_push()
        files = _existing(folder, (*WEIGHTS, *ABOUT))
        how: dict[str, Any] = {"token": token or self.args.hub_token, "revision": revision or self.args.hub_revision}
        if blocking:
            return self._push(files, str(commit_message), later=folder, **how)
        self._push_beside([(files, str(commit_message), "")], folder, None, **how)
        return None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See `CheckpointTrainer.save_model`; with `push_to_hub` it is pushed, too. A push that fails is said in the log."""
        super().save_model(output_dir, _internal_call)
        if self.args.push_to_hub and not _internal_call:
            try:
                self.push_to_hub(commit_message="Model save")
            except PushError as error:
                logger.error("%s", error)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is not None or not self.is_world_process_zero():
            return
        strategy, running = self.args.hub_strategy, self.push_in_progress
        if strategy == HubStrategy.END:
            return
        if running is not None and not running.is_done():
            if not self.args.hub_always_push:
                return
            self._finish_current_push()
        checkpoint, output_dir = Path(checkpoint_folder), Path(str(self.args.output_dir))
        self.create_model_card()
        staging = output_dir / STAGING
        shutil.rmtree(staging, ignore_errors=True)
        student = _link(_existing(checkpoint, WEIGHTS) + _existing(output_dir, ABOUT), staging / "student")
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [(student, message, "")]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
            rest = _link([file for file in checkpoint.iterdir() if file.is_file()], staging / "checkpoint")
            jobs.append((rest, f"{message}, checkpoint", f"{name}/"))
        self._push_beside(jobs, checkpoint, staging, token=self.args.hub_token, revision=self.args.hub_revision)

    def _push_beside(self, jobs: list[tuple], later: Path, staging: Path | None, **how: Any) -> None:
        """Push while training goes on; the log says what fails."""

        def push_all() -> None:
            try:
                for files, message, folder in jobs:
                    self._push(files, message, later=later, folder=folder, **how)
            except PushError as error:
                logger.error("%s", error)
            finally:
                if staging is not None:
                    shutil.rmtree(staging, ignore_errors=True)

        self.push_in_progress = PushInProgress([HfApi().run_as_future(push_all)])  # type: ignore[arg-type]

    def _push(
        self, files: list[Path], message: str, later: Path, token: str | None, revision: str | None, folder: str = ""
    ) -> CommitInfo:
        repo = str(self.hub_model_id)
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
            ) from error

    # What the card says

    def _write_results(self, file: Path) -> dict[str, dict[str, float]]:
        """The metrics of the weights that are saved, if they were evaluated, and those that were given or are in the file."""
        name = DISTILLED if self._distiller().teacher is not None else ALONE
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        step = best if best is not None and self._started is None else self.state.global_step
        evaluated = [entry for entry in self.state.log_history if entry["step"] == step and "eval_loss" in entry]
        kept = ("top1", "top5", "loss")
        own = {key: evaluated[-1][f"eval_{key}"] for key in kept if evaluated and f"eval_{key}" in evaluated[-1]}
        results = json.loads(file.read_text()) if file.exists() else {}
        results |= ({name: own} if own else {}) | self.results
        if results:
            file.write_text(json.dumps(results, indent=2) + "\n")
        return results

    @cached_property
    def _student_source(self) -> Source:
        return model_source(self.student)  # may ask the Hub: once

    @cached_property
    def _teacher_source(self) -> Source | None:
        teacher = self._distiller().teacher
        return model_source(teacher) if teacher is not None else None

    def _run_facts(self, dataset: str | None) -> dict[str, Any]:
        data, teacher = self.data, self._teacher_source
        trained = self.state.global_step > 0
        names = ", ".join(f"{name} {number}" for name, number in versions().items())
        facts: dict[str, Any] = {
            "student": self._student_source.name,
            "its arguments": self._student_arguments(),
            "teacher": _described(teacher),
            "data": _described(data) or dataset,
            "images seen": f"{self.loss_log.images_seen:,}" if trained else None,
            "steps": f"{self.state.global_step:,}" if trained else None,
            "global batch": self.get_total_train_batch_size(self.args) if trained else None,
            "seed": self.args.seed,
            "hardware": hardware(self.args.world_size, self.args.device) if trained else None,
            "hours": f"{self._seconds() / 3600:.3g}" if trained else None,
            "versions": names,
        }
        return facts

    def _student_arguments(self) -> str | None:
        known = {name: value for name, value in self.student.classifier.model_args.items() if name != "num_classes"}
        return f"`{json.dumps(known, default=str)}`" if known else None

    def _changed_settings(self) -> dict[str, Any]:
        """Settings of the method and of the training that are not the defaults, as YAML holds them."""
        own = [name for name in ScaleKDConfig.__annotations__ if name not in NOT_OF_THE_METHOD]
        defaults = {f.name: _default(f) for f in fields(ScaleKDConfig)}
        values = {name: getattr(self.args, name) for name in (*own, *PARENT_SETTINGS)}
        return {
            name: getattr(value, "value", value)
            for name, value in values.items()
            if value not in (None, defaults[name], defaults[name] or False)
        }


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _described(source: Source | None) -> str | None:
    if source is None:
        return None
    known = [
        f"revision `{source.revision}`" if source.revision else None,
        f"license `{source.license}`" if source.license else None,
    ]
    return ", ".join(filter(None, [f"`{source.hub_id}`" if source.hub_id else source.name, *known]))


def _existing(folder: Path, names: Iterable[str]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


def _link(files: list[Path], folder: Path) -> list[Path]:
    """The same files under the same names in a folder that nobody cleans up meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        try:
            os.link(file, folder / file.name)
        except OSError:  # another file system, or one without links
            shutil.copy2(file, folder / file.name)
    return [folder / file.name for file in files]
