"""Short runs as launchers start them, and what they have come to."""

import json
import os

import datasets
import pytest
import torch
import yaml
from accelerate import DistributedType
from accelerate.state import PartialState
from helpers import DIGITS, ROOT, settings, small_student, timm_swin
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from scalekd_hf import ScaleKDTrainer
from scalekd_hf.training import setup
from scalekd_hf.training.sharding import local_part


pytest.importorskip("deepspeed")


TERMS = ("loss", "task", "logit", "penultimate_spatial", "penultimate_frequency", "last_spatial", "last_frequency")


LAUNCH = ROOT / "recipes" / "accelerate"


def zero(name):
    """A configuration of the recipes, in which even the smallest parameters are partitioned."""
    config = json.loads((LAUNCH / f"{name}.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


ZERO = ("zero1", "zero2", "zero3", "zero3_offload")


WAYS = {"ddp": {}, **{name: {"deepspeed": zero(name)} for name in ZERO}, "fsdp2": {}}


def use_fsdp2():
    """What `accelerate launch --config_file recipes/accelerate/fsdp2.yaml` sets, in this process.

    Accelerate gives FSDP to processes with GPUs alone, though torch's runs on the CPU as well: there these pass for such.
    """
    config = yaml.safe_load((LAUNCH / "fsdp2.yaml").read_text())["fsdp_config"]
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        **{name.upper(): str(value).lower() for name, value in config.items()},
    }
    os.environ |= {name.upper(): config[name] for name in ("fsdp_auto_wrap_policy", "fsdp_state_dict_type")}
    if torch.cuda.is_available():
        return
    begin = PartialState.__init__

    def begin_as_with_gpus(state, *args, **kwargs):
        begin(state, *args, **kwargs)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = begin_as_with_gpus
    setup.check_processes = lambda args: None  # refuses FSDP on the CPU


def tapped_student(**changes):
    """Tapped where no ReLU has its input on the other side of 0 in two processes than in one."""
    return small_student(taps=("stages.1", "stages.3.downsample.0"), **changes)


def train(folder, way, batch=4, resume=None, streaming=False, student=tapped_student, teacher=timm_swin, **changes):
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    if way == "fsdp2":
        use_fsdp2()
    files = sorted(str(file) for file in DIGITS.glob("train-*.parquet"))
    data = datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming)
    options = {"per_device_train_batch_size": batch, "max_steps": 5, "optim": "sgd", "learning_rate": 0.02}
    options |= {"save_strategy": "steps", "save_steps": 2, **WAYS[way], **changes}
    torch.manual_seed(0)
    trainer = ScaleKDTrainer(student(), teacher(), settings(folder, **options), data)
    logits = set()
    if "torch_compile" not in options:  # which would compile all again for what the hook has added
        trainer.distiller.student.register_forward_hook(lambda module, args, output: logits.add(str(output[2].dtype)))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if trainer.is_world_process_zero():
        sharded = [p for p in trainer.model.parameters() if hasattr(p, "ds_tensor") or isinstance(p, DTensor)]
        result = {
            "history": [entry for entry in trainer.state.log_history if "loss" in entry],
            "logits": sorted(logits),
            "world_size": trainer.args.world_size,
            "kind": str(trainer.accelerator.distributed_type),
            "partitioned": len(sharded),
            "teacher_parts": part_of(trainer.model.teacher),
            "parameters": len(list(trainer.model.parameters())),
        }
        (folder / "result.json").write_text(json.dumps(result))
    return trainer.state.log_history


def part_of(teacher):
    """The share of the teacher's parameters that this process keeps."""
    parameters = [
        (local_part(getattr(p, "ds_tensor", p)).numel(), getattr(p, "ds_numel", p.numel()))
        for p in teacher.parameters()
    ]
    return sum(held for held, _ in parameters) / sum(whole for _, whole in parameters)


def result(folder):
    return json.loads((folder / "result.json").read_text())


def assert_without_teacher(checkpoint, way):
    """No file of a checkpoint of two processes under DeepSpeed has the teacher, nor has the optimiser anything of it."""
    (folder,) = checkpoint.glob("global_step*")
    for file in folder.glob("*model_states.pt"):
        names = torch.load(file, weights_only=False)["module"]
        assert names and all(name.startswith(("student.", "heads.")) for name in names)
    trained = sum(tensor.numel() for tensor in weights_of(small_student().model, checkpoint))
    states = [torch.load(file, weights_only=False) for file in folder.glob("*optim_states.pt")]
    masters = [state["optimizer_state_dict"] for state in states]
    kind = "fp32_flat_groups" if way == "zero3" else "single_partition_of_fp32_groups"
    held = sum(group.numel() for master in masters for group in master[kind])
    assert len(states) == 2 and trained <= held < trained + 200  # and a little padding


def weights_of(student, checkpoint):
    """The parameters of a student, and of the heads in a checkpoint."""
    buffers = {"running_mean", "running_var", "num_batches_tracked"}
    heads = load_file(checkpoint / "mimicking_heads.safetensors")
    kept = [tensor for name, tensor in heads.items() if name.rsplit(".", 1)[-1] not in buffers]
    return [*student.parameters(), *kept]
