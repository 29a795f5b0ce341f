"""Versions and devices, for a bug report."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version


__all__ = ["main"]

PACKAGES = (
    *("scalekd-hf", "torch", "torchvision", "transformers", "accelerate", "timm", "datasets", "evaluate"),
    *("huggingface-hub", "safetensors", "numpy", "pillow", "deepspeed"),
)


def main(words: Sequence[str] | None = None) -> None:
    """Print them."""
    parser = argparse.ArgumentParser(prog="scalekd env", description=__doc__)
    parser.add_argument("--version", action="store_true", help="the version of this package alone")
    if parser.parse_args(words).version:
        print(version("scalekd-hf"))
        return
    rows = {"system": platform.platform(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            rows[package] = version(package)
        except PackageNotFoundError:
            rows[package] = "not installed"
    for found in (lambda: rows, devices):  # the latter needs a torch that can be loaded
        for name, value in found().items():
            print(f"{name:<18}{value}")


def devices() -> dict[str, str]:
    """What torch computes on."""
    import torch

    rows = {"CPU threads": str(torch.get_num_threads()), "CUDA of torch": str(torch.version.cuda)}
    if not torch.cuda.is_available():
        return rows | {"GPUs": "none"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows[f"GPU {index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return rows
