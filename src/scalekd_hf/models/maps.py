"""How outputs of modules are read as maps of the image: layout, grid, and what stands before and between the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


__all__ = ["Tap", "all_tensors", "first_tensor", "map_tensors", "read_layout"]

MAX_PREFIX_TOKENS = 16


@dataclass(frozen=True)
class Tap:
    """A module whose output is tapped, and how to read it as a map (B, C, h, w)."""

    module: str
    layout: str  # "NCHW", "NHWC" or "tokens"
    dim: int
    grid: tuple[int, int]
    prefix: int = 0  # tokens before the patches
    index: int = 0  # of the map among the tensors that the module puts out
    order: Callable[[Tensor], Tensor] | None = None  # brings tokens (B, h w, C) into the image's order, (B, h, w, C)

    def as_map(self, output: Any) -> Tensor:
        """The module's output as (B, C, h, w)."""
        x = all_tensors(output)[self.index]
        if self.layout == "NHWC":
            return x.permute(0, 3, 1, 2)
        if self.layout == "tokens":
            x = x[:, self.prefix :]
            return (
                x.transpose(1, 2).unflatten(2, self.grid) if self.order is None else self.order(x).permute(0, 3, 1, 2)
            )
        return x

    def as_tokens(self, output: Any) -> Tensor:
        """The module's output as (B, N, C) in the image's order, or with its prefix (B, P + N, C)."""
        x = all_tensors(output)[self.index]
        if self.layout == "tokens":
            return x if self.order is None else self.order(x[:, self.prefix :]).flatten(1, 2)
        return x.flatten(2).transpose(1, 2) if self.layout == "NCHW" else x.flatten(1, 2)

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, C), in the module's order, as the module puts them out."""
        if self.layout == "tokens":
            return tokens
        x = tokens.unflatten(1, self.grid)
        return x.permute(0, 3, 1, 2) if self.layout == "NCHW" else x

    def places(self) -> Tensor | None:
        """The place in the image's order of each token of the module, (N,); None where they are the same."""
        if self.order is None:
            return None
        seen = self.order(torch.arange(self.grid[0] * self.grid[1])[None, :, None]).flatten()
        return seen.argsort()


def is_single(x: Tensor) -> bool:
    return x.ndim == 4 and (x.shape[2:] == (1, 1) or x.shape[1:3] == (1, 1))


def read_layout(
    name: str, x: Tensor, size: tuple[int, int], grids: list[tuple[int, int]], channels_last: bool
) -> Tap | None:
    """How to read an output as a map with the image's aspect ratio, or as a single cell; None if it is neither.

    Args:
        name: the module.
        x: its output for one image.
        size: (height, width) of the image.
        grids: of the maps seen so far; those of this one are added.
        channels_last: its library says that the model's maps are (B, h, w, C).
    """
    height, width = size
    if is_single(x):
        return (
            Tap(name, "NCHW", x.shape[1], (1, 1)) if x.shape[2:] == (1, 1) else Tap(name, "NHWC", x.shape[3], (1, 1))
        )

    def fits(h: int, w: int) -> bool:
        return h * w > 1 and abs(h * width - w * height) <= max(height, width) and h <= height and w <= width

    if x.ndim == 4:
        nchw, nhwc = fits(*x.shape[2:]), fits(*x.shape[1:3])
        if nhwc and (not nchw or channels_last):
            return Tap(name, "NHWC", x.shape[3], (x.shape[1], x.shape[2]))
        if not nchw:
            return None
        grid = (x.shape[2], x.shape[3])
        grids.append(grid)
        return Tap(name, "NCHW", x.shape[1], grid)
    if x.ndim == 3:
        for grid in _token_grids(x.shape[1], (height, width), grids):
            prefix = x.shape[1] - grid[0] * grid[1]
            if fits(*grid):
                return Tap(name, "tokens", x.shape[2], grid, prefix)
    return None


def _token_grids(tokens: int, size: tuple[int, int], grids: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Grids that `tokens` may stand for: one seen as a map earlier (the patch embedding), else of the image's shape."""
    for h, w in reversed(grids):
        if 0 <= tokens - h * w <= MAX_PREFIX_TOKENS and 2 * h * w >= tokens - 1:
            yield h, w
    for prefix in range(min(MAX_PREFIX_TOKENS, tokens)):
        h = round(((tokens - prefix) * size[0] / size[1]) ** 0.5)
        if h and (tokens - prefix) % h == 0 and abs(h * size[1] - (tokens - prefix) // h * size[0]) < max(size):
            yield h, (tokens - prefix) // h


def first_tensor(output: Any) -> Any:
    """The tensor of a module's output: itself, or the first of a tuple, list or model output."""
    while isinstance(output, (tuple, list, dict)) and len(output):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def map_tensors(change: Callable[[Any], Any], output: Any) -> Any:
    """A module's output with everything in it that is no container changed."""
    if isinstance(output, dict):  # model outputs are some, too
        return type(output)(**{name: map_tensors(change, part) for name, part in output.items()})
    if isinstance(output, (tuple, list)) and not isinstance(output, torch.Size):
        parts = [map_tensors(change, part) for part in output]
        return type(output)(parts) if type(output) in (tuple, list) else type(output)(*parts)  # a named tuple
    return change(output)


def all_tensors(output: Any) -> list[Tensor]:
    """The tensors of a module's output, in order, those in tuples, lists and model outputs as well."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for part in parts for tensor in all_tensors(part)]
