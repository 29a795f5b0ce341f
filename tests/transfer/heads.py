"""Segmenters and detectors built small, and a batch for them."""

import torch
from helpers import images
from transformers import AutoModelForObjectDetection, AutoModelForSemanticSegmentation

from scalekd_hf.transfer.detector import HEADS, build_detector
from scalekd_hf.transfer.segmenter import build_segmenter


NAMES = ["cat", "dog", "sky"]
SMALL = {
    "mask_rcnn": {
        "hidden_size": 16,
        "rpn_pre_nms_top_n_train": 100,
        "rpn_post_nms_top_n_train": 50,
        "rpn_pre_nms_top_n_test": 100,
        "rpn_post_nms_top_n_test": 50,
        "box_batch_size_per_image": 32,
        "box_detections_per_img": 10,
    },
    "d_fine": {
        "hidden_size": 16,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "decoder_layers": 2,
        "num_queries": 12,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "num_denoising": 4,
    },
}


def segmenter(folder, **changes):
    return build_segmenter(folder, NAMES, **{"image_size": 64, "hidden_size": 8, **changes})


def detector(folder, head, **changes):
    return build_detector(folder, NAMES, head=head, **{"image_size": 64, **SMALL[head], **changes})


def backbone_of(model):
    """The backbone in a model, by where its library keeps it."""
    names = ("backbone", "model.backbone.model", "detector.backbone.backbone")
    return next(m for m in map(dict(model.named_modules()).get, names) if hasattr(m, "channels"))


def batch(size=64, padded=48):
    """Two images, the second without objects and padded at the bottom."""
    pixel_values, pixel_mask = images(2, size), torch.ones(2, size, size, dtype=torch.int64)
    pixel_values[1, :, padded:], pixel_mask[1, padded:] = 0, 0
    masks = torch.zeros(2, size, size, dtype=torch.uint8)
    masks[0, 16:48, 16:48] = masks[1, :32, 32:] = 1
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.75, 0.25, 0.5, 0.5]])
    full = {"class_labels": torch.tensor([0, 2]), "boxes": boxes, "masks": masks}
    empty = {name: value[:0] for name, value in full.items()}
    return {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "labels": [full, empty]}


BUILDERS = {"upernet": segmenter, **{head: lambda *a, head=head, **k: detector(a[0], head, **k) for head in HEADS}}
AUTO = {"upernet": AutoModelForSemanticSegmentation, **dict.fromkeys(HEADS, AutoModelForObjectDetection)}
