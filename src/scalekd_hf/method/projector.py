"""The cross attention projector (CAP): from a student's feature map to teacher-like tokens.

Source: ScaleKD, Fan et al., NeurIPS 2024 (arXiv 2411.06786), section 3.1. The student's map takes
the place of keys and values; the queries, one for each cell of the teacher's grid, decide
where the teacher-like tokens stand, so that grids and widths of the two models are free to differ.

Shapes in this file: B images, C student channels, h x w student grid, N = H*W teacher cells,
D teacher channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


__all__ = [
    "PROJECTORS",
    "STEMS",
    "STEM_NORMS",
    "ChannelLayerNorm",
    "CrossAttentionProjector",
    "LinearProjector",
    "Stem",
]

PROJECTORS = ("cross_attention", "linear")
STEM_NORMS = ("batch", "layer")
STEMS = ("full", "shared", "separable")


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Stem(nn.Module):
    """3x3 convolution that keeps the channels, a norm and a ReLU: (B, C, h, w) to (B, C, h, w).

    The separable one is depthwise, then 1x1: a ninth of the work, and not the paper's.
    """

    def __init__(self, dim: int, norm: str, separable: bool = False):
        super().__init__()
        self.conv: nn.Module = nn.Conv2d(dim, dim, kernel_size=3, padding=1)
        if separable:
            depthwise = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False)
            self.conv = nn.Sequential(depthwise, nn.Conv2d(dim, dim, kernel_size=1))
        self.norm = nn.BatchNorm2d(dim) if norm == "batch" else ChannelLayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class CrossAttention(nn.Module):
    """Multi-head cross attention, no residual and no dropout: (B, N, D) and (B, h*w, C) to (B, N, D)."""

    def __init__(self, dim: int, context_dim: int, num_heads: int, softmax_scale: float):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 * softmax_scale
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(context_dim, dim)
        self.v = nn.Linear(context_dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, tokens, D/heads)
            for x in (self.q(queries), self.k(context), self.v(context))
        )
        # Learned queries are the same for every image; copied, as not every fused kernel takes a stride of 0.
        if len(q) != len(k):
            q = q.repeat(len(k), 1, 1, 1)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # torch's fused kernel takes 3 times as long there
            out = torch.softmax((q * self.scale) @ k.transpose(-2, -1), dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a ReLU between, hidden width 4D: (..., D) to (..., D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


def as_multiplied(x: Tensor) -> Tensor:
    """In the precision that autocast gives to products."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


