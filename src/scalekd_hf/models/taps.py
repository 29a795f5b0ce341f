"""Where a student is tapped: which modules put out its penultimate and its last map, and how to read them.

They are found by a dry run with one image. The autograd graph says at which modules the whole network passes through
a single tensor (outputs of blocks and stages, not of their branches); their shapes say which of those belong to the
last stage and to the one before it. The last map has passed the final norm where one stands before pooling, but in
isotropic students without attention: of mixers the method takes the last block's output.

What is found is checked against what timm or transformers say of the model's stages, and theirs are taken where it differs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..images import ImageSpec
from .maps import Tap, all_tensors, first_tensor, read_layout
from .stages import Stage, raster_order, stated_stages


__all__ = ["Tap", "dry_run", "find_taps", "first_tensor"]

CONTAINERS = (nn.Sequential, nn.ModuleList)
SHOWN = 12  # modules of a student that cannot be tapped by itself
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
class Visit:
    """One execution of a module in the dry run."""

    name: str
    module: nn.Module
    tap: Tap
    node: Any  # autograd node of its output
    plain: bool  # its output is a tensor, not a tuple or model output
    entering: int = 0  # cells of its input, where that is a map


def find_taps(student: Tapped, mixers_after_norm: bool = False) -> tuple[tuple[Tap, Tap], list[str]]:
    """The penultimate and last tap of a student, found by a dry run with one image of zeros, and what to say of them.

    Args:
        student: to be tapped.
        mixers_after_norm: the last map of a mixer is taken after its final norm, as up to November 2026.

    Returns:
        The two taps, and sentences on what is not as the method, or the model's library, would have it.

    Raises:
        ValueError: a model that does not run at its image size, or without two maps to tap.
    """
    visits, logits = dry_run(student)
    if student.tap_names is not None:
        penultimate, last = _named_taps(student, visits, student.tap_names)
        return (_in_order(student, penultimate), _in_order(student, last)), []
    stated = stated_stages(student.model, student.spec.size)
    stages, ends, single = _stage_ends(stated, visits, student.spec.size)
    one_cell = _halved_to_one_cell(visits, logits.grad_fn) or single > 0
    visits = [visit for visit in visits if visit.tap.grid != (1, 1)]
    whole = [visit for visit in visits if not visit.tap.index]  # not the second tensor of a module
    cuts = [visit for visit in whole if _is_cut(visit.node, logits.grad_fn) and not _in_attention(visit)]
    found = _search(student, whole, cuts, ends, mixers_after_norm) if cuts else None
    known = len(ends) > 1 and None not in ends[-2:]
    if known and (found is not None or single < 2):
        found = _reconciled(student, found, cuts, stages, [end for end in ends if end is not None], one_cell)
    elif one_cell and len(stated) > 2 > len(ends):  # there are no two stages left
        found = None
    if found is None:
        raise ValueError(_no_taps(student, whole, bool(cuts)))
    penultimate, last = found
    if (
        len(stages) < len(stated) and not one_cell
    ):  # without one that has no weights: what the library says all the same
        stages, ends = stated, [None] * len(stated)
    remarks = [said] if (said := _disagreement(student, found, stages, ends)) else []
    if one_cell:
        remarks.append(
            f"`student` {student.name!r} ends in a single cell at {student.spec.size[0]}x{student.spec.size[1]} px, which has "
            f"no place and no second view: its last map is {last.module}, before it, and the last stage learns from the "
            "logits alone. Larger images give it a map (`image_size`)."
        )
    return (_in_order(student, penultimate), _in_order(student, last)), remarks


def _search(
    student: Tapped, visits: list[Visit], cuts: list[Visit], ends: list[Visit | None], mixers_after_norm: bool
) -> tuple[Tap, Tap] | None:
    """The taps that the dry run alone suggests; of the library's stages, only how many blocks an isotropic network has."""
    last = _last_cut(cuts)
    blocks = [visit for visit in cuts if _is_block(visit)]
    here = [visit for visit in blocks if visit.tap.grid == last.tap.grid]
    before = [visit for visit in blocks if visit.tap.grid != last.tap.grid]
    if any(_area(visit) < _area(last) for visit in before):
        return None
    kinds = Counter(_kind(visit) for visit in here if not isinstance(visit.module, CONTAINERS))
    # Hierarchical: the same kind of block on a larger grid, or too few blocks on the last one to be the whole network.
    if before and (any(_kind(visit) in kinds for visit in before) or max(kinds.values(), default=0) < 3):
        return _last_of_stage(before, visits).tap, last.tap
    kind, depth = kinds.most_common(1)[0] if kinds else ("", 0)
    if depth < 2:
        return None
    isotropic = [visit for visit in here if _kind(visit) == kind]
    stated = [visit for visit in ends if visit is not None]
    if len(stated) == depth:
        isotropic = stated  # of which the blocks found may be parts
    if not (_has_attention(isotropic[0]) or _has_matrix(last.module) or mixers_after_norm):
        last = isotropic[-1]  # not the norm behind it
    return isotropic[_published_position(student, isotropic) - 1].tap, last.tap


