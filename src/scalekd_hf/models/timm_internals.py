"""All that this package borrows of timm that is not public there; `tests/test_private_names.py` tells what it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models._hub import save_config_for_hf


__all__ = ["construction_arguments", "write_config"]


def construction_arguments(module: Any) -> dict[str, Any]:
    """The arguments that `timm.create_model` built a module with, drop rates included, which `get_model_args` leaves out."""
    return dict(getattr(module, "_model_args", {}))


def write_config(
    module: Any, file: Path, arguments: dict[str, Any], labels: list[str] | None, data: dict[str, Any]
) -> None:
    """Write the config.json of a model without its weights, which `timm.models.save_for_hf` would write, too."""
    model_config = {"label_names": labels} if labels else None
    save_config_for_hf(module, str(file), model_config=model_config, model_args=arguments, data_config=data)
