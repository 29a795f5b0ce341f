"""Parameters in parts: a teacher that is too large for each GPU, and whole tensors of what an engine has divided."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer

from ..models.teachers import Teacher
from .config import ScaleKDConfig
from .run_config import RunConfig


__all__ = [
    "check_engine",
    "check_untrained",
    "engine_runs",
    "full_state",
    "local_part",
    "part_of_whole",
    "place_teacher",
    "shard_fsdp2",
    "shard_zero3",
    "whole_of_part",
    "without_idle_engine",
]

LISTS = (nn.ModuleList, nn.Sequential)
PER_TENSOR_OPTIMIZERS = ("lamb", "lars", "larc", "adafactor", "muon", "nlamb", "nlars", "fused")


def check_engine(accelerator: Accelerator, args: RunConfig) -> None:
    """Refuse what would fail, or be another method, under DeepSpeed or FSDP.

    Raises:
        ValueError: `shard_teacher` without FSDP2 or ZeRO-3, or an optimiser that DeepSpeed's flat parts change.
    """
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    fsdp = accelerator.distributed_type == DistributedType.FSDP
    state = accelerator.state
    if getattr(args, "shard_teacher", False) and not (
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


@contextmanager
def without_idle_engine(trainer: Any) -> Iterator[None]:
    """A trainer whose model was not trained evaluates it as it is inside of this context: engines want an optimiser, too."""
    engines = trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled
    if any(engines) and not engine_runs(trainer):
        trainer.is_deepspeed_enabled = trainer.is_fsdp_enabled = False
        trainer.model.to(trainer.args.device)
    try:
        yield
    finally:
        trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled = engines


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
        with teacher.engine_hooks():
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
    blocks = _blocks(teacher.model)
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # One root for all: they fetch on one stream, the next while one computes. What is in no block stays whole.
    in_blocks = {parameter for block in blocks for parameter in block.parameters()}
    whole = {parameter for parameter in teacher.model.parameters() if parameter not in in_blocks}
    fully_shard(teacher.model, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


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
    """The state dict of a module with whole tensors: of FSDP2's shards, and of ZeRO-3's partitions.

    Every process must call it. Tensors that are whole already are not copied. Parameters are in float32 under DeepSpeed, too
    (see `precision.py`), so that they are what its optimiser keeps.
    """
    state: dict[str, Tensor] = module.state_dict(keep_vars=True)
    partitioned = [tensor for tensor in state.values() if hasattr(tensor, "ds_id")]
    if not partitioned:
        return {name: _whole(tensor) for name, tensor in state.items()}
    with sys.modules["deepspeed"].zero.GatheredParameters(partitioned):  # all in one exchange
        return {name: tensor.detach().clone() for name, tensor in state.items()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: a shard of FSDP2's, else the whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole_of_part(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor whose parts the processes hold as they hold those of `like`; every process must call it."""
    if not isinstance(like, DTensor):
        return part
    layout = like.device_mesh, like.placements
    return DTensor.from_local(part, *layout, run_check=False, shape=like.shape, stride=like.stride()).full_tensor()


@torch.no_grad()
def part_of_whole(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that all hold whole, divided as `like` is."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()
