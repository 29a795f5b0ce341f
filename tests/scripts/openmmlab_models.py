"""Networks as mmpretrain builds them, with random weights and statistics: their checkpoints and their logits, for `test_mmpretrain.py`.

A process of its own, in which transformers cannot be imported: mmpretrain 1.2 does not know its version 5.
"""

import runpy
import sys
import warnings
from pathlib import Path

import importlib_metadata


sys.modules["transformers"] = None
find = importlib_metadata.distribution


def distribution(name):
    """Packages that are installed, as mmpretrain asks for them; without those of its multimodal models."""
    if name == "pycocotools":
        raise importlib_metadata.PackageNotFoundError(name)
    return find(name)


importlib_metadata.distribution = distribution
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from mmpretrain.models import ImageClassifier  # noqa: E402


VIT = {"type": "VisionTransformer", "with_cls_token": False}
BACKBONES = {
    "resnet50": {"type": "ResNet", "depth": 50},
    "resnet50d": {"type": "ResNetV1d", "depth": 50},
    "convnext_t": {"type": "ConvNeXt", "arch": "tiny", "gap_before_final_norm": False, "out_indices": (0, 1, 2, 3)},
    "swin_t": {"type": "SwinTransformer", "arch": "tiny", "img_size": 224, "out_indices": (2, 3)},
    "mixer_s": {"type": "MlpMixer", "arch": "s", "img_size": 224, "patch_size": 16},
    "mixer_b": {"type": "MlpMixer", "arch": "b", "img_size": 224, "patch_size": 16},
    "mixer_b14": {"type": "MlpMixer", "arch": "b", "img_size": 224, "patch_size": 14},
    "vit_s": VIT | {"arch": "deit-small", "patch_size": 16, "out_type": "featmap"},
    "vit_b": VIT | {"arch": "deit-base", "patch_size": 16, "out_type": "featmap"},
    "vit_b14": VIT | {"arch": "deit-base", "patch_size": 14, "out_type": "avg_featmap"},
    "eva02_s": {
        **{"type": "ViTEVA02", "arch": "s", "img_size": 336, "patch_size": 14, "sub_ln": True, "final_norm": False},
        "out_type": "avg_featmap",
    },
    "timm/resnet50c": {"type": "ResNetV1c", "depth": 50},
    "timm/swin_large_patch4_window7_224": {"type": "SwinTransformer", "arch": "large", "img_size": 224},
    "timm/eva_large_patch14_196": {
        **{"type": "BEiTViT", "arch": "l", "img_size": 196, "patch_size": 14, "layer_scale_init_value": 0.0},
        **{"out_type": "avg_featmap", "use_abs_pos_emb": True, "use_rel_pos_bias": False},
        **{"use_shared_rel_pos_bias": False, "layer_cfgs": {"bias": True}},
    },
}


def built(name):
    """A classifier of mmpretrain, in evaluation mode, in which no weight or statistic is what it was made with."""
    torch.manual_seed(0)
    backbone = BACKBONES[name]
    neck = {"type": "GlobalAveragePooling", "dim": 1 if backbone["type"] == "MlpMixer" else 2}
    neck = None if backbone.get("out_type") == "avg_featmap" else neck
    model = ImageClassifier(backbone=dict(backbone), neck=neck, head=None)
    size = backbone.get("img_size", 224)
    with torch.no_grad():
        width = model.eval().extract_feat(torch.zeros(1, 3, size, size))[-1].shape[-1]
    head = {"type": "LinearClsHead", "num_classes": 1000, "in_channels": width}
    model = ImageClassifier(backbone=dict(backbone), neck=neck, head=head).eval()
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.is_floating_point() and "freqs" not in key:
            value.add_(torch.randn_like(value) * (0.02 if value.ndim > 1 else 0.1))
    return model, torch.randn(2, 3, size, size)


def main(folder, names):
    """Write `<name>.pth` and `<name>.logits.pt` of each, or read `<name>.ours.pth` and write the logits of that; run what ends in `.py`."""
    for name in names:
        if name.endswith(".py"):
            runpy.run_path(str(Path(folder, name)))
            continue
        model, images = built(name)
        file = Path(folder, name.replace("/", "-"))
        ours = file.with_name(f"{file.name}.ours.pth")
        if ours.exists():
            loaded = model.load_state_dict(torch.load(ours, weights_only=True)["state_dict"], strict=False)
            assert not loaded.unexpected_keys and all("norm2" in k or "_index" in k for k in loaded.missing_keys)
        else:
            torch.save(
                {"meta": {"epoch": 1, "cfg": f"model = {BACKBONES[name]}"}, "state_dict": model.state_dict()},
                f"{file}.pth",
            )
        with torch.no_grad():
            torch.save({"images": images, "logits": model(images, mode="tensor")}, f"{file}.logits.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
