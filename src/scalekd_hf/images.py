"""What method, models and data share: the images that a model takes, and which labels count.

Shapes in this file: B images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


__all__ = ["IGNORED_LABEL", "INTERPOLATIONS", "PLAIN_FILTERS", "ImageSpec", "Normaliser", "counted"]

IGNORED_LABEL = -100  # of an image that does not count, as in `torch.nn.functional.cross_entropy`
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by PIL's number
PLAIN_FILTERS = ("bilinear", "bicubic")  # that can do without antialiasing
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Labels = TypeVar("Labels", bound=Any)  # a tensor, or an array of NumPy


@dataclass(frozen=True)
class ImageSpec:
    """The images that a model was made for: size (height, width) in pixels, normalisation, resizing, evaluation crop."""

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    antialias: bool = True
    crop_mode: str = "center"  # timm's: "squash" resizes without keeping the shape, "border" fills it up

    def updated(self, **changes: Any) -> ImageSpec:
        """A copy with the changes that are not None; an int `size` means a square."""
        changes = {name: value for name, value in changes.items() if value is not None}
        if isinstance(changes.get("size"), int):
            changes["size"] = (changes["size"], changes["size"])
        tupled: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
        return replace(self, **tupled)


class Normaliser(nn.Module):
    """Normalises images for the student; renormalises and resizes them for the teacher.

    Args:
        student: the images that the student takes.
        teacher: those that the teacher takes; None without one.
    """

    def __init__(self, student: ImageSpec, teacher: ImageSpec | None = None):
        super().__init__()
        self.student, self.teacher = student, teacher or student
        self.same_values = self.student.mean == self.teacher.mean and self.student.std == self.teacher.std
        self.resizes = self.student.size != self.teacher.size
        mean_s, std_s, mean_t, std_t = (
            torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
            for values in (student.mean, student.std, self.teacher.mean, self.teacher.std)
        )
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", std_s / std_t, persistent=False)
        self.register_buffer("shift", (mean_s - mean_t) / std_t, persistent=False)
        # No buffers: they stay in float32 when the model is evaluated in half precision.
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def for_student(self, images: Tensor) -> Tensor:
        """Pixels (B, 3, height, width) as uint8 to what the student takes, in float32; floats are taken as normalised."""
        if images.dtype != torch.uint8:
            return images
        if images.device not in self._on_device:
            values = (self.student.mean, self.student.std)
            mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) for value in values)
            self._on_device[images.device] = (255 * mean, 255 * std)
        mean, std = self._on_device[images.device]
        return images.float().sub_(mean).div_(std)

    @torch.no_grad()
    def for_teacher(self, pixel_values: Tensor) -> Tensor:
        """What the student takes, (B, 3, height, width), to what the teacher takes, in the teacher's size."""
        if not self.same_values:
            pixel_values = pixel_values * self.scale + self.shift
        if self.resizes:
            size = self.teacher.size
            pixel_values = F.interpolate(pixel_values, size, mode="bicubic", antialias=True, align_corners=False)
        return pixel_values


def counted(labels: Labels) -> Labels:
    """Which images count: (B,) booleans for class indices (B,), or for soft labels (B, K) where a blank is all ignored."""
    counts = labels != IGNORED_LABEL
    return counts.all(1) if labels.ndim == 2 else counts
