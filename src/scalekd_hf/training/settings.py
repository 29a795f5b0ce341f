"""Which settings make a run what it is: those that a card tells, and those that a resumed run has to keep."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, fields
from typing import Any

from torch import nn

from ..data.labels import SHOWN
from ..images import ImageSpec
from .model import ScaleKDModel
from .run_config import RunConfig


__all__ = ["FIXED", "models_to_keep", "rebuilding_settings", "run_settings", "settings_to_keep", "told_settings"]

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
    # Kept as what they come to, see `models_to_keep`.
    *("image_size", "teacher_image_size", "crop_pct", "interpolation", "antialias", "student_taps"),
    *("penultimate_num_heads", "last_num_heads"),
)
# That no checkpoint can go on with: another optimiser's state, other groups of parameters, other projectors.
FIXED = (
    *("optim", "optim_args", "timm_optim", "decay_all", "no_weight_decay", "student_taps", "teacher_last_blocks"),
    *("teacher_taps",),
    *("projector", "stem", "stem_norm", "penultimate_norm", "learned_last_queries", "teacher_perception"),
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
REPORTING = ("hub_", "log_", "logging_", "trackio_")  # begin the names of settings that say where a run reports
PARTS = 4  # of a teacher, whose norms tell its weights from another's
ACTIVATION = re.compile(r"elu|silu|swish|sigmoid|tanh|mish|act", re.IGNORECASE)


def run_settings(args: RunConfig) -> dict[str, Any]:
    """All settings but those that the same run may have otherwise when it is resumed."""
    return _plain({name: value for name, value in args.to_dict().items() if name not in NOT_OF_THE_RUN})


def told_settings(args: RunConfig) -> dict[str, Any]:
    """Those of method, images, optimisation, length and batch."""
    classes = [kind for kind in type(args).__mro__ if issubclass(kind, RunConfig)]
    own = [name for kind in classes for name in kind.__annotations__ if name not in NOT_OF_THE_METHOD]
    return {name: getattr(args, name) for name in (*own, *LENGTH_AND_BATCH, *OPTIMISATION)}


def rebuilding_settings(args: RunConfig) -> dict[str, Any]:
    """Those that the same run needs again, wherever it is run."""
    settings = _plain(args.to_dict())  # without tokens, which are masked
    inits = {field.name for field in fields(args) if field.init}
    return {
        name: value
        for name, value in settings.items()
        if name in inits - set(WHERE) and not name.endswith("_token") and not name.startswith(REPORTING)
        if value not in (None, "", [], {})
    }


def settings_to_keep(args: RunConfig) -> dict[str, Any]:
    """Those of method, images and optimisation under which a run has to go on, by their names."""
    kept = {name: value for name, value in told_settings(args).items() if name not in (*LENGTH_AND_BATCH, *FREE)}
    if args.timm_optim is not None:
        del kept["optim"]
    elif str(_plain(kept)["optim"]).startswith("adamw_torch"):  # which of the two is torch's choice
        kept["optim"] = "adamw_torch"
    return _plain(kept)


def models_to_keep(model: ScaleKDModel, heads: tuple[int, int] | None) -> dict[str, Any]:
    """What the models of a run are, as it has to go on; read before anything of them is sharded.

    Args:
        model: student, teacher and heads.
        heads: attention heads of the projectors, where there are any.
    """
    student, teacher = model.student, model.teacher
    leaves = [module for module in student.model.modules() if not any(True for _ in module.children())]
    rates = {
        getattr(leaf, "drop_prob", getattr(leaf, "p", None))
        for leaf in leaves
        if "drop" in type(leaf).__name__.lower()
    }
    kinds = {type(leaf).__name__ for leaf in leaves if not any(True for _ in leaf.parameters())}
    return _plain(
        {
            "student_taps": [tap.module for tap in student.taps] if model.heads is not None else None,
            "student's drop rates": sorted(round(rate, 4) for rate in rates if rate),
            "student's activations": sorted(kind for kind in kinds if ACTIVATION.search(kind)),
            "student's classes": _classes(student.labels),
            "student's images": _images(student.spec),
            "teacher's images": _images(teacher.spec) if teacher is not None else None,
            "teacher's weights": _fingerprint(teacher) if teacher is not None else None,
            "attention heads": heads,
        }
    )


def _classes(names: list[str] | None) -> list[str] | None:
    """The first few names, and a number that other names or another order would change."""
    return names and [*names[:SHOWN], hashlib.blake2b("\n".join(names).encode(), digest_size=4).hexdigest()]


def _images(spec: ImageSpec) -> dict[str, Any]:
    """Those that are trained on: the crop of an evaluation may change."""
    return {name: value for name, value in asdict(spec).items() if name not in ("crop_pct", "crop_mode")}


def _fingerprint(module: nn.Module) -> list[str]:
    """Norms of a few parts of a model, to four digits: another model has others, and another machine the same."""
    tensors = [tensor for tensor in module.parameters()]
    size = -(-len(tensors) // PARTS)
    parts = [tensors[start : start + size] for start in range(0, len(tensors), size)]
    return [f"{math.sqrt(sum(float(tensor.double().square().sum()) for tensor in part)):.4g}" for part in parts]


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=lambda value: getattr(value, "value", str(value))))
    return plain
