"""Students: any classifier of timm or transformers, tapped where the method wants its two maps.

Where to tap is found by a dry run with one image. The autograd graph says at which modules the
whole network passes through a single tensor (outputs of blocks and stages, not of their branches);
their shapes say which of those belong to the last stage and to the one before it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .loading import Classifier, check_patches, load_classifier


__all__ = ["Student", "Tap", "load_student"]

logger = logging.getLogger(__name__)

CONTAINERS = (nn.Sequential, nn.ModuleList)
MAX_PREFIX_TOKENS = 16


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


class Student(nn.Module):
    """A classifier that also returns its penultimate and last maps, from the same forward.

    Attributes:
        model: the classifier itself, what is saved and published.
        taps: the two `Tap`s, found at their first use; `dims` and `grids` are theirs.
        spec: the images it takes; labels: class names or None; num_labels: K.
    """

    def __init__(self, classifier: Classifier, tap_names: tuple[str, str] | None = None):
        super().__init__()
        self.model: Any = classifier.module
        self.classifier = classifier
        self.name, self.spec = classifier.name, classifier.spec
        self.labels, self.num_labels = classifier.labels, classifier.num_labels
        self.tap_names = tap_names
        self.pretrained = False
        self._tapped: dict[str, Any] = {}
        self._recording = False
        if not self.num_labels:
            raise ValueError(
                f"`student` {self.name!r} has no classifier head. Give it one with its number of classes."
            )

    def checkpoint_activations(self, kwargs: dict[str, Any] | None = None) -> None:
        """Recompute activations in the backward pass, with the model's own means; `kwargs` as transformers takes them.

        Raises:
            ValueError: a model that has none.
        """
        try:
            if isinstance(self.model, PreTrainedModel):
                self.model.gradient_checkpointing_enable({"use_reentrant": False, **(kwargs or {})})
            else:
                self.model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"`activation_checkpointing` is on, but {self.name!r} cannot recompute its activations ({error}). Turn it off, "
                "or take a smaller batch with `gradient_accumulation_steps`."
            ) from error
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.model.modules()):
            logger.warning(
                "With `activation_checkpointing`, BatchNorm takes each batch twice into its running statistics."
            )

    def name_labels(self, labels: list[str]) -> None:
        """Give the classes the names that the data set has for them, so that they are saved with the student."""
        self.labels = list(labels)
        if isinstance(self.model, PreTrainedModel):
            self.model.config.id2label = dict(enumerate(labels))
            self.model.config.label2id = {label: index for index, label in enumerate(labels)}

    @cached_property
    def taps(self) -> tuple[Tap, Tap]:
        check_patches(dataclasses.replace(self.classifier, spec=self.spec), "student")
        taps = find_taps(self)
        for tap in taps:
            module = self.model.get_submodule(tap.module)
            # The children of a Sequential run alone when timm recomputes activations.
            while type(module) is nn.Sequential and len(module):
                module = module[-1]
            module.register_forward_hook(partial(self._record, tap.module))
        return taps

    @property
    def dims(self) -> tuple[int, int]:
        """Channels (C_p, C_l) of the two maps."""
        return self.taps[0].dim, self.taps[1].dim

    @property
    def grids(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Grids ((h, w), (h, w)) of the two maps."""
        return self.taps[0].grid, self.taps[1].grid

    def classify(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 3, height, width) to logits (B, K)."""
        output = self.model(pixel_values.to(self._dtype()))
        return output.logits if isinstance(self.model, PreTrainedModel) else first_tensor(output)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, height, width) to the penultimate map, the last map (B, C, h, w each) and logits (B, K)."""
        taps = self.taps
        self._recording = True
        try:
            logits = self.classify(pixel_values)
        finally:
            self._recording = False
        penultimate, last = (tap.as_map(self._tapped[tap.module]) for tap in taps)
        self._tapped.clear()
        return penultimate, last, logits

    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def freeze_unused(self) -> list[str]:
        """Freeze parameters that the logits do not depend on, such as mask tokens: DDP waits for their gradients.

        Returns:
            Their names.
        """
        names, parameters = zip(*[(n, p) for n, p in self.model.named_parameters() if p.requires_grad], strict=True)
        _, logits = _dry_run(self)
        gradients = torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
        unused = [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]
        for name in unused:
            self.model.get_parameter(name).requires_grad_(False)
        return unused

    def _record(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        if self._recording:
            self._tapped[name] = output


@dataclass(frozen=True)
class _Visit:
    """One execution of a module in the dry run."""

    name: str
    module: nn.Module
    tap: Tap
    node: Any  # autograd node of its output
    plain: bool  # its output is a tensor, not a tuple or model output


def find_taps(student: Student) -> tuple[Tap, Tap]:
    """The penultimate and last tap of a student, found by a dry run with one image of zeros.

    Raises:
        ValueError: a model that does not run at its image size, or without two maps to tap.
    """
    visits, logits = _dry_run(student)
    if student.tap_names is not None:
        return _named_taps(student, visits, student.tap_names)
    cuts = [visit for visit in visits if _is_cut(visit.node, logits.grad_fn)]
    if not cuts:
        raise ValueError(
            f"`student` {student.name!r} ({type(student.model).__name__}) has no module at which all information passes "
            f"through one map larger than 1x1 at {student.spec.size[0]}x{student.spec.size[1]} px: nothing can be tapped. "
            "Larger images may help, or two modules named with `student_taps`."
        )
    same = [visit for visit in cuts if visit.node is cuts[-1].node]  # modules that hand on one tensor
    last = min(same, key=lambda visit: (not visit.plain, len(visit.name)))
    blocks = [visit for visit in cuts if any(True for _ in visit.module.children()) and _has_matrix(visit.module)]
    here = [visit for visit in blocks if visit.tap.grid == last.tap.grid]
    before = [visit for visit in blocks if visit.tap.grid != last.tap.grid]
    if any(_area(visit) < _area(last) for visit in before):
        raise ValueError(_no_taps(student))
    kinds = Counter(_kind(visit) for visit in here if not isinstance(visit.module, CONTAINERS))
    # Hierarchical: the same kind of block on a larger grid, or too few blocks on the last one to be the whole network.
    if before and (any(_kind(visit) in kinds for visit in before) or max(kinds.values(), default=0) < 3):
        penultimate = _last_of_stage(before, visits)
    else:
        penultimate = _isotropic_penultimate(student, here)
    return penultimate.tap, last.tap


def _last_of_stage(before: list[_Visit], visits: list[_Visit]) -> _Visit:
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

    outside: list[_Visit] = []
    inside: list[_Visit] = []
    for visit in before:
        if visit.tap.grid == grid:
            parts = visit.name.split(".")
            ancestors = [".".join(parts[:depth]) for depth in range(1, len(parts))]
            (inside if any(shrinks(name) for name in ancestors) else outside).append(visit)
    if outside and (not inside or inside[-1].tap.dim != outside[-1].tap.dim):
        return outside[-1]
    return inside[-1]


def _named_taps(student: Student, visits: list[_Visit], names: tuple[str, str]) -> tuple[Tap, Tap]:
    by_name = {visit.name: visit.tap for visit in visits}
    wrong = len(names) != 2 or names[0] == names[1] or any(name not in by_name for name in names)
    order = [visit.name for visit in visits]
    if wrong or order.index(names[0]) > order.index(names[1]):
        raise ValueError(
            f"`student_taps` must name two modules of `student` {student.name!r} that put out maps, the earlier first, got {list(names)}. "
            f"Those are: {', '.join(by_name)}."
        )
    return by_name[names[0]], by_name[names[1]]


def _isotropic_penultimate(student: Student, visits: list[_Visit]) -> _Visit:
    """Block 9 of 12 in a ViT (3/4 of the depth), the third from the end in mixers and EVA-02 (published settings)."""
    kinds = Counter(_kind(visit) for visit in visits if not isinstance(visit.module, CONTAINERS))
    kind, depth = kinds.most_common(1)[0] if kinds else ("", 0)
    if depth < 2:
        raise ValueError(_no_taps(student))
    blocks = [visit for visit in visits if _kind(visit) == kind]
    has_attention = any("attn" in name or "attention" in name for name, _ in blocks[0].module.named_children())
    vit = has_attention and "eva" not in kind.lower()
    position = max(1, 3 * depth // 4) if vit else max(1, depth - 2)  # 1-based
    return blocks[position - 1]


def _no_taps(student: Student) -> str:
    return (
        f"`student` {student.name!r} ({type(student.model).__name__}) has no two stages or blocks that the dry run could "
        f"find at {student.spec.size[0]}x{student.spec.size[1]} px. Name two modules with `student_taps`."
    )


def _area(visit: _Visit) -> int:
    return visit.tap.grid[0] * visit.tap.grid[1]


def _kind(visit: _Visit) -> str:
    return type(visit.module).__name__


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _dry_run(student: Student) -> tuple[list[_Visit], Tensor]:
    """Every module that put out a map, in the order in which they finished, and the logits."""
    visits: list[_Visit] = []
    grids: list[tuple[int, int]] = []
    names = {module: name for name, module in student.model.named_modules() if name}

    def record(module: nn.Module, args: tuple, output: Any) -> None:
        x = first_tensor(output)
        tap = _read_layout(names[module], x, student, grids) if isinstance(x, Tensor) and x.requires_grad else None
        if tap is not None:
            visits.append(_Visit(tap.module, module, tap, x.grad_fn, x is output))

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


def _read_layout(name: str, x: Tensor, student: Student, grids: list[tuple[int, int]]) -> Tap | None:
    """How to read an output as a map larger than 1x1 with the image's aspect ratio, or None if it is none."""
    height, width = student.spec.size

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


def load_student(
    name_or_module: str | nn.Module,
    *,
    pretrained: bool = False,
    taps: tuple[str, str] | list[str] | None = None,
    **kwargs: Any,
) -> Student:
    """A student from a name or module.

    Args:
        name_or_module: see `load_classifier`.
        pretrained: start from its published weights. The paper trains students from scratch.
        taps: names of the two modules to tap, where others are wanted than those that the dry run finds.
        **kwargs: `labels` (names of the classes of a new head), `image_size`, `mean`, `std`, `crop_pct`, and
            arguments of the model itself, see `load_classifier`.
    """
    if isinstance(name_or_module, Student):
        return name_or_module
    classifier = load_classifier(name_or_module, role="student", pretrained=pretrained, **kwargs)
    student = Student(classifier, tuple(taps) if taps is not None else None)  # type: ignore[arg-type]
    student.pretrained = pretrained and isinstance(name_or_module, str)
    return student
