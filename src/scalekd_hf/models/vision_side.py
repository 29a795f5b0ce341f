"""The part of a transformers model that images pass through, as a module that takes `pixel_values` alone.

Backbones come to the Hub inside of other models: beside a text encoder, behind a random masking of patches, or behind a
processor that cuts the patches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTConfig, ViTMAEModel, ViTModel

from ..borrowed.transformers import same_source


__all__ = ["classifies", "vision_side"]


def classifies(module: Any) -> bool:
    """Whether a transformers model ends in a classifier of images."""
    return "ForImageClassification" in type(getattr(module, "cut_model", module)).__name__


def vision_side(module: PreTrainedModel) -> nn.Module:
    """The module itself, or its part that images pass through.

    Raises:
        ValueError: a model that takes more than images.
    """
    if not classifies(module) and "For" in type(module).__name__:  # what a pretraining's decoder stands on
        base: Any = module.base_model
        module = base
    if not classifies(module) and isinstance(getattr(module, "vision_model", None), PreTrainedModel):
        side: Any = module.vision_model  # beside a text encoder
        module = side
    if isinstance(module, ViTMAEModel):
        return _unmasked(module)
    return CutImages(module) if "siglip2" in type(module).__name__.lower() else module


def _unmasked(module: ViTMAEModel) -> ViTModel:
    """A masked autoencoder's encoder as the ViT that it is: it leaves no patch out and shuffles none."""
    settings = module.config.to_dict()
    known = ViTConfig().to_dict()
    config = ViTConfig(**{name: value for name, value in settings.items() if name in known and name != "model_type"})
    parameter = next(module.parameters())
    encoder: Any = ViTModel(config, add_pooling_layer=False)
    encoder = encoder.to(parameter.device, parameter.dtype)
    encoder.load_state_dict(module.state_dict())
    same_source(encoder, module)
    return encoder


class CutImages(nn.Module):
    """A SigLIP 2 encoder of patches in rows, with the cutting that its processor does.

    Attributes:
        cut_model: the encoder.
        config: of its vision side, with the `image_size` (pixels) of its own number of patches.
    """

    def __init__(self, module: PreTrainedModel):
        super().__init__()
        self.cut_model: Any = module
        self.config = getattr(module.config, "vision_config", module.config)
        self.config.image_size = round(self.config.num_patches**0.5) * self.config.patch_size

    def forward(self, pixel_values: Tensor) -> Any:
        """Images (B, 3, height, width) to the encoder's output."""
        side = self.config.patch_size
        rows, columns = pixel_values.shape[2] // side, pixel_values.shape[3] // side
        patches = pixel_values.unflatten(3, (columns, side)).unflatten(
            2, (rows, side)
        )  # (B, 3, rows, side, columns, side)
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # colours last, as the processor has them
        shapes = torch.tensor([[rows, columns]] * len(patches))  # read by the host
        mask = torch.ones(patches.shape[:2], dtype=torch.int64, device=patches.device)
        return self.cut_model(patches, pixel_attention_mask=mask, spatial_shapes=shapes)
