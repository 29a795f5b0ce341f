"""`ScaleKDTrainer`: the Hugging Face `Trainer` for ScaleKD, with the fewest hooks."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import set_seed
from transformers.trainer_utils import TrainOutput

from ..data.dataset import Collator, ImageStream, collate, dataset_labels
from ..method.distiller import check_labels
from ..models.saving import (
    check_checkpoint,
    check_rebuildable,
    interrupted,
    last_checkpoint,
    optimizer_in_parts,
    run_settings,
)
from ..models.students import Student
from ..models.teachers import Teacher
from ..publishing.provenance import data_source
from ..publishing.publisher import PublishingTrainer
from .averaging import AveragedStudent
from .config import ScaleKDConfig
from .console import use_readable_log
from .feeding import count_steps, prepare_images
from .loss_log import LossLog
from .metrics import compute_accuracy, keep_top5
from .optimization import decayed_parameters, scaled_learning_rate, step_schedule, timm_optimizer
from .pair import build_model, convert_batchnorms
from .sharding import shard_fsdp2, shard_zero3


__all__ = ["ScaleKDTrainer"]

PER_TENSOR_OPTIMIZERS = ("lamb", "lars", "larc", "adafactor", "muon", "nlamb", "nlars", "fused")

logger = logging.getLogger(__name__)


class ScaleKDTrainer(PublishingTrainer):
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
        self.settings = run_settings(args)
        # The caller's may be for other runs, too; each needs a DeepSpeed plugin of its own.
        args = copy.copy(args) if args.deepspeed_plugin is None else dataclasses.replace(args)
        args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type != "cpu"
        set_seed(args.seed)
        labels = dataset_labels(train_dataset if train_dataset is not None else eval_dataset, args.label_column)
        distiller = build_model(model, teacher, args, labels)
        if args.channels_last:
            distiller.to(memory_format=torch.channels_last)
        check_rebuildable(distiller.student)
        evaluations = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        for name, dataset in (
            ("train_dataset", train_dataset),
            *(("eval_dataset" + f"[{key!r}]" * bool(key), value) for key, value in evaluations.items()),
        ):
            if names := dataset_labels(dataset, args.label_column):
                student = distiller.student
                check_labels(f"`{name}`", len(names), names, student.num_labels, student.labels)
                student.name_labels(names)
        if kwargs.get("compute_metrics") is None and kwargs.get("preprocess_logits_for_metrics") is None:
            kwargs["compute_metrics"] = compute_accuracy
            kwargs["preprocess_logits_for_metrics"] = keep_top5
        kwargs["data_collator"] = Collator(kwargs.get("data_collator") or collate)
        if args.timm_optim is not None:
            kwargs.setdefault("optimizer_cls_and_kwargs", timm_optimizer(args, args.learning_rate))
        if args.sync_batchnorm != "none" and args.world_size > 1:
            if args.device.type != "cuda":
                raise ValueError("`sync_batchnorm` needs GPUs: torch has no synchronised BatchNorm on the CPU.")
            convert_batchnorms(distiller, args.sync_batchnorm)
        self.loss_log = LossLog()
        self.results = {}
        self.data = data_source(train_dataset if train_dataset is not None else eval_dataset)
        train_dataset = prepare_images(train_dataset, "train_dataset", distiller.student, args)
        self._epochs_were_counted = isinstance(train_dataset, ImageStream) and args.max_steps <= 0
        if self._epochs_were_counted:
            args.max_steps = count_steps(train_dataset, args)
        super().__init__(
            model=distiller,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=prepare_images(eval_dataset, "eval_dataset", distiller.student, args),
            **kwargs,
        )
        self._check_engine()
        use_readable_log(self)
        self.averaged = AveragedStudent(self.student, args.ema_decay) if args.ema_decay else None
        if self.averaged is not None:
            self.add_callback(self.averaged)
        self._feed()

    # Training

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """See `Trainer.train`.

        Raises:
            ValueError: `output_dir` holds a run and neither resuming nor overwriting was asked for, or another run writes
                into it; or a checkpoint that cannot be used.
            NonFiniteLossError: a loss that is not finite.
            RunInterrupted: SIGTERM came, and a checkpoint is saved. It is a `SystemExit` with status 75; the same call
                resumes the run.
            StreamReadError, TooManyBadImagesError: the images ended; a checkpoint is saved.
        """
        with self._alone():
            return self._train(resume_from_checkpoint or None, **kwargs)

    def _train(self, checkpoint: Any, **kwargs: Any) -> TrainOutput:
        if self.deepspeed is not None:
            raise ValueError(
                "DeepSpeed trains a trainer's model once: make a new trainer, and resume from its checkpoint."
            )
        if checkpoint is None and interrupted(str(self.args.output_dir), self.settings):
            logger.warning("The run in %r was stopped before its end: it is resumed.", str(self.args.output_dir))
            checkpoint = True
        if checkpoint is True:
            checkpoint = last_checkpoint(str(self.args.output_dir))
            if checkpoint is None:
                raise ValueError(f"There is no checkpoint to resume from in `output_dir` {self.args.output_dir!r}.")
        self._images_seen_before = self._layout_start = 0
        self._seconds_before = 0.0
        self.loss_log.reset()
        if self.averaged is not None:
            self.averaged.restart()
        if checkpoint is None:
            self._clear_output_dir()
        else:
            sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
            check_checkpoint(checkpoint, sharded or (self.args.allow_data_mismatch and optimizer_in_parts(checkpoint)))
            step = self._read_run_state(Path(checkpoint))
            if self.averaged is not None and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
                self.averaged.restore(Path(checkpoint))
            if 0 < self.args.max_steps <= step:  # the parent would train one step more
                self._forget_interruption()
                return self._load_finished(checkpoint, step)
        if isinstance(self.train_dataset, ImageStream):
            self.args.ignore_data_skip = True  # it starts where the checkpoint stands
        teacher = self._distiller().teacher
        if teacher is not None:  # engines that place the parameters do not know of it
            teacher.to(self.args.device)
            if self.args.shard_teacher and not teacher.is_sharded:
                self._shard(teacher)
        if self.averaged is not None:
            self.averaged.average.to(self.args.device)
        self._started = time.monotonic()
        try:
            result = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            self._seconds_before, self._started = self._seconds(), None
            self.stopping.release()
            self._release_data()
            if self.stopping.stopped:
                self._note_interruption()
        self._stop_if_not_finite()
        self._report_bad_images()
        if self.stopping.stopped:
            self.accelerator.wait_for_everyone()
            self.stopping.raise_reason()
        self._forget_interruption()
        return result

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted loss in training, whose terms it adds up; the student's task loss in evaluation."""
        training = self._distiller().training  # an engine around it may say otherwise
        if training and self._mixup is not None and "labels" in inputs:
            inputs = self._mix(inputs)
        if training and self.args.has_labels and "labels" not in inputs:
            raise ValueError(
                f"The training samples have no `labels`, only {sorted(inputs)}. Name them so, or set `label_column` to "
                "none to train without."
            )
        outputs = model(**inputs)
        if training:
            images = len(inputs["pixel_values"]) * self.args.world_size
            self.loss_log.add(self.state.global_step + 1, outputs.loss, outputs.losses, images)
        return (outputs.loss, {"loss": outputs.loss, "logits": outputs.logits}) if return_outputs else outputs.loss

    def create_accelerator_and_postprocess(self) -> None:
        """The parent's, which does not see `bf16` under DeepSpeed: it would ask for DeepSpeed's own."""
        kept = {name: getattr(self.args, name) for name in ("bf16", "bf16_full_eval")}
        if self.args.deepspeed_plugin is not None:
            self.args.bf16 = self.args.bf16_full_eval = False
        try:
            super().create_accelerator_and_postprocess()
        finally:
            for name, value in kept.items():
                setattr(self.args, name, value)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> contextlib.AbstractContextManager:
        """bf16 under DeepSpeed and FSDP, see `ScaleKDConfig`; elsewhere Accelerate casts."""
        if self.args.bf16 and self.args.mixed_precision == "no":
            return torch.autocast(self.args.device.type, torch.bfloat16, cache_enabled=cache_enabled)
        return contextlib.nullcontext()

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters with weight decay, see `decay_all`."""
        return decayed_parameters(model, self.args.decay_all)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The parent's, with the rate scaled to the global batch."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(*(() if model is None else (model,)))  # transformers 5.0 takes none
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
        averaged: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.averaged is not None:
            self.averaged.average.to(self.args.device)
            self.averaged.synchronise(self.accelerator)
            averaged = self.averaged.in_place()
        with averaged, self._without_engine(), self.loss_log.paused():
            return super().evaluation_loop(*args, **kwargs)

    @contextlib.contextmanager
    def _without_engine(self) -> Iterator[None]:
        """A model that was not trained is evaluated as it is: engines want an optimiser, too."""
        engines = self.is_deepspeed_enabled, self.is_fsdp_enabled
        if any(engines) and not self._engine_runs():
            self.is_deepspeed_enabled = self.is_fsdp_enabled = False
            cast(nn.Module, self.model).to(self.args.device)
        try:
            yield
        finally:
            self.is_deepspeed_enabled, self.is_fsdp_enabled = engines

    def _check_engine(self) -> None:
        """Refuse what would fail, or be another method, under DeepSpeed or FSDP."""
        state = self.accelerator.state
        if self.args.shard_teacher and not (
            (self.is_deepspeed_enabled and state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"] == 3)
            or (self.is_fsdp_enabled and state.fsdp_plugin.fsdp_version == 2)
        ):
            raise ValueError(
                "`shard_teacher` needs FSDP2 or DeepSpeed ZeRO-3: launch with one of them, or leave it out."
            )
        if self.is_deepspeed_enabled and str(self.args.timm_optim).startswith(PER_TENSOR_OPTIMIZERS):
            raise ValueError(
                f"`timm_optim` {self.args.timm_optim!r} scales steps tensor by tensor, but DeepSpeed gives it flat parts: it "
                "would be another optimiser. Use DDP, or another optimiser."
            )

    def _shard(self, teacher: Teacher) -> None:
        if self.is_fsdp_enabled:
            shard_fsdp2(teacher, self.args.device)
        else:
            shard_zero3(teacher, self.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"])
        teacher.is_sharded = True

    def _report_bad_images(self) -> None:
        for data, bad in self.bad_images.items():
            if bad.kinds:
                logger.warning(
                    "Undecodable images met in %s: %s. They are listed in %r.", data, bad.summary(), str(bad.file)
                )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each loss term averaged since the last log, images per second and images seen."""
        if "loss" in logs:
            self._stop_if_not_finite()
            logs.update(self.loss_log.averages(self.accelerator))
        super().log(logs, start_time)
