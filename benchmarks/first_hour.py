"""A stranger's first hour, timed: from the built wheel in a new environment to an exported student of their own photos.

    python benchmarks/first_hour.py 'cifar10/train-*.parquet' [--image_column img] [--short] [--folder hour]

The photos are made from CIFAR-10's Parquet files: 600 in six class folders, of
mixed sizes, modes and kinds of file, with an empty one and a text among them. Other images of the same files train what stands for a
checkpoint from the Hub. `--short` takes few steps, leaves the quickstart out, and has the packages of this environment instead of
installing them.
"""

import argparse
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import yaml


ROOT = Path(__file__).parents[1]
CLASSES = {0: "airplane", 2: "great tit", 3: "Kätzchen", 5: "dog", 6: "frog", 8: "Segelboot (groß)"}
OF_EACH = 100
SWIN = {
    "img_size": 64,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 32,
    "depths": [2, 2, 2],
    "num_heads": [2, 4, 8],
}
COMMON = {"image_size": 64, "crop_pct": 1.0, "lr_scheduler_type": "cosine", "max_grad_norm": 5.0, "use_cpu": True}
COMMON |= {"crop_scale": [0.4, 1.0], "weight_decay": 0.05, "warmup_steps": 0.05, "disable_tqdm": True}


def make_photos(images: datasets.Dataset, folder: Path) -> list[int]:
    """Write the photos, and return the rows that none of them is from."""
    generator, rest = np.random.default_rng(0), []
    wanted = dict.fromkeys(CLASSES, OF_EACH)
    labels = images["label"]
    for row, label in enumerate(labels):
        if not wanted.get(label):
            rest.append(row)
            continue
        wanted[label] -= 1
        size = [int(side) for side in generator.integers(40, 160, 2)]
        image = images[row]["image"].convert("RGB").resize(size)
        kind = row % 6
        image = image.convert({0: "L", 1: "RGBA"}.get(kind, "RGB"))
        place = folder / CLASSES[label]
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"photo {row}.{'png' if kind < 3 else 'JPG' if kind == 3 else 'jpeg'}")
    (folder / "dog" / "empty.jpg").touch()
    (folder / "frog" / "notes.txt").write_text("where the frogs were\n", encoding="utf-8")
    return rest


def configurations(short: bool) -> dict[str, dict]:
    """What the user writes: the checkpoint's, the teacher's and the pair's."""
    held_out = {"dataset": "photos", "eval_split": "0.2"}
    checkpoint = {"model": "timm/swin_tiny_patch4_window7_224", "model_args": SWIN, "pretrained": False, **COMMON}
    checkpoint |= {"train_files": "checkpoint.parquet", "eval_split": "none", "output_dir": "checkpoint"}
    checkpoint |= {"max_steps": 4 if short else 1500, "per_device_train_batch_size": 64, "learning_rate": 2e-3}
    teacher = {"model": "checkpoint", "output_dir": "teacher", **held_out, **COMMON, "per_device_train_batch_size": 32}
    teacher |= {"num_train_epochs": 1 if short else 10, "learning_rate": 2e-4}
    pair = {"teacher": "teacher", "student": "timm/resnet18", "student_args": {"channels": [16, 32, 64, 128]}}
    pair |= {"output_dir": "student", "baseline": True, **held_out, **COMMON, "per_device_train_batch_size": 32}
    pair |= {"num_train_epochs": 1 if short else 40, "learning_rate": 5e-3, "save_strategy": "steps", "save_steps": 5}
    pair |= {"save_total_limit": 2}
    return {"checkpoint": checkpoint, "teacher": teacher, "pair": pair}


class Hour:
    """The steps, each a command that has to succeed, and how long it took."""

    def __init__(self, folder: Path):
        self.folder, self.steps = folder, {}
        self.env = {**os.environ, "HF_HUB_OFFLINE": "1"}

    def step(self, name: str, *words: object, cwd: Path | None = None, status: int = 0) -> str:
        """Run a command; returns what it printed."""
        start = time.monotonic()
        done = subprocess.run(
            [*map(str, words)], cwd=cwd or self.folder, env=self.env, capture_output=True, text=True, timeout=3600
        )
        self.note(name, time.monotonic() - start)
        if done.returncode != status:
            raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return done.stdout

    def note(self, name: str, seconds: float) -> None:
        """Keep a duration and print it."""
        self.steps[name] = round(seconds, 1)
        print(f"{name:<44}{seconds:>8.1f} s", flush=True)

    def interrupted(self, name: str, *words: object) -> None:
        """Run a command until its first checkpoint, then press Ctrl-C."""
        start = time.monotonic()
        started = subprocess.Popen([*map(str, words)], cwd=self.folder, env=self.env, stdout=subprocess.DEVNULL)
        while not list(self.folder.glob("student/checkpoint-*")) and started.poll() is None:
            time.sleep(0.1)
        started.send_signal(signal.SIGINT)
        if started.wait(timeout=120) != 130:
            raise SystemExit(f"{name} ended with {started.returncode}, not with 130")
        self.note(name, time.monotonic() - start)


