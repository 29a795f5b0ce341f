"""FSDP2 and DeepSpeed through the Trainer on one card, SyncBatchNorm in a group of one, and the export of a student there."""

import json
import os

import pytest
import torch
from helpers import images, run, settings, small_student, timm_swin
from processes import as_main, free_port, in_processes
from safetensors.torch import load_file
from torch.export.passes import move_to_device_pass

from scalekd_hf import load_student
from scalekd_hf.tools.export import export_student
from scalekd_hf.training.model import build_model


pytestmark = pytest.mark.gpu


def train(device, *words):
    """One process on a card; two on a CPU, where Accelerate takes one for no group."""
    words = ["tests/scripts/engine_run.py", *words]
    if device.type == "cpu":
        for outcome in in_processes(words[2], as_main, *words, processes=2):
            assert outcome.status == 0, outcome.text[-3000:]
        return
    group = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    environment = os.environ | {name: str(value) for name, value in {**group, "MASTER_PORT": free_port()}.items()}
    finished = run("python", *words, env=environment)
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The losses of the same run without an engine."""
    folder = tmp_path_factory.mktemp("plain")
    finished = run("python", "tests/scripts/engine_run.py", "ddp", folder)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads((folder / "ddp" / "result.json").read_text())["history"]


@pytest.mark.parametrize("way", ["fsdp2", "zero2", "zero3"] if torch.cuda.is_available() else ["fsdp2"])
def test_an_engine_trains_as_no_engine_does_and_resumes(tmp_path, device, plain, way):
    pytest.importorskip("deepspeed")
    train(device, way, tmp_path)
    engine = json.loads((tmp_path / way / "result.json").read_text())
    assert engine["kind"] == ("DistributedType.FSDP" if way == "fsdp2" else "DistributedType.DEEPSPEED")
    assert engine["logits"] == ["torch.bfloat16"]
    for first, second in zip(plain, engine["history"], strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=5e-3)  # in bf16
    before = load_file(tmp_path / way / "model.safetensors")
    train(device, way, tmp_path, "checkpoint-4")
    after = load_file(tmp_path / way / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], rtol=1e-4, atol=1e-6) for name in before)


def test_synchronised_batchnorms_of_one_process_are_plain_ones(device):
    torch.manual_seed(0)
    student = load_student(
        "timm/resnet18", layers=(1, 1, 1, 1), channels=(8, 12, 16, 24), num_classes=10, image_size=64
    )
    args = settings("unused", use_cpu=device.type == "cpu", stem_norm="batch")
    model = build_model(student, timm_swin(img_size=64), args).to(device).train()
    pixels, labels = images(4, 64).to(device), torch.arange(4, device=device)
    plain = model(pixels, labels).loss
    model.synchronise_batchnorms("all")
    norms = [module for module in model.modules() if isinstance(module, torch.nn.SyncBatchNorm)]
    assert len(norms) > 8
    if device.type == "cuda":
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        assert torch.allclose(model(pixels, labels).loss, plain, rtol=1e-4)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_a_student_of_the_card_is_exported_and_its_program_runs_there(tmp_path, device):
    student = small_student().to(device).eval()
    if device.type == "cuda":
        with pytest.raises(ValueError, match="must be in float32 on the CPU"):
            export_student(student, tmp_path, ("torch",))
    export_student(student.cpu(), tmp_path, ("torch",))
    program = move_to_device_pass(torch.export.load(tmp_path / "model.pt2"), device)
    pixels = images(3).to(device)
    expected = student.to(device).classify(pixels)
    assert (program.module()(pixels) - expected).abs().max() < 1e-4 * expected.abs().max()
