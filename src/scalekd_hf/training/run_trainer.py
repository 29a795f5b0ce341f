"""`RunTrainer`: the Hugging Face `Trainer` for runs that go on exactly where they stopped, whatever they learn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from ..data.stream import ImageStream
from ..manifest import STUDENT_FILE
from ..publishing.publisher import Publisher
from .checkpoints import Checkpoints
from .console import use_readable_log
from .epochs import count_epochs, steps_per_epoch
from .facts import PushedCheckpoints
from .loaders import Feed
from .loss_log import LossLog
from .optimization import decayed_parameters, own_schedule, scale_learning_rate
from .precision import without_bf16
from .run_config import RunConfig
from .run_folder import RunFolder
from .settings import run_settings
from .sharding import check_engine, check_untrained
from .stopping import MissedEvaluation, Stopping
from .stopwatch import Stopwatch


__all__ = ["RunTrainer"]


class RunTrainer(Trainer):
    """Trains on streams of images, and keeps the run: it stops on demand, and goes on to the same bits.

    Args:
        model, args: of `Trainer`.
        given: the settings as the caller gave them, by which a stopped run is known again.
        feed: loads the images, and knows those that cannot be decoded.
        publisher: publishes what is trained.
        epochs: to train for, where `max_steps` was derived from them.
        **options: what `Trainer` takes besides.

    Attributes:
        feed, checkpoints, run_folder, publisher: its parts: what feeds it, what keeps the run, and what publishes it.
    """

    args: RunConfig
    checkpoints: Any
    hub_model_id: Any
    loss_is_scaled_for_ga = False  # every loss is a mean over its own batch

    def __init__(
        self,
        model: nn.Module,
        args: RunConfig,
        given: RunConfig,
        feed: Feed,
        publisher: Publisher,
        epochs: float | None,
        **options: Any,
    ):
        self.feed, self.publisher, self.epochs = feed, publisher, epochs
        self.loss_log, self.stopwatch = LossLog(), Stopwatch()
        self._kept: list[tuple[ExportableState, dict[str, Any]]] = []  # callbacks as an evaluation began
        settings = run_settings(given)
        super().__init__(model, args, **options)
        check_engine(self.accelerator, args)
        self.run_folder = RunFolder(args, settings, self.accelerator)
        self.checkpoints = self.make_checkpoints(self.is_deepspeed_enabled or self.is_fsdp_enabled)
        self.stopping = Stopping(count_epochs(self, self.epochs, self.loss_log))
        use_readable_log(self)
        pushed = PushedCheckpoints(self.publisher, self.create_model_card)
        self.missed = MissedEvaluation(self._make_up_evaluation)
        for callback in (self.checkpoints.schedule, pushed, self.stopping, self.missed):
            self.add_callback(callback)  # those of the end have the last word on what is saved
        self.feed.warn_of_settings_without_effect(self.train_dataset, self.eval_dataset)

    def make_checkpoints(self, is_sharded: bool) -> Checkpoints:
        """What keeps the run."""
        raise NotImplementedError

    def before_training(self) -> None:
        """What belongs to the model and is not the parent's to place on the device."""

    def regroup(self, optimizer: torch.optim.Optimizer) -> None:
        """Give parts of the model rates of their own, before anything knows the optimiser's groups."""

    def describe(self, *args: Any, **kwargs: Any) -> None:
        """Write the card and what belongs to it, on the first process."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """See `Trainer.train`.

        Raises:
            ValueError: `output_dir` holds a run and neither resuming nor overwriting was asked for, or another run writes
                into it; or a checkpoint that cannot be used.
            NonFiniteLossError: a loss that is not finite.
            RunInterrupted, RunCancelled: SIGTERM, a `SystemExit` with status 75, or Ctrl-C; the same call resumes the run.
            StreamReadError, TooManyBadImagesError: the images ended. In both cases a checkpoint is saved.
        """
        check_untrained(self)
        with self.run_folder.locked():
            checkpoint = self.run_folder.begin(resume_from_checkpoint)
            position = self.checkpoints.start(checkpoint, self.train_dataset, self.epochs)
            self.missed.checkpoint = checkpoint if position.evaluation_is_due else None
            self.missed.was_due = position.evaluation_is_due
            if 0 < self.args.max_steps <= position.step and not position.evaluation_is_due:
                result = self._load_finished(str(checkpoint))  # the parent would train one more step
            else:
                self.before_training()
                if checkpoint is not None and isinstance(resume_from_checkpoint, (str, Path)):
                    self.run_folder.leave_later(checkpoint, position.step)
                with self.stopwatch.running(), self.stopping.within_training(self.run_folder):
                    result = super().train(checkpoint, *args, **kwargs)
                result = result._replace(training_loss=result.metrics["train_loss"])  # that of the whole run
                self.loss_log.stop_if_not_finite(self.accelerator, self.args.output_dir)
                self.feed.report_bad_images()
                self.stopping.raise_reason(self.accelerator)
            self.run_folder.forget_interruption()
            return result

    def _load_finished(self, checkpoint: str) -> TrainOutput:
        """A run that needs no more steps: load what it ended with."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None and Path(best).is_dir():
            self._load_best_model()
        return TrainOutput(self.state.global_step, float("nan"), {})

    def get_train_dataloader(self) -> DataLoader:
        """The parent's for finished samples; of raw images an endless sequence that finds its place itself."""
        stream = self.train_dataset
        return self.feed.training_loader(stream) if isinstance(stream, ImageStream) else super().get_train_dataloader()

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The parent's; none where one of the processes must stop, or nothing is left, which ends the run before this step."""
        if self.missed.ends(self.state, self.control):
            return [], None
        samples: tuple[list, Any] = [], None
        # A stream may be left by one process alone; other loaders wait until all of them read.
        may_leave = self.stopping.terminated and isinstance(self.train_dataset, ImageStream)
        with self.stopping.at_the_end_of_images(), self.loss_log.waiting():
            if not may_leave:
                samples = super().get_batch_samples(epoch_iterator, num_batches, device)
                self.feed.take_bad_images(samples[0], self.train_dataset)
        return ([], None) if self.stopping.stop_if_asked(self.args.world_size, self.control) else samples

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The parent's, of images as the model trains on them."""
        inputs = self.feed.training_inputs(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.loss_log.count(len(inputs["pixel_values"]) * self.args.world_size)
        return loss

    def create_accelerator_and_postprocess(self) -> None:
        """The parent's, with bf16 under DeepSpeed as `RunConfig` has it."""
        with without_bf16(self.args):
            super().create_accelerator_and_postprocess()

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters with weight decay, see `decay_all`."""
        return decayed_parameters(model, self.args.decay_all, self.args.no_weight_decay)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The parent's, with the rate scaled to the global batch."""
        was_given, optimizer = self.optimizer is not None, super().create_optimizer(model)
        if not was_given:
            scale_learning_rate(optimizer, self.args, self.get_total_train_batch_size(self.args))
            self.regroup(optimizer)
        return self.checkpoints.schedule.remember(optimizer)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> torch.optim.lr_scheduler.LRScheduler:
        """The parent's, or that of `lr_milestones` or `lr_by_epoch`."""
        if self.lr_scheduler is None:
            steps = steps_per_epoch(self.train_dataset, self.args) if self.args.lr_by_epoch else 1.0
            self.lr_scheduler = own_schedule(optimizer or self.optimizer, self.args, num_training_steps, steps)
            self._created_lr_scheduler = self.lr_scheduler is not None  # and not given: another `train` makes another
        return super().create_scheduler(num_training_steps, optimizer)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add loss and terms averaged since the last log, also over what came before a resume, images per second and images seen."""
        if "loss" in logs:
            self.loss_log.stop_if_not_finite(self.accelerator, self.args.output_dir)
            logs.update(self.loss_log.averages(self.accelerator))
        if "train_loss" in logs and "train_runtime" in logs:  # the parent's, at the end
            logs["train_loss"] = self.loss_log.mean_loss(self.accelerator)
        super().log(logs, start_time)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """The parent's, but for `eval_on_start` (which skips the schedule) where an evaluation is made up for at that step."""
        if skip_scheduler and self.missed.was_due:
            return {}
        self._kept = [
            (one, one.state()) for one in self.callback_handler.callbacks if isinstance(one, ExportableState)
        ]
        metrics: dict[str, float] = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        return metrics

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The parent's; in training, SIGTERM or images that end stop it on all processes, and the run with it."""
        with self.stopping.within_evaluation(self.accelerator, self._save_stopped_run, self.control.should_evaluate):
            return super().evaluate(*args, **kwargs)

    def _make_up_evaluation(self, checkpoint: str) -> None:
        """The evaluation that a checkpoint lacks, and the checkpoint with it."""
        self._determine_best_metric(self._evaluate(None, None), None)
        self._load_rng_state(checkpoint)
        self._save_checkpoint(cast(nn.Module, self.model), None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _save_stopped_run(self) -> None:
        for callback, state in self._kept if self.stopping.evaluation_is_due else []:  # all of it is made up for
            vars(callback).update(state["attributes"])
        if self.stopping.saved_step != self.state.global_step or self.stopping.evaluation_is_due:
            self._save_checkpoint(cast(nn.Module, self.model), None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.run_folder.note_interruption()

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: Any) -> TrainOutput:
        """The parent's; a run that was stopped keeps its last checkpoint beside the best one."""
        limit = self.args.save_total_limit
        try:
            self.args.save_total_limit = None if self.stopping.stopped else limit
            return super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit

    def _get_output_dir(self, trial: Any) -> str:
        return str(trial) if isinstance(trial, Path) else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: it is not whole yet. See `PushedCheckpoints`."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The parent's, beside the others; it takes its place once it is whole."""
        self.loss_log.stop_if_not_finite(self.accelerator, self.args.output_dir)  # before a good one is rotated away
        self.store_flos()
        self.checkpoints.before_saving(self.accelerator)
        parent, is_last = Path(self._get_output_dir(trial)), self.stopping.stopped or self.missed.is_made_up
        position, agree = self.checkpoints.position(self, self.stopping.evaluation_is_due), self.stopping.first_failure
        with self.loss_log.paused(), self.run_folder.new_checkpoint(parent, self.state, is_last, agree) as folder:
            super()._save_checkpoint(model, folder.parent)
            self.checkpoints.write_beside(folder, position)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, before any work, so that a token that may not write is known at once."""
        if self.is_world_process_zero():
            self.hub_model_id = self.publisher.create(token, private)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write what describes the run into `output_dir`, see `describe`."""
        if self.is_world_process_zero():
            self.describe(*args, **kwargs)

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> CommitInfo | None:
        """Save the student, describe it, and push both, see `Publisher.push`; every process must call it.

        A trainer that has trained nothing, over a folder with a student, pushes what it holds. `card` is for `describe_run`.
        """
        is_saved = self.state.global_step == 0 and (self.publisher.folder / STUDENT_FILE).exists()
        self.accelerator.wait_for_everyone()  # everyone has looked before the first process writes
        if not is_saved:
            self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None or revision not in (None, self.args.hub_revision):
            self.hub_model_id = self.publisher.create(token, private, revision)
        self.publisher.repo = self.hub_model_id
        if not is_saved or self.publisher.is_described() is False:  # a run that died before it wrote its card
            self.create_model_card(**card)
        return self.publisher.push(str(commit_message), blocking, token, revision)