def install(hour: Hour, short: bool) -> Path:
    """Build the wheel and install it in an environment of its own; returns that one's programs."""
    wheels, environment = hour.folder / "wheel", hour.folder / "environment"
    source = hour.folder / "source"  # building leaves files behind
    for part in ("src", "recipes"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    hour.step("build the wheel", sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, source)
    shutil.rmtree(source)
    hour.step("make an environment", sys.executable, "-m", "venv", environment)
    (wheel,) = wheels.glob("*.whl")
    if short:
        (site,) = environment.glob("lib/python*/site-packages")
        (site / "these.pth").write_text(
            "\n".join(path for path in sys.path if path.endswith("site-packages")), encoding="utf-8"
        )
    words = ["--no-deps", "--force-reinstall", "--ignore-installed"] if short else []
    hour.step("install it", environment / "bin/python", "-m", "pip", "install", "-q", *words, wheel)
    return environment / "bin"


def play(images: datasets.Dataset, folder: Path, short: bool) -> dict:
    """Play the hour; returns what came out of it."""
    hour = Hour(folder)
    bin = install(hour, short)
    scalekd = bin / "scalekd"
    where = hour.step("where it is", bin / "python", "-c", "import scalekd_hf; print(scalekd_hf.__file__)").strip()
    if not Path(where).is_relative_to(folder):
        raise SystemExit(f"The package is not the wheel's: {where}")
    hour.step("scalekd --help", scalekd, "--help")
    hour.step("scalekd recipes", scalekd, "recipes")
    if not short:  # `.ci/run` has it from a wheel
        hour.step("scalekd quickstart", scalekd, "quickstart", "--disable_tqdm", "true")
    rest = make_photos(images, folder / "photos")
    images.select(rest[: 500 if short else 20000]).to_parquet(folder / "checkpoint.parquet")
    for name, settings in configurations(short).items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    hour.step("(a checkpoint, instead of the Hub's)", scalekd, "train-teacher", "checkpoint.yaml")
    told = hour.step("scalekd train-teacher teacher.yaml", scalekd, "train-teacher", "teacher.yaml")
    print(told.splitlines()[-1])
    hour.step("scalekd plan pair.yaml", scalekd, "plan", "pair.yaml")
    hour.interrupted("scalekd distill pair.yaml, until Ctrl-C", scalekd, "distill", "pair.yaml")
    print(hour.step("scalekd distill pair.yaml, to its end", scalekd, "distill", "pair.yaml"))
    hour.step("scalekd evaluate", scalekd, "evaluate", "student", "--dataset", "photos", "--eval_split", "0.2")
    hour.step("scalekd export", scalekd, "export", "student")
    again = ["student/training_config.yaml", "--output_dir", "again", "--baseline", "false"]
    hour.step("the same student again", scalekd, "distill", *again)
    load = (
        "from transformers import pipeline; print(pipeline('image-classification', model='student')('photo.png')[0])"
    )
    shutil.copy(next(folder.glob("photos/K*/*.png")), folder / "photo.png")
    print(hour.step("load it with transformers", bin / "python", "-c", load))
    same = (folder / "again/model.safetensors").read_bytes() == (folder / "student/model.safetensors").read_bytes()
    bad = [
        json.loads(line)["file"]
        for line in (folder / "student/bad_images.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    results = json.loads((folder / "student/results.json").read_text(encoding="utf-8"))
    evaluated = json.loads((folder / "evaluation/student/evaluation.json").read_text(encoding="utf-8"))[0]
    hour.note("in all", sum(hour.steps.values()))
    return {"seconds": hour.steps, "results": results, "evaluated": evaluated, "bad images": bad, "same again": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", help="Parquet files with images and their `label`, as a pattern")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--folder", type=Path, help="to work in, and to keep")
    arguments = parser.parse_args()
    images = datasets.Dataset.from_parquet(sorted(glob.glob(arguments.files)))
    images = images.rename_columns({arguments.image_column: "image"})
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        folder.mkdir(exist_ok=True)
        outcome = play(images, folder, arguments.short)
        (folder / "hour.json").write_text(json.dumps(outcome, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({key: outcome[key] for key in ("bad images", "same again")}, ensure_ascii=False))


if __name__ == "__main__":
    main()
