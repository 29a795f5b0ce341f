"""Learning rates of a backbone's layers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from typing import Any

from torch import nn
from torch.optim import Optimizer


__all__ = ["blocks_of", "rate_scales", "regroup"]

LISTS = (nn.ModuleList, nn.Sequential)
STAGES = 4  # that networks have at most: what there is more of is blocks


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network, first to last: of the modules in lists those of the most frequent class, at the coarsest level of
    lists in lists that has more of them than a network has stages; else those that there are most of."""
    levels: dict[int, list[nn.Module]] = defaultdict(list)
    _collect(network, 0, levels)
    kept = []
    for level in sorted(levels):
        classes = Counter(type(module) for module in levels[level])
        kept.append([module for module in levels[level] if type(module) is classes.most_common(1)[0][0]])
    return next((blocks for blocks in kept if len(blocks) > STAGES), max(kept, key=len, default=[]))


def _collect(module: nn.Module, level: int, levels: dict[int, list[nn.Module]]) -> None:
    for child in module.children():
        is_item = isinstance(module, LISTS) and not isinstance(child, LISTS)
        if is_item and any(True for _ in child.parameters()):
            levels[level].append(child)
        _collect(child, level + is_item, levels)


def rate_scales(
    backbone: nn.Module, new: Collection[str], layer_decay: float, scale: float
) -> dict[nn.Parameter, float]:
    """The share of the learning rate that each parameter of a backbone has.

    The last block has `layer_decay` times the head's rate, the one before it that squared, and so on; what comes before the first
    block has the lowest, and what stands between two blocks, such as a downsampling, the rate of the next one.

    Args:
        backbone: a part of a model.
        new: names of its parameters that began with fresh weights, which have the head's rate.
        layer_decay, scale: see `TransferConfig`.

    Returns:
        Shares by parameter; of those with the head's rate there are none.
    """
    depth_of = {
        parameter: depth for depth, block in enumerate(blocks_of(backbone), 1) for parameter in block.parameters()
    }
    last = max(depth_of.values(), default=0)
    scales, depth = {}, last  # what comes after the last block has its rate
    for parameter in reversed(list(backbone.parameters())):
        depth = depth_of.get(parameter, depth)
        scales[parameter] = scale * layer_decay ** (last + 1 - depth)
    for parameter in backbone.parameters():  # the stem
        if parameter in depth_of:
            break
        scales[parameter] = scale * layer_decay ** (last + 1)
    fresh = {parameter for name, parameter in backbone.named_parameters() if name in new}
    return {parameter: share for parameter, share in scales.items() if parameter not in fresh}


def regroup(optimizer: Optimizer, scales: dict[nn.Parameter, float]) -> None:
    """Divide an optimiser's groups, before its first step, so that each has one learning rate."""
    groups: list[dict[str, Any]] = []  # the first of each kind is the head's, whose rate is logged
    for group in optimizer.param_groups:
        parts: dict[float, list[Any]] = {}
        for parameter in group["params"]:
            parts.setdefault(scales.get(parameter, 1.0), []).append(parameter)
        groups += [
            group | {"params": part, "lr": group["lr"] * share} for share, part in sorted(parts.items(), reverse=True)
        ]
    optimizer.param_groups[:] = groups
