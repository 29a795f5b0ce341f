"""What timm and transformers say themselves of a model's stages: where they end, and what one of their cells covers."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedModel

from ..borrowed.transformers import whole_models


__all__ = ["Stage", "raster_order", "stated_stages"]

logger = logging.getLogger(__name__)

ROUNDING = 2**0.5  # between the stride that is stated and the one that borders and remainders leave


@dataclass(frozen=True)
class Stage:
    """A stage as its library names it, the side in pixels that a cell of its map covers, and the map's channels."""

    name: str
    stride: float
    width: int

    def fits(self, grid: tuple[int, int], size: tuple[int, int]) -> bool:
        """Whether a grid (h, w) is this stage's for images of that size (height, width)."""
        return all(
            cells == math.ceil(side / self.stride) or 1 / ROUNDING < side / cells / self.stride < ROUNDING
            for cells, side in zip(grid, size, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.name} (stride {self.stride:.3g})"


def stated_stages(model: nn.Module, size: tuple[int, int]) -> list[Stage]:
    """The stages, first to last, that a model's library states.

    timm states all of them, and by the modules' names; transformers the last two of its backbones, by names of its own.

    Args:
        model: a classifier of timm or transformers.
        size: (height, width) of its images.

    Returns:
        An empty list where the library says nothing.
    """
    if isinstance(model, PreTrainedModel):
        return _backbone_stages(model.config, size)
    said: Any = getattr(model, "feature_info", None) or []
    stages = [Stage(entry["module"], entry["reduction"], entry["num_chs"]) for entry in said]
    return stages if len({stage.name for stage in stages}) == len(stages) else []  # else branches side by side


@whole_models()
def _backbone_stages(config: Any, size: tuple[int, int]) -> list[Stage]:
    names = list(getattr(config, "stage_names", None) or [])[-2:]
    if len(names) < 2:
        return []
    try:
        saved = json.loads(config.to_json_string())  # with lists for tuples, as the backbones want them
        asked = type(config)(**{**saved, "out_features": names, "out_indices": None})
        with torch.device("meta"), torch.no_grad():
            maps = AutoBackbone.from_config(asked).eval()(torch.zeros(1, 3, *size)).feature_maps
    except Exception as error:  # of all kinds: a backbone that does not run says nothing
        logger.debug("The backbone of %s does not run: %s", type(config).__name__, error)
        return []
    return [Stage(name, size[0] / x.shape[2], x.shape[1]) for name, x in zip(names, maps, strict=True)]


def raster_order(model: nn.Module, grid: tuple[int, int]) -> Callable[[Tensor], Tensor] | None:
    """What brings tokens (B, h w, C) into the order of the image, as (B, h, w, C); None where they are in it.

    Hiera keeps the tokens of a window together, and has the way back with it.
    """
    for module in model.modules():
        schedule = getattr(module, "schedule", None)
        reroll = getattr(module, "reroll", module)
        for index, (strides, size) in schedule.items() if isinstance(schedule, dict) else ():
            if tuple(size) == tuple(grid) and strides:
                return lambda tokens: reroll(tokens, index)  # noqa: B023  leaves the loop here
    return None
