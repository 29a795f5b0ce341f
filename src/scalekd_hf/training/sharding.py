"""Parameters in parts: a teacher that is too large for each GPU, and whole tensors of what an engine has divided."""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer

from ..models.teachers import Teacher
from .config import ScaleKDConfig


__all__ = [
    "check_engine",
    "check_untrained",
    "engine_runs",
    "full_state",
    "place_teacher",
    "shard_fsdp2",
    "shard_zero3",
]

LISTS = (nn.ModuleList, nn.Sequential)
PER_TENSOR_OPTIMIZERS = ("lamb", "lars", "larc", "adafactor", "muon", "nlamb", "nlars", "fused")


def check_engine(accelerator: Accelerator, args: ScaleKDConfig) -> None:
    """Refuse what would fail, or be another method, under DeepSpeed or FSDP.

    Raises:
        ValueError: `shard_teacher` without FSDP2 or ZeRO-3, or an optimiser that DeepSpeed's flat parts change.
    """
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    fsdp = accelerator.distributed_type == DistributedType.FSDP
    state = accelerator.state
    if args.shard_teacher and not (
        (deepspeed and state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"] == 3)
        or (fsdp and state.fsdp_plugin.fsdp_version == 2)
    ):
        raise ValueError("`shard_teacher` needs FSDP2 or DeepSpeed ZeRO-3: launch with one of them, or leave it out.")
    if deepspeed and str(args.timm_optim).startswith(PER_TENSOR_OPTIMIZERS):
        raise ValueError(
            f"`timm_optim` {args.timm_optim!r} scales steps tensor by tensor, but DeepSpeed gives it flat parts: it "
            "would be another optimiser. Use DDP, or another optimiser."
        )


def engine_runs(trainer: Trainer) -> bool:
    """Whether DeepSpeed or FSDP holds the parameters: from the start of training on, not in an evaluation alone."""
    return trainer.deepspeed is not None or isinstance(trainer.model, (FSDPModule, FullyShardedDataParallel))


def check_untrained(trainer: Trainer) -> None:
    """Refuse a second training of a model that DeepSpeed holds.

    Raises:
        ValueError: DeepSpeed has trained it.
    """
    if trainer.deepspeed is not None:
        raise ValueError(
            "DeepSpeed trains a trainer's model once: make a new trainer, and resume from its checkpoint."
        )


def place_teacher(teacher: Teacher | None, accelerator: Accelerator, args: ScaleKDConfig) -> None:
    """Put the teacher on the device, in parts where that is asked for: engines that place parameters do not know of it."""
    if teacher is None:
        return
    teacher.to(args.device)
    if args.shard_teacher and not teacher.is_sharded:
        if accelerator.distributed_type == DistributedType.FSDP:
            shard_fsdp2(teacher, args.device)
        else:
            shard_zero3(teacher, accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"])
        teacher.is_sharded = True


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


@torch.no_grad()
def full_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module with whole tensors: of FSDP2's shards, ZeRO-3's partitions, ZeRO's float32 masters.

    Every process must call it. Tensors that are whole already are not copied.
    """
    return {name: _whole(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}


def _whole(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    deepspeed: Any = sys.modules.get("deepspeed")  # imported where it holds parameters
    if deepspeed is None:
        return tensor.detach()
    if tensor.requires_grad:
        master: Tensor | None = deepspeed.utils.safe_get_full_fp32_param(tensor)
        if master is not None:
            return master
    if not hasattr(tensor, "ds_id"):  # not partitioned
        return tensor.detach()
    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().clone()
