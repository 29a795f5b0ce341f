"""Trainers of small models, and what their runs have come to."""

import torch
from helpers import settings, small_student, timm_swin, timm_vit

from scalekd_hf import ScaleKDTrainer


def trainer_for(folder, train=None, evaluation=None, teacher="swin", student=None, **changes):
    torch.manual_seed(0)
    teacher = {"swin": timm_swin, "vit": timm_vit}[teacher]() if isinstance(teacher, str) else teacher
    return ScaleKDTrainer(student or small_student(), teacher, settings(folder, **changes), train, evaluation)
