"""Detection: torchvision's Mask R-CNN, which papers compare, or transformers' D-FINE, on a student.

Shapes in this file: B images of H x W pixels, padded at right and bottom; n objects of an image, m detections.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DFineConfig,
    DFineForObjectDetection,
    PreTrainedModel,
    RTDetrImageProcessor,
)

from ..images import ImageSpec
from ..models.students import Student
from .backbone import load_backbone
from .mask_rcnn import StudentMaskRCNN, StudentMaskRCNNConfig, image_sizes
from .preparation import LONGER_SIDE
from .segmenter import named


__all__ = ["HEADS", "StudentDFine", "build_detector", "detect", "detection_processor"]

HEADS = ("mask_rcnn", "d_fine")
DETR_MAPS = 3  # that D-FINE looks at
THRESHOLD = 0.5  # above which a place belongs to a mask
BILINEAR = 2  # by PIL's number


class StudentDFine(DFineForObjectDetection):
    """D-FINE (Peng et al. 2024) whose boxes are relative to the images without padding, in labels and in predictions; without padding it is
    what transformers has, as which it is also loaded."""

    def __init__(self, config: DFineConfig):
        super().__init__(config)
        self.loss_type = DFineForObjectDetection.__name__  # transformers knows losses by the name of the class

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """See `build_detector`.

        Raises:
            ValueError: images whose sides are no multiples of the coarsest stride, 32 px in most networks: maps are doubled exactly.
        """
        _check_sides("pixel_values", pixel_values.shape[-2:], self)
        shares = _shares(pixel_values, pixel_mask)
        if labels is not None:
            labels = [{**label, "boxes": label["boxes"] * share} for label, share in zip(labels, shares, strict=True)]
        outputs = super().forward(pixel_values, pixel_mask=pixel_mask, labels=labels, **kwargs)
        outputs.pred_boxes = outputs.pred_boxes / shares[:, None]
        return outputs


def _check_sides(argument: str, size: Sequence[int], model: Any) -> None:
    multiple = list(model.config.feat_strides)[-1]
    if any(side % multiple for side in size):
        raise ValueError(
            f"`{argument}` {size[0]}x{size[1]} px: D-FINE doubles maps exactly and takes images with sides that {multiple} divides. Choose such ones."
        )


def _shares(pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
    """Which share of width, height, width, height is no padding, (B, 4)."""
    sizes = torch.tensor(image_sizes(pixel_values, pixel_mask), device=pixel_values.device, dtype=torch.float32)
    return (sizes / sizes.new_tensor(pixel_values.shape[-2:])).flip(1).repeat(1, 2)


def build_detector(
    student: str | Path | Student,
    class_names: Sequence[str],
    *,
    head: str = "mask_rcnn",
    image_size: int | tuple[int, int] | None = None,
    drop_path_rate: float = 0.0,
    pretrained: bool = True,
    hidden_size: int = 256,
    **settings: Any,
) -> PreTrainedModel:
    """A detector with a student as its backbone, whose BatchNorm is frozen where the student's weights are in it.

    Args:
        student, image_size, drop_path_rate, pretrained: see `load_backbone`.
        class_names: of the K classes, by their number in `class_labels`.
        head: "mask_rcnn", with boxes and masks, or "d_fine", with boxes.
        hidden_size: channels of the head.
        **settings: others of torchvision's `MaskRCNN`, or of `DFineConfig`.

    Returns:
        A model that takes `pixel_values` (B, 3, H, W), normalised and padded with zeros, `pixel_mask` (B, H, W), 1 where there is image, and `labels`, for
        each image `class_labels` (n,), `boxes` (n, 4), centre and sides relative to the image without padding, and for Mask R-CNN `masks` (n, H, W), to
        `loss` and `loss_dict` in training; `detect` reads its outputs in evaluation. Its `origin` says where the weights are from.

    Raises:
        ValueError: see `load_backbone`, or a head that there is not, or a student with too few maps for it.
    """
    labels = named(class_names)
    if head not in HEADS:
        raise ValueError(f"`head` {head!r} is none of {', '.join(HEADS)}. Choose one of them.")
    backbone = load_backbone(
        student,
        image_size=image_size,
        drop_path_rate=drop_path_rate,
        pretrained=pretrained,
        freeze_batch_norm=pretrained,
        maps=4 if head == "mask_rcnn" else DETR_MAPS,
    )
    model: PreTrainedModel
    if head == "mask_rcnn":
        mask_rcnn = StudentMaskRCNNConfig(
            backbone_config=backbone.config,
            strides=list(backbone.origin.strides),
            hidden_size=hidden_size,
            freeze_batch_norm=pretrained,
            settings=settings,
            **labels,
        )
        model = StudentMaskRCNN(mask_rcnn)
        model.detector.backbone.backbone = backbone  # the one that was built has fresh weights and drops no paths
    else:
        model = StudentDFine(_detr_config(backbone, hidden_size, labels, settings, pretrained))
        model.model.backbone.model = backbone
        size = backbone.origin.spec.updated(size=image_size).size
        _check_sides("image_size", size, model)
        places = sum(math.prod(math.ceil(side / stride) for side in size) for stride in backbone.origin.strides)
        if (queries := model.config.num_queries) > places:
            raise ValueError(
                f"`num_queries` is {queries}, but images of {size[0]}x{size[1]} px have {places} places to choose them from. Lower it (in "
                "`head_args`), or raise `image_size`."
            )
    model.origin = backbone.origin
    return model


def _detr_config(
    backbone: Any, hidden_size: int, labels: dict[str, Any], settings: dict[str, Any], freeze: bool
) -> DFineConfig:
    origin = backbone.origin
    if len(backbone.channels) < DETR_MAPS:
        raise ValueError(
            f"`head` 'd_fine' looks at {DETR_MAPS} maps, but `student` {origin.student!r} has {len(backbone.channels)}, of strides {origin.strides}. "
            "Choose 'mask_rcnn', or another student."
        )
    return DFineConfig(
        backbone_config=backbone.config,
        # timm's backbones are frozen by their own configuration: D-FINE would leave out the activations that timm has in BatchNorm.
        freeze_backbone_batch_norms=freeze and not hasattr(backbone.config, "freeze_batch_norm_2d"),
        encoder_in_channels=list(backbone.channels),
        feat_strides=[round(stride) for stride in origin.strides],
        encoder_hidden_dim=hidden_size,
        d_model=hidden_size,
        decoder_in_channels=[hidden_size] * DETR_MAPS,
        **labels,
        **settings,
    )


@torch.no_grad()
def detect(model: Any, outputs: Any, sizes: Tensor) -> list[dict[str, Tensor]]:
    """What a detector found, in pixels of the original images.

    Args:
        model: of `build_detector`, or as it was loaded.
        outputs: of its forward in evaluation, or a batch for it: `pixel_values` and, where padded, `pixel_mask`.
        sizes: (B, 2), heights and widths in pixels of the original images.

    Returns:
        For each image `scores` (m,), falling, `labels` (m,), `boxes` (m, 4) as x1, y1, x2, y2, and of Mask R-CNN `masks` (m, height, width), booleans.
    """
    if "pixel_values" in outputs:
        inputs = {name: outputs.get(name) for name in ("pixel_values", "pixel_mask")}
        outputs = model(**inputs)
        if not isinstance(model, (StudentMaskRCNN, StudentDFine)):  # as `from_pretrained` loads the latter
            outputs.pred_boxes = outputs.pred_boxes / _shares(**inputs)[:, None]
    if not isinstance(model, StudentMaskRCNN):
        found = RTDetrImageProcessor().post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        return [dict(image) for image in found]
    originals = [(int(height), int(width)) for height, width in sizes.tolist()]
    found = model.detector.transform.postprocess(outputs.detections, outputs.image_sizes, originals)
    return [
        {
            "scores": image["scores"],
            "labels": image["labels"] - 1,
            "boxes": image["boxes"],
            "masks": image["masks"][:, 0] > THRESHOLD,
        }
        for image in found
    ]


def detection_processor(spec: ImageSpec, image_size: int, *, square: bool = True) -> RTDetrImageProcessor:
    """A detector's evaluation transform as an image processor, for `pipeline("object-detection")`: resize, normalise.

    Args:
        spec: of the student, for its mean and standard deviation.
        image_size: pixels of the square's side that images are squeezed to, or of the shorter side.
        square: as D-FINE has it; otherwise the shape is kept, and the longer side is at most 5/3 of the shorter, as Mask R-CNN has it.
    """
    sides = ("height", "width") if square else ("shortest_edge", "longest_edge")
    size = dict(zip(sides, (image_size, image_size if square else round(LONGER_SIDE * image_size)), strict=True))
    return RTDetrImageProcessor(
        size=size,
        resample=BILINEAR,
        do_normalize=True,
        image_mean=list(spec.mean),
        image_std=list(spec.std),
    )
