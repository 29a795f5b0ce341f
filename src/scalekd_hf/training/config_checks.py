"""Which values the settings may have, alone and together."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import timm.optim
from transformers import SchedulerType

from ..images import INTERPOLATIONS
from ..method.losses import LOGIT_LOSSES, TASK_LOSSES
from ..method.projector import PROJECTORS, STEM_NORMS, STEMS
from .refused import check_refused_settings


__all__ = ["LR_SCALINGS", "SYNC_BATCHNORMS", "check_processes", "check_run_settings", "check_settings", "departures"]

LR_SCALINGS = ("linear", "sqrt")
COSINES = ("cosine", "cosine_with_min_lr", "cosine_warmup_with_min_lr")
# Settings of ScaleKD's features that plain feature matching does not have.
OF_MIMICKING = (
    *(
        "frequency_weight",
        "last_frequency_weight",
        "penultimate_num_heads",
        "last_num_heads",
        "softmax_scale",
        "stem_norm",
    ),
    *("penultimate_norm", "learned_last_queries", "teacher_perception", "remove_direct_component", "stem"),
)
SYNC_BATCHNORMS = ("none", "student", "all")
NOT_NEGATIVE = "must be finite and not negative"
SHARE = "must be between 0 and 1"
COUNT = "must be a whole number of at least 1"


def check_processes(config: Any) -> None:
    """Refuse processes that were started together and would each work alone, as transformers has them do without a GPU.

    Raises:
        ValueError: with what to set.
    """
    started = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if started > 1 and config.world_size == 1:
        raise ValueError(
            f"{started} processes were started, but without a GPU each would work alone. Set `use_cpu` to true, so that they "
            "work together on the CPU, or start one."
        )
    if started > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true" and config.device.type == "cpu":
        raise ValueError(
            "FSDP shards over GPUs alone, and this run is on the CPU, where Accelerate would run DDP. Leave FSDP out."
        )


def check_run_settings(config: Any) -> None:
    """Refuse settings that no training run can have.

    Args:
        config: a `RunConfig`.

    Raises:
        ValueError: with the setting, its value, and what it may be.
    """
    for name in ("learning_rate", "weight_decay"):
        _check(config, name, NOT_NEGATIVE, _is_not_negative)
    _check(config, "label_smoothing_factor", "must be at least 0 and below 1", lambda value: 0 <= value < 1)
    _check(config, "max_bad_images", SHARE, _is_share)
    for name in ("base_batch_size", "images_per_epoch", "shuffle_buffer_size"):
        _check(config, name, COUNT, _is_count)
    rising = "must be two numbers, the second the larger"
    _check(config, "pixel_range", rising, lambda value: len(value) == 2 and -math.inf < value[0] < value[1] < math.inf)
    _check(
        config,
        "lr_milestones",
        "must be rising shares of the run between 0 and 1",
        lambda value: list(value) == sorted(value) and all(0 < share < 1 for share in value),
    )
    _check(config, "lr_scaling", f"must be one of {LR_SCALINGS}", lambda value: value in LR_SCALINGS)
    known = timm.optim.list_optimizers()
    _check(config, "timm_optim", f"must be an optimiser of timm {known}", lambda value: value in known)
    if config.torch_compile_mode in ("reduce-overhead", "max-autotune") and config.gradient_accumulation_steps > 1:
        raise ValueError(
            f"`torch_compile_mode` {config.torch_compile_mode!r} uses CUDA graphs, whose gradients the next micro-step "
            f"overwrites: `gradient_accumulation_steps` must be 1 with it, got {config.gradient_accumulation_steps}. Choose "
            "'default' or 'max-autotune-no-cudagraphs'."
        )
    schedule = SchedulerType(config.lr_scheduler_type).value
    if config.lr_by_epoch and (config.lr_milestones or schedule not in COSINES):
        raise ValueError(
            f"`lr_by_epoch` is for a cosine, but `lr_scheduler_type` is {schedule!r} and `lr_milestones` are "
            f"{config.lr_milestones}. Set 'cosine' or 'cosine_warmup_with_min_lr', or leave it out."
        )
    check_refused_settings(config)


def check_settings(config: Any) -> None:
    """Refuse settings of method and images that no distillation can have.

    Args:
        config: a `ScaleKDConfig`.

    Raises:
        ValueError: with the setting, its value, and what it may be.
    """
    for name in ("spatial_weight", "frequency_weight", "last_frequency_weight"):
        _check(config, name, NOT_NEGATIVE, _is_not_negative)
    for name in ("logit_weight", "hflip", "random_erasing", "teacher_drop_path"):
        _check(config, name, SHARE, _is_share)
    _check(config, "ema_decay", "must be at least 0 and below 1", lambda value: 0 <= value < 1)
    _check(config, "rand_augment", "must be between 0 and 10", lambda value: 0 <= value <= 10)
    _check(config, "interpolation", f"must be one of {INTERPOLATIONS}", lambda value: value in INTERPOLATIONS)
    for name in ("mixup_alpha", "cutmix_alpha", "rand_augment_std"):
        _check(config, name, "must not be negative", lambda value: value >= 0)
    for name in ("temperature", "softmax_scale"):
        _check(config, name, "must be positive and finite", lambda value: 0 < value < math.inf)
    sizes = ("penultimate_num_heads", "last_num_heads", "image_size", "teacher_image_size")
    for name in (*sizes, "repeated_augmentation", "teacher_last_blocks"):
        _check(config, name, COUNT, _is_count)
    _check(config, "crop_pct", "must be above 0 and at most 1", lambda value: 0 < value <= 1)
    _check(
        config,
        "crop_scale",
        "must be two shares of the area, 0 < smallest <= largest <= 1",
        lambda value: len(value) == 2 and 0 < value[0] <= value[1] <= 1,
    )
    for name in ("student_taps", "teacher_taps"):
        _check(config, name, "must be the names of two modules", lambda value: len(value) == 2)
    _check(config, "sync_batchnorm", f"must be one of {SYNC_BATCHNORMS}", lambda value: value in SYNC_BATCHNORMS)
    _check(config, "logit_loss", f"must be one of {LOGIT_LOSSES}", lambda value: value in LOGIT_LOSSES)
    _check(config, "projector", f"must be one of {PROJECTORS}", lambda value: value in PROJECTORS)
    _check(config, "stem", f"must be one of {STEMS}", lambda value: value in STEMS)
    _check(config, "stem_norm", f"must be one of {STEM_NORMS}", lambda value: value in STEM_NORMS)
    _check(config, "task_loss", f"must be one of {TASK_LOSSES}", lambda value: value in TASK_LOSSES)
    _check_mixing(config)
    _check_comparisons(config)


def departures(config: Any) -> list[str]:
    """What makes a run another method than the paper's, in sentences; and what has no effect then."""
    found = []
    if config.projector == "linear":
        fields = type(config).__dataclass_fields__
        idle = [f"`{name}`" for name in OF_MIMICKING if getattr(config, name) != fields[name].default]
        found.append(
            "`projector` 'linear' is plain feature matching, not ScaleKD: `spatial_weight` weighs its one term."
        )
        found += [f"with `projector` 'linear' {', '.join(idle)} have no effect."] if idle else []
    elif config.stem != "full":
        found.append(f"`stem` {config.stem!r} is lighter than the paper's: this is another method.")
    if config.logit_loss != "kl":
        found.append(f"`logit_loss` {config.logit_loss!r} is not the paper's: this is another method.")
    return found