def _last_cut(cuts: list[Visit]) -> Visit:
    same = [visit for visit in cuts if visit.node is cuts[-1].node]  # modules that hand on one tensor
    return min(same, key=lambda visit: (not visit.plain, len(visit.name)))


def _stage_ends(
    stages: list[Stage], visits: list[Visit], size: tuple[int, int]
) -> tuple[list[Stage], list[Visit | None], int]:
    """The library's stages that learn and end in more than a cell, the visits that they are, and how many end in a cell.

    A stage without weights, such as the pooling after the last convolution of VGG, belongs to the one before it.
    """
    kept: list[Stage] = []
    ends: list[Visit | None] = []
    since, single = 0, 0
    for stage in stages:
        place = _place(stage, visits, size)
        if place is not None:
            between = visits[since : place + 1]
            if kept and ends[-1] is not None and between and not any(_has_matrix(visit.module) for visit in between):
                continue
            since = place + 1
        if stage.stride >= max(size) if place is None else visits[place].tap.grid == (1, 1):
            single += 1
            continue
        kept.append(stage)
        ends.append(None if place is None else visits[place])
    return kept, ends, single


def _place(stage: Stage, visits: list[Visit], size: tuple[int, int]) -> int | None:
    """Which visit is the end of a stage: that of its name and width.

    The module of that name may be of another width (in HRNet, where they mean none): then it is the first of the largest modules
    of the stage's stride and width. Where there is none of that name, as in backbones of transformers, nothing is known.
    """
    named = [place for place, visit in enumerate(visits) if visit.name == stage.name]
    fitting = [place for place, visit in enumerate(visits) if stage.fits(visit.tap.grid, size)]
    wide = [place for place, visit in enumerate(visits) if visit.tap.dim == stage.width]
    blocks = [place for place in fitting if place in wide and _is_block(visits[place])]
    outer = [p for p in blocks if not any(visits[p].name.startswith(f"{visits[q].name}.") for q in blocks)]
    exact = [place for place in named if place in wide]
    best = [*exact, *outer, *(place for place in named if place in fitting)]
    return best[0] if named and best else None


def _reconciled(
    student: Tapped,
    found: tuple[Tap, Tap] | None,
    cuts: list[Visit],
    stages: list[Stage],
    ends: list[Visit],
    one_cell: bool,
) -> tuple[Tap, Tap]:
    """The taps found, or the ends of the last two stages of the library where there are none, or others.

    Before a stage of one cell it is always those: no norm stands behind them, but the beginning of that stage.
    """
    isotropic = len({stage.stride for stage in stages}) == 1
    before, last = ends[-2].tap, ends[-1].tap
    if isotropic and len(ends) == len(stages):
        before = ends[_published_position(student, ends) - 1].tap
    if one_cell:
        return before, last
    if found is not None and found[1].grid == last.grid:
        inside = not isotropic and found[0].module.startswith(f"{last.module}.")
        return (before if inside or found[0].grid != ends[-2].tap.grid else found[0]), found[1]
    if found is None and cuts and _last_cut(cuts).tap.grid == last.grid:
        last = _last_cut(cuts).tap  # has passed the norm
    return before, last


def _disagreement(student: Tapped, taps: tuple[Tap, Tap], stages: list[Stage], ends: list[Visit | None]) -> str | None:
    """What to say where taps are of other strides than the last two stages that the library states."""
    size = student.spec.size
    pairs = list(zip(stages[-2:], ends[-2:], strict=True))
    fits = [
        tap.grid == end.tap.grid if end is not None else stage.fits(tap.grid, size)
        for tap, (stage, end) in zip(taps, pairs, strict=False)
    ]
    if len(pairs) < 2 or all(fits):
        return None
    found = " and ".join(f"{tap.module} (stride {size[0] / tap.grid[0]:.3g})" for tap in taps)
    library = "timm" if hasattr(student.model, "feature_info") else "transformers"
    return (
        f"`student` {student.name!r} is tapped at {found}, but {library} says that its last two stages are {stages[-2]} and "
        f"{stages[-1]}. If these are what you want, name them, or the modules that they are, with `student_taps`."
    )


