"""How images are prepared for a transformers model, as its image processor says."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor

from ..images import INTERPOLATIONS, ImageSpec


__all__ = ["config_spec", "processor_spec"]

REFUSED = {
    "do_flip_channel_order": "images with their channels as blue, green, red",
    "rescale_offset": "images whose values are shifted as they are scaled",
}

logger = logging.getLogger(__name__)


def config_spec(config: Any) -> ImageSpec:
    """The images that a transformers configuration names."""
    size = getattr(getattr(config, "vision_config", config), "image_size", None) or 224
    return ImageSpec().updated(size=tuple(size) if isinstance(size, (list, tuple)) else size)


def processor_spec(name: str, default: ImageSpec) -> ImageSpec:
    """The preprocessing that was published with a transformers model, where there is one.

    Raises:
        ValueError: a file that cannot be read, or preprocessing that is not done here.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False).to_dict()
    except (OSError, ValueError) as error:
        if Path(name, "preprocessor_config.json").exists():
            raise ValueError(f"{name!r} has a preprocessor_config.json that cannot be read: {error}") from error
        logger.warning(
            "%r says nothing of its preprocessing: ImageNet's mean and standard deviation are assumed. Give others with "
            "`mean` and `std`.",
            name,
        )
        return default
    for option, what in REFUSED.items():
        if processor.get(option):
            raise ValueError(
                f"{name!r} was published with `{option}` in its preprocessor_config.json: it takes {what}, which is not done here. "
                "Choose another model."
            )
    resize, crop = processor.get("size") or {}, processor.get("crop_size") or {}
    final = crop if processor.get("do_center_crop") and crop else resize
    height = final.get("height") or final.get("shortest_edge")
    width = final.get("width") or final.get("shortest_edge")
    shortest = resize.get("shortest_edge") or resize.get("height")
    crop_pct = processor.get("crop_pct") or (height / shortest if height and shortest else None)
    kind = str(processor.get("image_processor_type"))
    squashed = set(resize) >= {"height", "width"}
    if kind.startswith("ConvNext") and resize.get("shortest_edge", 0) >= 384:
        squashed, crop_pct = True, 1.0  # which it crops smaller images by alone
    if kind.startswith("Levit"):
        crop_pct = 224 / 256  # the shorter side becomes 256 / 224 of what `size` says
    if processor.get("include_top"):  # EfficientNet's: the normalised image is divided by the deviation once more
        processor["image_std"] = [deviation**2 for deviation in processor["image_std"]]
    resample = processor.get("resample")
    if processor.get("do_normalize") is False:
        processor |= {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
    return default.updated(
        size=(height, width) if height and width else None,
        mean=processor.get("image_mean"),
        std=processor.get("image_std"),
        interpolation=INTERPOLATIONS[int(resample)] if resample is not None else None,
        crop_pct=crop_pct,
        antialias=processor.get("antialias"),
        crop_mode="squash" if squashed else None,
    )
