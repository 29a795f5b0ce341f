"""Images a second from encoded bytes to normalised batches: ours, timm's and torchvision's way; what the stream adds
to it, and how it grows with workers.

python benchmarks/data.py [--images 256]

The images are JPEGs of 469 x 401 pixels, cut from the photographs that scikit-learn and scikit-image bring along;
both have to be installed. Nothing is downloaded. Every way does the same: decode, random resized crop to 224
(bicubic), flip, RandAugment of magnitude 9 and erasing with probability 0.25 (or neither), normalise. The first two
tables are of one core.
"""

import argparse
import io
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import skimage.data
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import RandAugment
from torch import Tensor
from torchvision import transforms

from scalekd_hf.data.augmentation import Augmentation
from scalekd_hf.data.dataset import prepare_dataset
from scalekd_hf.data.decoding import open_image
from scalekd_hf.data.preparation import Preparation, collate
from scalekd_hf.data.stream import ImageStream, Partition
from scalekd_hf.images import ImageSpec


WIDTH, HEIGHT, QUALITY = 469, 401, 96  # the mean size of ImageNet's training images; quality for as many bytes
SIZE, BATCH = 224, 64
PHOTOGRAPHS = ["astronaut.png", "coffee.png", "chelsea.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png"]
REPEATS = 7


def photographs() -> list[Image.Image]:
    """The bundled photographs in RGB."""
    folder = Path(skimage.data.__file__).parent
    scenes = [Image.fromarray(array) for array in load_sample_images().images]
    return scenes + [Image.open(folder / name).convert("RGB") for name in PHOTOGRAPHS]


def jpegs(number: int) -> list[bytes]:
    """Random crops of the photographs, encoded; from larger ones scaled down at random, so with more detail."""
    rng, scenes, encoded = random.Random(0), photographs(), []
    for index in range(number):
        scene = scenes[index % len(scenes)]
        smallest = max(WIDTH / scene.width, HEIGHT / scene.height)
        scale = rng.uniform(smallest, max(smallest, min(1.0, 1.3 * smallest)))
        scene = scene.resize((round(scene.width * scale), round(scene.height * scale)), Image.Resampling.BICUBIC)
        left, top = rng.randint(0, scene.width - WIDTH), rng.randint(0, scene.height - HEIGHT)
        file = io.BytesIO()
        scene.crop((left, top, left + WIDTH, top + HEIGHT)).save(file, "JPEG", quality=QUALITY)
        encoded.append(file.getvalue())
    return encoded


def rgb(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def timm_transform(strong: bool) -> Callable[[Image.Image], Tensor]:
    """timm's transforms of its training loader, with normalisation."""
    augmentation = {"auto_augment": "rand-m9-mstd0.5-inc1-n2", "re_prob": 0.25, "re_mode": "pixel"} if strong else {}
    normalisation = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    transform = create_transform(
        (3, SIZE, SIZE), is_training=True, interpolation="bicubic", color_jitter=None, **normalisation, **augmentation
    )
    for step in transform.transforms:
        if isinstance(step, RandAugment):
            posterize = next(op for op in step.ops if op.name.startswith("Posterize"))
            posterize.aug_fn = _posterize  # as it is, it dies on Pillow 13, which refuses to keep 0 bits
    return transform


def _posterize(image: Image.Image, bits_to_keep: int, **options: object) -> Image.Image:
    mask = 256 - 2 ** (8 - bits_to_keep)
    return image.point(lambda value: value & mask)


def torchvision_transform(strong: bool) -> Callable[[Image.Image], Tensor]:
    """The preset of torchvision's classification reference, on PIL images."""
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.RandomResizedCrop(SIZE, interpolation=bicubic), transforms.RandomHorizontalFlip()]
    if strong:
        steps += [transforms.RandAugment(num_ops=2, magnitude=9, interpolation=bicubic)]
    steps += [transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float32)]
    steps += [transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
    if strong:
        steps += [transforms.RandomErasing(p=0.25)]
    return transforms.Compose(steps)


def batches(transform: Callable[[Image.Image], Tensor], contents: list[bytes]) -> None:
    """Float images made one by one, and stacked."""
    for start in range(0, len(contents), BATCH):
        torch.stack([transform(rgb(content)) for content in contents[start : start + BATCH]])


def our_batches(augmentation: Augmentation, contents: list[bytes]) -> None:
    """uint8 images, stacked and normalised as a batch."""
    mean = 255 * torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]
    std = 255 * torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None]
    for start in range(0, len(contents), BATCH):
        batch = torch.stack([augmentation(open_image(content)) for content in contents[start : start + BATCH]])
        batch.float().sub_(mean).div_(std)


