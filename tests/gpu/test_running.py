"""Runs on the card: what they are fed with, and that they go on to the bit."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, run, settings, small_student, timm_swin
from safetensors.torch import load_file

from scalekd_hf import ScaleKDTrainer


pytestmark = pytest.mark.gpu


def trainer_for(folder, data, device, **options):
    torch.manual_seed(0)
    args = settings(folder, use_cpu=device.type == "cpu", **options)
    return ScaleKDTrainer(small_student(drop_path_rate=0.2), timm_swin(), args, data)


def test_batches_come_pinned_and_are_normalised_on_the_device(tmp_path, digits, device):
    trainer = trainer_for(tmp_path, digits, device)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["pixel_values"].dtype == torch.uint8 and batch["pixel_values"].device.type == "cpu"
    assert all(value.is_pinned() == (device.type == "cuda") for value in batch.values() if torch.is_tensor(value))
    inputs = trainer.feed.training_inputs(batch)
    assert all(inputs[name].device.type == device.type for name in ("pixel_values", "labels"))
    assert inputs["pixel_values"].dtype == torch.float32


def test_what_the_cards_random_numbers_decide_goes_on_after_a_resume(tmp_path, digits, device):
    """Stochastic depth of the student is drawn on the device."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "full_determinism": True, "ema_decay": 0.9}
    weights = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        trainer = trainer_for(tmp_path, digits, device, **options)
        trainer.train(resume_from_checkpoint=resume)
        weights.append({name: tensor.cpu() for name, tensor in trainer.model.state_dict().items()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_skipped_step_of_fp16_does_not_end_the_run_and_its_scale_is_resumed(tmp_path, digits, device):
    options = {"save_strategy": "steps", "save_steps": 10, "max_steps": 20, "full_determinism": True}
    options["fp16" if device.type == "cuda" else "bf16"] = True  # Accelerate has no fp16 on a CPU
    found = []
    for resume in (None, str(tmp_path / "checkpoint-10")):
        trainer = trainer_for(tmp_path, digits, device, **options)
        if device.type == "cuda":
            trainer.accelerator.scaler = torch.amp.GradScaler(
                "cuda", init_scale=2.0**24
            )  # too large: steps are skipped
        trainer.train(resume_from_checkpoint=resume)
        scale = trainer.accelerator.scaler.get_scale() if device.type == "cuda" else 1.0
        assert trainer.state.global_step == 20 and scale < 2.0**24
        found.append((scale, {name: tensor.cpu() for name, tensor in trainer.model.state_dict().items()}))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


def test_the_quickstart_killed_and_resumed_gives_the_same_weights(tmp_path, device, record_property):
    words = [sys.executable, "recipes/distill.py", "recipes/configs/quickstart.yaml", "--max_steps", "50"]
    words += ["--baseline", "false", "--save_strategy", "steps", "--save_steps", "10", "--disable_tqdm", "true"]
    words += ["--full_determinism", "true", "--eval_strategy", "no", "--use_cpu", str(device.type == "cpu")]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    logs = [tmp_path / "whole.log", tmp_path / "killed.log"]
    with logs[0].open("w") as first, logs[1].open("w") as second:
        options = {"cwd": ROOT, "env": environment, "stderr": subprocess.STDOUT}
        uninterrupted = subprocess.Popen([*words, "--output_dir", str(whole)], stdout=first, **options)
        started = subprocess.Popen([*words, "--output_dir", str(killed)], stdout=second, **options)
    while not (killed / "checkpoint-20").exists() and started.poll() is None:
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL, logs[1].read_text()[-3000:]
    assert not (killed / "model.safetensors").exists()
    finished = run(*words, "--output_dir", killed, "--resume_from_checkpoint", "true", env=environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert uninterrupted.wait(timeout=300) == 0, logs[0].read_text()[-3000:]
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    unequal = [name for name in expected if not torch.equal(expected[name], found[name])]
    record_property("tensors that differ after kill -9 and resume", f"{len(unequal)} of {len(expected)}")
    assert not unequal
