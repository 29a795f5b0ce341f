"""torchvision's Mask R-CNN on a backbone of transformers, as a model that `from_pretrained` loads.

Shapes in this file: B images of H x W pixels, padded at right and bottom; n objects of an image, m detections.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_convert
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from transformers import AutoBackbone, AutoConfig, AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


__all__ = ["StudentMaskRCNN", "StudentMaskRCNNConfig", "image_sizes"]

ANCHOR = 8  # sides of an anchor, in cells of its level: 32 px on a map of stride 4
RATIOS = (0.5, 1.0, 2.0)  # height to width
BOX_CELLS, MASK_CELLS, SAMPLES = 7, 14, 2  # of what is cut out of the maps, as in torchvision


class StudentMaskRCNNConfig(PreTrainedConfig):
    """Of a Mask R-CNN.

    Attributes:
        backbone_config: of the backbone.
        strides: of its maps, in pixels, finest first.
        hidden_size: channels of the feature pyramid.
        freeze_batch_norm: the backbone's BatchNorm keeps its statistics and weights.
        settings: other arguments of `torchvision.models.detection.MaskRCNN`, numbers of proposals for example.
    """

    model_type = "scalekd_mask_rcnn"

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    strides: list[float] | None = None
    hidden_size: int = 256
    freeze_batch_norm: bool = True
    settings: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        super().__post_init__(**kwargs)


@dataclass
class MaskRCNNOutput(ModelOutput):
    """Losses in training; in evaluation what was found, in pixels of the padded images, and the sizes (h, w) without padding."""

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    detections: list[dict[str, Tensor]] | None = None
    image_sizes: list[tuple[int, int]] | None = None


class Pyramid(nn.Module):
    """A backbone with torchvision's feature pyramid and one level more, by pooling."""

    def __init__(self, backbone: Any, out_channels: int):
        super().__init__()
        self.backbone = backbone
        self.fpn = FeaturePyramidNetwork(list(backbone.channels), out_channels, LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        maps = self.backbone(pixel_values).feature_maps
        pyramid: dict[str, Tensor] = self.fpn(OrderedDict((str(level), x) for level, x in enumerate(maps)))
        return pyramid


class StudentMaskRCNN(PreTrainedModel):
    """Mask R-CNN (He et al. 2017) of torchvision. Images are resized, padded and normalised before, not in it."""

    config: StudentMaskRCNNConfig
    config_class = StudentMaskRCNNConfig
    main_input_name = "pixel_values"

    def __init__(self, config: StudentMaskRCNNConfig):
        super().__init__(config)
        backbone: Any = AutoBackbone.from_config(config.backbone_config)
        if config.freeze_batch_norm:
            backbone = freeze_batch_norm_2d(backbone)
        strides, labels = list(config.strides or []), len(config.id2label or {})
        levels = [str(level) for level in range(len(strides))]
        sizes = tuple((round(ANCHOR * stride),) for stride in (*strides, 2 * strides[-1]))
        self.detector = MaskRCNN(
            Pyramid(backbone, config.hidden_size),
            num_classes=labels + 1,  # with the background
            rpn_anchor_generator=AnchorGenerator(sizes, (RATIOS,) * len(sizes)),
            box_roi_pool=MultiScaleRoIAlign(levels, BOX_CELLS, SAMPLES),
            mask_roi_pool=MultiScaleRoIAlign(levels, MASK_CELLS, SAMPLES),
            **(config.settings or {}),
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """torchvision has initialised its modules, and the backbone its own."""

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, labels: list[dict[str, Tensor]] | None = None
    ) -> MaskRCNNOutput:
        """Images to losses, or to detections.

        Args:
            pixel_values: (B, 3, H, W), normalised, zeros where padded.
            pixel_mask: (B, H, W), 1 where there is image; None without padding.
            labels: in training, for each image `class_labels` (n,) int64, `boxes` (n, 4), centre and sides relative to the image without padding,
                and `masks` (n, H, W) uint8.

        Raises:
            ValueError: training without labels.
        """
        sizes = image_sizes(pixel_values, pixel_mask)
        targets = None
        if self.training:
            if labels is None:
                raise ValueError(
                    "`labels` are None in training. Give one dictionary for each image, or call `eval()`."
                )
            targets = [_target(label, size) for label, size in zip(labels, sizes, strict=True)]
        images = ImageList(pixel_values, sizes)
        maps = self.detector.backbone(pixel_values)
        proposals, losses = self.detector.rpn(images, maps, targets)
        detections, more = self.detector.roi_heads(maps, proposals, sizes, targets)
        if not self.training:
            return MaskRCNNOutput(detections=detections, image_sizes=sizes)
        losses = {**losses, **more}
        return MaskRCNNOutput(loss=sum(losses.values()), loss_dict=losses)


def image_sizes(pixel_values: Tensor, pixel_mask: Tensor | None) -> list[tuple[int, int]]:
    """The sizes (h, w) of images (B, 3, H, W) without their padding, which is 0 in (B, H, W)."""
    if pixel_mask is None:
        return [(pixel_values.shape[2], pixel_values.shape[3])] * len(pixel_values)
    mask = pixel_mask.bool()
    sides = torch.stack([mask.any(2).sum(1), mask.any(1).sum(1)], 1).tolist()
    return [(height, width) for height, width in sides]


def _target(label: dict[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
    """An image's labels as torchvision has them: corners in pixels, and the background as class 0."""
    height, width = size
    scale = label["boxes"].new_tensor([width, height, width, height])
    boxes = box_convert(label["boxes"], "cxcywh", "xyxy") * scale
    return {"boxes": boxes, "labels": label["class_labels"] + 1, "masks": label["masks"]}


AutoConfig.register(StudentMaskRCNNConfig.model_type, StudentMaskRCNNConfig)
AutoModelForObjectDetection.register(StudentMaskRCNNConfig, StudentMaskRCNN)
