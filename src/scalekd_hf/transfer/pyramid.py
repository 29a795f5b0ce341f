"""A pyramid of maps from the one map of an isotropic network (Li et al. 2022, "Exploring plain vision transformer backbones")."""

from __future__ import annotations

import math
from collections.abc import Sequence

from timm.layers import LayerNorm2d
from torch import Tensor, nn


__all__ = ["LEVELS", "SimpleFeaturePyramid", "pyramid_strides"]

LEVELS = (4, 8, 16, 32)  # strides that heads are made for


def pyramid_strides(patch: int) -> list[float]:
    """The strides of a pyramid's maps: those of `LEVELS`, or the nearest that patches of that side (pixels) give by halving and doubling."""
    return [patch / 2.0**steps for steps in _doublings(patch)]


class SimpleFeaturePyramid(nn.Module):
    """Maps of four strides from the last map alone, by transposed convolutions and pooling (section 3 of the paper, without the
    lateral convolutions, which the heads bring).

    Args:
        dim: channels D of the map.
        patch: side in pixels of what a cell of it covers.
        levels: which of the four maps are wanted, ascending.

    Attributes:
        channels: of all four maps, D halved with each doubling of the grid.
    """

    def __init__(self, dim: int, patch: int, levels: Sequence[int] = (0, 1, 2, 3)):
        super().__init__()
        self.channels = [_width(dim, steps) for steps in _doublings(patch)]
        self.levels = nn.ModuleList(_resampling(dim, _doublings(patch)[level]) for level in levels)

    def forward(self, last: Tensor) -> list[Tensor]:
        """A map (B, D, h, w) to the wanted maps (B, C, h * 2**n, w * 2**n), finest first."""
        return [level(last) for level in self.levels]


def _doublings(patch: int) -> list[int]:
    """How often the grid is doubled for each level; halved where negative."""
    return [round(math.log2(patch)) - int(math.log2(stride)) for stride in LEVELS]


def _width(dim: int, doublings: int) -> int:
    return max(dim >> max(doublings, 0), 1)


def _resampling(dim: int, doublings: int) -> nn.Module:
    if doublings <= 0:
        size = 2**-doublings
        return nn.MaxPool2d(size, ceil_mode=True) if size > 1 else nn.Identity()
    layers: list[nn.Module] = []
    for step in range(doublings):
        before, after = _width(dim, step), _width(dim, step + 1)
        layers += [] if not step else [LayerNorm2d(before), nn.GELU()]
        layers.append(nn.ConvTranspose2d(before, after, kernel_size=2, stride=2))
    return nn.Sequential(*layers)
