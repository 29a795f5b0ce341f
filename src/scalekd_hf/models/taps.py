"""Where a student is tapped: which modules put out its penultimate and its last map, and how to read them.

They are found by a dry run with one image. The autograd graph says at which modules the whole network passes through
a single tensor (outputs of blocks and stages, not of their branches); their shapes say which of those belong to the
last stage and to the one before it. The last map has passed the final norm where one stands before pooling, but in
isotropic students without attention: of mixers the method takes the last block's output.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..images import ImageSpec


__all__ = ["Tap", "dry_run", "ends_in_one_cell", "find_taps", "first_tensor"]

logger = logging.getLogger(__name__)

CONTAINERS = (nn.Sequential, nn.ModuleList)
MAX_PREFIX_TOKENS = 16
HALVED = 4  # cells, 2x2, of which a stage makes a single one


class Tapped(Protocol):
    """What the search needs to know of a student."""

    name: str
    model: Any
    spec: ImageSpec
    tap_names: tuple[str, str] | None

    def classify(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 3, height, width) to logits (B, K)."""


@dataclass(frozen=True)
class Tap:
    """A module whose output is tapped, and how to read it as a map (B, C, h, w)."""

    module: str
    layout: str  # "NCHW", "NHWC" or "tokens"
    dim: int
    grid: tuple[int, int]
    prefix: int = 0  # tokens before the patches

    def as_map(self, output: Any) -> Tensor:
        """The module's output as (B, C, h, w)."""
        x = first_tensor(output)
        if self.layout == "NHWC":
            return x.permute(0, 3, 1, 2)
        if self.layout == "tokens":
            return x[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)
        return x


@dataclass(frozen=True)
class Visit:
    """One execution of a module in the dry run."""

    name: str
    module: nn.Module
    tap: Tap
    node: Any  # autograd node of its output
    plain: bool  # its output is a tensor, not a tuple or model output
    entering: int = 0  # cells of its input, where that is a map


def find_taps(student: Tapped, mixers_after_norm: bool = False) -> tuple[Tap, Tap]:
    """The penultimate and last tap of a student, found by a dry run with one image of zeros.

    Args:
        student: to be tapped.
        mixers_after_norm: the last map of a mixer is taken after its final norm, as up to November 2026.

    Raises:
        ValueError: a model that does not run at its image size, or without two maps to tap.
    """
    visits, logits = dry_run(student)
    if student.tap_names is not None:
        return _named_taps(student, visits, student.tap_names)
    one_cell = _halved_to_one_cell(visits, logits.grad_fn)
    visits = [visit for visit in visits if visit.tap.grid != (1, 1) and visit.tap.dim > 1]  # pooled: no map
    cuts = [visit for visit in visits if _is_cut(visit.node, logits.grad_fn)]
    if not cuts:
        raise ValueError(
            f"`student` {student.name!r} ({type(student.model).__name__}) has no module at which all information passes "
            f"through one map larger than 1x1 at {student.spec.size[0]}x{student.spec.size[1]} px: nothing can be tapped. "
            "Larger images may help, or two modules named with `student_taps`."
        )
    same = [visit for visit in cuts if visit.node is cuts[-1].node]  # modules that hand on one tensor
    last = min(same, key=lambda visit: (not visit.plain, len(visit.name)))
    if one_cell:
        logger.warning(
            "`student` %r ends in a single cell at %dx%d px, which has no place and no second view: its last map is %s, before "
            "it, and the last stage learns from the logits alone. Larger images give it a map (`image_size`).",
            student.name,
            *student.spec.size,
            last.name,
        )
    blocks = [visit for visit in cuts if any(True for _ in visit.module.children()) and _has_matrix(visit.module)]
    here = [visit for visit in blocks if visit.tap.grid == last.tap.grid]
    before = [visit for visit in blocks if visit.tap.grid != last.tap.grid]
    if any(_area(visit) < _area(last) for visit in before):
        raise ValueError(_no_taps(student))
    kinds = Counter(_kind(visit) for visit in here if not isinstance(visit.module, CONTAINERS))
    # Hierarchical: the same kind of block on a larger grid, or too few blocks on the last one to be the whole network.
    if before and (any(_kind(visit) in kinds for visit in before) or max(kinds.values(), default=0) < 3):
        penultimate = _last_of_stage(before, visits)
        return penultimate.tap, last.tap
    blocks, position = _isotropic_blocks(student, here)
    if not (_has_attention(blocks[0]) or _has_matrix(last.module) or mixers_after_norm):
        last = blocks[-1]  # not the norm behind it
    return blocks[position - 1].tap, last.tap


