"""Every family of teachers, built small, with weights large enough that each block matters."""

import timm
import torch
from helpers import SMALL_VIT, build, timm_swin, timm_vit, transformers_swin, transformers_vit
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    BeitConfig,
    BeitModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    ConvNextV2Config,
    Data2VecVisionConfig,
    Data2VecVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaModel,
    ResNetConfig,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    Swinv2Config,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)


VIT = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 12,
    "depths": [1, 2, 2],
    "num_heads": [1, 2, 4],
}
SMALL_CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24), "patch_size": 2}


def _timm(name, **changes):
    return lambda: timm.create_model(name, num_classes=10, **changes)


def _vit(name, **changes):
    return _timm(name, **{**SMALL_VIT, **changes})


def _transformers(config_class, **options):
    return lambda: build(config_class(**{**VIT, "num_labels": 10, **options}))


def _vision(config_class):
    return lambda: build(config_class(vision_config=VIT, num_labels=10))


def _cnn(config_class, **options):
    return lambda: build(config_class(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 2, 1], num_labels=10, **options))


FAMILIES = {
    "timm_swin": timm_swin,
    "timm_swin_v2": _timm(
        "swinv2_tiny_window8_256",
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=12,
        depths=(1, 2, 2),
        num_heads=(1, 2, 4),
    ),
    "timm_vit": timm_vit,
    "timm_vit_mean_pooling": lambda: timm_vit(class_token=False, global_pool="avg"),
    "timm_vit_registers": lambda: timm_vit(reg_tokens=3),
    "timm_vit_pre_norm": lambda: timm_vit(pre_norm=True),
    "timm_deit_distilled": _vit("deit_tiny_distilled_patch16_224"),
    "timm_eva": _vit("eva_large_patch14_196"),
    "timm_eva02": _vit("eva02_tiny_patch14_336"),
    "timm_beit": _vit("beit_base_patch16_224"),
    "timm_beit_shared_bias": _vit("beit_base_patch16_224", use_shared_rel_pos_bias=True, use_rel_pos_bias=False),
    "timm_beit_v2": _vit("beitv2_base_patch16_224"),
    "timm_dinov2": _vit("vit_small_patch14_dinov2"),
    "timm_dinov2_registers": _vit("vit_small_patch14_reg4_dinov2"),
    "timm_dinov3": _vit("vit_small_patch16_dinov3"),
    "timm_clip": _vit("vit_base_patch16_clip_224"),
    "timm_siglip": _vit("vit_base_patch16_siglip_224"),
    "timm_convnext": _timm("convnext_atto", **SMALL_CONVNEXT),
    "timm_resnet": _timm("resnet18", channels=(8, 16, 24, 32)),
    "timm_regnet": _timm("regnetx_002"),
    "transformers_swin": transformers_swin,
    "transformers_swin_v2": lambda: build(Swinv2Config(**SWIN, num_labels=10)),
    "transformers_vit": transformers_vit,
    "transformers_deit": lambda: DeiTForImageClassification(DeiTConfig(**VIT, num_labels=10)),
    "transformers_deit_distilled": lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**VIT, num_labels=10)),
    "transformers_beit": _transformers(BeitConfig, use_relative_position_bias=True),
    "transformers_beit_shared_bias": _transformers(BeitConfig, use_shared_relative_position_bias=True),
    "transformers_beit_class_token": _transformers(BeitConfig, use_mean_pooling=False),
    "transformers_dinov2": _transformers(Dinov2Config),
    "transformers_dinov2_registers": _transformers(Dinov2WithRegistersConfig, num_register_tokens=4),
    "transformers_dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**VIT, num_register_tokens=4)),
    "transformers_clip": _vision(CLIPConfig),
    "transformers_siglip": _vision(SiglipConfig),
    "transformers_convnext": _cnn(ConvNextConfig, image_size=64),
    "transformers_convnext_v2": _cnn(ConvNextV2Config, image_size=64),
    "transformers_resnet": _cnn(ResNetConfig, embedding_size=8),
}
TEXT = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 99,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MAPS = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1], "image_size": 64}
BIASED = {**VIT, "use_relative_position_bias": True}
CUT = {name: value for name, value in VIT.items() if name != "image_size"}
# Backbones as the Hub has them.
BACKBONES = {
    "Dinov2Model": lambda: Dinov2Model(Dinov2Config(**VIT)),
    "Dinov2WithRegistersModel": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**VIT)),
    "DINOv3ViTModel": lambda: DINOv3ViTModel(DINOv3ViTConfig(**VIT)),
    "DINOv3ConvNextModel": lambda: DINOv3ConvNextModel(DINOv3ConvNextConfig(**MAPS)),
    "CLIPVisionModel": lambda: CLIPVisionModel(CLIPVisionConfig(**VIT)),
    "CLIPModel": lambda: CLIPModel(CLIPConfig(vision_config=VIT, text_config=TEXT)),
    "SiglipVisionModel": lambda: SiglipVisionModel(SiglipVisionConfig(**VIT)),
    "Siglip2VisionModel": lambda: Siglip2VisionModel(Siglip2VisionConfig(**CUT, num_patches=16)),
    "Aimv2VisionModel": lambda: Aimv2VisionModel(Aimv2VisionConfig(**VIT)),
    "IJepaModel": lambda: IJepaModel(IJepaConfig(**VIT)),
    "ViTMAEModel": lambda: ViTMAEModel(ViTMAEConfig(**VIT)),
    "Data2VecVisionModel": lambda: Data2VecVisionModel(Data2VecVisionConfig(**BIASED)),
    "SwinModel": lambda: SwinModel(SwinConfig(**SWIN)),
    "BeitModel": lambda: BeitModel(BeitConfig(**BIASED)),
    "DeiTModel": lambda: DeiTModel(DeiTConfig(**VIT)),
    "ConvNextModel": lambda: ConvNextModel(ConvNextConfig(**MAPS)),
    "ViTModel": lambda: ViTModel(ViTConfig(**VIT)),
}
HEADLESS = ("transformers_dinov3",)
# Position terms sized for the prefix: (attribute that says how many prefix tokens, or slices, in a copy without them)
POSITION_TERMS = (
    "timm_eva02",
    "timm_dinov3",
    "timm_beit",
    "timm_beit_shared_bias",
    "transformers_beit",
    "transformers_dinov3",
)


def large_weights(model):
    """Weights at which attention is far from uniform and every block changes its tokens."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "bias" in name or "lambda" in name or "gamma" in name:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2 / fan_in) ** 0.5)
            else:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model
