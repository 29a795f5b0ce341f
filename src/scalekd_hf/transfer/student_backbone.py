"""The backbone class for students that no class of transformers rebuilds exactly, with a configuration that names no folder.

Shapes in this file: B images of H x W pixels.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_BACKBONE_MAPPING,
    AutoBackbone,
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from ..models import mixers  # noqa: F401  registers a mixer by its name
from .pyramid import SimpleFeaturePyramid


__all__ = ["StudentBackbone", "StudentBackboneConfig"]


class StudentBackboneConfig(BackboneConfigMixin, PreTrainedConfig):
    """What rebuilds a student as a backbone anywhere.

    Attributes:
        library: "timm" or "transformers".
        architecture: timm's name of the model, or the `model_type` of transformers.
        model_args: arguments of `timm.create_model`, or the values of the transformers configuration.
        strides: of all stages, in pixels; `channels` are theirs.
        stages: the numbers by which the library knows them.
        patch: side of the patches, in pixels, that images are filled up to whole ones of; None for networks of any size.
        pyramid: the network has one stride only, and gets a pyramid: `strides` and `channels` are that one's.
        freeze_batch_norm_2d: BatchNorm keeps its statistics and weights, as detectors have it.
    """

    model_type = "scalekd_backbone"

    library: str = "timm"
    architecture: str = ""
    model_args: dict[str, Any] | None = None
    strides: list[float] | None = None
    channels: list[int] | None = None
    stages: list[int] | None = None
    patch: int | None = None
    pyramid: bool = False
    freeze_batch_norm_2d: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.stage_names = [f"stage{number}" for number in range(1, len(self.strides or [4]) + 1)]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)


class StudentBackbone(BackboneMixin, PreTrainedModel):
    """A student of timm or transformers whose maps come out as (B, C, H / stride, W / stride)."""

    config: StudentBackboneConfig
    config_class = StudentBackboneConfig
    main_input_name = "pixel_values"
    has_attentions = False

    def __init__(self, config: StudentBackboneConfig):
        super().__init__(config)
        self.num_features = list(config.channels or [])
        network = _network(config)
        self.network: Any = freeze_batch_norm_2d(network) if config.freeze_batch_norm_2d else network
        self.pyramid: SimpleFeaturePyramid | None = None
        if config.pyramid:
            dim = max(config.channels or [1])  # a pyramid's coarsest map is as wide as the network's
            self.pyramid = SimpleFeaturePyramid(dim, config.patch or 1, config.out_indices)
        PreTrainedModel.post_init(
            self
        )  # the mixin's would have a network inside record its states twice, and take others for maps

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The libraries have initialised their modules; what is not saved with them is computed once more after loading."""
        initialise: Any = getattr(module, "init_non_persistent_buffers", None)
        if initialise is not None:
            initialise()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BackboneOutput:  # type: ignore[override]
        """Normalised images (B, 3, H, W) to the maps of `config.out_indices`, finest first.

        Raises:
            AssertionError, RuntimeError: a network of one size only gets images of another.
        """
        config: Any = self.config
        height, width = pixel_values.shape[-2:]
        if config.patch is not None:  # zeros at right and bottom
            pixel_values = F.pad(pixel_values, (0, -width % config.patch, 0, -height % config.patch))
        maps: Any = self.network(pixel_values)
        maps = getattr(maps, "feature_maps", maps)
        if self.pyramid is not None:
            maps = self.pyramid(maps[-1])
        strides = [config.strides[index] for index in config.out_indices]
        cropped = [
            x[..., : math.ceil(height / stride), : math.ceil(width / stride)]
            for x, stride in zip(maps, strides, strict=True)
        ]
        return BackboneOutput(feature_maps=tuple(cropped))


def _network(config: StudentBackboneConfig) -> Any:
    stages: Any = config.stages or [-1]
    indices = stages[-1:] if config.pyramid else [stages[index] for index in config.out_indices]
    arguments = dict(config.model_args or {})
    if config.library == "timm":
        return timm.create_model(config.architecture, features_only=True, out_indices=indices, **arguments)
    model = AutoConfig.for_model(config.architecture, **arguments)
    if type(model) in MODEL_FOR_BACKBONE_MAPPING:
        model.out_indices = indices
        return AutoBackbone.from_config(model)
    return HiddenMaps(model, indices, config.patch)


class HiddenMaps(nn.Module):
    """Hidden states of a transformers model that has no backbone class, as maps (B, C, h, w).

    Args:
        config: of the model.
        indices: which of its hidden states.
        patch: side in pixels of its patches, where its states are tokens.
    """

    def __init__(self, config: Any, indices: list[int], patch: int | None):
        super().__init__()
        self.model: Any = _without_pooler(config)
        self.indices, self.patch = indices, patch
        resampled = "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if resampled else {}

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        states = self.model(pixel_values, output_hidden_states=True, **self.options).hidden_states
        grid = tuple(side // (self.patch or 1) for side in pixel_values.shape[-2:])
        return [_as_map(states[index], grid) for index in self.indices]


def _without_pooler(config: Any) -> Any:
    try:
        return AutoModel.from_config(config, add_pooling_layer=False)
    except TypeError:  # most have none to leave out
        return AutoModel.from_config(config)


def _as_map(state: Tensor, grid: tuple[int, ...]) -> Tensor:
    """A map as it is, or the last h * w of tokens (B, N, C), which stand after class tokens and registers, as a map (B, C, h, w)."""
    return state if state.ndim == 4 else state[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)


AutoConfig.register(StudentBackboneConfig.model_type, StudentBackboneConfig)
AutoBackbone.register(StudentBackboneConfig, StudentBackbone)
