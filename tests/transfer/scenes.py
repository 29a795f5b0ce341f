"""Images of coloured squares with their masks and boxes, and trainers of small models on them."""

import json

import numpy as np
import torch
from helpers import small_student
from PIL import Image

from scalekd_hf.models.saving import save_student
from scalekd_hf.transfer.annotations import DenseDataArguments, load_dense_data
from scalekd_hf.transfer.config import TransferConfig
from scalekd_hf.transfer.detector import build_detector
from scalekd_hf.transfer.segmenter import build_segmenter
from scalekd_hf.transfer.trainer import TransferTrainer


NAMES = ("red", "blue")
COLOURS = ((200, 40, 40), (40, 40, 200))


def write_scenes(folder, training=14, validation=5):
    """Write images, masks and COCO files of both splits."""
    generator = np.random.default_rng(0)
    for split, count in (("training", training), ("validation", validation)):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        images, annotations = [], []
        for number in range(count):
            height, width = (int(side) for side in generator.integers(40, 72, 2))
            pixels = generator.integers(0, 60, (height, width, 3), dtype=np.uint8)
            mask = np.zeros((height, width), np.uint8)
            images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
            for _ in range(int(generator.integers(1, 3))):
                place, side = int(generator.integers(2)), int(generator.integers(14, 24))
                x, y = int(generator.integers(0, width - side)), int(generator.integers(0, height - side))
                pixels[y : y + side, x : x + side], mask[y : y + side, x : x + side] = COLOURS[place], place + 1
                outline = [x, y, x + side, y, x + side, y + side, x, y + side]
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": number, "category_id": place + 1, "iscrowd": 0}
                    | {"bbox": [x, y, side, side], "area": side * side, "segmentation": [outline]}
                )
            Image.fromarray(pixels).save(folder / "images" / split / f"{number}.png")
            Image.fromarray(mask).save(folder / "annotations" / split / f"{number}.png")
        categories = [{"id": place + 1, "name": name} for place, name in enumerate(NAMES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "classes.txt").write_text("background\nred\nblue\n", encoding="utf-8")
    torch.manual_seed(0)
    save_student(small_student(), folder / "student")


def dense_data(folder, task, masks=False, **changes):
    """What `load_dense_data` makes of the scenes."""
    names = {"class_names": str(folder / "classes.txt")} if task == "segment" else {}
    arguments = {"dataset": str(folder), "train_split": "training", "eval_split": "validation", **names, **changes}
    return load_dense_data(DenseDataArguments(**arguments), task, masks=masks)


def model_for(folder, task, names, **changes):
    """A segmenter or an D-FINE, small."""
    torch.manual_seed(0)
    if task == "segment":
        return build_segmenter(folder / "student", names, image_size=64, hidden_size=8, **changes)
    small = {"decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 12, "num_denoising": 4}
    small |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "hidden_size": 16}
    return build_detector(folder / "student", names, head="d_fine", image_size=64, **{**small, **changes})


def trainer_for(folder, output, task="segment", model=None, data=None, callbacks=(), **changes):
    """A trainer of 6 steps of 4 images, which saves every second."""
    data = data or dense_data(folder, task)
    options = {"max_steps": 6, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 2, "image_size": 64}
    options |= {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3, "logging_steps": 3, "use_cpu": True}
    options |= {"report_to": "none", "disable_tqdm": True, "lr_scheduler_type": "constant", **changes}
    config = TransferConfig(output_dir=str(output), **options)
    return TransferTrainer(model or model_for(folder, task, data.class_names), config, data, callbacks=list(callbacks))
