"""What the method asks of a student and of a teacher, whatever library they come from.

Shapes in this file: B images, K classes, N_p and N tokens before and after the teacher's last stage.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from ..images import ImageSpec


__all__ = ["StudentModel", "TeacherModel"]


class StudentModel(Protocol):
    """A network whose penultimate and last maps can be seen; a `torch.nn.Module`.

    `num_labels` is 0 of a backbone, which has no classifier.
    """

    spec: ImageSpec
    num_labels: int
    labels: list[str] | None

    @property
    def taps(self) -> Any:
        """Where the two maps are taken; reading it makes the network ready to give them."""

    def __call__(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, height, width) to the penultimate map, the last map (B, C, h, w each) and logits (B, K).

        Of a backbone the third is its features (B, C).
        """

    def classify(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 3, height, width) to logits (B, K)."""

    def features(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 3, height, width) to pooled features (B, C), of a backbone."""


class TeacherModel(Protocol):
    """A frozen network with a last stage that runs on its own; a `torch.nn.Module`."""

    spec: ImageSpec
    num_labels: int
    labels: list[str] | None

    def __call__(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, height, width) to the last map (B, D, H, W) and logits (B, K), None without a head."""

    def last_stage(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N_p, D_p) to (B, N, D); gradients pass through."""
