"""Runs that are killed at random times and gone on with, against the same runs left alone: what differs at the end.

python benchmarks/faults.py [--kills 100] [--seed 0]

A run has settings drawn at random (workers, moving average, mixing, accumulation, best model, how often it saves and evaluates, a
stream or a data set in memory), and is killed by SIGKILL, SIGTERM or Ctrl-C at random times, until it ends or has been killed five
times. It always goes on as the documents say: the same call again, with `resume_from_checkpoint=True` after SIGKILL. Then compared are,
to the bit, all tensors of its last checkpoint and of the student that it ends with, and its log but for times and its closing line; and listed is what lies
in its folder that the other's lacks. Digits, a small Swin that teaches a small ConvNeXt; one core.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file

from scalekd_hf import ScaleKDConfig, ScaleKDTrainer
from scalekd_hf.training.run_folder import last_checkpoint


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers import DIGITS, small_student, timm_swin
from processes import Started


INTERRUPTED = ("KeyboardInterrupt", "RunCancelled")  # what a process ends with after Ctrl-C
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
KILLS_OF_A_RUN = 5
TIMES = ("images_per_second", "data_wait", "runtime", "per_second")  # what may differ in a log


def drawn(rng: random.Random) -> dict[str, Any]:
    """Settings of a run, and "stream": whether its data is one."""
    saves = rng.choice([1, 2, 3])
    settings: dict[str, Any] = {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": rng.choice([1, 2]),
        "dataloader_num_workers": rng.choice([0, 2]),
        "shuffle_buffer_size": 5,
        "save_steps": saves,
        "eval_strategy": "steps",
        "eval_steps": saves * rng.choice([1, 2]),
        "logging_steps": rng.choice([1, 5]),
        "rand_augment": 9,
        "teacher_drop_path": 0.3,
        "stream": rng.random() < 0.7,
    }
    settings |= rng.choice([{}, {"ema_decay": 0.9}])
    settings |= rng.choice([{}, {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}])
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_total_limit": 2}
    settings |= rng.choice([{}, {**best, "eval_steps": saves}])
    return settings


def train(folder: Path, settings: dict[str, Any], shards: list[str]) -> None:
    """Train as far as it goes, and say at the end what was logged."""
    torch.manual_seed(0)
    given = dict(settings)
    data = datasets.load_dataset("parquet", data_files=shards, split="train", streaming=given.pop("stream"))
    fixed = {
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "steps",
        "stem_norm": "layer",
    }
    args = ScaleKDConfig(str(folder), learning_rate=1e-3, per_device_eval_batch_size=8, **fixed, **given)
    trainer = ScaleKDTrainer(small_student(drop_path_rate=0.2), timm_swin(), args, data, data)
    is_stopped = (folder / "_interrupted.json").exists()
    trainer.train(resume_from_checkpoint=None if is_stopped or not last_checkpoint(folder) else True)
    trainer.save_model()
    trainer.save_state()


def killed(
    folder: Path, settings: dict[str, Any], shards: list[str], seconds: float, rng: random.Random
) -> Counter[str]:
    """Train, and kill it again and again; how often by which signal, and "lost" where it could not go on."""
    kills = Counter[str]()
    while True:
        run = Started(folder.parent / "output", train, folder, settings, shards)
        (pid,) = run.pids
        how = rng.choice(SIGNALS) if kills.total() < KILLS_OF_A_RUN else None
        if how is not None:
            time.sleep(rng.uniform(0, seconds))
            is_over = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            if not is_over:
                os.kill(pid, how)
                kills[how.name] += 1
        (outcome,) = run.wait()
        if outcome.status == 0:
            return kills
        is_stopped = outcome.status in (75, -signal.SIGKILL, -signal.SIGTERM)
        if not is_stopped and outcome.text.rstrip().rpartition("\n")[2].rpartition(".")[2] not in INTERRUPTED:
            print(f"could not go on: {outcome.text[-500:]}", flush=True)
            return kills + Counter(lost=1)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that a run has come to, by file and name."""
    found = {}
    checkpoint = Path(str(last_checkpoint(folder)))
    for file in (folder / "model.safetensors", *sorted(checkpoint.glob("*.safetensors"))):
        found |= {f"{file.relative_to(folder)}/{name}": tensor for name, tensor in load_file(file).items()}
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    return found | {f"optimizer/{i}/{name}": value for i, state in optimizer.items() for name, value in state.items()}


def log_of(folder: Path) -> list[dict[str, Any]]:
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    kept = [
        {k: v for k, v in entry.items() if not k.endswith(TIMES)}
        for entry in state["log_history"]
        if "train_loss" not in entry
    ]
    return [*kept, {"best": state["best_global_step"], "metric": state["best_metric"]}]


def is_earlier(file: Path, last: str | None) -> bool:
    return file.name.startswith("checkpoint-") and str(file) != last


def compared(whole: Path, other: Path) -> Counter[str]:
    """Tensors, those that differ, and entries of the log that do; files that one of the folders has alone."""
    one, two = tensors(whole), tensors(other)
    differing = sum(name not in one or name not in two or not torch.equal(one[name], two[name]) for name in one | two)
    logs = log_of(whole), log_of(other)
    missing = [entry for one, two in (logs, logs[::-1]) for entry in one if entry not in two]
    # Where it was stopped, a run has a checkpoint that the other lacks: of those, the last is compared.
    last = last_checkpoint(whole), last_checkpoint(other)
    files = [
        {
            str(file.relative_to(folder))
            for file in (*folder.glob("*"), *Path(str(name)).rglob("*"))
            if not is_earlier(file, name)
        }
        for folder, name in zip((whole, other), last, strict=True)
    ]
    left = files[0] ^ files[1]
    if differing or missing or left:
        print(f"{differing} tensors, entries of the log {missing}, files {sorted(left)[:5]}", flush=True)
    return Counter(tensors=len(one), differing=differing, entries=len(missing), left=len(left))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all runs together, at least")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    rng, counts, runs, begun = random.Random(arguments.seed), Counter[str](), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        images = datasets.Dataset.from_parquet(str(DIGITS / "train-00000-of-00004.parquet"), cache_dir=name)
        shards = [str(Path(name, f"{index}.parquet")) for index in range(3)]
        for index, shard in enumerate(shards):
            images.shard(9, index).select(range(12)).to_parquet(shard, batch_size=4)
        while counts["SIGKILL"] + counts["SIGTERM"] + counts["SIGINT"] < arguments.kills:
            settings, whole, other = drawn(rng), Path(name, "whole"), Path(name, "killed")
            start = time.monotonic()
            (outcome,) = Started(Path(name, "output"), train, whole, settings, shards).wait()
            if outcome.status:
                raise RuntimeError(f"A run left alone has failed: {outcome.text[-2000:]}")
            kills = killed(other, settings, shards, time.monotonic() - start, rng)
            counts += kills
            counts += Counter() if kills["lost"] else compared(whole, other)
            runs += 1
            shutil.rmtree(whole), shutil.rmtree(other)
    kinds = ", ".join(f"{counts[how.name]} {how.name}" for how in SIGNALS)
    print(
        f"{sum(counts[how.name] for how in SIGNALS)} kills ({kinds}) in {runs} runs: {counts['lost']} lost; {counts['differing']} of "
        f"{counts['tensors']} tensors and {counts['entries']} entries of the logs differ; {counts['left']} files left behind or "
        f"missing; {time.monotonic() - begun:.0f} s"
    )
    raise SystemExit(bool(counts["lost"] or counts["differing"] or counts["entries"] or counts["left"]))


if __name__ == "__main__":
    main()
