"""Devices of one process, TF32, and precision under DeepSpeed and FSDP."""

from __future__ import annotations

import logging

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments


__all__ = ["keep_autocast", "say_tf32_in_both_ways", "use_one_gpu"]

logger = logging.getLogger(__name__)


def use_one_gpu(args: TrainingArguments) -> None:
    """Train on one GPU where one process sees several: the parent's `DataParallel` would copy the student without its teacher."""
    if args.n_gpu > 1:
        logger.warning(
            "%d GPUs are visible to this one process, which uses the first. `accelerate launch` (or `torchrun`) starts a "
            "process for each; `CUDA_VISIBLE_DEVICES` chooses another.",
            args.n_gpu,
        )
        args._n_gpu = 1


def say_tf32_in_both_ways() -> None:
    """Repeat in torch's older flags what the parent said of TF32 in the newer one, which it does when it compiles.

    Compilers of several torch releases read the older flags, and torch raises an error where only the newer one was set.
    """
    precision = getattr(torch.backends, "fp32_precision", "none")
    if precision != "none":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def keep_autocast(args: TrainingArguments) -> None:
    """Keep the engines' own mixed precision off.

    DeepSpeed and FSDP cast the parameters of what they wrap, but not the teacher's, which would meet the student's
    activations in another precision. `bf16` is the trainer's autocast around float32 parameters there.

    Raises:
        ValueError: another mixed precision than `bf16`.
    """
    deepspeed = args.deepspeed_plugin
    fsdp = args.fsdp_plugin_args is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if deepspeed is None and not fsdp:
        return
    if args.fp16 or (args.mixed_precision != "no" and not args.bf16):
        raise ValueError(
            f"Mixed precision is {args.mixed_precision!r}; under DeepSpeed and FSDP it must be asked for with `bf16=True`: "
            "`fp16` needs a loss scale that these engines keep for parameters in fp16 only."
        )
    args.mixed_precision = "no"
    if deepspeed is not None and (args.bf16 or args.bf16_full_eval):
        deepspeed.deepspeed_config.pop("bf16", None)
        deepspeed.hf_ds_config.config.pop("bf16", None)
        deepspeed.hf_ds_config._dtype = torch.float32  # what the parent casts inputs to