def _in_order(student: Tapped, tap: Tap) -> Tap:
    return replace(tap, order=raster_order(student.model, tap.grid)) if tap.layout == "tokens" else tap


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
    visits = [visit for visit in visits if visit.tap.grid != (1, 1)]
    by_name = {visit.name: visit.tap for visit in sorted(visits, key=lambda visit: -visit.tap.index)}  # the first map
    wrong = len(names) != 2 or names[0] == names[1] or any(name not in by_name for name in names)
    order = [visit.name for visit in visits]
    if wrong or order.index(names[0]) > order.index(names[1]):
        raise ValueError(
            f"`student_taps` must name two modules of `student` {student.name!r} that put out maps larger than 1x1 at "
            f"{student.spec.size[0]}x{student.spec.size[1]} px, the earlier first, got {list(names)}. "
            f"Those are: {', '.join(by_name)}."
        )
    return by_name[names[0]], by_name[names[1]]


def _published_position(student: Tapped, blocks: list[Visit]) -> int:
    """Which block of an isotropic network, counted from 1, is the penultimate tap as published.

    That is block 9 of 12 in a ViT (3/4 of the depth), and the third from the end in mixers and EVA-02, whose blocks are timm's
    also for later ViTs, such as DINOv3.
    """
    architecture = (getattr(student.model, "pretrained_cfg", None) or {}).get("architecture") or ""
    vit = _has_attention(blocks[0]) and not architecture.startswith("eva02")
    return max(1, 3 * len(blocks) // 4 if vit else len(blocks) - 2)


def _has_attention(block: Visit) -> bool:
    return any("attn" in name or "attention" in name for name, _ in block.module.named_children())


def _in_attention(visit: Visit) -> bool:
    """Whether a module is part of an attention, whose keys and values are no map: one that pools has nothing beside them."""
    return any("attn" in name or "attention" in name for name in visit.name.split(".")[:-1])


def _no_taps(student: Tapped, visits: list[Visit], any_cut: bool) -> str:
    missing = (
        "no two stages or blocks that the dry run could find"
        if any_cut
        else "no module at which all information passes through one map larger than 1x1"
    )
    blocks = [visit for visit in visits if _is_block(visit)]
    names = {visit.name for visit in blocks}
    outer = {v.name: v.tap.grid for v in blocks if not any(v.name.startswith(f"{name}.") for name in names)}
    shown = ", ".join([f"{name} ({height}x{width})" for name, (height, width) in outer.items()][-SHOWN:])
    return (
        f"`student` {student.name!r} ({type(student.model).__name__}) has {missing} at "
        f"{student.spec.size[0]}x{student.spec.size[1]} px. "
        + (
            f"Name two modules with `student_taps`; these put out maps: {shown}."
            if shown
            else "Larger images may help."
        )
    )


def _is_block(visit: Visit) -> bool:
    return any(True for _ in visit.module.children()) and _has_matrix(visit.module)


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
            f"`student` {student.name!r} does not run on images of {student.spec.size[0]}x{student.spec.size[1]} px: "
            f"{str(error).rstrip('.') or repr(error)}."
            + (" Choose an `image_size` that fits its patches, windows and strides." if size_may_help else "")
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in was_training:
            module.training = mode
    return visits, logits


def _halved_to_one_cell(visits: list[Visit], logits_node: Any) -> bool:
    """Whether a stage with weights ends in a single cell, and not pooling, or a convolution over a whole map."""
    shrinks = (v for v in visits if v.tap.grid == (1, 1) and v.entering > 1 and _is_cut(v.node, logits_node))
    first = next(shrinks, None)
    return first is not None and first.entering <= HALVED and _has_matrix(first.module)


def _cells(x: Any, tap: Tap) -> int:
    """Cells of what a module was given, 0 for no map."""
    if not isinstance(x, Tensor) or x.ndim != 4:
        return 0
    return x.shape[1] * x.shape[2] if tap.layout == "NHWC" else x.shape[2] * x.shape[3]


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
