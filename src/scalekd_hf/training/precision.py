"""TF32, and bf16 under DeepSpeed and FSDP: autocast around parameters in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig


__all__ = ["autocast_under_engines", "keep_autocast", "say_tf32_in_both_ways", "without_bf16"]


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
    activations in another precision. `bf16` is autocast around float32 parameters there, in the model's own forward: DeepSpeed
    turns off what surrounds it on a GPU.

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
        if isinstance(deepspeed.hf_ds_config, HfTrainerDeepSpeedConfig):  # else the parent makes it one later
            with without_bf16(args):  # so that the parent casts inputs to float32
                deepspeed.hf_ds_config.trainer_config_process(args)


@contextmanager
def without_bf16(args: TrainingArguments) -> Iterator[None]:
    """Inside, DeepSpeed's configuration is read as if `bf16` were off: the parent would ask for DeepSpeed's own."""
    kept = {name: getattr(args, name) for name in ("bf16", "bf16_full_eval")}
    if args.deepspeed_plugin is not None:
        args.bf16 = args.bf16_full_eval = False
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(args, name, value)


def autocast_under_engines(args: TrainingArguments) -> torch.dtype | None:
    """What the model itself casts to: that of `bf16` under DeepSpeed and FSDP; elsewhere Accelerate casts."""
    return torch.bfloat16 if args.bf16 and args.mixed_precision == "no" else None
