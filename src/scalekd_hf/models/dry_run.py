"""What a model's modules put out for one image, and which of it all information passes through."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..images import ImageSpec
from .maps import Tap, all_tensors, first_tensor, read_layout


__all__ = ["SIZE_OPTIONS", "Tapped", "Visit", "dry_run", "has_matrix", "passed_by_all"]

SIZE_OPTIONS = {"student": "image_size", "teacher": "teacher_image_size"}


class Tapped(Protocol):
    """What the search needs to know of a student or a teacher."""

    role: str  # "student" or "teacher"
    name: str
    model: Any
    spec: ImageSpec
    tap_names: tuple[str, str] | None
    last_blocks: int | None  # of a teacher without stages: the blocks between the taps

    def classify(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 3, height, width) to logits (B, K)."""


@dataclass(frozen=True)
class Visit:
    """One execution of a module in the dry run."""

    name: str
    module: nn.Module
    tap: Tap
    node: Any  # autograd node of its output
    plain: bool  # its output is a tensor, not a tuple or model output
    entering: int = 0  # cells of its input, where that is a map


def dry_run(student: Tapped) -> tuple[list[Visit], Tensor]:
    """Every module that put out a map, in the order in which they finished, and the logits."""
    visits: list[Visit] = []
    grids: list[tuple[int, int]] = []
    names = {module: name for name, module in student.model.named_modules() if name}
    channels_last = getattr(student.model, "output_fmt", "") == "NHWC"

    def record(module: nn.Module, args: tuple, output: Any) -> None:
        for index, x in enumerate(all_tensors(output)):
            if not x.requires_grad or x.shape[0] != 1:  # not of the image, or of windows of it
                continue
            tap = read_layout(names[module], x, student.spec.size, grids, channels_last)
            if tap is not None:
                visit = Visit(tap.module, module, tap, x.grad_fn, x is output, _cells(first_tensor(args), tap))
                visits.append(replace(visit, tap=replace(tap, index=index)))

    hooks = [module.register_forward_hook(record) for module in names]
    was_training = [(module, module.training) for module in student.model.modules()]
    parameter = next(student.model.parameters())
    image = torch.zeros(1, 3, *student.spec.size, device=parameter.device, dtype=parameter.dtype, requires_grad=True)
    try:
        student.model.eval()
        with torch.enable_grad():
            logits = student.classify(image)
    except Exception as error:  # whatever the model raises
        size_may_help = isinstance(error, (RuntimeError, ValueError, AssertionError))
        raise ValueError(
            f"`{student.role}` {student.name!r} does not run on images of {student.spec.size[0]}x{student.spec.size[1]} px: "
            f"{str(error).rstrip('.') or repr(error)}."
            + (
                f" Choose a `{SIZE_OPTIONS[student.role]}` that fits its patches, windows and strides."
                if size_may_help
                else ""
            )
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in was_training:
            module.training = mode
    return visits, logits


def passed_by_all(end: Any) -> set[Any]:
    """The autograd nodes, but for `end`, that every path from it back to the image passes: those with as many paths as there are."""
    order: list[Any] = []
    to_image: dict[Any, int] = {}  # number of paths
    stack = [(end, False)]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
            before = [parent for parent, _ in node.next_functions if parent is not None]
            # A leaf that is no parameter is the image.
            is_image = hasattr(node, "variable") and not isinstance(node.variable, nn.Parameter)
            to_image[node] = int(is_image) + sum(to_image[parent] for parent in before)
        elif node not in to_image:
            to_image[node] = 0
            stack.append((node, True))
            stack.extend(
                (parent, False) for parent, _ in node.next_functions if parent is not None and parent not in to_image
            )
    from_end = dict.fromkeys(order, 0)
    from_end[end] = 1
    for node in reversed(order):
        for parent, _ in node.next_functions:
            if parent is not None:
                from_end[parent] += from_end[node]
    total = to_image[end]
    return {node for node in order if node is not end and total and from_end[node] * to_image[node] == total}


def has_matrix(module: nn.Module) -> bool:
    return any(sum(side > 1 for side in parameter.shape) > 1 for parameter in module.parameters())


def _cells(x: Any, tap: Tap) -> int:
    """Cells of what a module was given, 0 for no map."""
    if not isinstance(x, Tensor) or x.ndim != 4:
        return 0
    return x.shape[1] * x.shape[2] if tap.layout == "NHWC" else x.shape[2] * x.shape[3]
