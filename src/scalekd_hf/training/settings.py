"""Which settings make a run what it is: those that a card tells, and those that a resumed run has to keep."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from typing import Any

from torch import nn

from .config import ScaleKDConfig
from .model import ScaleKDModel


__all__ = ["rebuilding_settings", "run_settings", "settings_to_keep", "told_settings"]

NOT_OF_THE_RUN = (
    "output_dir",
    "resume_from_checkpoint",
    "allow_data_mismatch",
    "allow_settings_mismatch",
    "local_rank",
)
NOT_OF_THE_METHOD = (
    *("overwrite_output_dir", "allow_data_mismatch", "allow_settings_mismatch", "channels_last"),
    *("dataloader_num_workers", "logging_steps", "report_to"),
)
OPTIMISATION = (
    *("learning_rate", "weight_decay", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm"),
    *("optim", "optim_args", "bf16", "fp16", "adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor"),
)
LENGTH_AND_BATCH = (
    *("seed", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("gradient_checkpointing", "torch_compile"),
)
# Of the images' order, which the position of a run knows, of the length of the run, or without effect on its result.
FREE = (
    *("remove_unused_columns", "ddp_find_unused_parameters", "logging_nan_inf_filter", "shard_teacher"),
    *("image_column", "shuffle_buffer_size", "repeated_augmentation", "max_bad_images", "images_per_epoch"),
)
WHERE = (
    *(
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "allow_data_mismatch",
        "allow_settings_mismatch",
    ),
    *("push_to_hub", "report_to", "run_name", "project", "disable_tqdm", "local_rank", "ddp_backend"),
    *("accelerator_config", "ignore_data_skip", "dataloader_pin_memory", "ddp_static_graph"),
)
REPORTING = ("hub_", "log", "trackio_")  # begin the names of settings that say where a run reports
VALUES = 16  # of each tensor, that tell one teacher's weights from another's


def run_settings(args: ScaleKDConfig) -> dict[str, Any]:
    """All settings but those that the same run may have otherwise when it is resumed."""
    return _plain({name: value for name, value in args.to_dict().items() if name not in NOT_OF_THE_RUN})


def told_settings(args: ScaleKDConfig) -> dict[str, Any]:
    """Those of method, images, optimisation, length and batch."""
    names = (
        *(n for n in ScaleKDConfig.__annotations__ if n not in NOT_OF_THE_METHOD),
        *LENGTH_AND_BATCH,
        *OPTIMISATION,
    )
    return {name: getattr(args, name) for name in names}


def rebuilding_settings(args: ScaleKDConfig) -> dict[str, Any]:
    """Those that the same run needs again, wherever it is run."""
    settings = _plain(args.to_dict())  # without tokens, which are masked
    inits = {field.name for field in fields(args) if field.init}
    return {
        name: value
        for name, value in settings.items()
        if name in inits - set(WHERE) and not name.endswith("_token") and not name.startswith(REPORTING)
        if value not in (None, "", [], {})
    }


def settings_to_keep(args: ScaleKDConfig, model: ScaleKDModel) -> dict[str, Any]:
    """Those under which a run has to go on, by their names: of method, images and optimisation, and what the models are.

    Args:
        args: of the run.
        model: before anything of it is sharded.
    """
    kept = {name: value for name, value in told_settings(args).items() if name not in (*LENGTH_AND_BATCH, *FREE)}
    arguments = {name: value for name, value in model.student.classifier.model_args.items() if name != "num_classes"}
    kept |= {"student_taps": [tap.module for tap in model.student.taps] if model.heads is not None else None}
    return _plain(kept | {"student_args": arguments, "teacher": _fingerprint(model.teacher)})


def _fingerprint(module: nn.Module | None) -> str | None:
    """Tells weights apart, wherever they were loaded from."""
    if module is None:
        return None
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.flatten()[:VALUES].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=lambda value: getattr(value, "value", str(value))))
    return plain
