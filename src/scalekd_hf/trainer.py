"""`ScaleKDTrainer`: the Hugging Face `Trainer` for ScaleKD, with the fewest hooks."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from transformers import TrainerState, set_seed
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from .averaging import TRAINED_FILE, AveragedStudent
from .building import build_model
from .config import ScaleKDConfig
from .data import ImageDataset, ImageStream, collate, dataset_labels
from .distiller import check_labels
from .image_trainer import ImageTrainer, Passes, count_steps, prepare_images
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


class ScaleKDTrainer(ImageTrainer):
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
        args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type != "cpu"
        set_seed(args.seed)
        labels = dataset_labels(train_dataset if train_dataset is not None else eval_dataset, args.label_column)
        distiller = build_model(model, teacher, args, labels)
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
        kwargs.setdefault("data_collator", collate)
        if args.timm_optim is not None:
            kwargs.setdefault("optimizer_cls_and_kwargs", timm_optimizer(args, args.learning_rate))
        if args.sync_batchnorm and args.world_size > 1:
            if args.device.type != "cuda":
                raise ValueError("`sync_batchnorm` needs GPUs: torch has no synchronised BatchNorm on the CPU.")
            distiller = convert_sync_batchnorm(distiller)  # timm's: it keeps activations that sit in its norms
        self.loss_log = LossLog()
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
        self._saving_checkpoint = False
        if isinstance(self.train_dataset, (ImageStream, ImageDataset)):
            self.add_callback(Passes(self.train_dataset))
        self.averaged = AveragedStudent(self.student, args.ema_decay) if args.ema_decay else None
        if self.averaged is not None:
            self.add_callback(self.averaged)
        self._mixup = self._make_mixup()

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
        self._resumed_images = 0
        self.loss_log.reset()
        if self.averaged is not None:
            self.averaged.restart()
        if checkpoint is None:
            self._clear_output_dir()
        else:
            check_checkpoint(checkpoint, sharded=self.is_deepspeed_enabled or self.is_fsdp_enabled)
            step = self._read_run_state(Path(checkpoint))
            if 0 < self.args.max_steps <= step:  # the parent would train one step more
                return self._load_finished(checkpoint, step)
        if isinstance(self.train_dataset, ImageStream):
            self.args.ignore_data_skip = True  # it starts where the checkpoint stands
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
        if model.training and self.args.has_labels and "labels" not in inputs:
            raise ValueError(
                f"The training samples have no `labels`, only {sorted(inputs)}. Name them so, or set `label_column` to "
                "none to train without."
            )
        outputs = model(**inputs)
        if model.training:
            images = len(inputs["pixel_values"]) * self.args.world_size
            self.loss_log.add(self.state.global_step + 1, outputs.loss, outputs.losses, images)
        return (outputs.loss, {"loss": outputs.loss, "logits": outputs.logits}) if return_outputs else outputs.loss

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
            self.averaged.synchronise(self.accelerator)
            averaged = self.averaged.in_place()
        with averaged, self.loss_log.paused():
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
        self._saving_checkpoint = True
        if self.averaged is not None:
            self.averaged.synchronise(self.accelerator)
        try:
            with self.loss_log.paused():
                super()._save_checkpoint(model, trial)
        finally:
            self._saving_checkpoint = False

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
        if self._saving_checkpoint:
            if self.averaged is not None:
                self.averaged.save_trained(folder)
            if model.heads is not None:
                save_heads(model.heads, folder, part("heads."))
            run_state = {"images_seen": self.loss_log.images_seen, "data": self._data_settings()}
            (folder / RUN_STATE_FILE).write_text(json.dumps(run_state, indent=2))

    def _read_run_state(self, checkpoint: Path) -> int:
        """Images seen and data settings of a checkpoint; returns its step."""
        run_state = json.loads((checkpoint / RUN_STATE_FILE).read_text())
        now, then = self._data_settings(), run_state["data"]
        changed = [f"{name} {then.get(name)} to {now[name]}" for name in now if now[name] != then.get(name)]
        if changed and not (self.args.allow_data_mismatch and isinstance(self.train_dataset, ImageStream)):
            raise ValueError(
                f"The checkpoint {str(checkpoint)!r} was written with other settings of the data: {', '.join(changed)}. "
                "The images would come in another order. Go back to them, or accept it with `allow_data_mismatch=True` "
                "where the data is a stream."
            )
        if (checkpoint / TRAINED_FILE).exists() and self.averaged is None:
            raise ValueError(
                f"The checkpoint {str(checkpoint)!r} holds an averaged student: set its `ema_decay` again."
            )
        self._resumed_images = run_state["images_seen"]
        self.loss_log.reset(self._resumed_images)
        step: int = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
        if (
            changed and self._epochs_were_counted and isinstance(self.train_dataset, ImageStream)
        ):  # the epochs that are left, in steps of the new batch
            self.args.max_steps = step + count_steps(self.train_dataset, self.args, self._resumed_images)
        return step

    def _load_finished(self, checkpoint: str, step: int) -> TrainOutput:
        """A run that needs no more steps: load what it ended with."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None and Path(best).is_dir():
            self._load_best_model()
        return TrainOutput(step, float("nan"), {})

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
