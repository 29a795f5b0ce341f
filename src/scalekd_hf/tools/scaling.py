"""What a run sends between GPUs in a step, and how it would scale: an estimate from FLOPs and bandwidths."""

from __future__ import annotations

from typing import Any


__all__ = ["communication", "memory_by_launcher", "scaling"]

GPUS_PER_NODE = 8
FLOPS = 4e14, 2.7e13  # a second of one H100, in half precision and in float32 without TF32, at 40% of its peaks
NODE_BANDWIDTH = 3e11  # bytes a second of one GPU to the others of its machine
NETWORK_BANDWIDTH = 4e10  # bytes a second of one GPU to other machines, 400 Gb/s for each at 80%
BACKWARD = 2 / 3  # of a step, which hides the exchange of gradients
CORES_PER_GPU = 16
IMAGES_PER_CORE = 520  # a second: decoded and augmented, `benchmarks/data.py`

# How often the trained parameters cross the links of a GPU in a step: gradients are reduced and the results
# spread, which is once each; where parameters are sharded, they are fetched once more for the backward pass.
CROSSINGS = {"DDP": 2, "ZeRO-1, ZeRO-2": 2, "ZeRO-3, FSDP2": 3}


def communication(parameters: int, processes: int, bytes_each: int = 4) -> dict[str, float]:
    """GB that each GPU sends in an optimiser step without accumulation, for each launcher.

    Args:
        parameters: that are trained: student and projectors. The teacher is whole on each GPU and is never sent.
        processes: GPUs.
        bytes_each: of a gradient.
    """
    share = (processes - 1) / processes
    return {name: times * parameters * bytes_each * share / 1e9 for name, times in CROSSINGS.items()}


def memory_by_launcher(parts: dict[str, float], processes: int) -> dict[str, float]:
    """GiB on each GPU under each launcher, from what `Plan.memory_gib` says of one process that holds all."""
    whole, saved = sum(parts.values()), 1 - 1 / processes
    zero1 = whole - saved * parts["optimiser"]
    zero2 = zero1 - saved * parts["gradients"]
    zero3 = zero2 - saved * parts["student and projectors"]
    return {
        "DDP": whole,
        "ZeRO-1": zero1,
        "ZeRO-2": zero2,
        "ZeRO-3, FSDP2": zero3,
        "and its optimiser offloaded": zero3 - parts["optimiser"] / processes,
        "ZeRO-3, FSDP2, shard_teacher": zero3 - saved * parts["teacher"],
    }


def scaling(
    gflops: float, batch: int, parameters: int, accumulation: int = 1, half: bool = True
) -> dict[str, dict[str, Any]]:
    """Expected throughput with DDP on 8, 32 and 256 GPUs.

    Args:
        gflops: of a training step, per image.
        batch: images of one GPU and micro-batch.
        parameters, accumulation: see `communication`; micro-batches of a step.
        half: computed in bf16 or fp16.

    Returns:
        For each number of GPUs: images a second, efficiency (the share of a step that is computing), CPU cores that
        each GPU needs for its images, and what limits the run.
    """
    rows = {}
    computing = accumulation * batch * gflops * 1e9 / FLOPS[0 if half else 1]
    cores = batch * accumulation / computing / IMAGES_PER_CORE
    for processes in (8, 32, 256):
        sent = communication(parameters, processes)["DDP"] * 1e9
        sending = sent / NODE_BANDWIDTH
        if processes > GPUS_PER_NODE:  # of a ring through all, each machine's GPUs share what leaves it
            sending = max(sending, sent / GPUS_PER_NODE / NETWORK_BANDWIDTH)
        exposed = max(0.0, sending - BACKWARD * computing / accumulation)
        step = computing + exposed
        limit = "network" if exposed > 0 else "computing"
        needed = cores * computing / step
        if needed > CORES_PER_GPU:  # the GPUs wait for images
            limit, step = "data", cores * computing / CORES_PER_GPU
        rows[str(processes)] = {
            "images_per_second": processes * batch * accumulation / step,
            "efficiency": computing / step,
            "cores_per_gpu": needed,
            "limit": limit,
        }
    return rows
