"""Two processes and their ways of sharing the work equal one, and what they save is the student alone."""

import json
import os

import datasets
import pytest
import torch
from helpers import DIGITS, settings, small_student, timm_swin
from processes import in_processes
from safetensors.torch import load_file

from scalekd_hf import ScaleKDTrainer


pytest.importorskip("deepspeed")

TERMS = ("loss", "task", "logit", "penultimate_spatial", "penultimate_frequency", "last_spatial", "last_frequency")


def zero(stage):
    """A configuration of DeepSpeed in which even the smallest parameters are partitioned."""
    parts = {
        "stage": stage,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    auto = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    return {"zero_optimization": parts, "zero_allow_untested_optimizer": True, **auto}


WAYS = {"ddp": {}, "zero1": {"deepspeed": zero(1)}, "zero2": {"deepspeed": zero(2)}, "zero3": {"deepspeed": zero(3)}}


def train(folder, way, batch=4, resume=None, **changes):
    os.environ["DS_ACCELERATOR"] = "cpu"
    files = sorted(str(file) for file in DIGITS.glob("train-*.parquet"))
    data = datasets.load_dataset("parquet", data_files=files, split="train")
    options = {"per_device_train_batch_size": batch, "max_steps": 5, "optim": "sgd", "learning_rate": 0.1}
    options |= {"save_strategy": "steps", "save_steps": 2, **WAYS[way], **changes}
    torch.manual_seed(0)
    trainer = ScaleKDTrainer(small_student(), timm_swin(), settings(folder, **options), data)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if trainer.is_world_process_zero():
        sharded = [name for name, p in trainer.model.named_parameters() if getattr(p, "ds_tensor", None) is not None]
        result = {
            "history": [entry for entry in trainer.state.log_history if "loss" in entry],
            "world_size": trainer.args.world_size,
            "kind": str(trainer.accelerator.distributed_type),
            "partitioned": len(sharded),
            "parameters": len(list(trainer.model.parameters())),
        }
        (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in one process, on digits in the order of a data set in memory."""
    folder = tmp_path_factory.mktemp("alone")
    (outcome,) = in_processes(folder, train, folder, "ddp", 8)
    assert outcome.status == 0, outcome.text[-3000:]
    return folder


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_equal_one(tmp_path, alone, way):
    for outcome in in_processes(tmp_path, train, tmp_path, way, processes=2):
        assert outcome.status == 0, outcome.text[-3000:]
    one, two = result(alone), result(tmp_path)
    assert two["world_size"] == 2
    assert two["kind"] == ("DistributedType.MULTI_CPU" if way == "ddp" else "DistributedType.DEEPSPEED")
    assert two["partitioned"] == (two["parameters"] if way == "zero3" else 0)
    for first, second in zip(one["history"], two["history"], strict=True):
        for name in TERMS:
            assert second[name] == pytest.approx(first[name], rel=1e-5), name
    mine, theirs = load_file(alone / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-4, atol=1e-6), name
