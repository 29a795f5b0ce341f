"""Parameters in parts: FSDP2, ZeRO-3, and a teacher that is too large for each process."""

import json
import os

import pytest
import torch
from families import FAMILIES, large_weights
from helpers import settings, small_student, timm_swin
from launched_runs import TERMS, assert_without_teacher, result, train, zero
from processes import in_processes
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from scalekd_hf import load_student, load_teacher
from scalekd_hf.models.saving import save_student
from scalekd_hf.training.averaging import AveragedStudent
from scalekd_hf.training.model import build_model
from scalekd_hf.training.sharding import full_state, shard_fsdp2


def test_an_optimiser_in_parts_is_not_given_to_other_processes(tmp_path):
    for outcome in in_processes(tmp_path, train, tmp_path, "ddp", processes=2):
        assert outcome.status == 0, outcome.text[-3000:]
    resume = str(tmp_path / "checkpoint-4")
    for outcome in in_processes(tmp_path, lambda: train(tmp_path, "zero2", resume=resume), processes=2):
        assert outcome.status == 1 and "is whole: 2 processes under DeepSpeed or FSDP cannot take it" in outcome.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fp16": True}, "Mixed precision is 'fp16'"),
        ({"timm_optim": "lamb"}, "flat parts"),
        ({"shard_teacher": True}, "`shard_teacher` needs FSDP2"),
    ],
)
def test_what_an_engine_would_make_something_else_of_is_refused(tmp_path, changes, message):
    def refused():
        with pytest.raises(ValueError, match=message):
            train(tmp_path, "zero2", **changes)

    (outcome,) = in_processes(tmp_path, refused, group=True)
    assert outcome.status == 0, outcome.text[-3000:]


def sharded_steps(folder, teacher_too=False, bf16=False):
    """Five steps on this process's half of each batch, with everything that trains sharded by FSDP2."""
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    model = build_model(small_student(), timm_swin(), settings(folder, use_cpu=False)).train()
    averaged = AveragedStudent(model.student, 0.5)
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        for module in (
            *model.student.model.stages,
            model.heads.penultimate_spatial,
            model.heads.last_spatial,
            model.student,
            model.heads,
            model,
        ):
            fully_shard(module, mesh=mesh)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert not any(isinstance(parameter, DTensor) for parameter in model.teacher.parameters())
    if teacher_too:
        whole = sum(parameter.numel() for parameter in model.teacher.parameters())
        shard_fsdp2(model.teacher, torch.device("cpu"))
        held = (p.to_local() if isinstance(p, DTensor) else p for p in model.teacher.parameters())
        assert sum(part.numel() for part in held) < 0.6 * whole
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.005), []
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        pixels, labels = torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8)
        half = slice(8 // size * rank, 8 // size * (rank + 1))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(pixels[half], labels[half]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with CommDebugMode() as sent:
            averaged.on_step_end(None, None, None)
        assert sent.get_total_counts() == 0
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / size)
    state, average = full_state(model.student.model), averaged.state_dict()
    if rank == 0:
        save_student(model.student, folder / "average", average)
        save_student(model.student, folder, state)
        (folder / "losses.json").write_text(json.dumps(losses))


@pytest.mark.parametrize(("teacher_too", "bf16"), [(False, False), (True, False), (True, True)])
def test_fsdp2_equals_one_process_and_saves_the_whole_student(tmp_path, teacher_too, bf16):
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        how = folder, teacher_too and processes > 1, bf16
        for outcome in in_processes(folder, sharded_steps, *how, processes=processes, group=True):
            assert outcome.status == 0, outcome.text[-3000:]
    one, two = (json.loads((tmp_path / name / "losses.json").read_text()) for name in "12")
    assert two == pytest.approx(one, rel=5e-3 if bf16 else 1e-5) and len(one) == 5
    for part in ("", "average"):
        mine, theirs = (load_student(str(tmp_path / name / part), pretrained=True).state_dict() for name in "12")
        assert max((mine[name] - theirs[name]).abs().max() for name in mine) < (0.02 if bf16 else 1e-4)


