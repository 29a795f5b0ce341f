"""Folders of small students of many families, and what their backbones are to be."""

import timm
import torch
from families import large_weights
from helpers import build, timm_swin, timm_vit, transformers_swin, transformers_vit
from transformers import AutoModel, ConvNextConfig, Dinov2Config, MobileNetV1Config, ResNetConfig

from scalekd_hf import load_student
from scalekd_hf.models.saving import save_student


def of_timm(name, **changes):
    return lambda: timm.create_model(name, num_classes=10, **changes)


STAGES = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1], "image_size": 64, "num_labels": 10}
SMALL_CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24), "drop_path_rate": 0.3}
DINOV2 = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
SMALL_EVA = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}

# name: (model built small, image size, class of the backbone, channels of its maps, strides)
FOUR = (4, 8, 16, 32)
STUDENTS = {
    "timm_resnet": (of_timm("test_resnet"), 64, "TimmBackbone", [32, 48, 192, 96], FOUR),
    "timm_resnet_args": (of_timm("resnet18", channels=(8, 16, 24, 32)), 64, "StudentBackbone", [8, 16, 24, 32], FOUR),
    "timm_mobilenetv3": (of_timm("mobilenetv3_small_050"), 64, "TimmBackbone", [8, 16, 24, 288], FOUR),
    "timm_efficientnet": (of_timm("test_efficientnet"), 64, "TimmBackbone", [24, 32, 48, 64], FOUR),
    "timm_convnext": (of_timm("test_convnext"), 64, "TimmBackbone", [24, 32, 48, 64], FOUR),
    "timm_convnext_args": (
        of_timm("convnext_atto", **SMALL_CONVNEXT),
        64,
        "StudentBackbone",
        [8, 12, 16, 24],
        FOUR,
    ),
    "timm_swin": (timm_swin, 32, "StudentBackbone", [12, 24, 48], (2, 4, 8)),
    "timm_vit": (timm_vit, 32, "StudentBackbone", [12, 24, 24, 24], FOUR),
    "timm_vit_mean": (
        lambda: timm_vit(class_token=False, global_pool="avg", fc_norm=False),
        32,
        "StudentBackbone",
        [12, 24, 24, 24],
        FOUR,
    ),
    "timm_eva02": (
        of_timm("eva02_tiny_patch14_224", **SMALL_EVA),
        32,
        "StudentBackbone",
        [12, 24, 24, 24],
        FOUR,
    ),
    "timm_mixer": (of_timm("mixer_s32_224", img_size=64), 64, "StudentBackbone", [64, 128, 256, 512], FOUR),
    "transformers_resnet": (
        lambda: build(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], num_labels=10)
        ),
        64,
        "ResNetBackbone",
        [8, 16, 24, 32],
        FOUR,
    ),
    "transformers_convnext": (lambda: build(ConvNextConfig(**STAGES)), 64, "ConvNextBackbone", [8, 12, 16, 24], FOUR),
    "transformers_swin": (transformers_swin, 32, "SwinBackbone", [12, 24, 48], (2, 4, 8)),
    "transformers_mobilenetv1": (
        lambda: build(MobileNetV1Config(depth_multiplier=0.25, image_size=64, num_labels=10)),
        64,
        "StudentBackbone",
        [32, 64, 128, 256],
        FOUR,
    ),
    "transformers_vit": (transformers_vit, 32, "StudentBackbone", [12, 24, 24, 24], FOUR),
    "transformers_dinov2": (
        lambda: AutoModel.from_config(Dinov2Config(**DINOV2)),
        32,
        "StudentBackbone",
        [12, 24, 24, 24],
        FOUR,
    ),
}
PYRAMIDS = ("timm_vit", "timm_vit_mean", "timm_eva02", "timm_mixer", "transformers_vit", "transformers_dinov2")
ONE_SIZE = ("timm_mixer",)


def saved(folder, family):
    """A student in a folder, whose weights and running statistics are none that a library starts with."""
    make, size, *_ = STUDENTS[family]
    model = large_weights(make())
    generator = torch.Generator().manual_seed(5)
    for name, tensor in model.named_buffers():
        if "running" in name:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    student = load_student(model)
    student.spec = student.spec.updated(size=size, mean=[0.4, 0.5, 0.6])
    save_student(student, folder)
    return student.eval()
