"""Frozen teachers: the last map, the logits, and the last stage as a function of its tokens.

The last map is what the teacher's own classifier pools. Nothing of a family is known here: a dry run finds the tokens that
enter the last stage and the last map (see `taps.py`), the model's own forward leads from one to the other (see
`last_stage.py`), and each teacher proves when it is loaded that its last stage applied to its own tokens gives its own map.
Plain transformers take patch tokens with or without their prefix (class, register) tokens: the method, as published, gives
patch tokens alone (section 3.3).

Shapes in this file: B images, P prefix tokens, N = H*W patch tokens, D channels.
"""

from __future__ import annotations

import inspect
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..images import ImageSpec
from .last_stage import REMEDY, LastStage, check_last_stage, check_repeated, is_close
from .loading import Classifier, check_patches, load_classifier
from .maps import first_tensor
from .taps import find_taps, taps_between


__all__ = ["OwnTeacher", "Teacher", "is_own", "load_teacher"]

logger = logging.getLogger(__name__)

LAST_BLOCKS = 2  # as published
# Arguments of blocks that are added to the attention scores.
MASKS = ("attn_mask", "attention_mask", "shared_rel_pos_bias", "relative_position_bias")


class Teacher(nn.Module):
    """A frozen network, seen as a map of its last stage, logits, and that last stage.

    Stays in eval mode whatever `train()` is called with (but for stochastic depth, where that was asked
    for); no parameter requires a gradient, but gradients pass through `last_stage` to its input.

    Args:
        classifier: the network.
        last_blocks: see `load_teacher`.
        drop_path: see `load_teacher`.
        tap_names: names of the module that gets the tokens entering the last stage and of the one that puts out the last map;
            None to find them.

    Attributes:
        taps: where the tokens enter the last stage, and where the last map leaves it.
        penultimate_dim, penultimate_grid: width D_p and grid (H_p, W_p) of the tokens entering the last stage.
        dim, grid: width D and grid (H, W) of the last map.
        spec: the images the teacher was made for; labels: its class names or None; num_labels: K or 0.
        deviation: how far `last_stage` of its own tokens was from its own last map when it was loaded, as a share of the map's
            largest value; None on the meta device.

    Raises:
        ValueError: a model in which no last stage is found, or one that does not give the model's own last map.
    """

    role = "teacher"
    deviation: float | None = None

    def __init__(
        self,
        classifier: Classifier,
        last_blocks: int = 2,
        drop_path: float = 0.0,
        tap_names: tuple[str, str] | None = None,
    ):
        super().__init__()
        self.model: Any = classifier.module
        self.last_blocks: int | None = last_blocks
        self.drop_path, self.tap_names = drop_path, tap_names
        self.is_sharded = False  # see `sharding.py`
        self.name, self.spec = classifier.name, classifier.spec
        self.labels, self.num_labels = classifier.labels, classifier.num_labels
        self._drop_paths = [module for module in self.model.modules() if "droppath" in type(module).__name__.lower()]
        self.requires_grad_(False)
        self.eval()
        check_patches(classifier, "teacher")
        self._check_drop_path()
        self._find()

    def _find(self) -> None:
        """Find the last stage, and see that it gives the model's own last map."""
        if self.tap_names is not None:
            self.taps = taps_between(self, self.tap_names)
        else:
            self.taps, remarks = find_taps(self)
            for remark in remarks:
                logger.warning("%s", remark)
        (self.penultimate_dim, self.penultimate_grid), (self.dim, self.grid) = (
            (tap.dim, tap.grid) for tap in self.taps
        )
        self._captured: dict[str, Any] = {}
        self._mask = ""  # the argument that hides prefix tokens, where position terms are sized for them
        self._hidden: Tensor | None = None
        self.register_buffer("_places", self.taps[0].places(), persistent=False)  # of tokens in another order
        self._places: Tensor | None
        names = [tap.module for tap in self.taps]
        by_input = self.tap_names is not None
        self._stage = LastStage(self.model, self.spec.size, names[0], names[1], by_input, self.taps[0].index)
        self.model.get_submodule(names[1]).register_forward_hook(self._keep_last)
        if not next(self.parameters()).is_meta or self.taps[0].prefix:
            self._prove()

    def train(self, mode: bool = True) -> Teacher:
        """Calls `eval()`: a teacher has no training mode; stochastic depth follows `mode` where it was asked for."""
        super().train(False)
        if self.drop_path:
            for module in self._drop_paths:
                module.training = mode
        return self

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, height, width) to the last map (B, D, H, W) and logits (B, K), None without a head."""
        output = self.model(pixel_values.to(next(self.parameters()).dtype))
        last_map = self.taps[1].as_map(self._captured.pop("last"))
        return last_map, _logits(output) if self.num_labels else None

    def last_stage(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N_p, D_p) to (B, N, D) through the frozen last stage and the norm before pooling.

        Patch tokens may come with their prefix, (B, P + N_p, D_p), and then leave with theirs. Where position terms are
        sized for the prefix, patch tokens alone are kept in place by empty tokens that nothing attends to.
        """
        entering = self.taps[0]
        if tokens.shape[1] > self._patches(entering):
            return self._run(tokens)
        if self._mask:
            tokens = self._behind(tokens.new_zeros(tokens.shape[0], entering.prefix, tokens.shape[2]), tokens)
        tokens = self._run(tokens)
        return tokens[:, tokens.shape[1] - self._patches(self.taps[1]) :]

    def _run(self, tokens: Tensor) -> Tensor:
        entering, last = self.taps
        if self._places is not None:
            tokens = tokens[:, self._places]
        try:
            return last.as_tokens(self._stage(entering.from_tokens(tokens)))
        finally:
            self._hidden = None

    def engine_hooks(self) -> AbstractContextManager[None]:
        """Inside, an engine may give its hooks to the model: see `LastStage.engine_hooks`."""
        return self._stage.engine_hooks()

    def classify(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 3, height, width) to logits (B, K), or without a head to numbers (B, 1) that all its features enter."""
        output = self.model(pixel_values)
        return _logits(output) if self.num_labels else first_tensor(output).flatten(1).mean(1, keepdim=True)

    def _patches(self, tap: Any) -> int:
        return tap.grid[0] * tap.grid[1]

    def _behind(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """Tokens behind a prefix that the blocks are told to hide."""
        self._hidden = tokens.new_zeros(1, 1, 1, prefix.shape[1] + tokens.shape[1])
        self._hidden[..., : prefix.shape[1]].fill_(float("-inf"))  # a number that is assigned is copied from the host
        return torch.cat([prefix, tokens], dim=1)

    def _hide(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._hidden is None:
            return None
        given = kwargs.get(self._mask)
        return args, {**kwargs, self._mask: self._hidden if given is None else given + self._hidden}

    def _keep_last(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self._stage.running:
            self._captured["last"] = output

    def _check_drop_path(self) -> None:
        if self.drop_path and not self._drop_paths:
            raise ValueError(
                f"`teacher_drop_path` is {self.drop_path}, but `teacher` {self.name!r} has no stochastic depth layers. "
                "Set it to 0, or give a teacher that has them by name."
            )

    @torch.no_grad()
    def _prove(self) -> None:
        """See that the last stage, applied to tokens of the model's own, gives its last map.

        Raises:
            ValueError: it does not.
        """
        parameter = next(self.parameters())
        entering, last = self.taps
        entered: list[Any] = []
        watching = self._stage.watch(entered)
        images = torch.randn(2, 3, *self.spec.size, generator=torch.Generator().manual_seed(0)).to(parameter)
        try:
            self.model(images)
        finally:
            watching.remove()
        expected = last.as_tokens(self._captured.pop("last"))
        self.model(images.flip(0))  # what modules keep of a batch is now of another
        check_repeated(self.name, last.as_tokens(self._captured.pop("last")).flip(0), expected)
        tokens = entering.as_tokens(entered[0])
        if entering.prefix:
            self._prepare_for_patches_alone(tokens)
        with torch.enable_grad():
            found = self.last_stage(tokens.requires_grad_())
        expected = expected[:, expected.shape[1] - found.shape[1] :]
        self.deviation = check_last_stage(self.name, found, expected, f" between {entering.module} and {last.module}")

    def _prepare_for_patches_alone(self, tokens: Tensor) -> None:
        """Find whether the last stage takes patch tokens alone, or else the argument of its blocks that hides their prefix.

        Raises:
            ValueError: neither.
        """
        patches = tokens[:, self.taps[0].prefix :]
        try:
            if self._run(patches).shape[1] >= self._patches(self.taps[1]):
                return
            reason = "it loses some of them"
        except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
        blocks = self._blocks()
        arguments = inspect.signature(blocks[0].forward).parameters if blocks else ()
        self._mask = next((name for name in MASKS if name in arguments), "")
        if self._mask:
            for block in blocks:
                block.register_forward_pre_hook(self._hide, with_kwargs=True)
            others = self._run(self._behind(tokens[:, : self.taps[0].prefix], patches))
            found = self.last_stage(patches)
            if is_close(found, others[:, -found.shape[1] :]):
                return
        raise ValueError(
            f"`teacher` {self.name!r}: its last stage does not run on patch tokens alone, as the method has it ({reason}), and has "
            f"no mask that hides their prefix of {self.taps[0].prefix}. {REMEDY}"
        )

    def _blocks(self) -> list[nn.Module]:
        """The blocks of a plain transformer that follow the one whose tokens enter the last stage."""
        path, _, index = self.taps[0].module.rpartition(".")
        if not index.isdigit():
            return []
        return list(self.model.get_submodule(path).children())[int(index) + (self.tap_names is None) :]


def _logits(output: Any) -> Tensor:
    logits: Tensor = output.logits if hasattr(output, "logits") else first_tensor(output)
    return logits


class OwnTeacher(Teacher):
    """A teacher that runs its own last stage: a module with a method `last_stage`.

    The module takes images (B, 3, height, width) and puts out three things: the map entering its last stage (B, D_p, H_p, W_p),
    its last map (B, D, H, W), and logits (B, K) or None. Its `last_stage` takes tokens (B, H_p*W_p, D_p), in the order of the
    flattened map, to (B, H*W, D).
    """

    @torch.no_grad()
    def _find(self) -> None:
        parameter = next(self.parameters())
        images = torch.randn(2, 3, *self.spec.size, generator=torch.Generator().manual_seed(0)).to(parameter)
        try:
            entering, last, _ = self.model(images)
            (self.penultimate_dim, *_), (self.dim, *_) = entering.shape[1:], last.shape[1:]
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(
                f"`teacher` {self.name!r} has a `last_stage`: then it puts out the map entering it (B, D_p, H_p, W_p), the last map "
                "(B, D, H, W), and logits (B, K) or None."
            ) from error
        (self.penultimate_dim, self.penultimate_grid) = entering.shape[1], tuple(entering.shape[2:])
        (self.dim, self.grid) = last.shape[1], tuple(last.shape[2:])
        check_repeated(self.name, self.model(images.flip(0))[1].flip(0), last)
        expected = last.flatten(2).transpose(1, 2)
        with torch.enable_grad():
            found = self.last_stage(entering.flatten(2).transpose(1, 2).requires_grad_())
        self.deviation = check_last_stage(self.name, found, expected)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Teacher.forward`."""
        _, last_map, logits = self.model(pixel_values.to(next(self.parameters()).dtype))
        return last_map, logits if self.num_labels else None

    def engine_hooks(self) -> AbstractContextManager[None]:
        """See `Teacher.engine_hooks`."""
        return nullcontext()

    def last_stage(self, tokens: Tensor) -> Tensor:
        """See `Teacher.last_stage`."""
        result: Tensor = self.model.last_stage(tokens)
        return result


