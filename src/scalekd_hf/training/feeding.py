"""The part of the trainer that feeds it: raw images in, batches out, and what their order depends on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState

from ..data.bad_images import BadImages, TooManyBadImagesError
from ..data.dataset import ImageStream, Preparation, prepare_dataset
from ..data.preparation import IGNORED_LABEL, normalise
from ..data.sources import Shards, StreamReadError, Table
from ..data.stream import Layout, outlive_sigterm
from ..models.students import Student
from .config import ScaleKDConfig
from .loss_log import LossLog
from .stopping import Stopping


__all__ = ["STOPPING_FAILURES", "ImageTrainer", "Passes", "count_steps", "prepare_images"]

BAD_IMAGES_FILE = "bad_images{}.jsonl"
STOPPING_FAILURES = (StreamReadError, TooManyBadImagesError)


class ImageTrainer(Trainer):
    """A `Trainer` whose data sets hold images: map-style or streaming, mixed where the settings ask for it."""

    args: ScaleKDConfig
    loss_log: LossLog
    _epochs_were_counted = False
    _images_seen_before = 0  # when the run was resumed
    _layout_start = 0  # place from which on images are dealt out as they are now
    _mixup: Mixup | None = None
    _ahead: tuple[list, Any] | None = None  # the batches of the next step
    _wanted: tuple = ()  # what they are got with
    _evaluated: Tensor  # sum of the losses, and images that count
    _evaluates_in_training = False
    _normalisation: tuple[Tensor, Tensor] | None = None

    def _feed(self) -> None:
        """Set up what belongs to the images, once the parent is there."""
        rank = f"_rank{self.args.process_index}" if self.args.world_size > 1 else ""
        file = Path(str(self.args.output_dir), BAD_IMAGES_FILE.format(rank))
        self.bad_images = {data: BadImages(file, self.args.max_bad_images) for data in ("training", "evaluation")}
        self.passes: Passes | None = None
        if isinstance(self.train_dataset, ImageStream):
            self.passes = Passes(self, self.args.images_per_epoch or len(self.train_dataset.source))
            self.callback_handler.callbacks.insert(0, self.passes)  # the others find the right epoch
        self.stopping = Stopping(
            self._fetch_next, STOPPING_FAILURES, lambda: bool(self.passes and self.passes.repeated)
        )
        self.add_callback(self.stopping)  # the last word on what is saved
        self._mixup = self._make_mixup()

    @property
    def student(self) -> Student:
        """The student, also while it is wrapped for distributed training."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False).student

    def get_train_dataloader(self) -> DataLoader:
        """The parent's for finished samples; raw images come from an endless stream that finds its place itself."""
        self._ahead = None
        if not isinstance(self.train_dataset, ImageStream):
            return super().get_train_dataloader()
        return self.train_dataset.training_loader(
            self._layout(), self.args.process_index, self._images_seen_before, **self._loader_options()
        )

    def _layout(self) -> Layout:
        workers = max(1, self.args.dataloader_num_workers or 0)
        return Layout(self._train_batch_size or 1, self.args.world_size, workers, self._layout_start)

    def _loader_options(self) -> dict[str, Any]:
        return {
            "collate_fn": self.data_collator,
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory,
            "prefetch_factor": self.args.dataloader_prefetch_factor,
            "multiprocessing_context": getattr(self.args, "dataloader_multiprocessing_context", None),
        }

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The parent's; of a stream they were fetched at the end of the step before, where a failure can stop the run."""
        self._wanted = (epoch_iterator, num_batches, device)
        if self._ahead is None:
            self._fetch()
        assert self._ahead is not None
        batches, self._ahead = self._ahead, None
        return batches

    def _fetch(self) -> None:
        with self.loss_log.waiting():
            self._ahead = super().get_batch_samples(*self._wanted)
        for batch in self._ahead[0]:
            self.bad_images["training"].add("training", batch.pop("bad_images", []))
        if isinstance(self.train_dataset, ImageStream):
            self.bad_images["training"].check(len(self.train_dataset.source), self.args.world_size)

    def _fetch_next(self) -> None:
        if isinstance(self.train_dataset, ImageStream):
            self._fetch()

    def _release_data(self) -> None:
        """Let go of the data loader's iterator, whose workers then end; the garbage collector would make it wait for them."""
        self._ahead, self._wanted = None, ()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The parent's; images become float and are normalised on the device."""
        self.bad_images["evaluation"].add("evaluation", inputs.pop("bad_images", []))
        inputs = {
            name: value.to(self.args.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        inputs = super()._prepare_inputs(inputs)
        pixel_values = inputs.get("pixel_values")
        if isinstance(pixel_values, Tensor) and pixel_values.dtype == torch.uint8:
            if self._normalisation is None:
                spec = self.student.spec
                mean, std = (torch.tensor(v, device=pixel_values.device).view(3, 1, 1) for v in (spec.mean, spec.std))
                self._normalisation = (mean, std)
            inputs["pixel_values"] = normalise(pixel_values, *self._normalisation)
        return inputs

    def _make_mixup(self) -> Mixup | None:
        if not (self.args.mixup_alpha or self.args.cutmix_alpha):
            return None
        classes = self.student.num_labels
        return Mixup(self.args.mixup_alpha, self.args.cutmix_alpha, label_smoothing=0.0, num_classes=classes)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The parent's; a raw data set is prepared first, and a stream is dealt out to ranks and workers."""
        named: Any = self.eval_dataset
        if isinstance(eval_dataset, str):
            eval_dataset = named[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = prepare_images(dataset, "eval_dataset", self.student, self.args)
        if not isinstance(dataset, ImageStream):
            # Without a key, so that no loader of another data set is taken for this one's.
            batch_size, sampler = self.args.eval_batch_size, cast(Any, self._get_eval_sampler)
            loader = self._get_dataloader(dataset, "Evaluation", batch_size, sampler_fn=sampler)
            own: Any = getattr(loader, "base_dataloader", loader)
            own.worker_init_fn = outlive_sigterm
            own.generator = torch.Generator()  # so that training draws the same with an evaluation and without
            return loader
        options = self._loader_options()
        return dataset.evaluation_loader(
            self.args.eval_batch_size, self.args.process_index, self.args.world_size, **options
        )

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        """The parent's; predictions on a stream come back in the order of its rows, and undecodable images are told."""
        bad = self.bad_images["evaluation"]
        bad.restart()
        self._evaluated = torch.zeros(2, device=self.args.device)
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        images = dataloader.dataset
        total, counted = self.accelerator.reduce(self._evaluated, "sum").tolist()
        metrics = cast(dict[str, float], output.metrics)
        for name in metrics:
            if name.endswith("_loss") and counted:
                metrics[name] = total / counted  # the parent's mean is over blanks, too
        bad.check(len(images) if hasattr(images, "__len__") else 0, self.args.world_size)
        self._stop_evaluation_if_asked()
        if not isinstance(images, ImageStream):
            return output
        order = images.row_order()
        return output._replace(
            predictions=_in_row_order(output.predictions, order), label_ids=_in_row_order(output.label_ids, order)
        )

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple:
        """The parent's; adds the loss up over the images that count."""
        self._stop_evaluation_if_asked()
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is not None and isinstance(labels, Tensor):
            images = (labels.any(dim=1) if labels.ndim == 2 else labels != IGNORED_LABEL).sum()
            self._evaluated += torch.stack([torch.where(images > 0, loss * images, 0.0), images])
        return loss, logits, labels

    def _stop_evaluation_if_asked(self) -> None:
        if self._evaluates_in_training:
            self.stopping.check_evaluation(self.args.world_size)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """That of an evaluation; labels may be missing."""
        data = prepare_images(test_dataset, "test_dataset", self.student, self.args, labels_optional=True)
        return self.get_eval_dataloader(data)

    def _mix(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Mixup or CutMix of a batch, labels (B,) to (B, K); of an odd batch the last image stays as it is."""
        assert self._mixup is not None
        pixel_values, labels = inputs["pixel_values"], inputs["labels"]
        if labels.ndim != 1:
            raise ValueError(f"Mixup and CutMix need class indices (B,) as labels, got {tuple(labels.shape)}.")
        even = len(labels) // 2 * 2
        rest = F.one_hot(labels[even:], self.student.num_labels).float()
        if even:
            mixed, soft = self._mixup(pixel_values[:even].clone(), labels[:even])
            pixel_values, rest = torch.cat([mixed, pixel_values[even:]]), torch.cat([soft, rest])
        return {**inputs, "pixel_values": pixel_values, "labels": rest}

    def _data_settings(self) -> dict[str, Any]:
        """What the order of the images depends on."""
        settings: dict[str, Any] = {"seed": self.args.seed, "repeated_augmentation": self.args.repeated_augmentation}
        batch, accumulated = self._train_batch_size, self.args.gradient_accumulation_steps
        data = self.train_dataset
        if isinstance(data, ImageStream):
            settings["images"] = len(data.source)
            if isinstance(data.source, Table):  # any reader can fetch any row
                step = batch * accumulated * self.args.world_size
                return settings | {"images per step": step, "processes": self.args.world_size}
            settings |= {"files": data.source.name, "shuffle_buffer_size": self.args.shuffle_buffer_size}
        return settings | {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulated,
            "processes": self.args.world_size,
            "dataloader_num_workers": self.args.dataloader_num_workers,
        }


def _in_row_order(values: Any, order: np.ndarray) -> Any:
    """Arrays, or a tuple of them, whose first axis is in the order of the batches, in that of the rows."""
    if isinstance(values, (tuple, list)):
        return type(values)(_in_row_order(value, order) for value in values)
    if not isinstance(values, np.ndarray) or len(values) != len(order):
        return values
    sorted_values = np.empty_like(values)
    sorted_values[order] = values
    return sorted_values


def prepare_images(
    dataset: Any, name: str, student: Student, args: ScaleKDConfig, labels_optional: bool = False
) -> Any:
    """A data set, or a dict of several, with the transforms that the settings and the student ask for."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {
            key: prepare_images(value, f"{name}[{key!r}]", student, args, labels_optional)
            for key, value in dataset.items()
        }

    preparation = Preparation(
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
    shuffle = (args.seed, args.shuffle_buffer_size)
    one_first = args.main_process_first(desc="counting the images")
    prepared = prepare_dataset(dataset, name, preparation, shuffle, args.max_bad_images, labels_optional, one_first)
    if isinstance(prepared, ImageStream) and isinstance(prepared.source, Shards) and args.world_size > 1:
        names: list[Any] = [None] * args.world_size
        torch.distributed.all_gather_object(names, prepared.source.name)
        if len(set(names)) > 1:
            raise ValueError(
                f"`{name}` has its files in another order on each process, as after `shuffle()` without a seed. Leave "
                "`shuffle()` out: the trainer shuffles the images of a pass."
            )
    return prepared


class Passes(TrainerCallback):
    """Epochs of a stream, which the parent takes for a single endless one: after so many images, one ends."""

    def __init__(self, trainer: ImageTrainer, images_per_epoch: int):
        self.trainer, self.images_per_epoch = trainer, images_per_epoch
        self.repeated = False  # the parent ends an epoch that has been ended

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.ended = -1
        left = (state.max_steps - state.global_step) * self._images_per_step(args)
        epochs = (self.trainer.loss_log.images_seen + left) / self.images_per_epoch
        state.num_train_epochs = math.ceil(args.num_train_epochs if self.trainer._epochs_were_counted else epochs)
        state.epoch = self.trainer.loss_log.images_seen / self.images_per_epoch

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        seen = self.trainer.loss_log.images_seen
        before = seen - self._images_per_step(args)
        state.epoch = seen / self.images_per_epoch
        if seen // self.images_per_epoch > before // self.images_per_epoch and state.global_step < state.max_steps:
            # The parent ends the last one. What callbacks do at the end of an epoch they do here, too.
            self.trainer.callback_handler.on_epoch_end(args, state, control)
            self.trainer.callback_handler.on_epoch_begin(args, state, control)
            self.ended = state.global_step

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.repeated = self.ended == state.global_step

    def _images_per_step(self, args: Any) -> int:
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def count_steps(stream: ImageStream, args: ScaleKDConfig, images_seen: int = 0) -> int:
    """Steps for what is left of `num_train_epochs`."""
    if args.num_train_epochs <= 0:
        raise ValueError(f"`num_train_epochs` must be positive, got {args.num_train_epochs}.")
    images = args.images_per_epoch or len(stream.source)
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return math.ceil((args.num_train_epochs * images - images_seen) / batch)