class CrossAttentionProjector(nn.Module):
    """Projects a student map onto the teacher's grid and width with one cross attention block.

    Args:
        student_dim: channels C of the student map.
        teacher_dim: channels D of the teacher tokens.
        student_grid: (h, w) of the student map.
        teacher_grid: (H, W) of the teacher tokens; N = H * W.
        num_heads: attention heads; must divide `teacher_dim`. Published: 16 / 24 for Swin-L
            and ResNet-50 (penultimate / last stage).
        softmax_scale: multiplies the usual head_dim^-0.5. Published: 5 in most pairs.
        learned_queries: own a query per cell of the teacher's grid. Otherwise `forward` needs
            `queries`, as in teacher parameter perception (section 3.3).
        stem_norm: "batch" (BatchNorm2d) or "layer" (LayerNorm over channels, the Swin-T pair).
        stem: "full", as published; "separable"; or "shared", none: the map given has been through one.

    Raises:
        ValueError: heads that do not divide the width, a size below 1, an unknown norm or stem.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        student_grid: tuple[int, int],
        teacher_grid: tuple[int, int],
        num_heads: int,
        softmax_scale: float = 5.0,
        learned_queries: bool = True,
        stem_norm: str = "batch",
        stem: str = "full",
    ):
        super().__init__()
        if num_heads < 1 or teacher_dim % num_heads:
            raise ValueError(
                f"`num_heads` must divide the teacher's width: got {num_heads} heads for {teacher_dim} channels. "
                f"Choose from {[n for n in range(1, teacher_dim + 1) if teacher_dim % n == 0]}."
            )
        if stem_norm not in STEM_NORMS:
            raise ValueError(f"`stem_norm` must be one of {STEM_NORMS}, got {stem_norm!r}.")
        if stem not in STEMS:
            raise ValueError(f"`stem` must be one of {STEMS}, got {stem!r}.")
        if not softmax_scale > 0:
            raise ValueError(f"`softmax_scale` must be positive, got {softmax_scale}.")
        self.student_grid = tuple(student_grid)
        self.teacher_grid = tuple(teacher_grid)
        self.stem: nn.Module = nn.Identity()
        if stem != "shared":
            self.stem = Stem(student_dim, stem_norm, stem == "separable")
        self.pos_embed = nn.Parameter(torch.empty(1, student_dim, *self.student_grid))
        num_queries = self.teacher_grid[0] * self.teacher_grid[1]
        self.queries = nn.Parameter(torch.empty(num_queries, teacher_dim)) if learned_queries else None
        self.query_proj = nn.Linear(teacher_dim, teacher_dim)
        self.attn = CrossAttention(teacher_dim, student_dim, num_heads, softmax_scale)
        self.norm = nn.LayerNorm(teacher_dim)
        self.mlp = Mlp(teacher_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Position embedding from a truncated normal (std 0.02), queries from a standard normal."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.queries is not None:
            nn.init.normal_(self.queries)

    def forward(self, student_map: Tensor, queries: Tensor | None = None, through_stem: bool = False) -> Tensor:
        """Compute teacher-like tokens (B, N, D).

        Args:
            student_map: (B, C, h, w).
            queries: (B, N, D), where none are learned.
            through_stem: whether the map has been through `stem` already.

        Raises:
            ValueError: a map of another grid, queries missing or given beside learned ones.
        """
        if tuple(student_map.shape[-2:]) != self.student_grid:
            raise ValueError(
                f"`student_map` has the grid {tuple(student_map.shape[-2:])}, but this projector was built for "
                f"{self.student_grid}. Images must keep the size the models were inspected with."
            )
        if (queries is None) == (self.queries is None):
            raise ValueError(
                "`queries` must be given exactly when the projector has no learned ones: "
                f"learned_queries={self.queries is not None}, queries given: {queries is not None}."
            )
        if not through_stem:
            student_map = self.stem(student_map)
        context = (student_map + self.pos_embed).flatten(2).transpose(1, 2)  # (B, h*w, C)
        context = as_multiplied(context).contiguous()  # once, where keys and values would each keep a copy
        # Learned queries are projected once, (1, N, D), not for each image.
        given = self.queries[None] if self.queries is not None else queries
        tokens = self.norm(self.attn(F.relu(self.query_proj(given)), context))
        return tokens + self.mlp(tokens)


class LinearProjector(nn.Module):
    """Projects a student map onto the teacher's grid and width with one linear layer: not the paper's, to compare with.

    A 1x1 convolution and bilinear resizing, which may change places. The map is resized first, without antialiasing, so that
    it may have any grid.

    Args:
        student_dim: channels C of the student map.
        teacher_dim: channels D of the teacher tokens.
        teacher_grid: (H, W) of the teacher tokens; N = H * W.
    """

    def __init__(self, student_dim: int, teacher_dim: int, teacher_grid: tuple[int, int]):
        super().__init__()
        self.teacher_grid = tuple(teacher_grid)
        self.linear = nn.Linear(student_dim, teacher_dim)

    def forward(self, student_map: Tensor) -> Tensor:
        """Compute teacher-like tokens: (B, C, h, w) to (B, N, D)."""
        resized = F.interpolate(student_map, self.teacher_grid, mode="bilinear", align_corners=False)
        return self.linear(resized.flatten(2).transpose(1, 2))
