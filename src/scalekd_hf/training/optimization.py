"""What the recipes need of optimisers and schedules and `TrainingArguments` lacks, from timm and torch."""

from __future__ import annotations

import logging
import math
from typing import Any, cast

import timm.optim
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .run_config import RunConfig


__all__ = ["decayed_parameters", "own_schedule", "scale_learning_rate", "scaled_learning_rate", "timm_optimizer"]

logger = logging.getLogger(__name__)

# Position embeddings, tables of relative positions, class and register tokens, and learned queries, by their names.
UNDECAYED = ("pos_embed", "position_embedding", "relative_position", "rel_pos", "queries")
TOKENS = "_token"  # ends the names of tokens
STEP_DECAY = 0.1


def decayed_parameters(model: nn.Module, decay_all: bool, no_weight_decay: list[str] | None = None) -> list[str]:
    """Names of the parameters with weight decay.

    Args:
        model: of which they are.
        decay_all: vectors are among them, which norms and biases are, and by default everything else.
        no_weight_decay: parts of names that are not; by default those of tables, tokens and queries, or none.
    """

    def excluded(name: str) -> bool:
        if no_weight_decay is not None:
            return any(part in name for part in no_weight_decay)
        return not decay_all and (name.endswith(TOKENS) or any(part in name for part in UNDECAYED))

    names = [name for name, parameter in model.named_parameters() if decay_all or parameter.ndim > 1]
    return [name for name in names if not excluded(name)]


def scale_learning_rate(optimizer: Optimizer, args: RunConfig, global_batch_size: int) -> None:
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


def scaled_learning_rate(args: RunConfig, global_batch_size: int) -> float:
    """The rate for the run's global batch, by the linear or the square root rule."""
    if args.base_batch_size is None:
        return args.learning_rate
    ratio = global_batch_size / args.base_batch_size
    return args.learning_rate * (ratio if args.lr_scaling == "linear" else ratio**0.5)


def timm_optimizer(args: RunConfig, learning_rate: float) -> tuple[Any, dict[str, Any]]:
    """Class and arguments of `timm_optim`, with the betas of the settings where it has two; else timm's defaults."""
    assert args.timm_optim is not None
    info = timm.optim.get_optimizer_info(args.timm_optim)
    options: dict[str, Any] = {"lr": learning_rate, **(info.defaults or {})}
    if info.has_betas and info.num_betas == 2:
        options |= {"betas": (args.adam_beta1, args.adam_beta2)}
    if info.has_momentum:
        options |= {"momentum": 0.9}
    return timm.optim.get_optimizer_class(args.timm_optim, bind_defaults=False), options


def own_schedule(optimizer: Any, args: RunConfig, total_steps: int, steps_per_epoch: float) -> LambdaLR | None:
    """The schedule of `lr_milestones` or `lr_by_epoch`; None where it is one of transformers'."""
    if args.lr_milestones:
        return step_schedule(optimizer, args, total_steps)
    return epoch_schedule(optimizer, args, total_steps, steps_per_epoch) if args.lr_by_epoch else None


def epoch_schedule(optimizer: Any, args: RunConfig, total_steps: int, steps_per_epoch: float) -> LambdaLR:
    """A linear warm-up by steps, then a cosine that falls at the beginning of each epoch, as the authors' runs had it.

    `lr_scheduler_kwargs` are those of transformers' `cosine_warmup_with_min_lr`: the rate at the end (`min_lr`, or
    `min_lr_rate` as a share) and the share that the warm-up begins at (`warmup_lr_rate`).
    """
    options: dict[str, float] = dict(cast(dict, args.lr_scheduler_kwargs) or {})
    lowest = options.get("min_lr_rate") or 0.0
    if min_lr := options.get("min_lr"):
        lowest = min_lr / optimizer.defaults["lr"] if optimizer.defaults["lr"] else 0.0
    first, warmup_steps = options.get("warmup_lr_rate") or 0.0, args.get_warmup_steps(total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return first + (1 - first) * step / max(1, warmup_steps - 1)
        begun = math.ceil(int(step / steps_per_epoch) * steps_per_epoch)  # the first step of this epoch
        progress = max(0.0, begun - warmup_steps) / max(1, total_steps - warmup_steps)
        return lowest + (1 - lowest) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, factor)


def step_schedule(optimizer: Any, args: RunConfig, total_steps: int) -> LambdaLR:
    """A linear warm-up, then a tenth of the rate after each share of the run in `lr_milestones`."""
    steps = [round(share * total_steps) for share in args.lr_milestones or ()]
    warmup_steps = args.get_warmup_steps(total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return STEP_DECAY ** sum(step >= milestone for milestone in steps)

    return LambdaLR(optimizer, factor)
