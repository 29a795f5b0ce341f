"""What feeds a trainer: prepared data sets, their loaders, and batches as the model takes them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from accelerate import Accelerator
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from ..data.bad_images import BadImages
from ..data.dataset import dataset_labels, prepare_dataset
from ..data.labels import class_order
from ..data.preparation import Preparation
from ..data.sources import Shards, Table
from ..data.stream import ImageStream, Partition, outlive_signals
from ..images import Normaliser
from ..models.students import Student
from .config import ScaleKDConfig
from .metrics import CountedLoss
from .position import RunPosition


__all__ = ["ImageFeed", "named", "prepare_images"]

BAD_IMAGES_FILE = "bad_images{}.jsonl"

logger = logging.getLogger(__name__)


class ImageFeed:
    """Loaders of the prepared data sets, batches on the device, and the account of undecodable images.

    Args:
        args: of the run.
        normaliser: scales the values of images for the model.
        num_labels: K, classes of the student; 0 of a backbone, which needs no labels.
        collator: samples to a batch.

    Attributes:
        position: where the run goes on, and from where on its images are dealt out as they are now.
        bad_images: undecodable ones in "training" and in "evaluation".
    """

    def __init__(self, args: ScaleKDConfig, normaliser: Normaliser, num_labels: int, collator: Any):
        self.args, self.normaliser, self.num_labels, self.collator = args, normaliser, num_labels, collator
        self.position = RunPosition()
        rank = f"_rank{args.process_index}" if args.world_size > 1 else ""
        file = Path(str(args.output_dir), BAD_IMAGES_FILE.format(rank))
        self.bad_images = {data: BadImages(file, args.max_bad_images) for data in ("training", "evaluation")}
        self._mixup: Mixup | None = None
        if args.mixup_alpha or args.cutmix_alpha:
            self._mixup = Mixup(args.mixup_alpha, args.cutmix_alpha, label_smoothing=0.0, num_classes=num_labels)
        self._evaluation_loaders: dict[str, tuple[Any, DataLoader]] = {}  # with persistent workers
        self._evaluated = CountedLoss(args.task_loss, args.device)

    def start_at(self, position: RunPosition) -> None:
        """Have training go on from there."""
        self.position = position

    # Loaders

    def training_loader(self, stream: ImageStream) -> DataLoader:
        """Endless batches of this process, from the position of the run on."""
        workers = max(1, self.args.dataloader_num_workers or 0)
        partition = Partition(self._batch_size, self.args.world_size, workers, self.position.layout_start)
        images_seen = self.position.images_seen
        return stream.training_loader(partition, self.args.process_index, images_seen, **self._loader_options())

    def evaluation_loader(
        self, dataset: Any, make_loader: Callable[[Any], DataLoader], name: str | None = None
    ) -> DataLoader:
        """One pass over a prepared data set, its images dealt out to processes and workers.

        Args:
            dataset: a stream, or a map-style data set.
            make_loader: the parent's, for a map-style one.
            name: of a data set that is evaluated more than once, so that its workers may stay.
        """
        persistent = name is not None and self.args.dataloader_persistent_workers
        kept, loader = self._evaluation_loaders.get(str(name), (None, None))
        if persistent and kept is dataset and loader is not None:
            return loader
        loader = self._new_evaluation_loader(dataset, make_loader, persistent)
        if persistent:
            self._evaluation_loaders[str(name)] = dataset, loader
        return loader

    def _new_evaluation_loader(
        self, dataset: Any, make_loader: Callable[[Any], DataLoader], persistent: bool
    ) -> DataLoader:
        loader: Any
        if isinstance(dataset, ImageStream):
            options = self._loader_options()
            persistent = persistent and bool(self.args.dataloader_num_workers)
            batch_size, rank, processes = self.args.eval_batch_size, self.args.process_index, self.args.world_size
            loader = dataset.evaluation_loader(batch_size, rank, processes, **options, persistent_workers=persistent)
        else:
            loader = self._whole(make_loader, dataset)
            own = getattr(loader, "base_dataloader", loader)
            own.worker_init_fn = outlive_signals
            own.generator = torch.Generator()  # so that training draws the same with an evaluation and without
        return cast(DataLoader, loader)

    def _whole(self, make_loader: Callable[[Any], DataLoader], dataset: Any) -> Any:
        """The parent's loader, which `dataloader_drop_last` would shorten: it is for training."""
        kept, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return make_loader(dataset)
        finally:
            self.args.dataloader_drop_last = kept

    def _loader_options(self) -> dict[str, Any]:
        return {
            "collate_fn": self.collator,
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory,
            "prefetch_factor": self.args.dataloader_prefetch_factor,
            "multiprocessing_context": self.args.dataloader_multiprocessing_context,
        }

    @property
    def _batch_size(self) -> int:
        return self.args.train_batch_size or 1

    def warn_of_settings_without_effect(self, *data: Any) -> None:
        """Name settings that shape `Trainer`'s own loaders, and that streams of images do not heed."""
        every = [dataset for given in data for dataset in (given.values() if isinstance(given, dict) else [given])]
        if not any(isinstance(dataset, ImageStream) for dataset in every):
            return
        accelerator: Any = self.args.accelerator_config
        without_effect = {
            "dataloader_drop_last": self.args.dataloader_drop_last,
            "dataloader_in_order": not self.args.dataloader_in_order,
            "train_sampling_strategy": self.args.train_sampling_strategy != "random",
            "accelerator_config.split_batches": accelerator.split_batches,
            "accelerator_config.dispatch_batches": accelerator.dispatch_batches,
        }
        for name in (name for name, is_set in without_effect.items() if is_set):
            logger.warning(
                "`%s` has no effect on streams of images: training is one endless sequence, shuffled anew in each pass and "
                "dealt out in order, and an evaluation counts every image once.",
                name,
            )

    # Batches

    def training_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch as the model trains on it: on the device, normalised, mixed where the settings ask for it.

        Raises:
            ValueError: it has no labels, and the settings do not say so.
        """
        if self.num_labels and self.args.has_labels and "labels" not in batch:
            raise ValueError(
                f"The training samples have no `labels`, only {sorted(batch)}. Name them so, or set `label_column` to "
                "none to train without."
            )
        batch = self._normalised(batch)
        if self._mixup is not None and "labels" in batch:
            batch = self._mix(self._mixup, batch)
        return self._laid_out(batch)

    def evaluation_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch as the model is evaluated on it: on the device and normalised, with images and labels alone."""
        batch.pop("blanks", None)
        self.bad_images["evaluation"].add("evaluation", batch.pop("bad_images", []))
        return self._laid_out(self._normalised(batch))

    def _normalised(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = {
            name: value.to(self.args.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        if isinstance(pixel_values := batch.get("pixel_values"), Tensor):
            batch["pixel_values"] = self.normaliser.for_student(pixel_values)
        return batch

    def _laid_out(self, batch: dict[str, Any]) -> dict[str, Any]:
        """With pixels in the memory order that `channels_last` gives the model's convolutions."""
        if self.args.channels_last and isinstance(pixel_values := batch.get("pixel_values"), Tensor):
            batch["pixel_values"] = pixel_values.contiguous(memory_format=torch.channels_last)
        return batch

    def _mix(self, mixup: Mixup, batch: dict[str, Any]) -> dict[str, Any]:
        """Mixup or CutMix of a batch, labels (B,) to (B, K); of an odd batch the last image stays as it is."""
        pixel_values, labels = batch["pixel_values"], batch["labels"]
        if labels.ndim != 1:
            raise ValueError(f"Mixup and CutMix need class indices (B,) as labels, got {tuple(labels.shape)}.")
        even = len(labels) // 2 * 2
        rest = F.one_hot(labels[even:], self.num_labels).float()
        if even:
            mixed, soft = mixup(pixel_values[:even].clone(), labels[:even])
            pixel_values, rest = torch.cat([mixed, pixel_values[even:]]), torch.cat([soft, rest])
        return {**batch, "pixel_values": pixel_values, "labels": rest}

    # Evaluation

    def begin_evaluation(self) -> None:
        """Count anew: losses and undecodable images."""
        self._evaluated = CountedLoss(self.args.task_loss, self.args.device)
        self.bad_images["evaluation"].restart()

    def add_evaluated(self, loss: Tensor | None, labels: Any) -> None:
        """Take in the mean loss of a batch and its labels, where it has any."""
        if loss is not None and isinstance(labels, Tensor):
            self._evaluated.add(loss, labels)

    def end_evaluation(self, output: EvalLoopOutput, images: Any, accelerator: Accelerator) -> EvalLoopOutput:
        """The output with the loss over the images that count; of a stream, in the order of its rows.

        Raises:
            TooManyBadImagesError: more than `max_bad_images` allows.
        """
        loss, metrics = self._evaluated.mean(accelerator), output.metrics or {}
        for name in [name for name in metrics if name.endswith("_loss")]:
            if loss is None:  # no image has a label
                del metrics[name]
            else:  # the parent's mean includes images that do not count
                metrics[name] = loss
        count = len(images) if hasattr(images, "__len__") else 0
        self.bad_images["evaluation"].check(count, self.args.world_size)
        if not isinstance(images, ImageStream):
            return output
        order = images.row_order()
        predictions, labels = (_in_row_order(values, order) for values in (output.predictions, output.label_ids))
        return output._replace(predictions=predictions, label_ids=labels)

    # Undecodable images

    def take_bad_images(self, batches: list[dict[str, Any]], dataset: Any) -> None:
        """Take what training batches say of undecodable images out of them.

        Raises:
            TooManyBadImagesError: the stream has more than `max_bad_images` allows.
        """
        bad = self.bad_images["training"]
        for batch in batches:
            bad.add("training", batch.pop("bad_images", []))
        if isinstance(dataset, ImageStream):
            bad.check(len(dataset.source), self.args.world_size)

    def report_bad_images(self) -> None:
        """Say how many there were, and where they are listed."""
        for data, bad in self.bad_images.items():
            if bad.kinds:
                logger.warning(
                    "Undecodable images met in %s: %s. They are listed in %r.", data, bad.summary(), str(bad.file)
                )

    def order_settings(self, dataset: Any) -> dict[str, Any]:
        """What the order of a training set's images depends on, by the names of settings."""
        settings: dict[str, Any] = {
            "seed": seed_of_images(self.args),
            "repeated_augmentation": self.args.repeated_augmentation,
        }
        batch, accumulated = self._batch_size, self.args.gradient_accumulation_steps
        if isinstance(dataset, ImageStream):
            settings["images"] = len(dataset.source)
            settings |= {"content": dataset.source.content} if dataset.source.content else {}
            if isinstance(dataset.source, Table):  # any reader can fetch any row
                step = batch * accumulated * self.args.world_size
                return settings | {"images per step": step, "processes": self.args.world_size}
            settings |= {"files": dataset.source.name, "shuffle_buffer_size": self.args.shuffle_buffer_size}
        return settings | {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulated,
            "processes": self.args.world_size,
            "dataloader_num_workers": self.args.dataloader_num_workers,
        }


def seed_of_images(args: ScaleKDConfig) -> int:
    """The seed of the order and the augmentation of the images."""
    return args.seed if args.data_seed is None else args.data_seed


def named(own: Any, asked: Any) -> tuple[Any, str | None]:
    """The data set to evaluate, and its name: "" for a trainer's only one, None for one that is not the trainer's.

    Args:
        own: the trainer's, or several by name.
        asked: a data set, a name, or None for the trainer's.
    """
    name = asked if isinstance(asked, str) else "" if asked is None or asked is own else None
    return (own[name] if name else own if name == "" else asked), name


def prepare_images(
    dataset: Any,
    name: str,
    student: Student,
    args: ScaleKDConfig,
    labels_optional: bool = False,
    compare_labels: bool = True,
) -> Any:
    """A data set, or a dict of several, with the transforms that the settings and the student ask for.

    For a backbone the labels to train on are not read, and those of an evaluation are the data's own, where it has any.

    Args:
        dataset: a `datasets` object, whose images are then decoded and augmented; any other stays as it is.
        name: the argument that errors name; "train_dataset" is augmented.
        labels_optional: a missing label column means images without labels.
        compare_labels: take labels by the student's class names, and refuse others.

    Raises:
        ValueError: see `prepare_dataset` and `class_order`; or files that are in another order on each process.
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict) and name == "train_dataset":
        raise ValueError(
            f"`train_dataset` is a `{type(dataset).__name__}` of {list(dataset)}: give the data set to train on, such as "
            f"`data[{next(iter(dataset), 'train')!r}]`."
        )
    if isinstance(dataset, dict):
        return {
            key: prepare_images(value, f"{name}[{key!r}]", student, args, labels_optional, compare_labels)
            for key, value in dataset.items()
        }
    is_backbone, training = not student.num_labels, name == "train_dataset"
    column = args.label_column if args.has_labels and not (is_backbone and training) else None
    classes = dataset_labels(dataset, args.label_column) if compare_labels and column else None
    model_names, num_labels = student.labels, student.num_labels
    if is_backbone:
        model_names, num_labels, labels_optional = classes, len(classes or ()), True
    preparation = Preparation(
        student.spec,
        training,
        args.image_column,
        column,
        (args.crop_scale[0], args.crop_scale[1]),
        args.hflip,
        args.rand_augment,
        args.rand_augment_std,
        args.random_erasing,
        args.repeated_augmentation,
        seed_of_images(args),
        class_order(name, classes, model_names, num_labels),
        num_labels or None if compare_labels else None,
        (args.pixel_range[0], args.pixel_range[1]) if args.pixel_range else None,
        model_names if compare_labels else None,
    )
    shuffle = (seed_of_images(args), args.shuffle_buffer_size)
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


def _in_row_order(values: Any, order: np.ndarray) -> Any:
    """Arrays, or a tuple of them, whose first axis is in the order of the batches, in that of the rows."""
    if isinstance(values, (tuple, list)):
        return type(values)(_in_row_order(value, order) for value in values)
    if not isinstance(values, np.ndarray) or len(values) != len(order):
        return values
    sorted_values = np.empty_like(values)
    sorted_values[order] = values
    return sorted_values
