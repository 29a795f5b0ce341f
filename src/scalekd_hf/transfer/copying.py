"""A student's weights in a backbone, with the proof that they are all there."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ..models.students import Student


__all__ = ["copy_weights", "shown"]

NEW = ("hidden_states_norms", "pyramid")  # parts that no student has
COUNTER = "num_batches_tracked"  # which a frozen BatchNorm has no use for
SHOWN = 4


def copy_weights(student: Student, backbone: nn.Module) -> tuple[list[str], list[str]]:
    """Give a backbone the student's tensors.

    Returns:
        Names of the student's tensors that were left out, and of the backbone's that are new.

    Raises:
        ValueError: a tensor that should have found its place and did not.
    """
    source, own = student.model.state_dict(), backbone.state_dict()
    prefix = getattr(student.model, "base_model_prefix", "")
    names = {key: _source(key, source, prefix) for key in own}
    taken = {key: name for key, name in names.items() if name is not None}
    new = [key for key, name in names.items() if name is None]
    left_out = sorted(set(source) - set(taken.values()))
    parts = {_part(name, prefix) for name in taken.values()}
    lost = [key for key in new if not any(part in key for part in NEW)]
    lost += [name for name in left_out if _part(name, prefix) in parts and not name.endswith(COUNTER)]
    lost += [key for key, name in taken.items() if own[key].shape != source[name].shape]
    if not lost:
        backbone.load_state_dict({key: source[name] for key, name in taken.items()}, strict=False)
        own = backbone.state_dict()
        lost = [key for key, name in taken.items() if not torch.equal(own[key].cpu(), source[name].cpu())]
    if lost:
        raise ValueError(
            f"`student` {student.name!r}: as a backbone ({type(backbone).__name__}) it would not have all of its weights; without a place: "
            f"{shown(lost)}. Choose another student, or save this one with the libraries that it was trained with."
        )
    return left_out, new


def _source(key: str, source: dict[str, Tensor], prefix: str) -> str | None:
    """The student's name of a backbone's tensor; None where it has none."""
    for wrapper in ("_backbone.", "network.", "model."):
        key = key.removeprefix(wrapper)
    spread = re.sub(r"_(\d+)\.", r".\1.", key, count=1)  # timm's lists of stages flatten `stages.0`
    candidates = (key, spread, f"{prefix}.{key}", key.removeprefix(f"{prefix}."))
    return next((name for name in candidates if name in source), None)


def _part(name: str, prefix: str) -> str:
    """The part of a network that a tensor is of: its first module, and which of them in a list."""
    first, *rest = name.removeprefix(f"{prefix}.").split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first


def shown(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more if names else "none"
