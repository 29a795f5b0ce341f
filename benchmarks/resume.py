"""Time to the first batch of a run that is resumed at 90% of its third pass over a stream: ours, and the Trainer's.

python benchmarks/resume.py [--images 1024]

Both train a very small network on the same JPEGs of 469 x 401 pixels in four Parquet shards, save a checkpoint, and are
resumed from it. The Trainer's stream is decoded and augmented by `map` and repeated, since it would not find its place in
a later pass. Needs scikit-learn and scikit-image, see `data.py`.

Then the share of the time of writing a checkpoint, of ResNet-50 and AdamW, that the digests of its manifest take, and the time
that they take to verify.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import timm
import torch
from data import jpegs
from transformers import Trainer, TrainerCallback, TrainingArguments

from scalekd_hf import ScaleKDConfig, ScaleKDTrainer, load_student, manifest
from scalekd_hf.data.augmentation import Augmentation
from scalekd_hf.data.decoding import open_image
from scalekd_hf.images import ImageSpec


BATCH, SIZE = 32, 64
NETWORK = {"channels": (8, 8, 8, 8), "num_classes": 10}


class FirstBatch(TrainerCallback):
    """Notes when the first batch is there."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.time = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.time = self.time or time.perf_counter()


class Classifier(torch.nn.Module):
    """What the Trainer trains: the same network as ours."""

    def __init__(self):
        super().__init__()
        self.network = timm.create_model("resnet18", **NETWORK)

    def forward(self, pixel_values, labels):
        logits = self.network(pixel_values)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def shards_of(contents: list[bytes], folder: Path) -> list[str]:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    files = [str(folder / f"{shard}.parquet") for shard in range(4)]
    for shard, file in enumerate(files):
        part = contents[shard::4]
        rows = {"image": [{"bytes": content, "path": None} for content in part], "label": [0] * len(part)}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(file, batch_size=100)
    return files


def stream_of(files: list[str]) -> datasets.IterableDataset:
    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)


def theirs(files: list[str], folder: Path, steps: int) -> Trainer:
    augment = Augmentation((SIZE, SIZE), "bicubic", ImageSpec().mean, ImageSpec().std)

    def decode(row):
        pixels = augment(open_image(row["image"])).float() / 255
        return {"pixel_values": pixels.numpy(), "labels": row["label"]}

    stream = stream_of(files).decode(False).shuffle(seed=0, buffer_size=100, max_buffer_input_shards=1)
    stream = stream.repeat(4).map(decode, remove_columns=["image", "label"]).with_format("torch")
    args = TrainingArguments(str(folder), max_steps=steps, **settings())
    return Trainer(Classifier(), args, train_dataset=stream)


def ours(files: list[str], folder: Path, steps: int) -> Trainer:
    student = load_student("timm/resnet18", image_size=SIZE, **NETWORK)
    args = ScaleKDConfig(str(folder), max_steps=steps, shuffle_buffer_size=100, **settings())
    return ScaleKDTrainer(student, None, args, stream_of(files))


def settings() -> dict:
    saving = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    return {"per_device_train_batch_size": BATCH, "use_cpu": True, "remove_unused_columns": False, **saving}


def writing(files: list[str], folder: Path) -> tuple[int, float, float, float]:
    """Bytes of a checkpoint, and seconds to write it with and without digests, in turn, and to verify it: medians of twenty."""
    student = load_student("timm/resnet50", num_classes=10, image_size=SIZE)
    given = settings() | {"per_device_train_batch_size": 2}
    trainer = ScaleKDTrainer(student, None, ScaleKDConfig(str(folder), max_steps=1, **given), stream_of(files))
    trainer.train()
    digest, taken = manifest.digest, {"plain": [], "whole": [], "verified": []}
    ways = [("plain", lambda *_: ""), ("whole", digest)]
    for _ in range(20):
        ways.reverse()
        for name, manifest.digest in ways:
            start = time.perf_counter()
            trainer._save_checkpoint(trainer.model, None)
            taken[name].append(time.perf_counter() - start)
        manifest.digest, start = digest, time.perf_counter()
        manifest.damage(folder / "checkpoint-1")
        taken["verified"].append(time.perf_counter() - start)
    size = sum(file.stat().st_size for file in (folder / "checkpoint-1").iterdir())
    return size, *(statistics.median(times) for times in taken.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    contents = jpegs(arguments.images)
    step = int(2.9 * arguments.images / BATCH)
    seconds = {}
    with tempfile.TemporaryDirectory() as name:
        files = shards_of(contents, Path(name))
        for way in (theirs, ours):
            random.seed(0), np.random.seed(0)
            trainer = way(files, Path(name, way.__name__), step)
            trainer.args.save_strategy = "steps"
            trainer.train()
            trainer._save_checkpoint(trainer.model, None)
            resumed, first = way(files, Path(name, way.__name__), step + 2), FirstBatch()
            resumed.add_callback(first)
            start = time.perf_counter()
            resumed.train(resume_from_checkpoint=str(Path(name, way.__name__, f"checkpoint-{step}")))
            seconds[way.__name__] = first.time - start
        size, plain, whole, verified = writing(files, Path(name, "large"))
    print(
        f"\nresumed at step {step} of batches of {BATCH}, {arguments.images} images a pass; time to the first batch:"
    )
    for label, way in (("Trainer", "theirs"), ("ScaleKDTrainer", "ours")):
        print(f"{label:16}{seconds[way]:>8.2f} s{seconds['theirs'] / seconds[way]:>8.1f}x")
    print(
        f"a checkpoint of {size / 1e6:.0f} MB: written in {plain:.2f} s without digests, {whole:.2f} s with them "
        f"({whole / plain - 1:+.1%}); verified in {verified:.3f} s"
    )


if __name__ == "__main__":
    main()
