"""A training step asks the device for nothing: the host never waits for a value between two logs."""

import traceback

import pytest
import torch
from helpers import images, settings, small_student, some_slow, timm_swin, timm_vit, transformers_swin
from processes import in_child, run_script
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageClassification, TrainerCallback

from scalekd_hf import ScaleKDTrainer, load_student, load_teacher
from scalekd_hf.training.model import build_model


# Methods that copy a tensor there; on a CPU tensor they show in no dispatch.
TO_THE_HOST = ("tolist", "cpu", "numpy", "item")
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")  # each needs a value on the host
BY_INDEX = ("index", "index_put", "index_put_")  # how many entries a mask has is known on the device
# LAMB counts its steps in a tensor that stays on the CPU; labels are checked before they leave it.
ON_THE_HOST = ("timm/optim/_helpers.py", "scalekd_hf/data/labels.py")


class Waits(TorchDispatchMode):
    """Notes every operation that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found, self.operations, self.copies = [], 0, Copies(self.note)

    def note(self, name):
        places = [frame.filename for frame in traceback.extract_stack()]
        if not any(place.endswith(ON_THE_HOST) for place in places):
            self.found.append((name, places))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.operations += 1
        if name in WAITING or (name in BY_INDEX and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.note(name)
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.copies.__exit__(*error)


class Copies(TorchFunctionMode):
    """Notes the methods that copy a tensor to the host."""

    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", None) in TO_THE_HOST:
            self.note(function.__name__)
        return function(*args, **(kwargs or {}))


class Watch(TrainerCallback):
    """Runs a context from the start of step 2 to the end of step 4, which no log is in."""

    def __init__(self, enter, leave):
        self.enter, self.leave = enter, leave

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.enter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            self.leave()


def train(tmp_path, digits, enter, leave, **changes):
    args = settings(tmp_path, max_steps=6, logging_steps=6, per_device_train_batch_size=4, **changes)
    trainer = ScaleKDTrainer(small_student(), timm_swin(), args, digits)
    trainer.add_callback(Watch(enter, leave))
    trainer.train()


@pytest.mark.parametrize(
    "wait", [lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x.sum().item(), lambda x: x[x > 0]]
)
def test_a_wait_is_noted(wait):
    with Waits() as waits:
        wait(torch.ones(3))
    assert len(waits.found) >= 1


@pytest.mark.parametrize(
    "changes", some_slow([{"bf16": True, "ema_decay": 0.9, "max_grad_norm": 1.0}, {}, {"timm_optim": "lamb"}], 1)
)
def test_nothing_is_asked_of_the_device_between_two_logs(tmp_path, digits, changes):
    waits = Waits()
    train(tmp_path, digits, waits.__enter__, lambda: waits.__exit__(None, None, None), **changes)
    assert waits.operations > 1000
    assert waits.found == []


@pytest.mark.gpu
def test_torch_finds_no_synchronisation_in_a_step_on_a_gpu(tmp_path, digits, device):
    options = {"bf16": True, "ema_decay": 0.9, "max_grad_norm": 1.0}
    if device.type == "cpu":
        return train(tmp_path, digits, lambda: None, lambda: None, **options)
    mode = torch.cuda.set_sync_debug_mode
    try:
        train(tmp_path, digits, lambda: mode("error"), lambda: mode("default"), use_cpu=False, **options)
    finally:
        mode("default")


def test_channels_last_changes_the_order_in_memory_and_no_result(tmp_path, digits):
    trained, teacher = {}, timm_swin()
    for layout in (False, True):
        args = settings(tmp_path / str(layout), channels_last=layout, optim="sgd", save_strategy="steps", save_steps=2)
        torch.manual_seed(0)
        trainer = ScaleKDTrainer(small_student(), teacher, args, digits)
        trainer.train()
        stem = trainer.model.heads.penultimate_spatial.stem.conv.weight
        assert stem.is_contiguous(memory_format=torch.channels_last) == layout
        trainer.save_model()
        trained[layout] = trainer.student.state_dict()
        resumed = ScaleKDTrainer(small_student(), teacher, args, digits)
        resumed.train(resume_from_checkpoint=str(tmp_path / str(layout) / "checkpoint-2"))
        for name, tensor in resumed.student.state_dict().items():
            assert torch.equal(tensor, trained[layout][name]), name
    for name, tensor in trained[True].items():
        assert torch.allclose(tensor, trained[False][name], rtol=1e-4, atol=1e-6), name
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "True")
    assert model.config.num_labels == 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "teacher", "depth"),
    [
        ("convnext", timm_swin, {"depths": (1, 2, 1)}),  # the second block of two has its windows shifted
        ("resnet", timm_vit, {"depth": 3}),
        ("resnet", transformers_swin, {"depths": [1, 2, 1]}),
    ],
)
def test_a_step_compiles_as_one_graph_without_breaks_once(tmp_path, teacher, student, depth):
    outcome = in_child(tmp_path, _compile_and_count, teacher, student, depth)
    assert outcome.status == 0, outcome.text[-3000:]


def _compile_and_count(teacher, name, depth):
    from torch._dynamo.utils import counters

    options = {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32), "image_size": 64, "num_classes": 10}
    convnext = name == "convnext"
    student = small_student(depths=(1, 1, 1, 1)) if convnext else load_student("timm/resnet18", **options)
    model = build_model(student, load_teacher(teacher(**depth)), settings("unused")).train()
    counters.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # a break is an error
    pixels, labels = images(4, student.spec.size[0]), torch.arange(4)
    model(pixels, labels)
    for _ in range(3):
        compiled(pixels, labels).loss.backward()
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_every_lever_computes_the_same_both_ways():
    words = ["--student", "timm/resnet18", "--teacher", "timm/vit_tiny_patch16_224", "--image_size", 64, "--batch", 2]
    result = run_script("benchmarks/levers.py", *words, "--rounds", 1, "--device", "cpu")
    assert result.returncode == 0, result.stderr[-3000:]
    measured = [line.split()[0] for line in result.stdout.splitlines() if line.count("x") >= 1 and "%" in line]
    assert {"tail", "attention", "queries", "targets", "optimizer", "checkpointing"} <= set(measured)
