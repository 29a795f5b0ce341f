"""How good a segmenter or a detector is: from a confusion matrix of pixels, and average precision as COCO defines it.

Both are fed image by image and may be fed by several processes, each with images of its own and any number of them: what
`compute` gives, in all of them, is that of all images. It must then be called by all.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from ..data.labels import some
from .targets import IGNORED_PIXEL


__all__ = ["DetectionMetrics", "SegmentationMetrics", "class_maps"]

logger = logging.getLogger(__name__)

# torchmetrics' names of what COCO calls AP, for boxes or masks.
PRECISIONS = {
    "map": "ap",
    "map_50": "ap50",
    "map_75": "ap75",
    "map_small": "ap_small",
    "map_medium": "ap_medium",
    "map_large": "ap_large",
}
KINDS = {"bbox": "box", "segm": "mask"}


def class_maps(logits: Tensor, pixel_mask: Tensor, sizes: Sequence[tuple[int, int]] | Tensor) -> list[Tensor]:
    """The class of each pixel at the sizes that images had before they were resized and padded.

    Args:
        logits: (B, K, H, W) of padded images.
        pixel_mask: (B, H, W), 1 where there is image, which begins at the left and at the top.
        sizes: B of (height, width).

    Returns:
        B tensors (height, width), int64.
    """
    maps = []
    for scores, mask, size in zip(logits, pixel_mask, sizes, strict=True):
        height, width = int(mask[:, 0].sum()), int(mask[0].sum())
        height, width = height or mask.shape[0], width or mask.shape[1]  # of a blank
        whole = (int(size[0]), int(size[1]))
        inner = scores[None, :, :height, :width].float()
        maps.append(F.interpolate(inner, whole, mode="bilinear", align_corners=False)[0].argmax(0))
    return maps


class SegmentationMetrics:
    """Mean intersection over union, and shares of pixels that are right; ignored pixels do not count.

    Args:
        class_names: K of them.
        device: on which pixels are counted.

    Raises:
        ImportError: without torchmetrics.
    """

    def __init__(self, class_names: Sequence[str], device: torch.device | str = "cpu"):
        metrics = _torchmetrics().classification
        self.class_names = list(class_names)
        if len(self.class_names) == 1:
            raise ValueError(
                f"`class_names` is {self.class_names}: with a single class all pixels are right. Name what is around it as a class, too."
            )
        counts = metrics.MulticlassConfusionMatrix(len(self.class_names), ignore_index=IGNORED_PIXEL)
        self._confusion, self._told = counts.to(device), False

    def update(self, predictions: Sequence[Tensor], targets: Sequence[dict[str, Any] | None]) -> None:
        """Take in images.

        Args:
            predictions: B class maps (H, W), integers.
            targets: B dictionaries with `mask` (H, W), 255 for pixels that do not count; None for blanks, which do not.

        Raises:
            ValueError: a class map of another size than its mask.
        """
        for prediction, target in zip(predictions, targets, strict=True):
            if target is None:
                continue
            mask = torch.as_tensor(target["mask"])
            if prediction.shape != mask.shape:
                raise ValueError(
                    f"`predictions` has a map of shape {tuple(prediction.shape)} for a mask of {tuple(mask.shape)}: classes are "
                    "compared at the original size. Resize the logits to it, as `class_maps` does."
                )
            device = self._confusion.device
            self._confusion.update(prediction.to(device), mask.to(device, torch.int64))

    def compute(self) -> dict[str, float]:
        """Results of all images of all processes.

        Returns:
            `mean_iou` and `mean_accuracy`, the means over classes, and `pixel_accuracy`, all from 0 to 1. A class that is neither in
            the masks nor in the predictions is left out of the first mean, and one that is not in the masks of the second.

        Raises:
            ValueError: there was not one pixel that counts.
        """
        confusion = self._counts()
        absent = [name for name, count in zip(self.class_names, confusion.sum(1).tolist(), strict=True) if not count]
        if absent and not self._told:
            logger.warning(
                "Classes that no evaluated mask has, and that count little or not at all: %s.", some(absent)
            )
            self._told = True
        right, there = confusion.diag(), confusion.sum(1)
        return {
            "mean_iou": self._iou(confusion).nanmean().item(),
            "pixel_accuracy": (right.sum() / there.sum()).item(),
            "mean_accuracy": (right / there).nanmean().item(),
        }

    def iou_by_class(self) -> dict[str, float]:
        """Intersection over union of each class by its name, from 0 to 1; NaN for one that is nowhere."""
        return dict(zip(self.class_names, self._iou(self._counts()).tolist(), strict=True))

    def reset(self) -> None:
        """Forget all images."""
        self._confusion.reset()

    def _counts(self) -> Tensor:
        """Pixels (K, K), by their class and by the one that was predicted."""
        confusion: Tensor = self._confusion.compute().cpu().double()
        if not confusion.sum():
            raise ValueError(
                "Not one pixel was evaluated: all masks are 255, or there was no image. Check the evaluation data."
            )
        return confusion

    @staticmethod
    def _iou(confusion: Tensor) -> Tensor:
        right = confusion.diag()
        return right / (confusion.sum(0) + confusion.sum(1) - right)


class DetectionMetrics:
    """Average precision over IoU thresholds from 0.5 to 0.95, at most 100 objects an image, as pycocotools computes it;
    by faster-coco-eval.

    Args:
        masks: of masks, too.

    Raises:
        ImportError: without torchmetrics or faster-coco-eval.
    """

    def __init__(self, masks: bool = False):
        self.kinds = ("bbox", "segm") if masks else ("bbox",)
        self._metric = self._new()

    def _new(self) -> Any:
        _require_faster_coco_eval()
        # COCO's thresholds: torchmetrics has them as float32, which moves results by a thousandth. Its own gathering takes it that
        # all processes have as many images.
        metric = _torchmetrics().detection.MeanAveragePrecision(
            iou_type=self.kinds,
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0, 1, 101).tolist(),
            backend="faster_coco_eval",
            sync_on_compute=False,
        )
        metric.warn_on_many_detections = False  # detectors without suppression always give more than 100
        return metric

    def update(self, predictions: Sequence[dict[str, Any]], targets: Sequence[dict[str, Any] | None]) -> None:
        """Take in images.

        Args:
            predictions: B dictionaries of `scores` (m,), `labels` (m,), `boxes` (m, 4), by their corners in pixels of the original
                image, and `masks` (m, H, W) where masks are evaluated.
            targets: B dictionaries of `boxes` (n, 4), `labels` (n,), `iscrowd` (n,), `area` (n,) and `masks` (n, H, W) likewise;
                None for blanks, which do not count.

        Raises:
            ValueError: masks are evaluated and missing.
        """
        pairs = [pair for pair in zip(predictions, targets, strict=True) if pair[1] is not None]
        for name, side in (("predictions", 0), ("targets", 1)):
            if "segm" in self.kinds and any("masks" not in (pair[side] or {}) for pair in pairs):
                raise ValueError(
                    f"`{name}` has no 'masks', which are evaluated. Give them, or make the metric without masks."
                )
        made = [[self._as_coco(side or {}) for side in pair] for pair in pairs]
        if made:
            self._metric.update([pair[0] for pair in made], [pair[1] for pair in made])

    def compute(self) -> dict[str, float]:
        """Results of all images of all processes.

        Returns:
            `box_ap`, `box_ap50`, `box_ap75`, and `box_ap_small`, `box_ap_medium` and `box_ap_large` of objects below 32 x 32 pixels,
            between, and above 96 x 96; with masks also `mask_ap` and so on; all from 0 to 1. A size of which there is no object is
            left out.

        Raises:
            ValueError: there was not one object.
        """
        results: dict[str, float] = {}
        found = self._of_all_processes().compute()
        for kind in self.kinds:
            prefix = f"{kind}_" if len(self.kinds) > 1 else ""
            values = {f"{KINDS[kind]}_{name}": float(found[prefix + known]) for known, name in PRECISIONS.items()}
            results |= {name: value for name, value in values.items() if value >= 0}  # -1 is COCO's for none
        if "box_ap" not in results:
            raise ValueError(
                "Not one object was evaluated: there is no annotation that counts. Check the evaluation data."
            )
        return results

    def reset(self) -> None:
        """Forget all images."""
        self._metric.reset()

    def _of_all_processes(self) -> Any:
        """A metric with what all processes have taken in."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self._metric
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, self._metric.metric_state)
        whole = self._new()
        whole.update([], [])  # so that it knows of an update
        for name in whole.metric_state:
            setattr(whole, name, [image for state in gathered for image in state[name]])
        return whole

    def _as_coco(self, side: dict[str, Any]) -> dict[str, Tensor]:
        """A prediction or a target in the types that torchmetrics takes, on the CPU."""
        types = {"scores": torch.float32, "boxes": torch.float32, "area": torch.float32}
        types |= {"labels": torch.int64, "iscrowd": torch.int64}
        types |= {"masks": torch.uint8} if "segm" in self.kinds else {}
        return {
            name: torch.as_tensor(side[name]).detach().to("cpu", kind) for name, kind in types.items() if name in side
        }


def _torchmetrics() -> Any:
    try:
        import torchmetrics.classification
        import torchmetrics.detection
    except ImportError as error:
        raise ImportError("Dense metrics need torchmetrics: `pip install 'scalekd-hf[transfer]'`.") from error
    return torchmetrics


def _require_faster_coco_eval() -> None:
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError as error:
        raise ImportError("Average precision needs faster-coco-eval: `pip install 'scalekd-hf[transfer]'`.") from error