def is_own(module: nn.Module) -> bool:
    """Whether a module is of neither timm nor transformers."""
    return not (
        isinstance(module, Teacher) or isinstance(module, PreTrainedModel) or hasattr(module, "pretrained_cfg")
    )


@torch.no_grad()
def _own_classifier(
    module: nn.Module,
    labels: list[str] | None = None,
    image_size: int | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> Classifier:
    """A network of images as a classifier.

    Args:
        module: takes images (B, 3, height, width). What it puts out are logits if the first tensor of it is (B, K), unless its
            `num_classes` is 0. Its `spec`, an `ImageSpec`, says what images it takes; by default 224 px, ImageNet's mean and
            standard deviation.
        labels: its class names.
        image_size, mean, std: instead of its `spec`'s.
    """
    spec: Any = getattr(module, "spec", ImageSpec())
    spec = spec.updated(size=image_size, mean=mean, std=std)
    parameter = next(module.parameters())
    try:
        output = module.eval()(torch.zeros(2, 3, *spec.size, dtype=parameter.dtype, device=parameter.device))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise ValueError(
            f"`teacher` is a {type(module).__name__} that does not run on images (2, 3, {spec.size[0]}, {spec.size[1]}): {error}. "
            "Give `teacher_image_size`, or a network of images."
        ) from error
    if hasattr(module, "last_stage"):
        logits = output[2]
    else:
        logits = output.logits if hasattr(output, "logits") else first_tensor(output)
    is_classifier = logits is not None and logits.ndim == 2 and getattr(module, "num_classes", None) != 0
    return Classifier(
        module, "torch", spec, type(module).__name__, labels, classes=logits.shape[1] if is_classifier else 0
    )


def _check_loaded(teacher: Teacher, last_blocks: int, drop_path: float, taps: Any) -> None:
    """Refuse what is asked for, other than by default, of a teacher that is loaded without it."""
    names = list(teacher.tap_names or ())
    asked = {
        "teacher_last_blocks": (last_blocks, last_blocks in (LAST_BLOCKS, teacher.last_blocks), teacher.last_blocks),
        "teacher_drop_path": (drop_path, drop_path in (0.0, teacher.drop_path), teacher.drop_path),
        "teacher_taps": (taps, list(taps or names) == names, names or "none"),
    }
    for name, (value, fits, has) in asked.items():
        if not fits:
            raise ValueError(
                f"`{name}` is {value}, but the teacher is loaded already, with {has}. Give it to `load_teacher`, or its name "
                "instead of the teacher."
            )


def load_teacher(
    name_or_module: str | nn.Module,
    *,
    last_blocks: int = LAST_BLOCKS,
    drop_path: float = 0.0,
    pretrained: bool = True,
    taps: tuple[str, str] | list[str] | None = None,
    **kwargs: Any,
) -> Teacher:
    """A frozen teacher from a name or module.

    Args:
        name_or_module: see `load_classifier`; or a module of neither library, see
            `OwnTeacher` and `docs/recipes.md`. Without a trained
            classifier it teaches through its features alone.
        last_blocks: blocks that make the last stage of a plain ViT. Published: 2, of 12 or 24.
        drop_path: rate of stochastic depth that the teacher runs with while its student trains, as in the
            published loop; 0 for none. A module keeps the rate it was built with.
        pretrained: load its weights; turn off to inspect a pair without them.
        taps: names of the module that gets the tokens entering the last stage and of the module that puts out the last map,
            where others are wanted than those that the dry run finds.
        **kwargs: `image_size`, `mean`, `std`, and arguments of the model itself, see `load_classifier`.

    Raises:
        ValueError: an unknown name, a checkpoint that lacks weights, a model without a last stage that can run on its own, an
            image size that its patches do not divide, or a wrong `last_blocks`.
    """
    if isinstance(name_or_module, Teacher):
        _check_loaded(name_or_module, last_blocks, drop_path, taps)
        return name_or_module
    if drop_path and isinstance(name_or_module, str):
        kwargs["drop_path_rate"] = drop_path
    tap_names = (taps[0], taps[1]) if taps is not None else None
    if isinstance(name_or_module, nn.Module) and is_own(name_or_module):
        kind = OwnTeacher if hasattr(name_or_module, "last_stage") else Teacher
        return kind(_own_classifier(name_or_module, **kwargs), last_blocks, drop_path, tap_names)
    classifier = load_classifier(name_or_module, role="teacher", pretrained=pretrained, **kwargs)
    return Teacher(classifier, last_blocks, drop_path, tap_names)
