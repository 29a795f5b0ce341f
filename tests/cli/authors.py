"""What the authors ran, recipe by recipe: values only.

From their 17 configurations with the base files resolved, and from their code as it runs (github.com/deep-optimization/ScaleKD,
the configurations as of commit 5ba1f04, read in November 2026). Names are those of our settings where there is one.
"""

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SWIN_L = "timm/swin_large_patch4_window7_224.ms_in22k_ft_in1k"
SWIN_B = "timm/swin_base_patch4_window7_224.ms_in22k_ft_in1k"
SWIN_S = "timm/swin_small_patch4_window7_224.ms_in1k"
EVA_L = "timm/eva_large_patch14_196.in22k_ft_in22k_in1k"
EVA_L_336 = "timm/eva_large_patch14_336.in22k_ft_in22k_in1k"

COMMON = {
    # Method
    **{"logit_weight": 0.5, "temperature": 1, "spatial_weight": 0.08, "frequency_weight": 0.06},
    **{"last_frequency_weight": None, "learned_last_queries": False, "teacher_perception": True, "stem": "full"},
    **{"remove_direct_component": True, "softmax_scale": 5, "stem_norm": "batch", "penultimate_norm": False},
    **{"teacher_last_blocks": 2, "label_smoothing_factor": 0, "task_loss": "cross_entropy"},
    # Images
    **{
        "image size": 224,
        "teacher image size": 224,
        "student's normalisation": IMAGENET,
        "teacher's normalisation": IMAGENET,
    },
    **{"crop_scale": [0.08, 1], "hflip": 0.5, "shorter side in evaluation": 256},
    **{"interpolation": "bicubic", "antialias": True, "rand_augment": None, "random_erasing": 0},
    **{"mixup_alpha": 0, "cutmix_alpha": 0, "repeated_augmentation": 1},
    # Optimisation
    **{"bf16": False, "fp16": False, "adam_beta1": 0.9, "adam_beta2": 0.999, "optimizer's epsilon": 1e-8},
    **{"images_per_epoch": 1_281_167, "gradient_accumulation_steps": 1, "max_grad_norm": 0, "ema_decay": 0},
    **{"sync_batchnorm": "none", "lr_milestones": None, "lr_by_epoch": True, "no_weight_decay": None, "drop path": 0},
    # Models
    **{"classifier's initial std": 0.01, "norms after pooling": 0, "activation": None, "gated MLP's norm": None},
    "LayerNorm's epsilon": None,
}
SGD = COMMON | {
    **{"optimizer": "SGD", "optimizer's epsilon": None, "learning_rate": 0.1, "weight_decay": 1e-4, "decay_all": True},
    **{
        "base_batch_size": 256,
        "per_device_train_batch_size": 32,
        "num_train_epochs": 100,
        "warm-up epochs": 0,
        "interpolation": "bilinear",
        "antialias": False,
    },
}
STEPS = SGD | {
    "lr_milestones": [0.3, 0.6, 0.9],
    "lr_by_epoch": False,
    "sync_batchnorm": "student",
    "activation": "ReLU",
}
LAMB = COMMON | {
    **{
        "optimizer": "Lamb",
        "optimizer's epsilon": 1e-6,
        "learning_rate": 5e-3,
        "weight_decay": 0.02,
        "decay_all": True,
        "base_batch_size": 2048,
        "per_device_train_batch_size": 64,
    },
    **{"num_train_epochs": 300, "warm-up epochs": 5, "warm-up from": 0.25, "lowest rate": 0, "activation": "ReLU"},
    **{"rand_augment": 8.75, "rand_augment_std": 0.625},
}
ADAMW = COMMON | {
    **{"optimizer": "AdamW", "learning_rate": 1e-3, "weight_decay": 0.05, "decay_all": False, "base_batch_size": 1024},
    "per_device_train_batch_size": 32,
    **{"num_train_epochs": 300, "warm-up epochs": 20, "warm-up from": 1e-3, "lowest rate": 1e-5},
    **{"rand_augment": 9, "rand_augment_std": 0.5, "random_erasing": 0.25, "label_smoothing_factor": 0.1},
    **{"no_weight_decay": ["relative_position_bias_table"], "ema_decay": 0.9999, "activation": "GELU"},
}
MIXER = ADAMW | {
    **{"learning_rate": 7e-4, "weight_decay": 0.067, "decay_all": True, "no_weight_decay": ["pos_embed", "cls_token"]},
    **{
        "base_batch_size": 1536,
        "per_device_train_batch_size": 48,
        "warm-up from": 1e-6,
        "lowest rate": 0,
        "rand_augment": 8,
        "rand_augment_std": 1 / 3,
    },
    **{"label_smoothing_factor": 0, "max_grad_norm": 1, "LayerNorm's epsilon": 1e-5},
}
VIT = ADAMW | {"no_weight_decay": ["pos_embed", "cls_token"], "max_grad_norm": 5, "LayerNorm's epsilon": 1e-6}
RESNET50 = LAMB | {
    **{"student": "timm/resnet50d", "task_loss": "binary_cross_entropy", "random_erasing": 0.25, "max_grad_norm": 5},
}
MOBILENET = {"student": "timm/mobilenetv1_100", "label_smoothing_factor": 0.1, "activation": "ReLU"}


