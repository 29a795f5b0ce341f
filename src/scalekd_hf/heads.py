"""The four projectors with dual-view feature mimicking (DFM) and teacher parameter perception (TPP).

Source: ScaleKD (arXiv 2411.06786), sections 3.2 and 3.3. For each view v, spatial and frequency:

    P_v = last_stage(CAP_penultimate,v(S_penultimate))      gradients pass through the frozen last stage
    M_v = CAP_last,v(S_last; queries = P_v)                 queries depend on the image, not detached

and both P_v and M_v are compared with the teacher's last map in view v.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .losses import frequency_mimicking_loss, spatial_mimicking_loss
from .projector import CrossAttentionProjector


__all__ = ["FEATURE_TERMS", "MimickingHeads"]

VIEW_LOSSES = {"spatial": spatial_mimicking_loss, "frequency": frequency_mimicking_loss}
FEATURE_TERMS = ("penultimate_spatial", "penultimate_frequency", "last_spatial", "last_frequency")


class MimickingHeads(nn.Module):
    """From student maps and the teacher's last map to the unweighted feature losses.

    Args:
        student_dims: channels (C_p, C_l) of the student's penultimate and last maps.
        student_grids: their grids ((h, w), (h, w)).
        teacher_dims: widths (D_p, D_l) of the tokens before and after the teacher's last stage.
        teacher_grids: their grids.
        num_heads: attention heads of the penultimate and of the last projectors.
        softmax_scale, stem_norm: see `CrossAttentionProjector`.
        learned_last_queries: give the last projectors learned queries instead of the P_v, as the
            published 100-epoch Swin-S to ResNet-50 run does (no teacher parameter perception there).
        terms: the losses to compute, out of `FEATURE_TERMS`. Projectors that no loss needs are not
            built: under DDP a parameter without a gradient is an error.
    """

    def __init__(
        self,
        student_dims: tuple[int, int],
        student_grids: tuple[tuple[int, int], tuple[int, int]],
        teacher_dims: tuple[int, int],
        teacher_grids: tuple[tuple[int, int], tuple[int, int]],
        num_heads: tuple[int, int],
        softmax_scale: float = 5.0,
        stem_norm: str = "batch",
        learned_last_queries: bool = False,
        terms: tuple[str, ...] = FEATURE_TERMS,
    ):
        super().__init__()
        if unknown := set(terms) - set(FEATURE_TERMS):
            raise ValueError(f"`terms` must be among {FEATURE_TERMS}, got {sorted(unknown)}.")
        self.terms = tuple(term for term in FEATURE_TERMS if term in terms)
        self.learned_last_queries = learned_last_queries
        for name in FEATURE_TERMS:
            stage, view = name.split("_")
            is_last = stage == "last"
            if name not in terms and (is_last or learned_last_queries or f"last_{view}" not in terms):
                continue
            self.add_module(
                name,
                CrossAttentionProjector(
                    student_dims[is_last],
                    teacher_dims[is_last],
                    student_grids[is_last],
                    teacher_grids[is_last],
                    num_heads[is_last],
                    softmax_scale=softmax_scale,
                    learned_queries=learned_last_queries or not is_last,
                    stem_norm=stem_norm,
                ),
            )

    def forward(
        self,
        student_penultimate: Tensor,
        student_last: Tensor,
        teacher_last: Tensor,
        last_stage: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """Compute the unweighted losses.

        Args:
            student_penultimate, student_last: student maps (B, C, h, w).
            teacher_last: the teacher's last map (B, D, H, W), without gradient.
            last_stage: the teacher's frozen last stage, tokens (B, N_p, D_p) to (B, N, D).

        Returns:
            A scalar for each name in `terms`, a sum over tokens and a mean over images.
        """
        losses = {}
        for view, view_loss in VIEW_LOSSES.items():
            penultimate, last = f"penultimate_{view}", f"last_{view}"
            perceived: Any = None
            if hasattr(self, penultimate):
                perceived = last_stage(getattr(self, penultimate)(student_penultimate))
            if penultimate in self.terms:
                losses[penultimate] = view_loss(perceived, teacher_last)
            if last in self.terms:
                queries = None if self.learned_last_queries else perceived
                losses[last] = view_loss(getattr(self, last)(student_last, queries), teacher_last)
        return losses
