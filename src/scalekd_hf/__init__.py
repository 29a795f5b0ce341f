"""ScaleKD knowledge distillation from strong vision transformers, as a Hugging Face `Trainer`.

What is named is what is loaded: `import scalekd_hf` alone takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .method.heads import MimickingHeads
    from .method.losses import (
        frequency_mimicking_loss,
        logit_distillation_loss,
        relational_logit_loss,
        spatial_mimicking_loss,
    )
    from .method.projector import CrossAttentionProjector
    from .models.mixers import mixer_b14_224
    from .models.students import Student, load_student
    from .models.teachers import Teacher, load_teacher
    from .models.variants import eva02_small_patch14_336_openmmlab, vit_base_patch14_224_openmmlab
    from .tools.plan import Plan, plan
    from .training.config import ScaleKDConfig
    from .training.loss_log import NonFiniteLossError
    from .training.metrics import TopKAccuracy
    from .training.model import ScaleKDModel, ScaleKDOutput
    from .training.trainer import ScaleKDTrainer

_MODULES = {
    "CrossAttentionProjector": "method.projector",
    "MimickingHeads": "method.heads",
    "NonFiniteLossError": "training.loss_log",
    "Plan": "tools.plan",
    "ScaleKDConfig": "training.config",
    "ScaleKDModel": "training.model",
    "ScaleKDOutput": "training.model",
    "ScaleKDTrainer": "training.trainer",
    "Student": "models.students",
    "Teacher": "models.teachers",
    "TopKAccuracy": "training.metrics",
    "eva02_small_patch14_336_openmmlab": "models.variants",
    "frequency_mimicking_loss": "method.losses",
    "load_student": "models.students",
    "load_teacher": "models.teachers",
    "logit_distillation_loss": "method.losses",
    "mixer_b14_224": "models.mixers",
    "plan": "tools.plan",
    "relational_logit_loss": "method.losses",
    "spatial_mimicking_loss": "method.losses",
    "vit_base_patch14_224_openmmlab": "models.variants",
}
_PACKAGES = ("borrowed", "cli", "data", "images", "method", "models", "publishing", "tools", "training", "transfer")

__all__ = [
    "CrossAttentionProjector",
    "MimickingHeads",
    "NonFiniteLossError",
    "Plan",
    "ScaleKDConfig",
    "ScaleKDModel",
    "ScaleKDOutput",
    "ScaleKDTrainer",
    "Student",
    "Teacher",
    "TopKAccuracy",
    "eva02_small_patch14_336_openmmlab",
    "frequency_mimicking_loss",
    "load_student",
    "load_teacher",
    "logit_distillation_loss",
    "mixer_b14_224",
    "plan",
    "relational_logit_loss",
    "spatial_mimicking_loss",
    "vit_base_patch14_224_openmmlab",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        globals()[name] = found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        return found
    if name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
