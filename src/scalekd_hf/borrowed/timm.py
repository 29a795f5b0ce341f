"""Of timm: the arguments and the configuration of a model, and the lists of ImageNet's classes."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from timm.models._hub import save_config_for_hf


__all__ = ["IMAGENET_INFO", "construction_arguments", "write_config"]

IMAGENET_INFO = files("timm.data") / "_info"  # lists of WordNet ids for subsets, and reassessed labels


def construction_arguments(module: Any) -> dict[str, Any]:
    """The arguments that `timm.create_model` built a module with, drop rates included, which `get_model_args` leaves out."""
    return dict(getattr(module, "_model_args", {}))


def write_config(
    module: Any, file: Path, arguments: dict[str, Any], labels: list[str] | None, data: dict[str, Any]
) -> None:
    """Write the config.json of a model without its weights, which `timm.models.save_for_hf` would write, too."""
    model_config = {"label_names": labels} if labels else None
    save_config_for_hf(module, str(file), model_config=model_config, model_args=arguments, data_config=data)