def swin_teacher(name, drop_path, heads):
    return {"teacher": name, "teacher_drop_path": drop_path, "heads": heads}


def eva_teacher(spatial=0.016, frequency=0.008, name=EVA_L):
    weights = {"spatial_weight": spatial, "frequency_weight": frequency, "softmax_scale": 1}
    return {"teacher": name, "teacher_drop_path": 0, "heads": (8, 8)} | weights


AS_RUN = {
    "swin_s_to_resnet50_traditional": STEPS
    | swin_teacher(SWIN_S, 0.3, (3, 6))
    | {"student": "timm/resnet50", "logit_weight": 0, "last_frequency_weight": 0},
    "swin_b_to_resnet50_traditional": STEPS | swin_teacher(SWIN_B, 0.5, (8, 16)) | {"student": "timm/resnet50"},
    "swin_l_to_resnet50_traditional": STEPS | swin_teacher(SWIN_L, 0.1, (16, 24)) | {"student": "timm/resnet50"},
    "swin_l_to_mobilenetv1_traditional": SGD | {"lowest rate": 0} | swin_teacher(SWIN_L, 0.1, (16, 24)) | MOBILENET,
    "swin_l_to_mobilenetv1": LAMB
    | {"learning_rate": 2e-3, "weight_decay": 0.004}
    | swin_teacher(SWIN_L, 0.1, (16, 24))
    | MOBILENET,
    "swin_l_to_resnet50": RESNET50 | swin_teacher(SWIN_L, 0.1, (16, 24)),
    "swin_l_to_resnet50_600_epochs": RESNET50 | swin_teacher(SWIN_L, 0.1, (16, 24)) | {"num_train_epochs": 600},
    "swin_l_to_convnext_t": ADAMW
    | swin_teacher(SWIN_L, 0.1, (8, 16))
    | {"student": "timm/convnext_tiny", "softmax_scale": 1, "drop path": 0.1, "classifier's initial std": 0.02}
    | {"LayerNorm's epsilon": 1e-6},
    "swin_l_to_swin_t": ADAMW
    | swin_teacher(SWIN_L, 0.1, (24, 48))
    | {
        "student": "timm/swin_tiny_patch4_window7_224",
        "softmax_scale": 1,
        "stem_norm": "layer",
        "penultimate_norm": True,
    }
    | {
        "drop path": 0.05,
        "max_grad_norm": 5,
        "per_device_train_batch_size": 16,
        "classifier's initial std": 0.02,
        "LayerNorm's epsilon": 1e-5,
    },
    "swin_l_to_mixer_s": MIXER
    | swin_teacher(SWIN_L, 0.1, (8, 8))
    | {"student": "timm/mixer_s16_224", "per_device_train_batch_size": 24},
    "swin_l_to_mixer_b": MIXER
    | swin_teacher(SWIN_L, 0.1, (8, 8))
    | {"student": "timm/mixer_b16_224", "drop path": 0.1, "ema_decay": 0},
    "swin_l_to_vit_s": VIT | swin_teacher(SWIN_L, 0.1, (8, 8)) | {"student": "timm/vit_small_patch16_224"},
    "swin_l_to_vit_b": VIT
    | swin_teacher(SWIN_L, 0.1, (8, 8))
    | {"student": "timm/vit_base_patch16_224", "shorter side in evaluation": 224, "per_device_train_batch_size": 16},
    "eva_l_to_resnet50": RESNET50 | eva_teacher() | {"softmax_scale": 0.2},
    "eva_l_to_mixer_b14": MIXER
    | eva_teacher()
    | {
        "student": "timm/mixer_b14_224",
        "drop path": 0.1,
        "label_smoothing_factor": 0.1,
        "per_device_train_batch_size": 24,
    },
    "eva_l_to_vit_b14": VIT
    | eva_teacher()
    | {"student": "timm/vit_base_patch16_224", "ema_decay": 0, "norms after pooling": 1},
    "eva_l_to_eva02_s": ADAMW
    | eva_teacher(0.008, 0.004, EVA_L_336)
    | {"student": "timm/eva02_small_patch14_336", "image size": 336, "teacher image size": 336, "drop path": 0.1}
    | {
        "shorter side in evaluation": 336,
        "norms after pooling": 1,
        "activation": "SiLU",
        "gated MLP's norm": "LayerNorm",
    }
    | {"LayerNorm's epsilon": 1e-5, "per_device_train_batch_size": 16},
}
