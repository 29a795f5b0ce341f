"""MLP-Mixer-B with 14 px patches, a published student that timm has no name for.

timm's own mixers fix the patch size in their name. Importing this module registers another, so a saved student of
it loads in timm and transformers after `from scalekd_hf import mixer_b14_224`.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.mlp_mixer import MlpMixer


__all__ = ["mixer_b14_224"]

default_cfgs = generate_default_cfgs(
    {
        "mixer_b14_224.untrained": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": None,
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "stem.proj",
            "classifier": "head",
        }
    }
)


@register_model
def mixer_b14_224(pretrained: bool = False, **kwargs: Any) -> MlpMixer:
    """Mixer-B (https://arxiv.org/abs/2105.01601) on a 16x16 grid of 14 px patches at 224 px."""
    options = {"patch_size": 14, "num_blocks": 12, "embed_dim": 768, **kwargs}
    return build_model_with_cfg(MlpMixer, "mixer_b14_224", pretrained, **options)
