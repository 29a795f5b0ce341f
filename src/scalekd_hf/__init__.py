"""ScaleKD knowledge distillation from strong vision transformers, as a Hugging Face `Trainer`."""

from .config import ScaleKDConfig
from .distiller import ScaleKDModel, ScaleKDOutput
from .heads import MimickingHeads
from .loss_log import NonFiniteLossError
from .losses import frequency_mimicking_loss, logit_distillation_loss, spatial_mimicking_loss
from .metrics import TopKAccuracy
from .mixers import mixer_b14_224
from .plan import Plan, plan
from .projector import CrossAttentionProjector
from .students import Student, load_student
from .teachers import Teacher, load_teacher
from .trainer import ScaleKDTrainer


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
    "frequency_mimicking_loss",
    "load_student",
    "load_teacher",
    "logit_distillation_loss",
    "mixer_b14_224",
    "plan",
    "spatial_mimicking_loss",
]
