"""`TransferTrainer`: a student and a head learn to segment or to detect, by the habits of distillation."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, set_seed

from ..data.stream import ImageStream
from ..manifest import STUDENT_FILE
from ..models.saving import broken_file, replacing
from ..publishing.hub import failures_in_log
from ..publishing.provenance import data_source
from ..publishing.publisher import Publisher
from ..training.checkpoints import Checkpoints
from ..training.config_checks import check_processes
from ..training.epochs import count_steps
from ..training.loaders import named
from ..training.optimization import timm_optimizer
from ..training.run_folder import check_writable
from ..training.run_trainer import RunTrainer
from ..training.sharding import without_idle_engine
from .annotations import DenseData
from .card import describe_transfer
from .config import TransferConfig, chosen_metric
from .feeding import DenseFeed
from .layers import rate_scales, regroup
from .tasks import backbone_of, task_of


__all__ = ["TransferTrainer"]


class TransferTrainer(RunTrainer):
    """Trains a segmenter or a detector whose backbone is a student.

    ```python
    data = load_dense_data(DenseDataArguments(dataset="ADEChallengeData2016", train_split="training"), "segment")
    model = build_segmenter("resnet50-scalekd", data.class_names, image_size=512)
    TransferTrainer(model, TransferConfig(output_dir="resnet50-ade20k", max_steps=160_000), data).train()
    ```

    Args:
        model: of `build_segmenter` or `build_detector`.
        args: the settings.
        data: of `load_dense_data`.
        **kwargs: what `Trainer` takes besides, such as callbacks.

    Attributes:
        results: metrics for the card's table beside the trainer's own, by the names of its rows.
        task: what tells segmentation and detection apart.
        feed, checkpoints, run_folder, publisher: its parts, see `RunTrainer`.

    Raises:
        ValueError: model, settings and data that do not fit each other.
    """

    args: TransferConfig
    feed: DenseFeed

    def __init__(self, model: PreTrainedModel, args: TransferConfig, data: DenseData, **kwargs: Any):
        if not isinstance(args, TransferConfig):
            raise ValueError(f"`args` must be a `TransferConfig`, got a `{type(args).__name__}`.")
        check_processes(args)
        if args.should_save:
            check_writable(str(args.output_dir))
        given = args
        args = copy.copy(args) if args.deepspeed_plugin is None else dataclasses.replace(args)
        args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type != "cpu"
        set_seed(args.seed)
        self.task = task_of(model, data, args.image_size)
        self.task.check_batch(args.per_device_train_batch_size)
        chosen_metric(args, self.task.best)
        feed = DenseFeed(args, self.task)
        train = feed.prepared(data.train, "train")
        epochs, is_stream = None, isinstance(train, ImageStream)
        args.ignore_data_skip |= is_stream
        if is_stream and args.max_steps <= 0:
            epochs, args.max_steps = args.num_train_epochs, count_steps(train, args)
        self.data, self.evaluated = data_source(data.train), data_source(data.evaluation)
        self.results = cast(dict[str, dict[str, float]], {})
        self._metrics = self.task.metrics(args.device)
        options = {"train_dataset": train, "eval_dataset": feed.prepared(data.evaluation, "evaluation"), **kwargs}
        options |= {"data_collator": feed.collator, "processing_class": self.task.processor()}
        if args.timm_optim is not None:
            options.setdefault("optimizer_cls_and_kwargs", timm_optimizer(args, args.learning_rate))
        backbone = backbone_of(model)
        publisher = Publisher(args, SimpleNamespace(model=backbone, name=backbone.origin.student), None)
        super().__init__(model, args, given, feed, publisher, epochs, **options)

    @property
    def trained(self) -> Any:
        """Backbone and head, also while they are wrapped for distributed training."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def make_checkpoints(self, is_sharded: bool) -> Checkpoints:
        """What keeps the run; engines that divide the model among processes have no place in it.

        Raises:
            ValueError: under DeepSpeed or FSDP.
        """
        if is_sharded:
            raise ValueError(
                "A transfer trains under DDP, for students and their heads fit one GPU. Leave DeepSpeed and FSDP out, and accumulate "
                "gradients where memory is short."
            )
        model = self.trained
        models = {"model": type(model).__name__, "classes": list(model.config.id2label.values())}
        models |= {"backbone": type(backbone_of(model)).__name__, "channels": list(backbone_of(model).channels)}
        return Checkpoints(self.args, self.feed, self.loss_log, self.stopwatch, models, is_sharded)

    def regroup(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the backbone's blocks the rates of `layer_decay` and `backbone_lr_scale`."""
        if self.args.layer_decay < 1 or self.args.backbone_lr_scale < 1:
            backbone = backbone_of(self.trained)
            scales = self.args.layer_decay, self.args.backbone_lr_scale
            regroup(optimizer, rate_scales(backbone, backbone.origin.new, *scales))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The head's loss, whose terms are added up for the log."""
        outputs = model(**inputs)
        self.loss_log.add(self.state.global_step + 1, outputs.loss, self.task.losses(outputs))
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """One pass over the evaluation data, each image once, dealt out to processes and workers."""
        dataset, name = named(self.eval_dataset, eval_dataset)
        if dataset is None:
            raise ValueError("There are no evaluation data: `data.evaluation` is None, and none were given.")
        return self.feed.evaluation_loader(
            self.feed.prepared(dataset, "evaluation"), super().get_test_dataloader, name
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The parent's, with the metrics of the task, at the original size of each image."""
        self._metrics.reset()
        self.feed.bad_images["evaluation"].restart()
        with without_idle_engine(self), self.loss_log.paused():
            rest = (prediction_loss_only, ignore_keys, metric_key_prefix)
            output = super().evaluation_loop(dataloader, description, *rest)
            dataset: Any = dataloader.dataset
            count = len(getattr(dataset, "images", dataset))  # of all processes
            self.feed.bad_images["evaluation"].check(count, self.args.world_size)
            self.stopping.leave_evaluation_if_asked(self.args.world_size)
            found = {f"{metric_key_prefix}_{name}": value for name, value in self._metrics.compute().items()}
        return output._replace(metrics={**(output.metrics or {}), **found})

    @torch.no_grad()
    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple:
        """Takes a batch into the metrics; there is no loss of an evaluation, and nothing is gathered."""
        self.stopping.leave_evaluation_if_asked(self.args.world_size)
        batch = self.feed.evaluation_inputs(inputs)
        with self.compute_loss_context_manager():
            found = self.task.predict(model, batch)
        self._metrics.update(found, batch["targets"])
        return None, None, None

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not offered: maps and boxes of images of all sizes are measured one by one and kept nowhere.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "A `TransferTrainer` does not predict: `evaluate` measures, and a `pipeline` of the saved model, or `detect`, finds."
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write backbone and head as `from_pretrained` loads them, with an image processor.

        With `push_to_hub` they are pushed, too; a push that fails is said in the log.
        """
        if self.args.should_save:
            with replacing(output_dir or str(self.args.output_dir)) as unfinished:
                self.trained.save_pretrained(unfinished)
                cast(Any, self.processing_class).save_pretrained(unfinished)
        if self.args.push_to_hub and not _internal_call:
            with failures_in_log():
                self.push_to_hub(commit_message="Model save")

    def load_saved(self, folder: str) -> None:
        """Load the weights of a folder that `save_model` wrote; see `load_weights` for the errors."""
        load_weights(self.trained, Path(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.trained, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_weights(self.trained, self.run_folder.whole(str(self.state.best_model_checkpoint)))

    def describe(self, *args: Any, **kwargs: Any) -> None:
        """Write README.md, training_config.yaml, results.json and curves.png into `output_dir`; see `describe_transfer`."""
        describe_transfer(self, *args, **kwargs)


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Give a model the weights in a folder that a `TransferTrainer` wrote, all of them.

    Raises:
        ValueError: a missing or damaged file, or weights of another model.
    """
    kind: Any = type(model)
    try:
        saved, info = kind.from_pretrained(folder, output_loading_info=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(broken_file(folder, STUDENT_FILE, error)) from error
    wrong = {kind: sorted(keys) for kind, keys in info.items() if keys and kind.endswith("_keys")}
    try:
        if wrong:
            raise RuntimeError(str(wrong))
        model.load_state_dict(saved.state_dict(), strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"The weights in {str(folder)!r} do not fit this {type(model).__name__}: {error} Build it with the student and the head that "
            "the run was started with."
        ) from error
