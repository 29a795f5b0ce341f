"""Frozen teachers: the last map, the logits, and the last stage as a function of its tokens.

The last map is what the teacher's own classifier pools. For every adapter here
`last_stage(tokens entering the last stage)` equals the last map, up to the prefix tokens (class,
register) of a plain ViT, on which the published method runs no last stage (section 3.3).

Shapes in this file: B images, N = H*W tokens, D channels.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .loading import Classifier, check_patches, load_classifier


__all__ = ["Teacher", "load_teacher"]


class Teacher(nn.Module):
    """A frozen classifier, seen as a map of its last stage, logits, and that last stage.

    Stays in eval mode whatever `train()` is called with; no parameter requires a gradient, but
    gradients pass through `last_stage` to its input.

    Attributes:
        penultimate_dim, penultimate_grid: width D_p and grid (H_p, W_p) of the tokens entering the last stage.
        dim, grid: width D and grid (H, W) of the last map.
        spec: the images the teacher was made for; labels: its class names or None; num_labels: K or 0.
    """

    family: ClassVar[tuple[str, str]]  # library, name of the class or of an ancestor

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.model: Any = classifier.module
        self.name, self.spec = classifier.name, classifier.spec
        self.labels, self.num_labels = classifier.labels, classifier.num_labels
        self.requires_grad_(False)
        self.eval()
        check_patches(classifier, "teacher")
        self._check()
        self._measure()

    def train(self, mode: bool = True) -> Teacher:
        """Does nothing but call `eval()`: a teacher has no training mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, height, width) to the last map (B, D, H, W) and logits (B, K), None without a head."""
        tokens, logits = self._tokens_and_logits(pixel_values)
        last_map = tokens.transpose(1, 2).unflatten(2, self.grid)
        return last_map, logits if self.num_labels else None

    def last_stage(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N_p, D_p) to (B, N, D) through the frozen last stage and the norm before pooling."""
        raise NotImplementedError

    def entry(self) -> nn.Module:
        """The module that receives the tokens entering the last stage as its first argument."""
        raise NotImplementedError

    def _tokens_and_logits(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Last tokens (B, N, D) without prefix, and logits, from one forward."""
        raise NotImplementedError

    def _patch_size(self) -> tuple[int, int]:
        raise NotImplementedError

    def _stages(self) -> list[tuple[tuple[int, int], tuple[int, int] | None]]:
        """(grid, attention window or None) of each stage; a plain ViT is one stage."""
        return [(self._patch_grid(), None)]

    def _patch_grid(self) -> tuple[int, int]:
        patch = self._patch_size()
        return self.spec.size[0] // patch[0], self.spec.size[1] // patch[1]

    def _check(self) -> None:
        height, width = self.spec.size
        for grid, window in self._stages():
            if window and any(cells > side and cells % side for cells, side in zip(grid, window, strict=True)):
                raise ValueError(
                    f"`teacher` {self.name!r} attends in windows of {window[0]}x{window[1]} tokens, which do not divide "
                    f"its grid {grid[0]}x{grid[1]} at image size {height}x{width}. Choose another `teacher_image_size`."
                )

    def _measure(self) -> None:
        """Learn widths and grids, and that the model runs at its image size, from one image of zeros."""
        seen: list[Tensor] = []
        hook = self.entry().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        parameter = next(self.parameters())
        image = torch.zeros(1, 3, *self.spec.size, device=parameter.device, dtype=parameter.dtype)
        try:
            with torch.no_grad():
                tokens, _ = self._tokens_and_logits(image)
        finally:
            hook.remove()
        grids = [grid for grid, _ in self._stages()]
        self.grid, self.penultimate_grid = grids[-1], grids[-2:][0]
        self.penultimate_dim, self.dim = seen[0].shape[-1], tokens.shape[-1]


class PlainTeacher(Teacher):
    """Isotropic transformers: the last stage is the last `last_blocks` blocks and the norm before pooling."""

    def __init__(self, classifier: Classifier, last_blocks: int = 2):
        self.last_blocks = last_blocks
        super().__init__(classifier)

    def _check(self) -> None:
        super()._check()
        if not 1 <= self.last_blocks <= len(self._blocks()):
            raise ValueError(
                f"`teacher_last_blocks` must be between 1 and the {len(self._blocks())} blocks of `teacher` "
                f"{self.name!r}, got {self.last_blocks}."
            )

    def entry(self) -> nn.Module:
        return self._blocks()[-self.last_blocks]

    def last_stage(self, tokens: Tensor) -> Tensor:
        for block in self._blocks()[-self.last_blocks :]:
            tokens = _first(block(tokens))
        return self._norm()(tokens)

    def _blocks(self) -> Any:
        raise NotImplementedError

    def _norm(self) -> Any:
        raise NotImplementedError


class TimmVit(PlainTeacher):
    family = ("timm", "VisionTransformer")

    def _blocks(self) -> Any:
        return self.model.blocks

    def _norm(self) -> Any:
        return self.model.norm

    def _tokens_and_logits(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.model.forward_features(pixel_values)
        return tokens[:, self.model.num_prefix_tokens :], self.model.forward_head(tokens)

    def _patch_size(self) -> tuple[int, int]:
        return _pair(self.model.patch_embed.patch_size)


class TransformersVit(PlainTeacher):
    family = ("transformers", "ViTForImageClassification")

    def _blocks(self) -> Any:
        vit = self.model.vit
        return vit.layers if hasattr(vit, "layers") else vit.encoder.layer  # renamed within transformers 5

    def _norm(self) -> Any:
        return self.model.vit.layernorm

    def _tokens_and_logits(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.model.vit(pixel_values).last_hidden_state
        return tokens[:, 1:], self.model.classifier(tokens[:, 0])

    def _patch_size(self) -> tuple[int, int]:
        return _pair(self.model.config.patch_size)


class TimmSwin(Teacher):
    family = ("timm", "SwinTransformer")

    def entry(self) -> nn.Module:
        return self.model.layers[-1]  # its first part is the 2x patch merging

    def last_stage(self, tokens: Tensor) -> Tensor:
        x = tokens.unflatten(1, self.penultimate_grid)  # (B, H_p, W_p, D_p)
        return self.model.norm(self.model.layers[-1](x)).flatten(1, 2)

    def _tokens_and_logits(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        x = self.model.forward_features(pixel_values)  # (B, H, W, D)
        return x.flatten(1, 2), self.model.forward_head(x)

    def _patch_size(self) -> tuple[int, int]:
        return _pair(self.model.patch_embed.patch_size)

    def _stages(self) -> list[tuple[tuple[int, int], tuple[int, int] | None]]:
        blocks = [layer.blocks[0] for layer in self.model.layers]
        return [(_pair(block.input_resolution), _pair(block.window_size)) for block in blocks]


class TransformersSwin(Teacher):
    family = ("transformers", "SwinForImageClassification")

    def entry(self) -> nn.Module:
        return self._layers()[-2].downsample  # the 2x merging sits at the end of the stage before

    def last_stage(self, tokens: Tensor) -> Tensor:
        tokens = self._layers()[-2].downsample(tokens, self.penultimate_grid)
        return self.model.swin.layernorm(_first(self._layers()[-1](tokens, self.grid)))

    def _layers(self) -> Any:
        return self.model.swin.encoder.layers

    def _tokens_and_logits(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model.swin(pixel_values)
        return output.last_hidden_state, self.model.classifier(output.pooler_output)

    def _patch_size(self) -> tuple[int, int]:
        return _pair(self.model.config.patch_size)

    def _stages(self) -> list[tuple[tuple[int, int], tuple[int, int] | None]]:
        height, width = self._patch_grid()
        stages: list[tuple[tuple[int, int], tuple[int, int] | None]] = []
        for _ in self._layers():
            stages.append(((height, width), _pair(self.model.config.window_size)))
            height, width = (height + 1) // 2, (width + 1) // 2  # merging pads odd grids
        return stages


ADAPTERS: tuple[type[Teacher], ...] = (TimmSwin, TimmVit, TransformersSwin, TransformersVit)


def load_teacher(
    name_or_module: str | nn.Module, *, last_blocks: int = 2, pretrained: bool = True, **kwargs: Any
) -> Teacher:
    """A frozen teacher from a name or module.

    Args:
        name_or_module: see `load_classifier`.
        last_blocks: blocks that make the last stage of a plain ViT. Published: 2, of 12 or 24.
        pretrained: load its weights; turn off to inspect a pair without them.
        **kwargs: `image_size`, `mean`, `std`, and arguments of the model itself, see `load_classifier`.

    Raises:
        ValueError: an unknown name, a model without transformer stages, an image size that patch or window
            does not divide, or a wrong `last_blocks`.
    """
    if isinstance(name_or_module, Teacher):
        return name_or_module
    classifier = load_classifier(name_or_module, role="teacher", pretrained=pretrained, **kwargs)
    ancestors = {cls.__name__ for cls in type(classifier.module).__mro__}
    for adapter in ADAPTERS:
        library, class_name = adapter.family
        if library == classifier.library and class_name in ancestors:
            options: dict[str, Any] = {"last_blocks": last_blocks} if issubclass(adapter, PlainTeacher) else {}
            return adapter(classifier, **options)
    known = ", ".join(f"{class_name} ({library})" for library, class_name in (a.family for a in ADAPTERS))
    raise ValueError(
        f"`teacher` {classifier.name!r} is a {type(classifier.module).__name__} of {classifier.library}, which has no "
        f"transformer last stage that ScaleKD can run on the student's tokens. Teachers known: {known}."
    )


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[1]) if isinstance(value, (tuple, list)) else (value, value)
