"""How much of the bare step's speed the trainer reaches, data included, and where the rest goes.

python benchmarks/end_to_end.py [--steps 60 --batch 128]

The bare step is forward, backward and optimiser on one batch that stays on the device, in a loop. The trainer reads JPEGs of
469 x 401 pixels from Parquet made on the spot, decodes, crops, flips and erases them in workers, and logs; both in one run, the
bare step before and after. `waiting for data` is the log's share of the time.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
from pathlib import Path

import datasets
import numpy as np
import torch
from measuring import describe, time_once
from PIL import Image
from step import CLASSES

from scalekd_hf import ScaleKDConfig, ScaleKDTrainer, load_student, load_teacher
from scalekd_hf.tools.recipe import mapping


WIDTH, HEIGHT = 469, 401  # the mean size of ImageNet's training images


def write_images(folder: Path, number: int, shards: int) -> None:
    """Parquet shards of smooth random images: about 30 kB each as JPEG."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (40, 47, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(file, "jpeg", quality=92)
        rows.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    labels = rng.integers(0, len(CLASSES), number).tolist()
    data = datasets.Dataset.from_dict({"image": rows, "label": labels}, features)
    for index in range(shards):
        data.shard(shards, index).to_parquet(folder / f"train-{index:05d}.parquet")


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Time the bare step before and after a run of the trainer, and print both."""
    config = ScaleKDConfig(
        output_dir=str(folder / "run"),
        use_cpu=not torch.cuda.is_available(),
        bf16=args.precision == "bf16",
        torch_compile=args.compile,
        torch_compile_backend=args.backend if args.compile else None,
        per_device_train_batch_size=args.batch,
        max_steps=args.warm_up + args.steps,
        logging_steps=args.warm_up,
        dataloader_num_workers=args.workers,
        random_erasing=0.25,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )
    write_images(folder, args.images, shards=8)
    files = sorted(str(file) for file in folder.glob("*.parquet"))
    train = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    teacher = load_teacher(args.teacher, pretrained=False, **mapping(args.teacher_args, "teacher_args"))
    student = load_student(args.student, labels=CLASSES, **mapping(args.student_args, "student_args"))
    trainer = ScaleKDTrainer(student, teacher, config, train)
    teacher.to(config.device)  # `train` does so; the bare step runs before it
    bare = BareStep(trainer)
    seconds = bare.time(args)
    bare.optimizer.state.clear()  # the run's own comes now
    if config.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = torch.cuda.max_memory_allocated() / 2**30 if config.device.type == "cuda" else None
    seconds += bare.time(args)
    logged = [entry for entry in trainer.state.log_history if "images_per_second" in entry][1:]
    trained = statistics.median(entry["images_per_second"] for entry in logged)
    waited = statistics.mean(entry["data_wait"] for entry in logged)
    stepped = args.batch / statistics.median(seconds)
    print(f"{args.student}, {args.teacher}, batch {args.batch}, {args.precision}; {describe(config.device)}")
    print(f"bare step  {stepped:>10.2f} images/s")
    print(f"trainer    {trained:>10.2f} images/s, {trained / stepped:.1%} of it; {waited:.1%} waiting for data")
    if args.output is not None:
        found = {"bare": stepped, "trainer": trained, "share": trained / stepped, "waiting": waited, "peak_gib": peak}
        args.output.write_text(
            json.dumps({**found, "workers": config.dataloader_num_workers, "batch": args.batch}), encoding="utf-8"
        )


class BareStep:
    """Forward, backward and optimiser on one batch, with a trainer's model, precision and optimiser."""

    def __init__(self, trainer: ScaleKDTrainer):
        self.trainer, self.device = trainer, trainer.args.device
        size, batch = trainer.student.spec.size, trainer.args.per_device_train_batch_size
        self.pixels = torch.randn(batch, 3, *size, device=self.device)
        self.labels = torch.randint(len(CLASSES), (batch,), device=self.device)
        self.model = trainer.model.to(self.device)
        backend = trainer.args.torch_compile_backend
        self.run = torch.compile(self.model, backend=backend) if trainer.args.torch_compile else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def step(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.trainer.args.bf16):
            loss = self.run(self.pixels, self.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def time(self, args: argparse.Namespace) -> list[float]:
        """Seconds of a step, several times over."""
        self.model.train()
        vars(self.model).pop("forward", None)  # Accelerate's, around the same one: the bare step casts by itself
        for _ in range(args.warm_up):
            self.step()
        return [time_once(lambda: [self.step() for _ in range(10)], self.device) / 10 for _ in range(args.rounds)]


def parse() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="timm/resnet50")
    parser.add_argument("--student_args")
    parser.add_argument("--teacher", default="timm/swin_small_patch4_window7_224")
    parser.add_argument("--teacher_args")
    parser.add_argument("--batch", type=int, default=128 if on_gpu else 4)
    parser.add_argument("--precision", choices=["float32", "bf16"], default="bf16")
    parser.add_argument("--images", type=int, default=4096 if on_gpu else 256)
    parser.add_argument("--steps", type=int, default=200 if on_gpu else 20)
    parser.add_argument("--warm_up", type=int, default=20 if on_gpu else 5)
    parser.add_argument("--rounds", type=int, default=5 if on_gpu else 1)
    parser.add_argument("--workers", type=int, help="that decode images; by default the package's choice")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--output", type=Path, help="a file for the figures, as JSON")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=on_gpu)
    return parser.parse_args()


if __name__ == "__main__":
    main()
