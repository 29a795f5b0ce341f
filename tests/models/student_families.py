"""Students of many families, built small."""

import timm
from helpers import build, timm_swin
from transformers import (
    ConvNextConfig,
    MobileNetV1Config,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
)


def timm_student(name, **changes):
    return lambda: timm.create_model(name, num_classes=10, **changes)


# name: (model built small, image size, ((C_p, grid_p), (C_l, grid_l)))
STUDENTS = {
    "timm_resnet": (timm_student("resnet18", channels=(8, 16, 24, 32)), 64, ((24, (4, 4)), (32, (2, 2)))),
    "timm_mobilenetv1": (timm_student("mobilenetv1_100"), 64, ((512, (4, 4)), (1024, (2, 2)))),
    "timm_convnext": (
        timm_student("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 12, 16, 24)),
        64,
        ((16, (4, 4)), (24, (2, 2))),
    ),
    "timm_swin": (timm_swin, 32, ((24, (8, 8)), (48, (4, 4)))),
    "timm_vit": (
        timm_student("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=12, num_heads=2),
        32,
        ((24, (4, 4)), (24, (4, 4))),
    ),
    "timm_mixer": (
        timm_student("mixer_s16_224", img_size=64),
        64,
        ((512, (4, 4)), (512, (4, 4))),
    ),
    "transformers_resnet": (
        lambda: build(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], num_labels=10)
        ),
        64,
        ((24, (4, 4)), (32, (2, 2))),
    ),
    "transformers_mobilenetv1": (
        lambda: build(MobileNetV1Config(depth_multiplier=0.25, image_size=64, num_labels=10)),
        64,
        ((128, (4, 4)), (256, (2, 2))),
    ),
    "transformers_convnext": (
        lambda: build(ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 2, 1], image_size=64, num_labels=10)),
        64,
        ((16, (4, 4)), (24, (2, 2))),
    ),
    "transformers_swin": (
        lambda: build(
            SwinConfig(
                image_size=32,
                patch_size=2,
                window_size=4,
                embed_dim=12,
                depths=[1, 2, 2],
                num_heads=[1, 2, 4],
                num_labels=10,
            )
        ),
        32,
        ((24, (8, 8)), (48, (4, 4))),
    ),
    "transformers_vit": (
        lambda: build(
            ViTConfig(
                image_size=32,
                patch_size=8,
                hidden_size=24,
                num_hidden_layers=4,
                num_attention_heads=2,
                intermediate_size=48,
                num_labels=10,
            )
        ),
        32,
        ((24, (4, 4)), (24, (4, 4))),
    ),
}
