"""The last stage of any model as a function of the tokens that enter it: its own forward, run on from one of its modules.

The modules that ran before are passed over: each puts out zeros of the shape that it had, which take no memory. So whatever
stands between the modules in the model's code is run as it is written, and nothing of a family needs to be known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from .maps import map_tensors


__all__ = ["REMEDY", "LastStage", "check_last_stage", "check_repeated", "is_close"]

TOLERANCE = 1e-4  # of the last map's largest value
REMEDY = "Name other modules with `teacher_taps`, or take another teacher."


class Reached(Exception):
    """Carries what the last module of the stage has put out past all that would follow in the model's forward."""


@dataclass(frozen=True)
class Like:
    """A tensor of `fixed` sides and sides that grow with the number of images; the tokens take the place of one."""

    fixed: tuple[int, ...]
    growing: tuple[int, ...]
    dtype: torch.dtype
    is_replaced: bool = False

    def made(self, tokens: Tensor) -> Tensor:
        """Zeros for as many images as there are in `tokens`."""
        sides = [fixed + growing * tokens.shape[0] for fixed, growing in zip(self.fixed, self.growing, strict=True)]
        dtype = tokens.dtype if self.dtype.is_floating_point else self.dtype
        return torch.zeros((), dtype=dtype, device=tokens.device).expand(sides)


class PassedOver:
    """The forward of a module that came before: its own, and zeros while the last stage runs alone."""

    def __init__(self, forward: Callable[..., Any], stage: LastStage, output: Any, is_entrance: bool):
        functools.update_wrapper(self, forward)
        self.forward, self.stage, self.output, self.is_entrance = forward, stage, output, is_entrance
        self.was_passed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tokens = self.stage.waiting
        self.was_passed = tokens is not None
        if tokens is None:
            return self.forward(*args, **kwargs)
        if self.is_entrance:
            self.stage.waiting = None
        return map_tensors(lambda leaf: _replaced(leaf, tokens), self.output)


def _replaced(leaf: Any, tokens: Tensor) -> Any:
    if not isinstance(leaf, Like):
        return leaf
    return tokens if leaf.is_replaced else leaf.made(tokens)