def _check_comparisons(config: Any) -> None:
    """Refuse what is to be compared with ScaleKD where it would have no part in the loss."""
    if config.projector == "linear" and not config.spatial_weight:
        raise ValueError(
            "`projector` is 'linear', but `spatial_weight` is 0, which leaves its one term out. Give it a weight, or leave "
            "`projector` out."
        )
    if config.logit_loss == "dist" and config.logit_weight == 0:
        raise ValueError(
            "`logit_loss` is 'dist', but `logit_weight` is 0: logits teach nothing. Give it a weight, or leave `logit_loss` out."
        )
    if config.logit_loss == "dist" and config.per_device_train_batch_size < 2:
        raise ValueError(
            "`logit_loss` 'dist' compares the images of a batch: `per_device_train_batch_size` must be at least 2, got "
            f"{config.per_device_train_batch_size}."
        )


def _check_mixing(config: Any) -> None:
    mixing = config.mixup_alpha > 0 or config.cutmix_alpha > 0
    if mixing and config.per_device_train_batch_size % 2:
        raise ValueError(
            "Mixup and CutMix mix pairs: `per_device_train_batch_size` must be even, got "
            f"{config.per_device_train_batch_size}."
        )
    if mixing and not config.has_labels and config.logit_weight != 1:
        raise ValueError(
            "Mixup and CutMix mix labels, too: they need a `label_column`, got 'none', or a `logit_weight` of 1, with which labels "
            f"have no part in the loss, got {config.logit_weight}."
        )


def _is_not_negative(value: Any) -> bool:
    return bool(0 <= value < math.inf)


def _is_share(value: Any) -> bool:
    return bool(0 <= value <= 1)


def _is_count(value: Any) -> bool:
    return bool(value == int(value) >= 1)


def _check(config: Any, name: str, requirement: str, holds: Callable[[Any], bool]) -> None:
    value = getattr(config, name)
    if value is None:
        return
    try:
        valid = holds(value)
    except TypeError as error:
        raise ValueError(f"`{name}` {requirement}, got {value!r} ({type(value).__name__}).") from error
    if not valid:
        raise ValueError(f"`{name}` {requirement}, got {value!r}.")
