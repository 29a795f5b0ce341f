"""What tells the tasks apart: the samples that they learn from, what a model takes of a batch, and what is measured."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..images import ImageSpec
from .annotations import DenseData
from .collation import DenseCollator
from .detector import detect, detection_processor
from .mask_rcnn import StudentMaskRCNN, image_sizes
from .metrics import DetectionMetrics, SegmentationMetrics, class_maps
from .segmenter import segmentation_processor


__all__ = ["Detection", "Segmentation", "Task", "backbone_of", "has_one_size", "task_of"]


class Task:
    """One of the two.

    Args:
        model: of `build_segmenter` or `build_detector`.
        data: what it learns.
        spec: the size of its images, and how they are normalised.

    Attributes:
        best: the metric that the best checkpoint is chosen by.
        pipeline: the task's name on the Hub.
    """

    best = pipeline = ""
    least_batch = 1  # images that a process needs in a training batch
    options: dict[str, Any] = {}  # of the preparation

    def __init__(self, model: Any, data: DenseData, spec: ImageSpec):
        self.model, self.data, self.spec = model, data, spec

    @property
    def collator(self) -> DenseCollator:
        """Samples to a batch."""
        return DenseCollator()

    def check_batch(self, size: int) -> None:
        """Refuse batches that the head cannot learn from.

        Raises:
            ValueError: of so few images of each process.
        """
        if size < self.least_batch:
            raise ValueError(
                f"`per_device_train_batch_size` is {size}, but the head's BatchNorm needs {self.least_batch} images in each process; accumulating "
                "gradients does not help. Raise it."
            )

    def preparation(self, training: bool, seed: int) -> Any:
        """Rows to samples."""
        return self.data.preparation(self.spec, training, seed=seed, **self.options)

    def processor(self) -> Any:
        """The image processor that is saved with the model."""
        raise NotImplementedError

    def metrics(self, device: torch.device) -> Any:
        """What adds up an evaluation."""
        raise NotImplementedError

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the model takes of a batch."""
        return {name: batch[name] for name in ("pixel_values", "pixel_mask", "labels") if name in batch}

    def losses(self, outputs: Any) -> dict[str, Tensor]:
        """The terms of the loss that the log shows."""
        return {}

    def predict(self, model: Any, batch: dict[str, Any]) -> list[Any]:
        """What a model finds in each image of a batch, for the metrics. Images of different sizes are looked at one by one and
        without padding, which heads see, so that no other image has a part in it."""
        pixels, sizes = batch["pixel_values"], image_sizes(batch["pixel_values"], batch["pixel_mask"])
        every = list(range(len(sizes)))
        found: list[Any] = []
        for places in [every] if len(set(sizes)) == 1 else [[place] for place in every]:
            height, width = sizes[places[0]]
            outputs = model(pixel_values=pixels[places, :, :height, :width])
            found += self.read(model, outputs, batch["sizes"][places])
        return found

    def read(self, model: Any, outputs: Any, sizes: Tensor) -> list[Any]:
        """What the outputs mean at the original sizes (B, 2), heights and widths in pixels."""
        raise NotImplementedError


class Segmentation(Task):
    """A class for each pixel."""

    best, pipeline = "mean_iou", "image-segmentation"
    least_batch = 2  # for the BatchNorm that UperNet has after pooling to a single cell

    def __init__(self, model: Any, data: DenseData, spec: ImageSpec):
        super().__init__(model, data, spec)
        self.options = {"square": has_one_size(model, spec)}

    @property
    def collator(self) -> DenseCollator:
        """Batches of one shape in training."""
        return DenseCollator(size=self.spec.size)

    def processor(self) -> Any:
        """See `Task.processor`."""
        return segmentation_processor(self.spec, min(self.spec.size), **self.options)

    def metrics(self, device: torch.device) -> Any:
        """See `Task.metrics`."""
        return SegmentationMetrics(self.data.class_names, device)

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """See `Task.inputs`: padding has no class."""
        return {name: batch[name] for name in ("pixel_values", "labels") if name in batch}

    def read(self, model: Any, outputs: Any, sizes: Tensor) -> list[Any]:
        """See `Task.read`."""
        whole = torch.ones_like(outputs.logits[:, 0], dtype=torch.uint8)
        return class_maps(outputs.logits, whole, sizes)


class Detection(Task):
    """Boxes, and masks where the head makes them."""

    best, pipeline = "box_ap", "object-detection"

    def __init__(self, model: Any, data: DenseData, spec: ImageSpec):
        super().__init__(model, data, spec)
        self.masks = isinstance(model, StudentMaskRCNN)
        if self.masks and has_one_size(model, spec):
            raise ValueError(
                f"`student` {backbone_of(model).origin.student!r} takes images of {spec.size[0]} px alone, and Mask R-CNN shows it images "
                "of all shapes. Choose `head` 'd_fine', which squeezes them to a square, or another student."
            )
        self.options = {"masks": self.masks, "square": not self.masks}

    def processor(self) -> Any:
        """See `Task.processor`."""
        return detection_processor(self.spec, min(self.spec.size), square=not self.masks)

    def metrics(self, device: torch.device) -> Any:
        """See `Task.metrics`."""
        return DetectionMetrics(self.masks)

    def losses(self, outputs: Any) -> dict[str, Tensor]:
        """See `Task.losses`; without those of the decoder's earlier layers, which are numbered."""
        terms = outputs.loss_dict or {}
        return {name: value for name, value in terms.items() if not any(letter.isdigit() for letter in name)}

    def read(self, model: Any, outputs: Any, sizes: Tensor) -> list[Any]:
        """See `Task.read`."""
        return detect(self.model, outputs, sizes)


def backbone_of(model: Any) -> Any:
    """The part of a segmenter or a detector that is a student."""
    if isinstance(model, StudentMaskRCNN):
        return model.detector.backbone.backbone
    return model.model.backbone.model if hasattr(model, "model") else model.backbone


def has_one_size(model: Any, spec: ImageSpec) -> bool:
    """Whether a model's backbone takes images of one size alone, as mixers do; from a run without values."""
    shadow = copy.deepcopy(backbone_of(model)).to("meta").eval()
    height, width = spec.size
    try:
        shadow(torch.zeros(1, 3, height, 2 * width, device="meta"))
    except (AssertionError, RuntimeError, ValueError):
        return True
    return False


def task_of(model: Any, data: DenseData, image_size: int) -> Task:
    """The task of a model and its data.

    Raises:
        ValueError: a model that has another number of classes, or was not built by this package.
    """
    origin = getattr(backbone_of(model), "origin", None)
    if origin is None:
        raise ValueError(
            f"`model` is a {type(model).__name__} that does not say which images its backbone takes. Build it with `build_segmenter` or "
            "`build_detector`, also to go on from a checkpoint: `train` loads its weights."
        )
    if (count := model.config.num_labels) != len(data.class_names):
        raise ValueError(
            f"`model` tells {count} classes apart, and the data have {len(data.class_names)}. Build it with the data's `class_names`."
        )
    names = [model.config.id2label[number] for number in range(count)]
    if names != list(data.class_names):
        different = next(
            (ours, theirs) for ours, theirs in zip(names, data.class_names, strict=True) if ours != theirs
        )
        raise ValueError(
            f"`model` and the data have other classes, or another order: where the model has {different[0]!r}, the data have "
            f"{different[1]!r}. Build it with the data's `class_names`."
        )
    kinds = {"segment": Segmentation, "detect": Detection}
    return kinds[data.task](model, data, origin.spec.updated(size=image_size))
