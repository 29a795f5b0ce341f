"""Semantic segmentation: transformers' UperNet on a student."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import SegformerImageProcessor, UperNetConfig, UperNetForSemanticSegmentation

from ..images import ImageSpec
from ..models.students import Student
from .backbone import load_backbone


__all__ = ["build_segmenter", "segmentation_processor"]

AUXILIARY_MAP = 2  # the map, counted from 0, that UperNet's second head looks at
BILINEAR = 2  # by PIL's number
LONGEST = 4  # times the shorter side, as mmsegmentation tests on ADE20K: 512 and at most 2048 px


def build_segmenter(
    student: str | Path | Student,
    class_names: Sequence[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    drop_path_rate: float = 0.0,
    pretrained: bool = True,
    hidden_size: int = 512,
) -> UperNetForSemanticSegmentation:
    """UperNet (Xiao et al. 2018) with a student as its backbone.

    Args:
        student, image_size, drop_path_rate, pretrained: see `load_backbone`.
        class_names: of the K classes, by their number in the masks.
        hidden_size: channels of the head, twice those of the auxiliary one; 512 in mmsegmentation's recipes.

    Returns:
        A model that takes `pixel_values` (B, 3, H, W), normalised, and `labels` (B, H, W), int64 with 255 where none counts, to `loss` and
        `logits` (B, K, H, W); its `backbone.origin` says where the weights are from. A training batch has two images or more, for the
        head's BatchNorm after pooling to one cell.

    Raises:
        ValueError: see `load_backbone`, or fewer than two classes or names that are not different.
    """
    labels = named(class_names, least=2)
    backbone = load_backbone(student, image_size=image_size, drop_path_rate=drop_path_rate, pretrained=pretrained)
    channels = backbone.channels
    auxiliary = min(AUXILIARY_MAP, len(channels) - 1)
    config = UperNetConfig(
        backbone_config=backbone.config,
        hidden_size=hidden_size,
        use_auxiliary_head=auxiliary == AUXILIARY_MAP,
        auxiliary_in_channels=channels[auxiliary],
        auxiliary_channels=hidden_size // 2,
        **labels,
    )
    model = UperNetForSemanticSegmentation(config)
    model.backbone = backbone  # the one that was built has fresh weights and drops no paths
    return model


def segmentation_processor(spec: ImageSpec, image_size: int, *, square: bool = False) -> SegformerImageProcessor:
    """The evaluation transform as an image processor, for `pipeline("image-segmentation")`: resize, normalise.

    Args:
        spec: of the student, for its mean and standard deviation.
        image_size: pixels of the shorter side; the longer one is at most four times that.
        square: squeeze images to a square of that side, for students of one size only.
    """
    sides = ("height", "width") if square else ("shortest_edge", "longest_edge")
    size = dict(zip(sides, (image_size, image_size if square else LONGEST * image_size), strict=True))
    return SegformerImageProcessor(
        size=size, resample=BILINEAR, image_mean=list(spec.mean), image_std=list(spec.std), do_reduce_labels=False
    )


def named(class_names: Sequence[str], *, least: int = 1) -> dict[str, Any]:
    """The names of classes as configurations of transformers have them.

    Raises:
        ValueError: too few of them, or two that are the same.
    """
    names = [str(name) for name in class_names]
    if len(names) < least:
        raise ValueError(
            f"`class_names` has {len(names)} names, but this head tells {least} classes or more apart. Name all of them."
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"`class_names` has {twice[0]!r} more than once. Give each class a name of its own.")
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
