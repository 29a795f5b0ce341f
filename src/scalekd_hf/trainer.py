"""`ScaleKDTrainer`: the Hugging Face `Trainer` for ScaleKD, with the fewest hooks."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState, set_seed
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from .config import ScaleKDConfig
from .data import ImageStream, Preparation, collate, dataset_labels, prepare_dataset
from .distiller import ScaleKDModel, check_labels, feature_weights
from .heads import MimickingHeads
from .metrics import compute_accuracy, keep_top5
from .saving import (
    RUN_STATE_FILE,
    check_checkpoint,
    check_output_dir,
    check_rebuildable,
    load_checkpoint,
    save_heads,
    save_student,
)
from .students import Student, load_student
from .teachers import Teacher, load_teacher


__all__ = ["ScaleKDTrainer", "build_model"]

PUBLISHED_HEADS = (16, 24)  # Swin-L: penultimate and last projectors


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
        self._reset_log()
        self.images_seen = 0
        self._resumed_step = 0
        super().__init__(
            model=distiller,
            args=args,
            train_dataset=self._prepare_data(train_dataset, "train_dataset", distiller.student, args),
            eval_dataset=self._prepare_data(eval_dataset, "eval_dataset", distiller.student, args),
            **kwargs,
        )
        if isinstance(self.train_dataset, ImageStream):
            self.add_callback(_StreamProgress)

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
                args.label_column,
                (args.crop_scale[0], args.crop_scale[1]),
                args.hflip,
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
        self._reset_log()
        self._resumed_step = self.images_seen = 0
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
        outputs = model(**inputs)
        if model.training:
            self._add_terms(outputs.loss, outputs.losses)
            self.images_seen += len(inputs["pixel_values"]) * self.args.world_size
        return (outputs.loss, {"loss": outputs.loss, "logits": outputs.logits}) if return_outputs else outputs.loss

    def _reset_log(self) -> None:
        self._term_names: list[str] = []
        self._term_sums: Tensor | None = None  # (terms,) on the device: nothing waits for it before a log
        self._first_bad: Tensor | None = None  # (1 + terms,) step and terms of the first loss that is not finite
        self._micro_steps = 0
        self._images_logged, self._time_logged = getattr(self, "images_seen", 0), time.perf_counter()

    def _add_terms(self, loss: Tensor, losses: dict[str, Tensor]) -> None:
        if not self._micro_steps and not self._term_names:
            self._term_names = list(losses)
            self._images_logged, self._time_logged = self.images_seen, time.perf_counter()
        terms = torch.stack([value.detach().float() for value in losses.values()])
        if self._term_sums is None or self._first_bad is None:
            self._term_sums = torch.zeros_like(terms)
            self._first_bad = torch.cat([terms.new_full((1,), -1.0), torch.zeros_like(terms)])
        self._term_sums += terms
        self._micro_steps += 1
        now = torch.cat([terms.new_full((1,), float(self.state.global_step + 1)), terms])
        is_first = ~torch.isfinite(loss.detach()) & (self._first_bad[0] < 0)
        self._first_bad = torch.where(is_first, now, self._first_bad)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each loss term averaged since the last log, images per second and images seen."""
        if "loss" in logs and self._term_sums is not None:
            self._stop_if_not_finite()
            means = self.accelerator.reduce(self._term_sums / self._micro_steps, "mean").tolist()
            logs.update(zip(self._term_names, means, strict=True))
            elapsed = time.perf_counter() - self._time_logged
            logs["images_per_second"] = round((self.images_seen - self._images_logged) / elapsed, 2)
            logs["images_seen"] = self.images_seen
            self._term_sums.zero_()
            self._micro_steps = 0
            self._images_logged, self._time_logged = self.images_seen, time.perf_counter()
        super().log(logs, start_time)

    def _stop_if_not_finite(self) -> None:
        if self._first_bad is None:
            return
        for step, *terms in self.accelerator.gather(self._first_bad[None]).tolist():
            if step >= 0:
                values = ", ".join(f"{name}={value:.4g}" for name, value in zip(self._term_names, terms, strict=True))
                last = get_last_checkpoint(self.args.output_dir) or "there is none"
                raise NonFiniteLossError(
                    f"The loss is not finite at step {int(step)}: {values}. Nothing was saved since; the last checkpoint "
                    f"is kept: {last}. A lower `learning_rate`, `max_grad_norm`, a longer warm-up, or `bf16` instead of "
                    "`fp16` may help."
                )

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

        save_student(model.student, folder, part("student.model."))
        if folder.name.startswith("checkpoint-"):
            if model.heads is not None:
                save_heads(model.heads, folder, part("heads."))
            (folder / RUN_STATE_FILE).write_text(json.dumps({"images_seen": self.images_seen}))

    def _read_run_state(self, checkpoint: Path) -> None:
        self._resumed_step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
        run_state = checkpoint / RUN_STATE_FILE
        self.images_seen = json.loads(run_state.read_text())["images_seen"] if run_state.exists() else 0

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        distiller = self.accelerator.unwrap_model(model or self.model, keep_torch_compile=False)
        load_checkpoint(distiller.student, distiller.heads, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

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


class NonFiniteLossError(FloatingPointError):
    """Training was stopped because a loss was NaN or infinite."""


def build_model(
    student: str | nn.Module | Student,
    teacher: str | nn.Module | Teacher | None,
    args: ScaleKDConfig,
    labels: list[str] | None = None,
) -> ScaleKDModel:
    """Student, teacher and heads as the settings describe them.

    Args:
        student, teacher, args: see `ScaleKDTrainer`.
        labels: class names of the data set, for a student that is built by name.
    """
    options: dict[str, Any] = {"labels": labels, "image_size": args.image_size} if isinstance(student, str) else {}
    student = load_student(student, **options)
    student.spec = student.spec.updated(size=args.image_size, crop_pct=args.crop_pct)
    settings: dict[str, Any] = {"task_loss": args.task_loss, "label_smoothing": args.label_smoothing_factor}
    if teacher is None:
        return ScaleKDModel(student, **settings)
    size: dict[str, Any] = {"image_size": args.teacher_image_size} if isinstance(teacher, str) else {}
    teacher = load_teacher(teacher, last_blocks=args.teacher_last_blocks, **size)
    weights = (args.spatial_weight, args.frequency_weight, args.last_frequency_weight)
    terms = tuple(feature_weights(*weights))
    heads = None
    if terms:
        heads = MimickingHeads(
            student.dims,
            student.grids,
            (teacher.penultimate_dim, teacher.dim),
            (teacher.penultimate_grid, teacher.grid),
            (
                args.penultimate_num_heads or _largest_divisor(teacher.penultimate_dim, PUBLISHED_HEADS[0]),
                args.last_num_heads or _largest_divisor(teacher.dim, PUBLISHED_HEADS[1]),
            ),
            softmax_scale=args.softmax_scale,
            stem_norm=args.stem_norm,
            learned_last_queries=args.learned_last_queries,
            terms=terms,
        )
    return ScaleKDModel(
        student,
        teacher,
        heads,
        spatial_weight=args.spatial_weight,
        frequency_weight=args.frequency_weight,
        last_frequency_weight=args.last_frequency_weight,
        logit_weight=args.logit_weight,
        temperature=args.temperature,
        **settings,
    )


def _largest_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)