@pytest.fixture(scope="module")
def in_bf16(tmp_path_factory):
    """The losses of two processes in bf16 without an engine."""
    folder = tmp_path_factory.mktemp("in_bf16")
    for outcome in in_processes(folder, lambda: train(folder, "ddp", bf16=True), processes=2):
        assert outcome.status == 0, outcome.text[-3000:]
    return result(folder)["history"]


def assert_same_losses(one, other):
    for first, second in zip(one, other, strict=True):
        assert [second[name] for name in TERMS] == pytest.approx([first[name] for name in TERMS], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["zero2", "zero3"])
def test_bf16_under_an_engine_is_that_of_ddp_and_the_student_is_saved_in_full_precision(tmp_path, in_bf16, way):
    config = zero(way)
    config["zero_optimization"]["memory_efficient_linear"] = False  # it rounds before it adds a bias
    for outcome in in_processes(tmp_path, lambda: train(tmp_path, way, bf16=True, deepspeed=config), processes=2):
        assert outcome.status == 0, outcome.text[-3000:]
    assert_same_losses(in_bf16, result(tmp_path)["history"])
    assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "model.safetensors").values())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["zero2", "fsdp2"])
def test_bf16_is_not_turned_off_by_an_engine_as_it_is_on_a_gpu(tmp_path, way):
    """DeepSpeed asks for the autocast of CUDA, which no CPU has on, and turns it off where its configuration has none."""

    def run_it():
        is_enabled = torch.is_autocast_enabled
        torch.is_autocast_enabled = lambda device_type="cpu": is_enabled(device_type)
        train(tmp_path, way, bf16=True, max_steps=2)

    for outcome in in_processes(tmp_path, run_it, processes=2):
        assert outcome.status == 0, outcome.text[-3000:]
    assert result(tmp_path)["logits"] == ["torch.bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["zero2", "zero3"])
def test_bf16_as_accelerate_launches_deepspeed_is_that_of_ddp(tmp_path, in_bf16, way):
    config = zero(way)
    config["zero_optimization"]["memory_efficient_linear"] = False
    (tmp_path / "engine.json").write_text(json.dumps(config))

    def launched():
        names = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "engine.json")}
        os.environ.update(names)
        train(tmp_path, "ddp", bf16=True)

    for outcome in in_processes(tmp_path, launched, processes=2):
        assert outcome.status == 0, outcome.text[-3000:]
    assert result(tmp_path)["kind"] == "DistributedType.DEEPSPEED"
    assert_same_losses(in_bf16, result(tmp_path)["history"])


def shares_of_families():
    torch.distributed.init_process_group("gloo")
    for name, make in FAMILIES.items():
        teacher = load_teacher(large_weights(make()))
        tokens = torch.randn(2, teacher.penultimate_grid[0] * teacher.penultimate_grid[1], teacher.penultimate_dim)
        tokens.requires_grad_()
        pixels = torch.randn(2, 3, *teacher.spec.size)

        def compute(teacher=teacher, tokens=tokens, pixels=pixels):
            last, _ = teacher(pixels)
            projected = teacher.last_stage(tokens)
            return last, projected, torch.autograd.grad(projected.square().sum(), tokens)[0]

        before, whole = compute(), sum(parameter.numel() for parameter in teacher.parameters())
        shard_fsdp2(teacher, torch.device("cpu"))
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in teacher.parameters())
        assert held < 0.8 * whole, (name, held / whole)
        assert all(torch.equal(a, b) for a, b in zip(before, compute(), strict=True)), name


@pytest.mark.slow
def test_teachers_of_all_families_can_be_kept_in_parts_and_compute_the_same(tmp_path):
    for outcome in in_processes(tmp_path, shares_of_families, processes=2):
        assert outcome.status == 0, outcome.text[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["zero3", "fsdp2"])
def test_a_teacher_in_parts_under_an_engine_equals_one_process(tmp_path, alone, way):
    for outcome in in_processes(tmp_path, lambda: train(tmp_path, way, shard_teacher=True), processes=2):
        assert outcome.status == 0, outcome.text[-3000:]
    assert_same_losses(result(alone)["history"], result(tmp_path)["history"])
    if way == "zero3":
        assert_without_teacher(tmp_path / "checkpoint-4", way)
    # FSDP2 leaves what is in no block whole.
    assert result(tmp_path)["teacher_parts"] == pytest.approx(0.5, abs=0.01 if way == "zero3" else 0.1)
