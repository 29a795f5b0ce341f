"""Times, memory and FLOPs of pieces of work, measured side by side in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from scalekd_hf.tools.flops import flops_of


Work = Callable[[], object]
MATRIX_SIDE = {"cuda": 8192, "cpu": 2048}
PRODUCTS = {"cuda": 10, "cpu": 1}  # in one timing: the host's part must not count


@dataclass(frozen=True)
class Times:
    """Seconds of one piece of work over the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half of the distance between the quartiles, over the median."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (third - first) / 2 / self.median


def interleave(works: Mapping[str, Work], rounds: int, device: torch.device, warm_up: int = 1) -> dict[str, Times]:
    """Time each piece of work once in every round, each round beginning with another one."""
    for work in works.values():
        for _ in range(warm_up):
            work()
    names, seconds = list(works), {name: [] for name in works}  # type: dict[str, list[float]]
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(time_once(works[name], device))
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def time_once(work: Work, device: torch.device) -> float:
    """Seconds until the device has done the work."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(work: Work, device: torch.device) -> float:
    """The most memory that is held at once during the work beyond what is held before it, GiB.

    On the CPU by torch's own record of every allocation, so weights and what other libraries hold do not count.
    """
    work()
    if device.type == "cuda":
        synchronise(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        synchronise(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**30


def graph_pools_gib() -> float:
    """What CUDA graphs hold for themselves, GiB: their replays allocate nothing."""
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if segment["segment_pool_id"] != (0, 0)) / 2**30


def tflops_of(work: Work) -> float:
    """TFLOP of the work, as plans count them."""
    return flops_of(work) / 1e12


def matrix_product(device: torch.device, dtype: torch.dtype) -> tuple[Work, float]:
    """Square matrix products, the yardstick of utilisation, and their TFLOP."""
    side, number = MATRIX_SIDE[device.type], PRODUCTS[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def multiply() -> None:
        for _ in range(number):
            left @ right

    return multiply, number * 2 * side**3 / 1e12


def without_tf32() -> None:
    """Products and convolutions of float32 in float32 on a GPU."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def describe(device: torch.device) -> str:
    """The machine, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}"
