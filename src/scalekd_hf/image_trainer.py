"""The part of the trainer that feeds it: raw images in, batches out, and what their order depends on."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState

from .config import ScaleKDConfig
from .data import ImageDataset, ImageStream, Preparation, RepeatSampler, prepare_dataset
from .students import Student


__all__ = ["ImageTrainer", "Passes", "count_steps", "prepare_images"]


class ImageTrainer(Trainer):
    """A `Trainer` whose data sets hold images: map-style or streaming, mixed where the settings ask for it."""

    args: ScaleKDConfig
    _resumed_images = 0  # images that the run had seen when it was resumed
    _mixup: Mixup | None = None

    @property
    def student(self) -> Student:
        """The student, also while it is wrapped for distributed training."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False).student

    def get_train_dataloader(self) -> DataLoader:
        """The parent's, but for a stream: that one shards, shuffles and finds its place itself."""
        if not isinstance(self.train_dataset, ImageStream):
            return super().get_train_dataloader()
        return self.train_dataset.loader(
            self._train_batch_size,
            self.args.process_index,
            self.args.world_size,
            consumed_batches=self._resumed_images // (self._train_batch_size * self.args.world_size),
            collate_fn=self.data_collator,
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
        dataset = prepare_images(dataset, "eval_dataset", self.student, self.args)
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
        return {
            "per_device_train_batch_size": self._train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "processes": self.args.world_size,
            "dataloader_num_workers": self.args.dataloader_num_workers,
            "seed": self.args.seed,
            "shuffle_buffer_size": self.args.shuffle_buffer_size,
            "repeated_augmentation": self.args.repeated_augmentation,
        }


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

    return prepare_dataset(dataset, name, make, args.seed, args.shuffle_buffer_size, labels_optional)


class Passes(TrainerCallback):
    """Tells the data which pass it is in; accelerate does so only in some launches, and not after a resume."""

    def __init__(self, data: ImageDataset | ImageStream):
        self.data = data

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if isinstance(self.data, ImageDataset):
            self.data.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if isinstance(self.data, ImageStream):  # the parent counts from where it was resumed
            state.epoch = state.global_step / state.max_steps


def count_steps(stream: ImageStream, args: ScaleKDConfig, images_seen: int = 0) -> int:
    """Steps for what is left of `num_train_epochs`, where the stream or the settings know the number of images."""
    images = args.images_per_epoch or stream.known_length()
    if images is None:
        raise ValueError(
            "The length of the training stream is not known: set `max_steps`, or `images_per_epoch` so that "
            f"`num_train_epochs` ({args.num_train_epochs}) can be counted."
        )
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return math.ceil((args.num_train_epochs * images - images_seen) / batch)
