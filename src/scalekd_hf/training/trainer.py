"""`ScaleKDTrainer`: the Hugging Face `Trainer` for ScaleKD. Its hooks are short and hand over to its parts."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..models.saving import save_student
from ..models.students import Student
from ..models.teachers import Teacher
from ..publishing.hub import failures_in_log
from ..publishing.publisher import Publisher
from .averaging import AveragedStudent
from .backbones import backbone_prediction
from .config import ScaleKDConfig
from .distillation_checkpoints import DistillationCheckpoints
from .facts import describe_run
from .feeding import ImageFeed, prepare_images
from .loaders import named
from .model import ScaleKDModel, batch_of_one_explained
from .run_trainer import RunTrainer
from .setup import set_up
from .sharding import engine_runs, full_state, place_teacher, without_idle_engine


__all__ = ["ScaleKDTrainer"]


class ScaleKDTrainer(RunTrainer):
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
    feed: ImageFeed
    checkpoints: DistillationCheckpoints

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
        args, student = setup.args, setup.model.student
        self.data, self.evaluated = setup.data, setup.evaluated
        self.results = cast(dict[str, dict[str, float]], {})
        feed = ImageFeed(args, setup.model.normaliser, student.num_labels, setup.options["data_collator"])
        publisher = Publisher(args, student, setup.model.teacher)
        options = setup.data_sets | setup.options
        super().__init__(setup.model, args, given, feed, publisher, setup.epochs, **options)

    def make_checkpoints(self, is_sharded: bool) -> DistillationCheckpoints:
        """What keeps the run, the averaged student included."""
        model, args = self.distiller, self.args
        self.averaged = AveragedStudent(self.student, args.ema_decay) if args.ema_decay else None
        if self.averaged is not None:
            self.callback_handler.callbacks.insert(0, self.averaged)  # before others evaluate it
        parts = (self.feed, self.loss_log, self.stopwatch, self.averaged)
        return DistillationCheckpoints(args, model, *parts, is_sharded)

    @property
    def distiller(self) -> ScaleKDModel:
        """Student, teacher and heads, also while they are wrapped for distributed training."""
        return cast(ScaleKDModel, self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    @property
    def student(self) -> Student:
        """The student, also while it is wrapped for distributed training."""
        return cast(Student, self.distiller.student)

    def before_training(self) -> None:
        """The teacher goes to its device, in parts where that is asked for."""
        place_teacher(self.distiller.teacher, self.accelerator, self.args)

    def describe(self, *args: Any, **kwargs: Any) -> None:
        """Write README.md, training_config.yaml, results.json and curves.png into `output_dir`; see `describe_run`."""
        describe_run(self, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The parent's, of images that are normalised and mixed on the device."""
        with batch_of_one_explained(len(inputs["pixel_values"])):
            return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted loss in training, whose terms it adds up; the student's task loss in evaluation."""
        outputs = model(**inputs)
        if self.distiller.training:  # the wrapper of an engine may be in another mode
            self.loss_log.add(self.state.global_step + 1, outputs.loss, outputs.losses)
        return (outputs.loss, {"loss": outputs.loss, "logits": outputs.logits}) if return_outputs else outputs.loss

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The parent's; a raw data set is prepared first, and a stream is dealt out to processes and workers."""
        dataset, name = named(self.eval_dataset, eval_dataset)
        dataset = prepare_images(dataset, "eval_dataset", self.student, self.args)
        return self.feed.evaluation_loader(dataset, super().get_test_dataloader, name)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """That of an evaluation; labels may be missing."""
        dataset = prepare_images(test_dataset, "test_dataset", self.student, self.args, labels_optional=True)
        return self.feed.evaluation_loader(dataset, super().get_test_dataloader)

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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.checkpoints.load(Path(resume_from_checkpoint), resume=True)

    def _load_best_model(self) -> None:
        best = self.run_folder.whole(str(self.state.best_model_checkpoint))
        if engine_runs(self):
            super()._load_best_model()
            self.checkpoints.restore_average(best)
        else:
            self.checkpoints.load(best, resume=False)
