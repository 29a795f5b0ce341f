"""What the recipes need of optimisers and schedules and `TrainingArguments` lacks, from timm and torch."""

from __future__ import annotations

import logging
from typing import Any

import timm.optim
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .config import ScaleKDConfig


__all__ = ["decayed_parameters", "scale_learning_rate", "scaled_learning_rate", "step_schedule", "timm_optimizer"]

logger = logging.getLogger(__name__)

# Position embeddings, tables of relative positions, class and register tokens, and learned queries, by their names.
UNDECAYED = ("pos_embed", "position_embedding", "relative_position", "rel_pos", "cls_token", "reg_token", "queries")
STEP_DECAY = 0.1


def decayed_parameters(model: nn.Module, decay_all: bool) -> list[str]:
    """Names of the parameters with weight decay: all, or all but norms, biases, tables, tokens and queries."""
    names = []
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        excluded = parameter.ndim <= 1 or leaf.endswith("_token") or any(part in name for part in UNDECAYED)
        if decay_all or not excluded:
            names.append(name)
    return names


def scale_learning_rate(optimizer: Optimizer, args: ScaleKDConfig, global_batch_size: int) -> None:
    """Give an optimiser the rate for the run's global batch, and say so where that is another."""
    rate = scaled_learning_rate(args, global_batch_size)
    if rate == args.learning_rate:
        return
    logger.warning(
        "The global batch is %d, the learning rate %g is for %s: it is scaled to %g (%s).",
        global_batch_size,
        args.learning_rate,
        args.base_batch_size,
        rate,
        args.lr_scaling,
    )
    for group in (*optimizer.param_groups, optimizer.defaults):
        group["lr"] = rate


def scaled_learning_rate(args: ScaleKDConfig, global_batch_size: int) -> float:
    """The rate for the run's global batch, by the linear or the square root rule."""
    if args.base_batch_size is None:
        return args.learning_rate
    ratio = global_batch_size / args.base_batch_size
    return args.learning_rate * (ratio if args.lr_scaling == "linear" else ratio**0.5)


def timm_optimizer(args: ScaleKDConfig, learning_rate: float) -> tuple[Any, dict[str, Any]]:
    """Class and arguments of `timm_optim`, with the betas of the settings where it has two; else timm's defaults."""
    assert args.timm_optim is not None
    info = timm.optim.get_optimizer_info(args.timm_optim)
    options: dict[str, Any] = {"lr": learning_rate, **(info.defaults or {})}
    if info.has_betas and info.num_betas == 2:
        options |= {"betas": (args.adam_beta1, args.adam_beta2)}
    if info.has_momentum:
        options |= {"momentum": 0.9}
    return timm.optim.get_optimizer_class(args.timm_optim, bind_defaults=False), options


def step_schedule(optimizer: Any, args: ScaleKDConfig, total_steps: int) -> LambdaLR:
    """A linear warm-up, then a tenth of the rate after each share of the run in `lr_milestones`."""
    steps = [round(share * total_steps) for share in args.lr_milestones or ()]
    warmup_steps = args.get_warmup_steps(total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return STEP_DECAY ** sum(step >= milestone for milestone in steps)

    return LambdaLR(optimizer, factor)
