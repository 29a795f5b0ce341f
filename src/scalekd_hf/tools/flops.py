"""FLOPs of a piece of work, as plans, evaluations and benchmarks count them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count


__all__ = ["flops_of"]


def flops_of(work: Callable[[], Any]) -> int:
    """FLOPs of products and convolutions in `work`, also on the meta device; a multiplication and an addition are two.

    Attention counts as the products that its equation has, forwards and backwards, whatever a kernel computes anew.
    """
    mapping = {torch.ops.aten.convolution_backward: _conv_backward_flops}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work()
    return counter.get_total_flops()


def _conv_backward_flops(
    grad_shape: Any, x_shape: Any, weight_shape: Any, *settings: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Each gradient costs what the forward costs; torch's own count forgets the groups of depthwise convolutions."""
    *_, transposed, _, _, mask = settings
    return conv_flop_count(x_shape, weight_shape, grad_shape, transposed=transposed) * (mask[0] + mask[1])
