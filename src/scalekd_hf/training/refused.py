"""Arguments of `Trainer` and `TrainingArguments` that would be taken and change nothing, or break the run: refused."""

from __future__ import annotations

from typing import Any


__all__ = ["REFUSED_ARGUMENTS", "REFUSED_SETTINGS", "check_arguments", "check_refused_settings"]

OF_TEXT = "it is for language models"

# Of `TrainingArguments`: the values that are allowed, and the reason against others.
REFUSED_SETTINGS: dict[str, tuple[tuple[Any, ...], str]] = {
    "auto_find_batch_size": (
        (False,),
        "the order of the images and the learning rate depend on the batch. `--plan` estimates the memory; set "
        "`per_device_train_batch_size` and `gradient_accumulation_steps`",
    ),
    "remove_unused_columns": ((False,), "images are transformed on the fly"),
    "logging_nan_inf_filter": ((False,), "it hides a loss that is not finite, and synchronises"),
    "enable_jit_checkpoint": (
        (False,),
        "SIGTERM always saves a checkpoint here, and the same command goes on from it",
    ),
    "label_names": ((None, [], ["labels"]), "samples have `labels`; name the column of the data with `label_column`"),
    "parallelism_config": ((None,), "students fit one GPU: use DDP, FSDP2 or DeepSpeed"),
    "train_sampling_strategy": (("random", "sequential"), "images have no lengths to be grouped by"),
    "include_num_input_tokens_seen": (("no", False), OF_TEXT),
    "neftune_noise_alpha": ((None,), OF_TEXT),
    "use_liger_kernel": ((False,), OF_TEXT),
    "liger_kernel_config": ((None,), OF_TEXT),
    "use_cache": ((False,), OF_TEXT),
}

# Of `Trainer`.
REFUSED_ARGUMENTS: dict[str, str] = {
    "compute_loss_func": "the loss is the method's; its weights are settings. For another, train in your own loop with "
    "`ScaleKDModel`",
    "model_init": "give the student as `model`, by name: it is built with the seed of the run",
    "processing_class": "the processor that is saved follows from the student and the settings of its images",
}


def check_refused_settings(config: Any) -> None:
    """Refuse settings of `TrainingArguments` that have no use here.

    Raises:
        ValueError: with the setting, its value, and the reason.
    """
    for name, (allowed, reason) in REFUSED_SETTINGS.items():
        value = getattr(config, name, allowed[0])
        value = getattr(value, "value", value)  # of an enumeration
        if value not in allowed:
            raise ValueError(f"`{name}` must be {allowed[0]!r}, got {value!r}: {reason}.")


def check_arguments(options: dict[str, Any], metrics_are_ours: bool, config: Any) -> None:
    """Refuse arguments of `Trainer` that have no use here.

    Raises:
        ValueError: with the argument and the reason.
    """
    for name, reason in REFUSED_ARGUMENTS.items():
        if options.get(name) is not None:
            raise ValueError(f"`{name}` is not taken: {reason}.")
    if metrics_are_ours and config.batch_eval_metrics:
        raise ValueError(
            "`batch_eval_metrics` needs a `compute_metrics` that adds up batches: give yours, or leave it out."
        )