def _last_of_stage(before: list[Visit], visits: list[Visit]) -> Visit:
    """The last block of the penultimate stage, not the expansion with which a block of the last stage begins.

    A block inside of what shrinks the grid belongs to the penultimate stage where it has that stage's width:
    Swin of transformers merges at the end of a stage.
    """
    grid = before[-1].tap.grid
    area = grid[0] * grid[1]

    def shrinks(name: str) -> bool:
        # Padding puts out larger grids that are no stage's: only modules with weights count.
        inner = [v.tap.grid for v in visits if v.name.startswith(f"{name}.") and _has_matrix(v.module)]
        output = [visit.tap.grid for visit in visits if visit.name == name]
        return any(h * w < area for h, w in output) and max((h * w for h, w in inner), default=0) <= area

    outside: list[Visit] = []
    inside: list[Visit] = []
    for visit in before:
        if visit.tap.grid == grid:
            parts = visit.name.split(".")
            ancestors = [".".join(parts[:depth]) for depth in range(1, len(parts))]
            (inside if any(shrinks(name) for name in ancestors) else outside).append(visit)
    if outside and (not inside or inside[-1].tap.dim != outside[-1].tap.dim):
        return outside[-1]
    return inside[-1]


def _named_taps(student: Tapped, visits: list[Visit], names: tuple[str, str]) -> tuple[Tap, Tap]:
    by_name = {visit.name: visit.tap for visit in visits}
    wrong = len(names) != 2 or names[0] == names[1] or any(name not in by_name for name in names)
    order = [visit.name for visit in visits]
    if wrong or order.index(names[0]) > order.index(names[1]):
        raise ValueError(
            f"`student_taps` must name two modules of `student` {student.name!r} that put out maps, the earlier first, got {list(names)}. "
            f"Those are: {', '.join(by_name)}."
        )
    return by_name[names[0]], by_name[names[1]]


