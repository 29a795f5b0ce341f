"""The four projectors with dual-view feature mimicking (DFM) and teacher parameter perception (TPP).

Source: ScaleKD (arXiv 2411.06786), sections 3.2 and 3.3. For each view v, spatial and frequency:

    P_v = last_stage(CAP_penultimate,v(S_penultimate))      gradients pass through the frozen last stage
    M_v = CAP_last,v(S_last; queries = P_v)                 queries depend on the image, not detached

and both P_v and M_v are compared with the teacher's last map in view v.

`LinearHeads` are not ScaleKD: plain feature matching, to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .losses import mimicking_loss, mimicking_target, spatial_mimicking_loss
from .projector import ChannelLayerNorm, CrossAttentionProjector, LinearProjector, Stem


__all__ = ["FEATURE_TERMS", "LINEAR_TERM", "LinearHeads", "MimickingHeads"]

VIEWS = ("spatial", "frequency")
FEATURE_TERMS = ("penultimate_spatial", "penultimate_frequency", "last_spatial", "last_frequency")
LINEAR_TERM = "last_linear"


class MimickingHeads(nn.Module):
    """From student maps and the teacher's last map to the unweighted feature losses.

    Args:
        student_dims: channels (C_p, C_l) of the student's penultimate and last maps.
        student_grids: their grids ((h, w), (h, w)).
        teacher_dims: widths (D_p, D_l) of the tokens before and after the teacher's last stage.
        teacher_grids: their grids.
        num_heads: attention heads of the penultimate and of the last projectors.
        softmax_scale, stem_norm: see `CrossAttentionProjector`.
        penultimate_norm: a LayerNorm over the channels of the penultimate map, which all that follows shares.
        learned_last_queries: give the last projectors learned queries instead of the P_v, as without teacher parameter
            perception.
        remove_direct_component: of the frequency view, as published.
        stem: of the projectors, "full" as published, "separable", or "shared" by the two views of a stage.
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
        penultimate_norm: bool = False,
        learned_last_queries: bool = False,
        remove_direct_component: bool = True,
        stem: str = "full",
        terms: tuple[str, ...] = FEATURE_TERMS,
    ):
        super().__init__()
        if unknown := set(terms) - set(FEATURE_TERMS):
            raise ValueError(f"`terms` must be among {FEATURE_TERMS}, got {sorted(unknown)}.")
        self.terms = tuple(term for term in FEATURE_TERMS if term in terms)
        self.learned_last_queries = learned_last_queries
        self.removes_direct_component = {"spatial": False, "frequency": remove_direct_component}
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
                    stem=stem,
                ),
            )
        self.penultimate_norm = ChannelLayerNorm(student_dims[0]) if penultimate_norm else nn.Identity()
        self.stems = nn.ModuleDict()  # where the two views of a stage share theirs
        for stage, dim in zip(("penultimate", "last"), student_dims, strict=True):
            if stem == "shared" and any(name.startswith(stage) for name, _ in self.projectors()):
                self.stems[stage] = Stem(dim, stem_norm)

    def projectors(self) -> Iterator[tuple[str, CrossAttentionProjector]]:
        """The projectors by the names in `FEATURE_TERMS`, those that were built."""
        for name, module in self.named_children():
            if isinstance(module, CrossAttentionProjector):
                yield name, module

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
        tokens = self._penultimate_tokens(student_penultimate)
        # Before the teacher's last stage: its activations are gone when the largest gradients, these stems', are computed.
        last_maps = self._last_maps(student_last)
        perceived = self._perceive(tokens, last_stage)
        del tokens
        losses = {}
        for view in VIEWS:
            penultimate, last = f"penultimate_{view}", f"last_{view}"
            if penultimate not in self.terms and last not in self.terms:
                continue
            without = self.removes_direct_component[view]
            target = mimicking_target(teacher_last, without)
            if penultimate in self.terms:
                losses[penultimate] = mimicking_loss(perceived[view], target, without)
            if last in self.terms:
                queries = None if self.learned_last_queries else perceived[view]
                projector = getattr(self, last)
                projected = projector(last_maps[view], queries, through_stem=_runs_in_parts(projector))
                losses[last] = mimicking_loss(projected, target, without)
        return losses

    def _penultimate_tokens(self, student_map: Tensor) -> dict[str, Tensor]:
        student_map = self.penultimate_norm(student_map)
        if "penultimate" in self.stems:
            student_map = self.stems["penultimate"](student_map)
        return {view: getattr(self, f"penultimate_{view}")(student_map) for view in self._views("penultimate")}

    def _last_maps(self, student_map: Tensor) -> dict[str, Tensor]:
        """What the last projectors' stems put out, where these can run before the rest of their projectors."""
        if "last" in self.stems:
            student_map = self.stems["last"](student_map)
        projectors = {view: getattr(self, f"last_{view}") for view in self._views("last")}
        return {
            view: projector.stem(student_map) if _runs_in_parts(projector) else student_map
            for view, projector in projectors.items()
        }

    def _views(self, stage: str) -> list[str]:
        return [view for view in VIEWS if hasattr(self, f"{stage}_{view}")]

    def _perceive(self, tokens: dict[str, Tensor], last_stage: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """P_v of each view; both views pass through the teacher's last stage as one batch."""
        if not tokens:
            return {}
        perceived = last_stage(torch.cat(list(tokens.values())))
        return dict(zip(tokens, perceived.chunk(len(tokens)), strict=True))


def _runs_in_parts(projector: nn.Module) -> bool:
    """False for one that FSDP has made a unit of, by another class: its parameters are whole in its own forward alone."""
    return type(projector) is CrossAttentionProjector


class LinearHeads(nn.Module):
    """Plain feature matching, the floor for the projectors: the student's last map, projected linearly, and the teacher's.

    The loss is that of the spatial view, the squared distance of unit vectors, so that the projector is all that differs from
    ScaleKD's own term and the same weight means the same. It is N * D times the mean squared error of tokens of length 1.

    Args:
        student_dim: channels C of the student's last map.
        teacher_dim: width D of the teacher's last map.
        teacher_grid: its grid (H, W).
    """

    terms = (LINEAR_TERM,)
    removes_direct_component = MappingProxyType({"linear": False})  # of views, by the names of their terms

    def __init__(self, student_dim: int, teacher_dim: int, teacher_grid: tuple[int, int]):
        super().__init__()
        self.last_linear = LinearProjector(student_dim, teacher_dim, teacher_grid)

    def projectors(self) -> Iterator[tuple[str, LinearProjector]]:
        """The one projector, by the name of its term."""
        yield LINEAR_TERM, self.last_linear

    def forward(self, student_penultimate: Tensor, student_last: Tensor, teacher_last: Tensor, last_stage: Any) -> Any:
        """Compute the unweighted loss of `LINEAR_TERM`; arguments are those of `MimickingHeads`, the first and last unused."""
        return {LINEAR_TERM: spatial_mimicking_loss(self.last_linear(student_last), teacher_last)}