class LastStage:
    """Runs a model from one module to another.

    Args:
        model: in eval mode. The forwards of its modules before `entrance` are wrapped.
        size: of its images, (height, width).
        entrance: name of the module whose tensor enters the stage.
        last: name of the module that puts out the stage's result.
        by_input: it enters as the first that the module gets, and not as one that it puts out.
        index: of the tensor among those that the module puts out.

    Attributes:
        waiting: tokens on their way to the entrance; None while the whole model runs.
        running: whether the stage runs alone.
    """

    def __init__(
        self, model: nn.Module, size: tuple[int, int], entrance: str, last: str, by_input: bool = False, index: int = 0
    ):
        self.model, self.image = model, (3, *size)
        self.waiting: Tensor | None = None
        self.running = False
        self.calls = self.left = 1
        modules = dict(model.named_modules())
        self.passed_over: list[tuple[nn.Module, PassedOver]] = []
        self.entrance, self.by_input = modules[entrance], by_input
        one, two = self._observe(1, entrance, last, by_input), self._observe(2, entrance, last, by_input)
        for name in _outermost(one):
            if name != entrance or by_input:
                output = _compared(one[name], two[name])
                tensors = _likes(output)
                if tensors and all(any(like.growing) for like in tensors):
                    self._pass_over(modules[name], output, False)
        if by_input:
            modules[entrance].register_forward_pre_hook(self._enter, with_kwargs=True)
        else:
            output = _compared(one[entrance], two[entrance], index)
            self._pass_over(modules[entrance], output, True)
        self.last = modules[last]
        self._reaching = self.last.register_forward_hook(self._reach)

    def __call__(self, tokens: Tensor) -> Any:
        """What the last module puts out when the entrance gives `tokens`, of the shape that the model has there."""
        image = torch.zeros((), dtype=self._dtype(), device=tokens.device).expand(tokens.shape[0], *self.image)
        self.waiting, self.running, self.left = tokens, True, self.calls
        try:
            self.model.forward(image)  # past the hooks of the model as a whole: an engine's would not see its end
        except Reached as reached:
            return reached.args[0]
        finally:
            self.waiting, self.running = None, False
        raise ValueError("The last stage has ended without its last module: name one that comes later.")

    def _pass_over(self, module: nn.Module, output: Any, is_entrance: bool) -> None:
        module.forward = PassedOver(module.forward, self, output, is_entrance)
        self.passed_over.append((module, module.forward))

    @contextmanager
    def engine_hooks(self) -> Iterator[None]:
        """Inside, hooks that are given to modules that are passed over are for the whole model alone.

        An engine that fetches a module's parameters need not do so for one that is not run, and sees the end of the last one
        before the stage is left.
        """
        for module, passed in self.passed_over:
            give_before, give_after = module.register_forward_pre_hook, module.register_forward_hook

            def before(hook: Any, give: Any = give_before, **options: Any) -> Any:
                return give(lambda *given: None if self.waiting is not None else hook(*given), **options)

            def after(hook: Any, give: Any = give_after, passed: PassedOver = passed, **options: Any) -> Any:
                return give(lambda *given: None if passed.was_passed else hook(*given), **options)

            vars(module).update(register_forward_pre_hook=before, register_forward_hook=after)
        try:
            yield
        finally:
            for module, _ in self.passed_over:
                del module.register_forward_pre_hook, module.register_forward_hook
            self._reaching.remove()
            self._reaching = self.last.register_forward_hook(self._reach)

    def watch(self, seen: list[Any]) -> Any:
        """Keep what enters the stage when the whole model runs in `seen`; returns a handle with `remove`."""
        if self.by_input:
            return self.entrance.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(_first_argument(args, kwargs)), with_kwargs=True
            )
        return self.entrance.register_forward_hook(lambda module, args, output: seen.append(output))

    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        tokens, self.waiting = self.waiting, None
        if tokens is None:
            return None
        if args:
            return (tokens, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): tokens}

    def _reach(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self.running or self.waiting is not None:
            return
        self.left -= 1
        if not self.left:
            raise Reached(output)

    @torch.no_grad()
    def _observe(self, images: int, entrance: str, last: str, by_input: bool) -> dict[str, Any]:
        """The shapes of what each module put out that ended before the tokens entered, and of the entrance."""
        seen: dict[str, Any] = {}
        after: list[str] = []
        entered = False

        def begin(name: str) -> None:
            nonlocal entered
            entered = entered or (by_input and name == entrance)

        def end(name: str, output: Any) -> None:
            nonlocal entered
            if entered:
                after.append(name)
            elif name not in seen:
                seen[name] = map_tensors(_shape, output)
            entered = entered or (not by_input and name == entrance)

        hooks = []
        for name, module in self.model.named_modules():
            if name:
                hooks.append(module.register_forward_pre_hook(lambda *_, name=name: begin(name)))
                hooks.append(module.register_forward_hook(lambda *given, name=name: end(name, given[2])))
        try:
            parameter = next(self.model.parameters())
            self.model(torch.zeros(images, *self.image, dtype=parameter.dtype, device=parameter.device))
        finally:
            for hook in hooks:
                hook.remove()
        self.calls = max(1, after.count(last))
        if entrance in after and not by_input:
            raise ValueError(f"The last stage cannot begin at {entrance}, which runs more than once.")
        return seen


def _first_argument(args: tuple, kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _shape(leaf: Any) -> Any:
    return Like(tuple(leaf.shape), (0,) * leaf.ndim, leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _compared(one: Any, two: Any, index: int | None = None) -> Any:
    """A module's output for one image and for two, as what it is for any number; the tokens replace the tensor at `index`."""
    others, places = iter(_likes(two)), count()

    def compare(leaf: Any) -> Any:
        if not isinstance(leaf, Like):
            return leaf
        growing = tuple(y - x for x, y in zip(leaf.fixed, next(others).fixed, strict=True))
        fixed = tuple(x - step for x, step in zip(leaf.fixed, growing, strict=True))
        return Like(fixed, growing, leaf.dtype, next(places) == index)

    return map_tensors(compare, one)


def _likes(output: Any) -> list[Like]:
    found: list[Like] = []
    map_tensors(lambda leaf: found.append(leaf) if isinstance(leaf, Like) else None, output)
    return found


def _outermost(names: dict[str, Any]) -> list[str]:
    """Those that are in no other of them."""
    return [name for name in names if not any(f"{name}.".startswith(f"{other}.") and other != name for other in names)]


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Equal to rounding, by the largest value; of tensors without values nothing is known."""
    if expected.is_meta:
        return True
    tolerance = max(TOLERANCE, 4 * torch.finfo(expected.dtype).eps)
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def check_repeated(name: str, again: Tensor, expected: Tensor) -> None:
    """Refuse a teacher that gives two maps of one image.

    Raises:
        ValueError: it does.
    """
    if not is_close(again, expected):
        raise ValueError(f"`teacher` {name!r} gives another map of the same image each time. {REMEDY}")


def check_last_stage(name: str, found: Tensor, expected: Tensor, where: str = "") -> float | None:
    """Refuse a last stage that does not give the model's own last map, and say how close it is.

    Args:
        name: of the teacher.
        found, expected: (B, N, D).
        where: between which modules, for the error.

    Raises:
        ValueError: they are not equal to rounding.
    """
    if found.shape != expected.shape:
        raise ValueError(
            f"`teacher` {name!r}: its last stage{where} puts out {tuple(found.shape)}, but the last map has {tuple(expected.shape)}. "
            f"{REMEDY}"
        )
    if not found.requires_grad:
        raise ValueError(
            f"`teacher` {name!r}: no gradient passes through its last stage{where}, so that the student would learn nothing there. Run it "
            "without `torch.no_grad`."
        )
    if expected.is_meta:
        return None
    error, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    if not is_close(found, expected):
        raise ValueError(
            f"`teacher` {name!r}: its last stage{where}, applied to its own tokens, gives another map than the model: they differ by "
            f"{error:.3g} where the map reaches {scale:.3g}. More than these tokens enters it. {REMEDY}"
        )
    return error / scale if scale else 0.0