def _isotropic_blocks(student: Tapped, visits: list[Visit]) -> tuple[list[Visit], int]:
    """The blocks, and which of them, counted from 1, is the penultimate tap as published.

    That is block 9 of 12 in a ViT (3/4 of the depth), and the third from the end in mixers and EVA-02.
    """
    kinds = Counter(_kind(visit) for visit in visits if not isinstance(visit.module, CONTAINERS))
    kind, depth = kinds.most_common(1)[0] if kinds else ("", 0)
    if depth < 2:
        raise ValueError(_no_taps(student))
    blocks = [visit for visit in visits if _kind(visit) == kind]
    vit = _has_attention(blocks[0]) and "eva" not in kind.lower()
    return blocks, max(1, 3 * depth // 4) if vit else max(1, depth - 2)


def _has_attention(block: Visit) -> bool:
    return any("attn" in name or "attention" in name for name, _ in block.module.named_children())


def _no_taps(student: Tapped) -> str:
    return (
        f"`student` {student.name!r} ({type(student.model).__name__}) has no two stages or blocks that the dry run could "
        f"find at {student.spec.size[0]}x{student.spec.size[1]} px. Name two modules with `student_taps`."
    )


def _area(visit: Visit) -> int:
    return visit.tap.grid[0] * visit.tap.grid[1]


def _kind(visit: Visit) -> str:
    return type(visit.module).__name__


def _has_matrix(module: nn.Module) -> bool:
    return any(sum(side > 1 for side in parameter.shape) > 1 for parameter in module.parameters())


def dry_run(student: Tapped) -> tuple[list[Visit], Tensor]:
    """Every module that put out a map, in the order in which they finished, and the logits."""
    visits: list[Visit] = []
    grids: list[tuple[int, int]] = []
    names = {module: name for name, module in student.model.named_modules() if name}

    def record(module: nn.Module, args: tuple, output: Any) -> None:
        x = first_tensor(output)
        tap = _read_layout(names[module], x, student, grids) if isinstance(x, Tensor) and x.requires_grad else None
        if tap is not None:
            visits.append(Visit(tap.module, module, tap, x.grad_fn, x is output, _cells(first_tensor(args), tap)))

    hooks = [module.register_forward_hook(record) for module in names]
    was_training = [(module, module.training) for module in student.model.modules()]
    parameter = next(student.model.parameters())
    image = torch.zeros(1, 3, *student.spec.size, device=parameter.device, dtype=parameter.dtype, requires_grad=True)
    try:
        student.model.eval()
        with torch.enable_grad():
            logits = student.classify(image)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"`student` {student.name!r} does not run on images of {student.spec.size[0]}x{student.spec.size[1]} px: "
            f"{error} Choose an `image_size` that fits its patches, windows and strides."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in was_training:
            module.training = mode
    return visits, logits


def ends_in_one_cell(student: Tapped) -> bool:
    """Whether a student's last stage puts out a single cell, so that its last map is one before that stage's end."""
    visits, logits = dry_run(student)
    return _halved_to_one_cell(visits, logits.grad_fn)


def _halved_to_one_cell(visits: list[Visit], logits_node: Any) -> bool:
    """Whether a stage with weights ends in a single cell, and not pooling, or a convolution over a whole map."""
    shrinks = (v for v in visits if v.tap.grid == (1, 1) and v.entering > 1 and _is_cut(v.node, logits_node))
    first = next(shrinks, None)
    return first is not None and first.entering <= HALVED and _has_matrix(first.module)


def _is_single(x: Tensor) -> bool:
    return x.ndim == 4 and (x.shape[2:] == (1, 1) or x.shape[1:3] == (1, 1))


def _cells(x: Any, tap: Tap) -> int:
    """Cells of what a module was given, 0 for no map."""
    if not isinstance(x, Tensor) or x.ndim != 4:
        return 0
    return x.shape[1] * x.shape[2] if tap.layout == "NHWC" else x.shape[2] * x.shape[3]


def _read_layout(name: str, x: Tensor, student: Tapped, grids: list[tuple[int, int]]) -> Tap | None:
    """How to read an output as a map with the image's aspect ratio, or as a single cell; None if it is neither."""
    height, width = student.spec.size
    if _is_single(x):
        return (
            Tap(name, "NCHW", x.shape[1], (1, 1)) if x.shape[2:] == (1, 1) else Tap(name, "NHWC", x.shape[3], (1, 1))
        )

    def fits(h: int, w: int) -> bool:
        return h * w > 1 and abs(h * width - w * height) <= max(height, width) and h <= height and w <= width

    if x.ndim == 4:
        nchw, nhwc = fits(*x.shape[2:]), fits(*x.shape[1:3])
        if nhwc and (not nchw or getattr(student.model, "output_fmt", "") == "NHWC"):
            return Tap(name, "NHWC", x.shape[3], (x.shape[1], x.shape[2]))
        if not nchw:
            return None
        grid = (x.shape[2], x.shape[3])
        grids.append(grid)
        return Tap(name, "NCHW", x.shape[1], grid)
    if x.ndim == 3:
        for grid in _token_grids(x.shape[1], (height, width), grids):
            prefix = x.shape[1] - grid[0] * grid[1]
            if fits(*grid):
                return Tap(name, "tokens", x.shape[2], grid, prefix)
    return None


def _token_grids(tokens: int, size: tuple[int, int], grids: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Grids that `tokens` may stand for: one seen as a map earlier (the patch embedding), else of the image's shape."""
    for h, w in reversed(grids):
        if 0 <= tokens - h * w <= MAX_PREFIX_TOKENS and h * w > tokens // 2:
            yield h, w
    for prefix in range(min(MAX_PREFIX_TOKENS, tokens)):
        h = round(((tokens - prefix) * size[0] / size[1]) ** 0.5)
        if h and (tokens - prefix) % h == 0 and abs(h * size[1] - (tokens - prefix) // h * size[0]) < max(size):
            yield h, (tokens - prefix) // h


def _is_cut(node: Any, logits_node: Any) -> bool:
    """Whether every path from the logits back to the image passes through `node`."""
    if node is None:
        return False
    seen, stack = {node}, [logits_node]
    if logits_node is node:
        return False
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if hasattr(current, "variable") and not isinstance(current.variable, nn.Parameter):
            return False  # a leaf that is no parameter is the image
        stack.extend(parent for parent, _ in current.next_functions if parent is not None)
    return True


def first_tensor(output: Any) -> Any:
    """The tensor of a module's output: itself, or the first of a tuple, list or model output."""
    while isinstance(output, (tuple, list, dict)) and len(output):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output
