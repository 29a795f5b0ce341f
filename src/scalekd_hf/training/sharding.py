"""A teacher whose parameters are kept in parts, for those that are too large for each GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ..models.teachers import Teacher


__all__ = ["shard_fsdp2", "shard_zero3"]

LISTS = (nn.ModuleList, nn.Sequential)


def shard_fsdp2(teacher: Teacher, device: torch.device) -> None:
    """Divide each block's parameters among all processes; a block fetches the rest when it runs, also backwards.

    Every process must call it, and must from then on run the teacher as often as the others.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in _blocks(teacher.model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)


def shard_zero3(teacher: Teacher, settings: dict[str, Any]) -> None:
    """The same with DeepSpeed, in an engine of the teacher's own that writes no checkpoints.

    Args:
        teacher: on the device that it is to run on.
        settings: `zero_optimization` of the run's configuration.
    """
    import deepspeed

    names = [name for name in settings if "param" in name or name == "memory_efficient_linear"]  # the latter is global
    kept = {name: settings[name] for name in names if settings[name] != "auto"}
    zero = {"stage": 3, **{name: value for name, value in kept.items() if not name.startswith("offload")}}
    config = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1}
    deepspeed.initialize(model=teacher.model, config=config)
    teacher.requires_grad_(False)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The smallest repeated parts: children of lists that do not themselves keep most of their parameters in lists.

    Models without lists, such as RegNet, are divided at their children.
    """
    children = [child for parent in model.modules() if isinstance(parent, LISTS) for child in parent]
    blocks = [child for child in children if not isinstance(child, LISTS) and 2 * _in_lists(child) <= _size(child)]
    inner = {module for block in blocks for module in block.modules() if module is not block}
    blocks = [block for block in blocks if block not in inner and _size(block)]
    return blocks or [child for child in model.children() if _size(child)]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _in_lists(module: nn.Module) -> int:
    lists = [inner for inner in module.modules() if isinstance(inner, LISTS)]
    kept = {parameter for inner in lists for parameter in inner.parameters()}
    return sum(parameter.numel() for parameter in kept)
