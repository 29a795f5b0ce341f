"""Checkpoints of transformers: whatever one lacks is said, and never taught."""

from __future__ import annotations

import logging
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn
from transformers import AutoModel


__all__ = [
    "WeightsError",
    "pretrained_weights",
    "runs_code",
    "saved_backbone",
    "take_off_untrained_head",
    "trained_weights",
]

logger = logging.getLogger(__name__)

HEADS, POOLER = ("classifier", "head", "fc"), "pooler"  # parts of the names of weights that no map passes through
SHOWN = 4
UNTRAINED = (
    "The checkpoint of `teacher` %r lacks %s: it has no trained classifier, and teaches through its features alone."
)


class WeightsError(ValueError):
    """A checkpoint that is not of the model that is to be built."""


def runs_code(error: BaseException | None) -> str | None:
    """What is wrong with a model that could be loaded only by running what it brings, in words; None for other errors."""
    while error is not None:
        if "trust_remote_code" in str(error):
            return (
                "asks for code of its own (`auto_map` in its configuration, or `trust_remote_code`), which is never run here. Choose a model "
                "that timm or transformers knows."
            )
        if isinstance(error, UnpicklingError):
            return (
                "has weights in a file of pickle that holds more than tensors, or is damaged. What else it holds could run code: it is "
                "not loaded. Choose a model whose weights are in safetensors."
            )
        error = error.__cause__ if error.__cause__ is not error else None
    return None


def take_off_untrained_head(module: Any, name: str, missing: list[str]) -> None:
    """Take the classifier off a timm teacher whose checkpoint lacks it.

    Args:
        missing: names of the weights that the checkpoint lacks.

    Raises:
        ValueError: it lacks others.
    """
    if not missing:
        return
    heads = module.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    unused = "head.norm."  # of features without classes
    if lost := [key for key in missing if not key.startswith((*(f"{head}." for head in heads), unused))]:
        raise ValueError(f"`teacher` {name!r}: its checkpoint lacks the weights {lost[:SHOWN]}, {len(lost)} in all.")
    if module.num_classes:
        logger.warning(UNTRAINED, name, ", ".join(missing[:SHOWN]))
        module.reset_classifier(0)


def saved_backbone(config: Any) -> bool:
    """Whether a model was saved without a classifier, which would be new and random."""
    saved = getattr(config, "architectures", None) or []
    return bool(saved) and not any("ForImageClassification" in name for name in saved)


def pretrained_weights(auto: Any, name: str, config: Any) -> nn.Module:
    """Weights in float32, with a new classifier where the checkpoint has another or none; nothing else may be new."""
    module, changed, missing = _loaded(auto, name, config)
    if lost := [key for key in changed if not any(part in key for part in HEADS)]:
        raise WeightsError(_other_shapes(lost))
    if lost := [key for key in missing if not any(part in key for part in (*HEADS, POOLER))]:
        raise WeightsError(f"its checkpoint lacks the weights {lost[:SHOWN]}, {len(lost)} in all.")
    return module


def trained_weights(auto: Any, name: str, config: Any) -> nn.Module:
    """Weights in float32 of which none is new: without a classifier where the checkpoint has none."""
    module, changed, missing = _loaded(auto, name, config)
    if changed:
        raise WeightsError(_other_shapes(changed))
    if missing and auto is not AutoModel:
        logger.warning(
            UNTRAINED,
            name,
            ", ".join(missing[:SHOWN]),
        )
        return trained_weights(AutoModel, name, config)
    if lost := [key for key in missing if POOLER not in key]:  # no map passes through a pooler
        raise WeightsError(
            f"its checkpoint lacks the weights {lost[:SHOWN]}, {len(lost)} in all: it would teach noise."
        )
    return module


def _loaded(auto: Any, name: str, config: Any) -> tuple[nn.Module, list[str], list[str]]:
    """A model, its weights that have other shapes in the checkpoint, and those that the checkpoint lacks."""
    module, info = auto.from_pretrained(
        name,
        config=config,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        trust_remote_code=False,
    )
    changed = [key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]]
    return module, sorted(changed), sorted(set(info["missing_keys"]) - set(changed))


def _other_shapes(names: list[str]) -> str:
    return (
        f"its weights {names} have other shapes than this image size, these classes or these arguments ask for. Load it as it "
        "was trained; images are resized for the teacher."
    )
