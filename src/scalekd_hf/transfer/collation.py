"""Samples of different sizes to a batch: padded at the right and at the bottom, and `pixel_mask` says where there is image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .targets import IGNORED_PIXEL


__all__ = ["DenseCollator"]


class DenseCollator:
    """Makes batches of what `SegmentationPreparation` and `DetectionPreparation` give.

    A batch has `pixel_values` uint8 (B, 3, H, W), black where it is padded, `pixel_mask` uint8 (B, H, W), 1 where there is image, and
    `labels`: of segmentation int64 (B, H, W), 255 where it is padded; of detection a list of B dictionaries, their masks
    (n, H, W) padded likewise. In evaluation it has `targets`, a list of B that is None for blanks, and `sizes` int64 (B, 2), the
    original heights and widths. `bad_images` and `blanks` are as those of `data.preparation.Collator`. Pixels are normalised
    later; what is padded becomes zero by `pixel_mask`.

    Args:
        multiple: of pixels, that H and W are.
        size: (height, width) that they are at least, for batches of one shape.
    """

    def __init__(self, multiple: int = 32, size: tuple[int, int] = (1, 1)):
        self.multiple, self.size = multiple, size

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        shapes = [tuple(sample["pixel_values"].shape[1:]) for sample in samples]
        sides = (max(least, *side) for least, side in zip(self.size, zip(*shapes, strict=True), strict=True))
        whole = tuple(-(-side // self.multiple) * self.multiple for side in sides)
        batch: dict[str, Any] = {
            "pixel_values": torch.stack([_padded(sample["pixel_values"], whole) for sample in samples]),
            "pixel_mask": torch.stack([_padded(torch.ones(shape, dtype=torch.uint8), whole) for shape in shapes]),
        }
        labels = [sample["labels"] for sample in samples]
        if isinstance(labels[0], dict):
            batch["labels"] = [
                {name: _padded(value, whole) if name == "masks" else value for name, value in objects.items()}
                for objects in labels
            ]
        else:
            batch["labels"] = torch.stack([_padded(mask, whole, IGNORED_PIXEL) for mask in labels]).long()
        if "target" in samples[0]:
            batch["targets"] = [sample["target"] for sample in samples]
            batch["sizes"] = torch.tensor(
                [sample.get("size", shape) for sample, shape in zip(samples, shapes, strict=True)]
            )
        found = {
            "bad_images": [sample["bad_image"] for sample in samples if "bad_image" in sample],
            "blanks": [place for place, sample in enumerate(samples) if sample.get("blank", False)],
        }
        return batch | {name: values for name, values in found.items() if values}


def _padded(values: Tensor, size: tuple[int, ...], fill: int = 0) -> Tensor:
    """(..., h, w) filled up to `size` (height, width) at the right and at the bottom."""
    height, width = values.shape[-2:]
    return F.pad(values, (0, size[1] - width, 0, size[0] - height), value=fill)
