"""What feeds a distillation: prepared data sets, and batches as the model takes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.data import Mixup
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput

from ..data.dataset import dataset_labels, has_names, prepare_dataset
from ..data.labels import class_order
from ..data.preparation import Preparation
from ..data.stream import ImageStream
from ..images import IGNORED_LABEL, Normaliser
from ..models.students import Student
from .config import ScaleKDConfig
from .loaders import Feed, check_same_files, seed_of_images
from .metrics import CountedLoss


__all__ = ["ImageFeed", "prepare_images"]


class ImageFeed(Feed):
    """The loaders of a distillation, and its batches on the device.

    Args:
        args: of the run.
        normaliser: scales the values of images for the model.
        num_labels: K, classes of the student; 0 of a backbone, which needs no labels.
        collator: samples to a batch.
    """

    args: ScaleKDConfig

    def __init__(self, args: ScaleKDConfig, normaliser: Normaliser, num_labels: int, collator: Any):
        super().__init__(args, collator)
        self.normaliser, self.num_labels = normaliser, num_labels
        self._mixup: Mixup | None = None
        if args.mixup_alpha or args.cutmix_alpha:
            self._mixup = Mixup(args.mixup_alpha, args.cutmix_alpha, label_smoothing=0.0, num_classes=num_labels)
        self._evaluated = CountedLoss(args.task_loss, args.device)

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
        if self._mixup is not None:
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
        """Mixup or CutMix of a batch, labels (B,) to (B, K); of an odd batch the last image stays as it is.

        Without labels, which then have no part in the loss, the same images are mixed in the same way.
        """
        pixel_values = batch["pixel_values"]
        labels = batch.get("labels", torch.zeros(len(pixel_values), dtype=torch.long, device=pixel_values.device))
        if labels.ndim != 1:
            raise ValueError(f"Mixup and CutMix need class indices (B,) as labels, got {tuple(labels.shape)}.")
        even = len(labels) // 2 * 2
        counts = labels != IGNORED_LABEL
        labels = labels.clamp(min=0)
        rest = F.one_hot(labels[even:], self.num_labels).float()
        if even:
            mixed, soft = mixup(pixel_values[:even].clone(), labels[:even])
            pixel_values, rest = torch.cat([mixed, pixel_values[even:]]), torch.cat([soft, rest])
            counts = torch.cat([counts[:even] & counts[:even].flip(0), counts[even:]])  # each is mixed with one
        rest = torch.where(counts[:, None], rest, float(IGNORED_LABEL))
        return {**batch, "pixel_values": pixel_values, **({"labels": rest} if "labels" in batch else {})}

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
    if is_backbone and column and has_names(dataset, column):
        raise ValueError(
            f"`{name}` has names as labels in its column {column!r}, and a backbone knows no classes that they could mean. Store them as "
            f"indices (`dataset.class_encode_column({column!r})`), or set `label_column` to none."
        )
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
    check_same_files(prepared, name, args)
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