def pipelines() -> dict[str, Callable[[list[bytes]], None]]:
    """What is compared, by name: each turns encoded images into normalised float batches."""
    ways: dict[str, Callable[[list[bytes]], None]] = {}
    for strong, suffix in ((True, "RandAugment + erasing"), (False, "crop + flip")):
        options = {"rand_augment": 9, "random_erasing": 0.25} if strong else {}
        ours = Augmentation((SIZE, SIZE), "bicubic", IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, **options)
        ways[f"timm, {suffix}"] = partial(batches, timm_transform(strong))
        ways[f"torchvision, {suffix}"] = partial(batches, torchvision_transform(strong))
        ways[f"ours, {suffix}"] = partial(our_batches, ours)
    return ways


def measure(contents: list[bytes]) -> dict[str, float]:
    """Median images a second of each pipeline, over repeats that take turns, in processor time: other programs do not count."""
    ways, rates = pipelines(), {name: [] for name in pipelines()}
    for repeat in range(REPEATS + 1):
        for name, way in ways.items():
            random.seed(repeat), np.random.seed(repeat), torch.manual_seed(repeat)
            start = time.process_time()
            way(contents)
            rates[name].append(len(contents) / (time.process_time() - start))
    return {name: statistics.median(values[1:]) for name, values in rates.items()}  # the first warms up


def report_rates(contents: list[bytes]) -> None:
    print(
        f"{len(contents)} JPEGs of {WIDTH} x {HEIGHT}, {statistics.mean(map(len, contents)) / 1000:.0f} KB on average"
    )
    rates = measure(contents)
    print(f"{'':36}{'images/s':>10}{'ms/image':>10}{'to timm':>9}")
    for name, rate in rates.items():
        timm_rate = rates["timm, " + name.partition(", ")[2]]
        print(f"{name:36}{rate:>10.0f}{1000 / rate:>10.2f}{rate / timm_rate:>8.2f}x", flush=True)


def stream_of(contents: list[bytes], folder: str) -> ImageStream:
    """The images as a stream of four Parquet shards in row groups of 100, each of them eight times, prepared for training as in a run."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for shard in range(4):
        part = contents[shard::4] * 8
        rows = {"image": [{"bytes": content, "path": None} for content in part], "label": [0] * len(part)}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(f"{folder}/{shard}.parquet", batch_size=100)
    files = [f"{folder}/{shard}.parquet" for shard in range(4)]
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    preparation = Preparation(ImageSpec((SIZE, SIZE)), True, rand_augment=9, random_erasing=0.25)
    return prepare_dataset(stream, "train_dataset", preparation, shuffle=(0, 100))


def report_stream(contents: list[bytes]) -> None:
    """One core: decoding and augmenting, and what a stream of shards adds: reading, shuffling, seeding, keeping count."""
    times: dict[str, list[float]] = {"decode and augment": [], "open": [], "stream without decoding": []}
    with tempfile.TemporaryDirectory() as folder:
        stream = stream_of(contents, folder)
        augment, stream.preparation.transform = stream.preparation.transform, lambda image: None
        for _ in range(REPEATS):
            rows = iter(stream)
            ways = (lambda content: augment(open_image(content)), open_image, lambda _: next(rows))  # noqa: B023
            for name, way, passes in zip(
                times, ways, (1, 1, 8), strict=True
            ):  # the stream's pass is eight times as long
                start = time.process_time()
                for content in contents * passes:
                    way(content)
                times[name].append((time.process_time() - start) / passes)
    work, opening, streaming = (1000 * statistics.median(values) / len(contents) for values in times.values())
    added = streaming - opening
    print(f"\ndecode and augment {work:.2f} ms/image, the stream adds {added:.3f}: {added / work:.1%}")


def report_workers(contents: list[bytes], seconds: float = 6.0) -> None:
    """A training loader with more and more workers."""
    print(f"\n{'workers':>8}{'images/s':>10}{'to one':>9}   of {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        stream, one = stream_of(contents, folder), None
        for workers in (1, 2, 4, 8, 16):
            if workers > 2 * (os.cpu_count() or 1):
                break
            layout = Partition(BATCH, workers=workers)
            loader = iter(stream.training_loader(layout, 0, 0, num_workers=workers, collate_fn=collate))
            for _ in range(2 * workers):
                next(loader)  # what was made while the workers started
            start, images = time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                images += len(next(loader)["pixel_values"])
            rate = images / (time.perf_counter() - start)
            one = one or rate
            print(f"{workers:>8}{rate:>10.0f}{rate / one:>8.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="a multiple of 64")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    contents = jpegs(arguments.images)
    report_rates(contents)
    report_stream(contents)
    report_workers(contents)


if __name__ == "__main__":
    main()
