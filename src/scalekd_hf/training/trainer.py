"""`ScaleKDTrainer`: the Hugging Face `Trainer` for ScaleKD. Its hooks are short and hand over to its parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.trainer_utils import TrainOutput

from ..data.stream import ImageStream
from ..models.saving import STUDENT_FILE, save_student
from ..models.students import Student
from ..models.teachers import Teacher
from ..publishing.hub import failures_in_log
from ..publishing.publisher import Publisher
from .averaging import AveragedStudent
from .backbones import backbone_prediction
from .checkpoints import Checkpoints
from .config import ScaleKDConfig
from .console import use_readable_log
from .epochs import count_epochs, steps_per_epoch
from .facts import PushedCheckpoints, describe_run
from .feeding import ImageFeed, named, prepare_images
from .loss_log import LossLog
from .model import ScaleKDModel, batch_of_one_explained
from .optimization import decayed_parameters, own_schedule, scale_learning_rate
from .precision import without_bf16
from .run_folder import RunFolder
from .settings import run_settings
from .setup import set_up
from .sharding import check_engine, check_untrained, engine_runs, full_state, place_teacher, without_idle_engine
from .stopping import MissedEvaluation, Stopping
from .stopwatch import Stopwatch


__all__ = ["ScaleKDTrainer"]


class ScaleKDTrainer(Trainer):
    """Distils a frozen teacher into a student with ScaleKD (NeurIPS 2024, arXiv 2411.06786).

    ```python
    args = ScaleKDConfig(output_dir="resnet50-scalekd")
    ScaleKDTrainer("timm/resnet50", "timm/swin_large_patch4_window7_224", args, data["train"], data["validation"]).train()
    ```

    Args:
        model: the student: a name that is built with fresh weights, a module, or a `Student`.
        teacher: a name, whose weights are loaded, a module, or a `Teacher`. None trains the student alone.
        args: the settings.
        train_dataset, eval_dataset: `datasets` objects, map-style or streaming, with an image and a label column, torch data
            sets of (image, class index), or anything that yields `pixel_values` (3, height, width), normalised for the student, and `labels`.
        **kwargs: what `Trainer` takes besides. Without a `compute_metrics` or `preprocess_logits_for_metrics` of yours, metrics are
            top-1 and top-5, and predictions each image's five best classes, best first; of a backbone `neighbours_top1`, and features.

    Attributes:
        results: metrics for the card's table beside the trainer's own, by its rows: "teacher", "student alone".
        data: the data set that the card names.
        feed, checkpoints, run_folder, publisher: its parts: what feeds it, what keeps the run, and what publishes it.

    Raises:
        ValueError: models, images or labels that do not fit each other.
    """

    args: ScaleKDConfig
    hub_model_id: Any
    loss_is_scaled_for_ga = False  # every loss is a mean over its own batch

    def __init__(
        self,
        model: str | nn.Module | Student,
        teacher: str | nn.Module | Teacher | None = None,
        args: ScaleKDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ):
        given = args if args is not None else ScaleKDConfig(output_dir="scalekd_output")
        setup = set_up(model, teacher, given, train_dataset, eval_dataset, kwargs)
        args, student, settings = setup.args, setup.model.student, run_settings(given)
        self.data, self.epochs, self.results = setup.data, setup.epochs, cast(dict[str, dict[str, float]], {})
        self.loss_log, self.stopwatch = LossLog(), Stopwatch()
        self.publisher = Publisher(args, student, setup.model.teacher)
        self.feed = ImageFeed(args, setup.model.normaliser, student.num_labels, setup.options["data_collator"])
        super().__init__(setup.model, args, **setup.data_sets, **setup.options)
        check_engine(self.accelerator, args)
        self.run_folder = RunFolder(args, settings, self.accelerator)
        self.averaged = AveragedStudent(student, args.ema_decay) if args.ema_decay else None
        parts = (self.feed, self.loss_log, self.stopwatch, self.averaged)
        self.checkpoints = Checkpoints(args, setup.model, *parts, self.is_deepspeed_enabled or self.is_fsdp_enabled)
        if self.averaged is not None:
            self.callback_handler.callbacks.insert(0, self.averaged)  # before others evaluate it
        self.stopping = Stopping(count_epochs(self, self.epochs, self.loss_log))
        use_readable_log(self)
        pushed = PushedCheckpoints(self.publisher, self.create_model_card)
        self.missed = MissedEvaluation(self._make_up_evaluation)
        for callback in (self.checkpoints.schedule, pushed, self.stopping, self.missed):
            self.add_callback(callback)  # those of the end have the last word on what is saved
        self.feed.warn_of_settings_without_effect(self.train_dataset, self.eval_dataset)

    @property
    def distiller(self) -> ScaleKDModel:
        """Student, teacher and heads, also while they are wrapped for distributed training."""
        return cast(ScaleKDModel, self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    @property
    def student(self) -> Student:
        """The student, also while it is wrapped for distributed training."""
        return cast(Student, self.distiller.student)

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
            if 0 < self.args.max_steps <= position.step and not position.evaluation_is_due:
                result = self._load_finished(str(checkpoint))  # the parent would train one more step
            else:
                place_teacher(self.distiller.teacher, self.accelerator, self.args)
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
        """The parent's, of images that are normalised and mixed on the device."""
        inputs = self.feed.training_inputs(inputs)
        with batch_of_one_explained(len(inputs["pixel_values"])):
            loss = super().training_step(model, inputs, *args, **kwargs)
        self.loss_log.count(len(inputs["pixel_values"]) * self.args.world_size)
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted loss in training, whose terms it adds up; the student's task loss in evaluation."""
        outputs = model(**inputs)
        if self.distiller.training:  # the wrapper of an engine may be in another mode
            self.loss_log.add(self.state.global_step + 1, outputs.loss, outputs.losses)
        return (outputs.loss, {"loss": outputs.loss, "logits": outputs.logits}) if return_outputs else outputs.loss

    def create_accelerator_and_postprocess(self) -> None:
        """The parent's, with bf16 under DeepSpeed as `ScaleKDConfig` has it."""
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

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The parent's; a raw data set is prepared first, and a stream is dealt out to processes and workers."""
        dataset, name = named(self.eval_dataset, eval_dataset)
        dataset = prepare_images(dataset, "eval_dataset", self.student, self.args)
        return self.feed.evaluation_loader(dataset, super().get_test_dataloader, name)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """That of an evaluation; labels may be missing."""
        dataset = prepare_images(test_dataset, "test_dataset", self.student, self.args, labels_optional=True)
        return self.feed.evaluation_loader(dataset, super().get_test_dataloader)

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
        if self.stopping.saved_step != self.state.global_step or self.stopping.evaluation_is_due:
            self._save_checkpoint(cast(nn.Module, self.model), None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.run_folder.note_interruption()

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        """The parent's, of the averaged student where there is one; predictions come in the order of the rows."""
        averaged = self.averaged.in_place(self.accelerator) if self.averaged is not None else contextlib.nullcontext()
        with averaged, without_idle_engine(self), self.loss_log.paused():
            self.feed.begin_evaluation()
            output = super().evaluation_loop(dataloader, *args, **kwargs)
            output = self.feed.end_evaluation(output, dataloader.dataset, self.accelerator)
            self.stopping.leave_evaluation_if_asked(self.args.world_size)
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple:
        """The parent's, of images that are normalised on the device."""
        self.stopping.leave_evaluation_if_asked(self.args.world_size)
        if not self.student.num_labels:
            return backbone_prediction(self, model, inputs, *args, **kwargs)
        loss, logits, labels = super().prediction_step(model, self.feed.evaluation_inputs(inputs), *args, **kwargs)
        self.feed.add_evaluated(loss, labels)
        return loss, logits, labels

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student as `from_pretrained` loads it, whole and in full precision; every process must call it.

        With `push_to_hub` it is pushed, too; a push that fails is said in the log.
        """
        averaged = self.averaged
        state = averaged.state_dict() if averaged is not None else full_state(self.student.model)
        if self.args.should_save:
            save_student(self.student, output_dir or str(self.args.output_dir), state)
        if self.args.push_to_hub and not _internal_call:
            with failures_in_log():
                self.push_to_hub(commit_message="Model save")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The parent's, beside the others; it takes its place once it is whole."""
        self.loss_log.stop_if_not_finite(self.accelerator, self.args.output_dir)  # before a good one is rotated away
        self.store_flos()
        self.checkpoints.synchronise_average(self.accelerator)
        parent, is_last = Path(self._get_output_dir(trial)), self.stopping.stopped or self.missed.is_made_up
        position, agree = self.checkpoints.position(self, self.stopping.evaluation_is_due), self.stopping.first_failure
        with self.loss_log.paused(), self.run_folder.new_checkpoint(parent, self.state, is_last, agree) as folder:
            super()._save_checkpoint(model, folder.parent)
            self.checkpoints.write_beside_student(folder, self.distiller, position)

    def _get_output_dir(self, trial: Any) -> str:
        return str(trial) if isinstance(trial, Path) else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: it is not whole yet. See `PushedCheckpoints`."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.checkpoints.load(Path(resume_from_checkpoint), self.distiller, resume=True)

    def _load_best_model(self) -> None:
        best = self.run_folder.whole(str(self.state.best_model_checkpoint))
        if engine_runs(self):
            super()._load_best_model()
            self.checkpoints.restore_average(best)
        else:
            self.checkpoints.load(best, self.distiller, resume=False)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, before any work, so that a token that may not write is known at once."""
        if self.is_world_process_zero():
            self.hub_model_id = self.publisher.create(token, private)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write README.md, training_config.yaml, results.json and curves.png into `output_dir`; see `describe_run`."""
        if self.is_world_process_zero():
            describe_run(self, *args, **kwargs)

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
