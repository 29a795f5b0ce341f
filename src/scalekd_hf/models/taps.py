"""Where a student or a teacher is tapped: which modules put out its penultimate and its last map, and how to read them.

They are found by a dry run with one image. The autograd graph says at which modules the whole network passes through
a single tensor (outputs of blocks and stages, not of their branches); their shapes say which of those belong to the
last stage and to the one before it. The last map has passed the final norm where one stands before pooling, but in
isotropic students without attention: of mixers the method takes the last block's output.

What is found is checked against what timm or transformers say of the model's stages, and theirs are taken where it differs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .dry_run import SIZE_OPTIONS, Tapped, Visit, dry_run, has_matrix, passed_by_all
from .maps import Tap, first_tensor, read_layout
from .stages import Stage, raster_order, stated_stages


__all__ = ["ends_in_one_cell", "find_taps", "taps_between"]

CONTAINERS = (nn.Sequential, nn.ModuleList)
SHOWN = 12  # modules of a student that cannot be tapped by itself
HALVED = 4  # cells, 2x2, of which a stage makes a single one


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
    through = passed_by_all(logits.grad_fn)
    one_cell = _halved_to_one_cell(visits, through) or single > 0
    visits = [visit for visit in visits if visit.tap.grid != (1, 1) and visit.tap.dim > 1]  # pooled: no map
    whole = [visit for visit in visits if not visit.tap.index]  # not the second tensor of a module
    cuts = [visit for visit in whole if visit.node in through and not _in_attention(visit)]
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
            f"`{student.role}` {student.name!r} ends in a single cell at {student.spec.size[0]}x{student.spec.size[1]} px, which has "
            f"no place and no second view: its last map is {last.module}, before it, and the last stage learns from the "
            f"logits alone. Larger images give it a map (`{SIZE_OPTIONS[student.role]}`)."
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
    if not (_has_attention(isotropic[0]) or has_matrix(last.module) or mixers_after_norm or student.last_blocks):
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
            if kept and ends[-1] is not None and between and not any(has_matrix(visit.module) for visit in between):
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
        f"`{student.role}` {student.name!r} is tapped at {found}, but {library} says that its last two stages are {stages[-2]} and "
        f"{stages[-1]}. If these are what you want, name them, or the modules that they are, with `{student.role}_taps`."
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
        inner = [v.tap.grid for v in visits if v.name.startswith(f"{name}.") and has_matrix(v.module)]
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
            f"`{student.role}_taps` must name two modules of `{student.role}` {student.name!r} that put out maps larger than 1x1 at "
            f"{student.spec.size[0]}x{student.spec.size[1]} px, the earlier first, got {list(names)}. "
            f"Those are: {', '.join(by_name)}."
        )
    return by_name[names[0]], by_name[names[1]]


def taps_between(teacher: Tapped, names: tuple[str, str]) -> tuple[Tap, Tap]:
    """What the first of two modules gets and what the second puts out.

    Raises:
        ValueError: names of no modules, or modules without a map there.
    """
    modules = dict(teacher.model.named_modules())
    if unknown := [name for name in names if name not in modules]:
        raise ValueError(f"`teacher_taps` names {unknown}, which `teacher` {teacher.name!r} does not have.")
    got: list[Tensor] = []
    hook = modules[names[0]].register_forward_pre_hook(
        lambda module, args, kwargs: got.append(first_tensor(args or kwargs)), with_kwargs=True
    )
    try:
        visits, _ = dry_run(teacher)
    finally:
        hook.remove()
    grids = [visit.tap.grid for visit in visits if visit.tap.layout == "NCHW"]
    channels_last = getattr(teacher.model, "output_fmt", "") == "NHWC"
    entering = read_layout(names[0], got[0], teacher.spec.size, grids, channels_last) if got else None
    last = next((visit.tap for visit in reversed(visits) if visit.name == names[1] and not visit.tap.index), None)
    if entering is None or last is None:
        wrong = names[0] if entering is None else names[1]
        raise ValueError(
            f"`teacher_taps` are {list(names)}, but {wrong} {'gets' if entering is None else 'puts out'} no map or tokens of one in "
            f"`teacher` {teacher.name!r}. Those that put out some are: {', '.join(dict.fromkeys(v.name for v in visits))}."
        )
    return _in_order(teacher, entering), _in_order(teacher, last)


def _published_position(student: Tapped, blocks: list[Visit]) -> int:
    """Which block of an isotropic network, counted from 1, is the penultimate tap: of a student as published.

    That is block 9 of 12 in a ViT (3/4 of the depth), and the third from the end in mixers and EVA-02, whose blocks are timm's
    also for later ViTs, such as DINOv3.
    """
    if student.last_blocks is not None:
        if not 1 <= student.last_blocks < len(blocks):
            raise ValueError(
                f"`teacher_last_blocks` must be between 1 and {len(blocks) - 1}, one less than the blocks of `teacher` "
                f"{student.name!r}, got {student.last_blocks}."
            )
        return len(blocks) - student.last_blocks
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
        f"`{student.role}` {student.name!r} ({type(student.model).__name__}) has {missing} at "
        f"{student.spec.size[0]}x{student.spec.size[1]} px. "
        + (
            f"Name two modules with `{student.role}_taps`; these put out maps: {shown}."
            if shown
            else "Larger images may help."
        )
    )


def _is_block(visit: Visit) -> bool:
    return any(True for _ in visit.module.children()) and has_matrix(visit.module)


def _area(visit: Visit) -> int:
    return visit.tap.grid[0] * visit.tap.grid[1]


def _kind(visit: Visit) -> str:
    return type(visit.module).__name__


def ends_in_one_cell(student: Tapped) -> bool:
    """Whether a student's last stage puts out a single cell, so that its last map is one before that stage's end."""
    visits, logits = dry_run(student)
    stages = stated_stages(student.model, student.spec.size)
    *_, single = _stage_ends(stages, visits, student.spec.size)
    return _halved_to_one_cell(visits, passed_by_all(logits.grad_fn)) or single > 0


def _halved_to_one_cell(visits: list[Visit], through: set[Any]) -> bool:
    """Whether a stage with weights ends in a single cell, and not pooling, or a convolution over a whole map."""
    shrinks = (v for v in visits if v.tap.grid == (1, 1) and v.entering > 1 and v.node in through)
    first = next(shrinks, None)
    return first is not None and first.entering <= HALVED and has_matrix(first.module)
