"""Small scenes with known objects, and the files in which data sets of segmentation and detection keep them.

An object of class 0 is red, of class 1 green and of class 2 blue, on dark noise, so that pixels tell whether masks and boxes have
moved with them.
"""

import io
import json

import datasets
import numpy as np
from PIL import Image


CLASSES = ["cup", "key", "pen"]
IDS = [3, 7, 90]  # of the categories, with gaps


def scene(number):
    """Pixels (h, w, 3) and objects as (class, left, top, width, height), of which none hides another."""
    rng = np.random.default_rng(number)
    height, width = int(rng.integers(40, 60)), int(rng.integers(48, 72))
    pixels = rng.integers(0, 40, (height, width, 3), dtype=np.uint8)
    objects = []
    for place in range(int(rng.integers(1, 4))):
        kind, side = int(rng.integers(3)), int(rng.integers(8, 14))
        left, top = 1 + place * 16, int(rng.integers(0, height - side))
        pixels[top : top + side, left : left + side] = 0
        pixels[top : top + side, left : left + side, kind] = 255
        objects.append((kind, left, top, side, side))
    return pixels, objects


def encoded(pixels, form="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def polygon(left, top, width, height):
    return [[left, top, left + width, top, left + width, top + height, left, top + height]]


def coco_content(numbers, names=CLASSES, ids=IDS):
    """A COCO file of some scenes, and images by their file names."""
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)][::-1]
    files = {}
    for number in numbers:
        pixels, objects = scene(number)
        name = f"{number:04d}.png"
        files[name] = pixels
        content["images"].append(
            {"id": 100 + number, "file_name": name, "height": pixels.shape[0], "width": pixels.shape[1]}
        )
        for kind, *box in objects:
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": 100 + number,
                    "category_id": ids[kind],
                    "bbox": [float(value) for value in box],
                    "area": float(box[2] * box[3]),
                    "iscrowd": 0,
                    "segmentation": polygon(*box),
                }
            )
    return content, files


def write_coco(root, splits, change=lambda content: None, layout="coco"):
    """Write a folder of COCO, or of Roboflow; `splits` has the numbers of scenes by the names of splits."""
    for split, numbers in splits.items():
        content, files = coco_content(numbers)
        change(content)
        folder = root / split
        file = root / "annotations" / f"instances_{split}.json"
        file = folder / "_annotations.coco.json" if layout == "roboflow" else file
        for needed in (folder, file.parent):
            needed.mkdir(parents=True, exist_ok=True)
        for name, pixels in files.items():
            (folder / name).write_bytes(encoded(pixels))
        file.write_text(json.dumps(content), encoding="utf-8")
    return root


def mask_of(pixels, objects, first=1, around=0):
    """A mask (h, w) of a scene: `around` where there is nothing, and `first` for the first class."""
    mask = np.full(pixels.shape[:2], around, np.uint8)
    for kind, left, top, width, height in objects:
        mask[top : top + height, left : left + width] = kind + first
    return mask


def write_masks(root, splits, prefix="", masks="annotations", **how):
    """Write a folder of images and masks."""
    for split, numbers in splits.items():
        for number in numbers:
            pixels, objects = scene(number)
            found = {"images": (pixels, "jpg", "JPEG"), masks: (mask_of(pixels, objects, **how), "png", "PNG")}
            for folder, (values, ending, form) in found.items():
                file = root / folder / split / f"{prefix}{number:04d}.{ending}"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(encoded(values, form))
    return root


def write_parquet(file, numbers, xyxy=True, category=None, **more):
    """Write a Parquet file with a column of objects; further fields of theirs are functions of a box."""
    rows = {"image": [], "objects": []}
    for number in numbers:
        pixels, objects = scene(number)
        rows["image"].append({"bytes": encoded(pixels), "path": None})
        boxes = [box for _, *box in objects]
        corners = [[left, top, left + width, top + height] for left, top, width, height in boxes]
        rows["objects"].append(
            {
                "bbox": corners if xyxy else boxes,
                "category": [kind for kind, *_ in objects],
                **{name: [make(box) for box in boxes] for name, (make, _) in more.items()},
            }
        )
    number = datasets.Value("float64")
    listed = {
        "bbox": datasets.List(datasets.List(number)),
        "category": datasets.List(category or datasets.Value("int64")),
    }
    listed |= {name: datasets.List(kind) for name, (_, kind) in more.items()}
    features = datasets.Features({"image": datasets.Image(), "objects": listed})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file, batch_size=3)
    return str(file)
