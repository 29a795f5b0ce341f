"""ScaleKD knowledge distillation from strong vision transformers, as a Hugging Face `Trainer`."""

from .method.heads import MimickingHeads
from .method.losses import frequency_mimicking_loss, logit_distillation_loss, spatial_mimicking_loss
from .method.projector import CrossAttentionProjector
from .models.mixers import mixer_b14_224
from .models.students import Student, load_student
from .models.teachers import Teacher, load_teacher
from .tools.plan import Plan, plan
from .training.config import ScaleKDConfig
from .training.loss_log import NonFiniteLossError
from .training.metrics import TopKAccuracy
from .training.model import ScaleKDModel, ScaleKDOutput
from .training.trainer import ScaleKDTrainer


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
