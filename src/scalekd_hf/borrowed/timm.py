"""Of timm: the arguments and the configuration of a model, and the lists of ImageNet's classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from timm.models._hub import save_config_for_hf
from torch import nn


__all__ = ["IMAGENET_INFO", "construction_arguments", "listed_weights", "write_config"]

IMAGENET_INFO = files("timm.data") / "_info"  # lists of WordNet ids for subsets, and reassessed labels


@contextmanager
def listed_weights() -> Iterator[list[str]]:
    """Inside, models load checkpoints that lack weights, and these are listed: timm passes over them in some families.

    Raises:
        RuntimeError: a checkpoint with weights that the model does not have, where timm would raise, too.
    """
    missing: list[str] = []
    load = nn.Module.load_state_dict

    def listing(module: nn.Module, state: Any, strict: bool = True, **options: Any) -> Any:
        result = load(module, state, strict=False, **options)
        missing.extend(result.missing_keys)
        if strict and result.unexpected_keys:
            raise RuntimeError(
                f"the checkpoint has weights that the model does not have: {result.unexpected_keys[:4]}"
            )
        return result

    nn.Module.load_state_dict = listing  # type: ignore[method-assign, assignment]
    try:
        yield missing
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]


def construction_arguments(module: Any) -> dict[str, Any]:
    """The arguments that `timm.create_model` built a module with, drop rates included, which `get_model_args` leaves out."""
    return dict(getattr(module, "_model_args", {}))


def write_config(
    module: Any, file: Path, arguments: dict[str, Any], labels: list[str] | None, data: dict[str, Any]
) -> None:
    """Write the config.json of a model without its weights, which `timm.models.save_for_hf` would write, too."""
    model_config = {"label_names": labels} if labels else None
    save_config_for_hf(module, str(file), model_config=model_config, model_args=arguments, data_config=data)
