"""Whole tensors in full precision, wherever a launcher keeps the parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.integrations import deepspeed as hf_deepspeed


__all__ = ["full_state", "whole_models"]


@torch.no_grad()
def full_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module with whole tensors: of FSDP2's shards, ZeRO-3's partitions, ZeRO's float32 masters.

    Every process must call it. Tensors that are whole already are not copied.
    """
    return {name: _whole(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}


def _whole(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if not (hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping")):
        return tensor.detach()
    import deepspeed

    if tensor.requires_grad:
        master: Tensor | None = deepspeed.utils.safe_get_full_fp32_param(tensor)
        if master is not None:
            return master
    with deepspeed.zero.GatheredParameters([tensor] if hasattr(tensor, "ds_id") else []):
        return tensor.detach().clone()


@contextmanager
def whole_models() -> Iterator[None]:
    """Models that transformers builds inside have whole parameters, also when ZeRO-3 is configured.

    The dry runs that look at a model need them; the engine partitions what trains when training starts.
    """
    kept: Any = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = kept
