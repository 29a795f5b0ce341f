"""`ScaleKDTrainer`: the Hugging Face `Trainer` for ScaleKD, with the fewest hooks."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState, set_seed
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from .averaging import AveragedStudent
from .building import build_model
from .config import ScaleKDConfig
from .data import ImageDataset, ImageStream, Preparation, RepeatSampler, collate, dataset_labels, prepare_dataset
from .distiller import check_labels
from .loss_log import LossLog
from .metrics import compute_accuracy, keep_top5
from .optimization import decayed_parameters, scaled_learning_rate, step_schedule, timm_optimizer
from .saving import (
    RUN_STATE_FILE,
    check_checkpoint,
    check_output_dir,
    check_rebuildable,
    load_checkpoint,
    save_heads,
    save_student,
)
from .students import Student
from .teachers import Teacher


__all__ = ["ScaleKDTrainer"]

logger = logging.getLogger(__name__)


class ScaleKDTrainer(Trainer):
    """Distils a frozen teacher into a student with ScaleKD (NeurIPS 2024, arXiv 2411.06786).

    ```python
    trainer = ScaleKDTrainer(
        model="timm/resnet50",
        teacher="timm/swin_large_patch4_window7_224.ms_in22k_ft_in1k",
        args=ScaleKDConfig(output_dir="resnet50-scalekd"),
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
    )
    trainer.train()
    ```

    Args:
        model: the student: a name that is built with fresh weights, a module, or a `Student`.
        teacher: a name, whose weights are loaded, a module, or a `Teacher`. None trains the student alone.
        args: the settings.
        train_dataset, eval_dataset: `datasets` objects, map-style or streaming, with an image and a label column, or
            anything that yields `pixel_values` (3, height, width), normalised for the student, and `labels`.
        **kwargs: what `Trainer` takes besides; `data_collator`, `compute_metrics` (top-1 and top-5 by default) and
            `preprocess_logits_for_metrics` replace the trainer's own.

    Raises:
        ValueError: models, images or labels that do not fit each other.
    """

    args: ScaleKDConfig
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
        args = args if args is not None else ScaleKDConfig(output_dir="scalekd_output")
        if not isinstance(args, ScaleKDConfig):
            raise ValueError(f"`args` must be a `ScaleKDConfig`, got a `{type(args).__name__}`.")
        args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type != "cpu"
        set_seed(args.seed)
        labels = dataset_labels(train_dataset if train_dataset is not None else eval_dataset, args.label_column)
        distiller = build_model(model, teacher, args, labels)
        check_rebuildable(distiller.student)
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if names := dataset_labels(dataset, args.label_column):
                student = distiller.student
                check_labels(f"`{name}`", len(names), names, student.num_labels, student.labels)
                student.name_labels(names)
        if kwargs.get("compute_metrics") is None:
            kwargs["compute_metrics"] = compute_accuracy
            kwargs["preprocess_logits_for_metrics"] = keep_top5
        kwargs.setdefault("data_collator", collate)
        if args.timm_optim is not None:
            kwargs.setdefault("optimizer_cls_and_kwargs", timm_optimizer(args, args.learning_rate))
        if args.sync_batchnorm and args.world_size > 1:
            if args.device.type != "cuda":
                raise ValueError("`sync_batchnorm` needs GPUs: torch has no synchronised BatchNorm on the CPU.")
            distiller = nn.SyncBatchNorm.convert_sync_batchnorm(distiller)
        self.loss_log = LossLog()
        self._resumed_step = 0
        train_dataset = self._prepare_data(train_dataset, "train_dataset", distiller.student, args)
        if isinstance(train_dataset, ImageStream) and args.max_steps <= 0:
            args.max_steps = _count_steps(train_dataset, args)
        super().__init__(
            model=distiller,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=self._prepare_data(eval_dataset, "eval_dataset", distiller.student, args),
            **kwargs,
        )
        if isinstance(self.train_dataset, ImageStream):
            self.add_callback(_StreamProgress)
        self.averaged = AveragedStudent(self.student, args.ema_decay) if args.ema_decay else None
        if self.averaged is not None:
            self.add_callback(self.averaged)
        self._mixup = self._make_mixup()

    @property
    def student(self) -> Student:
        """The student, also while it is wrapped for distributed training."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False).student

    # Data

    @staticmethod
    def _prepare_data(dataset: Any, name: str, student: Student, args: ScaleKDConfig) -> Any:
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {
                key: ScaleKDTrainer._prepare_data(value, f"{name}[{key!r}]", student, args)
                for key, value in dataset.items()
            }

        def make() -> Preparation:
            return Preparation(
                student.spec,
                name == "train_dataset",
                args.image_column,
                args.label_column if args.has_labels else None,
                (args.crop_scale[0], args.crop_scale[1]),
                args.hflip,
                args.rand_augment,
                args.random_erasing,
                args.repeated_augmentation,
                args.seed,
            )

        return prepare_dataset(dataset, name, make, args.seed, args.shuffle_buffer_size)

    def get_train_dataloader(self) -> DataLoader:
        """The parent's, but for a stream: that one shards, shuffles and finds its place itself."""
        if not isinstance(self.train_dataset, ImageStream):
            return super().get_train_dataloader()
        return self.train_dataset.loader(
            self._train_batch_size,
            self.args.process_index,
            self.args.world_size,
            consumed_batches=self._resumed_step * self.args.gradient_accumulation_steps,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=False,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.repeated_augmentation > 1 and isinstance(dataset, ImageDataset):
            return RepeatSampler(dataset)
        return super()._get_train_sampler(train_dataset)

    def _make_mixup(self) -> Mixup | None:
        if not (self.args.mixup_alpha or self.args.cutmix_alpha):
            return None
        if self.args.per_device_train_batch_size % 2:
            raise ValueError(
                "Mixup and CutMix mix pairs: `per_device_train_batch_size` must be even, got "
                f"{self.args.per_device_train_batch_size}."
            )
        classes = self.student.num_labels
        return Mixup(self.args.mixup_alpha, self.args.cutmix_alpha, label_smoothing=0.0, num_classes=classes)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The parent's; a raw data set is prepared first, and a stream is read by at most one worker.

        Several workers end a stream with several short batches, of which the parent would lose images.
        """
        named: Any = self.eval_dataset
        if isinstance(eval_dataset, str):
            eval_dataset = named[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self._prepare_data(dataset, "eval_dataset", self.student, self.args)
        if not isinstance(dataset, ImageStream):
            return super().get_eval_dataloader(dataset)
        loader = DataLoader(
            dataset,
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=min(1, self.args.dataloader_num_workers),
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """That of an evaluation."""
        return self.get_eval_dataloader(test_dataset)

    # Training

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """See `Trainer.train`.

        Raises:
            ValueError: `output_dir` holds a run and neither resuming nor overwriting was asked for; or a
                checkpoint that cannot be used.
            NonFiniteLossError: a loss that is not finite.
        """
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = get_last_checkpoint(str(self.args.output_dir))
            if checkpoint is None:
                raise ValueError(f"There is no checkpoint to resume from in `output_dir` {self.args.output_dir!r}.")
        self._resumed_step = 0
        self.loss_log.reset()
        if self.averaged is not None:
            self.averaged.restart()
        if checkpoint is None:
            self._clear_output_dir()
        else:
            check_checkpoint(checkpoint, sharded=self.is_deepspeed_enabled or self.is_fsdp_enabled)
            self._read_run_state(Path(checkpoint))
        if isinstance(self.train_dataset, ImageStream):
            self.args.ignore_data_skip = True  # it starts where the checkpoint stands
            if checkpoint and self._resumed_step >= self.args.max_steps:  # the parent would train one step more
                self._load_from_checkpoint(checkpoint)
                self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
                return TrainOutput(self._resumed_step, float("nan"), {})
        result = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        self._stop_if_not_finite()
        return result

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted loss in training, whose terms it adds up; the student's task loss in evaluation."""
        if model.training and self._mixup is not None and "labels" in inputs:
            inputs = self._mix(inputs)
        outputs = model(**inputs)
        if model.training:
            images = len(inputs["pixel_values"]) * self.args.world_size
            self.loss_log.add(self.state.global_step + 1, outputs.loss, outputs.losses, images)
        return (outputs.loss, {"loss": outputs.loss, "logits": outputs.logits}) if return_outputs else outputs.loss

    def _mix(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Mixup or CutMix of a batch, labels (B,) to (B, K); an odd image at the end of the data stays out."""
        assert self._mixup is not None
        even = len(inputs["labels"]) // 2 * 2
        pixel_values, labels = self._mixup(inputs["pixel_values"][:even].clone(), inputs["labels"][:even])
        return {**inputs, "pixel_values": pixel_values, "labels": labels}

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters with weight decay, see `decay_all`."""
        return decayed_parameters(model, self.args.decay_all)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The parent's, with the rate scaled to the global batch."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        batch = self.get_total_train_batch_size(self.args)
        rate = scaled_learning_rate(self.args, batch)
        if not given and rate != self.args.learning_rate:
            logger.warning(
                "The global batch is %d, the learning rate %g is for %s: it is scaled to %g (%s).",
                batch,
                self.args.learning_rate,
                self.args.base_batch_size,
                rate,
                self.args.lr_scaling,
            )
            for group in (*optimizer.param_groups, optimizer.defaults):
                group["lr"] = rate
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The parent's, or steps at `lr_milestones`."""
        optimizer = optimizer or self.optimizer
        if self.lr_scheduler is None and self.args.lr_milestones and optimizer is not None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = step_schedule(optimizer, self.args.lr_milestones, num_training_steps, warmup)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's, with the averaged student where there is one."""
        with self.averaged.in_place() if self.averaged is not None else contextlib.nullcontext():
            return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each loss term averaged since the last log, images per second and images seen."""
        if "loss" in logs:
            self._stop_if_not_finite()
            logs.update(self.loss_log.averages(self.accelerator))
        super().log(logs, start_time)

    def _stop_if_not_finite(self) -> None:
        self.loss_log.stop_if_not_finite(self.accelerator, get_last_checkpoint(str(self.args.output_dir)))

    # Saving and loading

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._stop_if_not_finite()  # before a good checkpoint is rotated away
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The student; in checkpoints also the heads and the images seen. Never the teacher."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

        def part(prefix: str) -> dict[str, Tensor] | None:
            if state_dict is None:
                return None
            return {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}

        student_state = part("student.model.")
        if self.averaged is not None:
            student_state = self.averaged.average.module.state_dict()
        save_student(model.student, folder, student_state)
        if folder.name.startswith("checkpoint-"):
            if self.averaged is not None:
                self.averaged.save_trained(folder)
            if model.heads is not None:
                save_heads(model.heads, folder, part("heads."))
            (folder / RUN_STATE_FILE).write_text(json.dumps({"images_seen": self.loss_log.images_seen}))

    def _read_run_state(self, checkpoint: Path) -> None:
        self._resumed_step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
        run_state = checkpoint / RUN_STATE_FILE
        if run_state.exists():
            self.loss_log.reset(json.loads(run_state.read_text())["images_seen"])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_weights(resume_from_checkpoint, resume=True)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_weights(str(self.state.best_model_checkpoint), resume=False)

    def _load_weights(self, folder: str, resume: bool) -> None:
        distiller = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        load_checkpoint(distiller.student, distiller.heads, folder)
        if self.averaged is not None:
            self.averaged.load(Path(folder), resume)

    def _clear_output_dir(self) -> None:
        held = check_output_dir(str(self.args.output_dir), self.args.overwrite_output_dir)
        self.accelerator.wait_for_everyone()  # everyone has looked before anything goes
        if self.args.should_save:
            for path in held:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.accelerator.wait_for_everyone()


class _StreamProgress(TrainerCallback):
    """Counts the "epoch" of an endless stream from the whole run: the parent counts from where it was resumed."""

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step / state.max_steps


def _count_steps(stream: ImageStream, args: ScaleKDConfig) -> int:
    """Steps from epochs, where the stream or the settings know the number of images."""
    images = args.images_per_epoch or stream.known_length()
    if images is None:
        raise ValueError(
            "The length of the training stream is not known: set `max_steps`, or `images_per_epoch` so that "
            f"`num_train_epochs` ({args.num_train_epochs}) can be counted."
        )
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return math.ceil(args.num_train_epochs * images / batch)
