"""Two published students of the authors' that timm cannot build exactly as they are.

Importing this module registers them, so that a saved student of one loads in timm and transformers after
`from scalekd_hf import vit_base_patch14_224_openmmlab`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


__all__ = ["eva02_small_patch14_336_openmmlab", "vit_base_patch14_224_openmmlab"]

COMMON = {
    "num_classes": 1000,
    "pool_size": None,
    "interpolation": "bicubic",
    "fixed_input_size": True,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
default_cfgs = generate_default_cfgs(
    {
        "vit_base_patch14_224_openmmlab.untrained": {**COMMON, "input_size": (3, 224, 224), "crop_pct": 0.875},
        "eva02_small_patch14_336_openmmlab.untrained": {**COMMON, "input_size": (3, 336, 336), "crop_pct": 1.0},
    }
)


class NormedTwice(VisionTransformer):
    """A ViT with a LayerNorm before the mean over its tokens and another after it."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.fc_norm = nn.LayerNorm(self.num_features, eps=1e-6)


class _Rotary(nn.Module):
    """The rotary positions of mmpretrain's `RotaryEmbeddingFast`: sines and cosines (h * w, 2 * D) of tokens of D channels a head.

    Of the D channels the first half turns by the row, the second by the column. Neighbouring channels, which are turned together,
    have two frequencies, where those of EVA-02 have one.
    """

    def __init__(self, channels: int, grid: tuple[int, int]):
        super().__init__()
        self.channels, self.grid = channels, grid
        self.table: Tensor
        self.register_buffer("table", torch.empty(grid[0] * grid[1], 2 * channels), persistent=False)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Fill in the table, also after a model was made without memory: transformers calls this by its name."""
        half = self.channels // 2
        frequencies = 10000.0 ** -(torch.arange(0, half, 2, device=self.table.device).float() / half)
        rows, columns = (
            torch.outer(torch.arange(side, device=self.table.device) / side * half, frequencies).repeat(1, 2)
            for side in self.grid
        )
        angles = torch.cat((rows.repeat_interleave(self.grid[1], 0), columns.repeat(self.grid[0], 1)), dim=-1)
        self.table.copy_(torch.cat((angles.sin(), angles.cos()), dim=-1))

    def get_embed(self, shape: Any = None) -> Tensor:
        """The table, as timm asks for it."""
        return self.table


class RotatedEva(Eva):
    """EVA-02 with these rotary positions."""

    def __init__(self, *, embed_dim: int, num_heads: int, **options: Any):
        super().__init__(embed_dim=embed_dim, num_heads=num_heads, **options)
        self.rope = _Rotary(embed_dim // num_heads, self.patch_embed.grid_size)


@register_model
def vit_base_patch14_224_openmmlab(pretrained: bool = False, **kwargs: Any) -> NormedTwice:
    """ViT-B/14 without a class token, with a LayerNorm before the mean over its tokens and another after it.

    OpenMMLab builds it with `avg_token`; it is the student of the pair `eva_l_to_vit_b14` as the authors ran it.
    """
    options: dict[str, Any] = {"patch_size": 14, "embed_dim": 768, "depth": 12, "num_heads": 12, "class_token": False}
    options |= {"global_pool": "avg", "fc_norm": False, **kwargs}
    name = "vit_base_patch14_224_openmmlab"
    return build_model_with_cfg(NormedTwice, name, pretrained, **options)


@register_model
def eva02_small_patch14_336_openmmlab(pretrained: bool = False, **kwargs: Any) -> RotatedEva:
    """EVA-02-S/14 at 336 px as OpenMMLab builds it, and the authors trained it.

    It differs from EVA-02 in its rotary positions, in a bias of the attention's keys, and in the epsilon of its LayerNorms.
    """
    options: dict[str, Any] = {
        "img_size": 336,
        "patch_size": 14,
        "embed_dim": 384,
        "depth": 12,
        "num_heads": 6,
        "mlp_ratio": 8 / 3,
    }
    options |= {"swiglu_mlp": True, "scale_mlp": True, "attn_type": "rope", "scale_attn_inner": False}
    options |= {"global_pool": "avg", "norm_layer": partial(nn.LayerNorm, eps=1e-5), **kwargs}
    name = "eva02_small_patch14_336_openmmlab"
    return build_model_with_cfg(RotatedEva, name, pretrained, **options)
