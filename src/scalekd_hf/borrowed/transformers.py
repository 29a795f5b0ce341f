"""Of transformers: models that are built and looked at whole, also under ZeRO-3, and the commits that they are from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.integrations import deepspeed as hf_deepspeed


__all__ = ["commit_of", "same_source", "whole_models"]


def commit_of(module: Any) -> str | None:
    """The commit on the Hub that a model was loaded from; None where it is from elsewhere."""
    commit: str | None = getattr(getattr(module, "config", None), "_commit_hash", None)
    return commit


def same_source(module: Any, other: Any) -> None:
    """Have a model that was made of another one say where that was loaded from."""
    module.config.name_or_path = other.config.name_or_path
    module.config._commit_hash = commit_of(other)


@contextmanager
def whole_models() -> Iterator[None]:
    """Models that transformers builds inside have whole parameters, also when ZeRO-3 is configured.

    The dry runs that look at a model need them; the engine partitions what trains when training starts.
    """
    kept: Any = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = kept
