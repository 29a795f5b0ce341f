"""Frozen teachers: the last map, the logits, and the last stage as a function of its tokens.

The last map is what the teacher's own classifier pools. `last_stage(tokens entering the last stage)`
equals the last map for every family here. Plain transformers take patch tokens with or without their
prefix (class, register) tokens: the method, as published, gives patch tokens alone (section 3.3).

Shapes in this file: B images, P prefix tokens, N = H*W patch tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .loading import Classifier, check_patches, load_classifier, patch_size
from .taps import first_tensor


__all__ = ["Teacher", "load_teacher"]

Grid = tuple[int, int]


class Teacher(nn.Module):
    """A frozen classifier, seen as a map of its last stage, logits, and that last stage.

    Stays in eval mode whatever `train()` is called with (but for stochastic depth, where that was asked
    for); no parameter requires a gradient, but gradients pass through `last_stage` to its input.

    Attributes:
        penultimate_dim, penultimate_grid: width D_p and grid (H_p, W_p) of the tokens entering the last stage.
        dim, grid: width D and grid (H, W) of the last map.
        spec: the images the teacher was made for; labels: its class names or None; num_labels: K or 0.
    """

    def __init__(self, classifier: Classifier, layout: Layout, last_blocks: int, drop_path: float):
        super().__init__()
        self.model: Any = classifier.module
        self.layout, self.last_blocks, self.drop_path = layout, last_blocks, drop_path
        self.is_sharded = False  # see `sharding.py`
        self.name, self.spec = classifier.name, classifier.spec
        self.labels, self.num_labels = classifier.labels, classifier.num_labels
        self._patch = patch_size(classifier)
        self._drop_paths = [module for module in self.model.modules() if "droppath" in type(module).__name__.lower()]
        self.requires_grad_(False)
        self.eval()
        check_patches(classifier, "teacher")
        self._check()
        self._captured: dict[str, Any] = {}
        self.entry().register_forward_pre_hook(self._keep_entering, with_kwargs=True)
        self.exit().register_forward_hook(self._keep_last)
        self._measure()

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
        self._captured.pop("last", None)  # left by a call of a part alone, or by one that failed
        output = self.model(pixel_values.to(next(self.parameters()).dtype))
        last_map = self._as_map(self._captured.pop("last"))
        if not self.num_labels:
            return last_map, None
        return last_map, output.logits if hasattr(output, "logits") else first_tensor(output)

    def last_stage(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N_p, D_p) to (B, N, D) through the frozen last stage and the norm before pooling."""
        raise NotImplementedError

    def entry(self) -> nn.Module:
        """The module that receives the tokens entering the last stage as its first argument."""
        raise NotImplementedError

    def exit(self) -> nn.Module:
        """The module that puts out the last map, or the tokens it is made of."""
        raise NotImplementedError

    def _check(self) -> None:
        """Refuse an image size that the model's windows do not divide, and options that do not fit."""
        if self.drop_path and not self._drop_paths:
            raise ValueError(
                f"`teacher_drop_path` is {self.drop_path}, but `teacher` {self.name!r} has no stochastic depth layers. "
                "Set it to 0, or give a teacher that has them by name."
            )

    def _as_map(self, output: Any) -> Tensor:
        raise NotImplementedError

    def _grids(self) -> tuple[Grid, Grid]:
        """Grids before and after the last stage; the model has run once."""
        raise NotImplementedError

    def _keep_entering(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tokens, *positions = args or (kwargs.pop("hidden_states"),)
        self._captured["entering"] = (tokens.shape, tuple(positions), kwargs)

    def _keep_last(self, module: nn.Module, args: tuple, output: Any) -> None:
        if "last" not in self._captured:
            self._captured["last"] = first_tensor(output)

    def _measure(self) -> None:
        """Learn widths and grids, and that the model runs at its image size, from one image of zeros."""
        parameter = next(self.parameters())
        image = torch.zeros(1, 3, *self.spec.size, device=parameter.device, dtype=parameter.dtype)
        with torch.no_grad():
            self.model(image)
        self.penultimate_grid, self.grid = self._grids()
        self.penultimate_dim = self._dim(self._captured["entering"][0])
        self.dim = self._as_map(self._captured.pop("last")).shape[1]

    def _dim(self, shape: torch.Size) -> int:
        return shape[1] if self.layout.order == "NCHW" else shape[-1]

    def _patch_grid(self) -> Grid:
        if built := getattr(getattr(self.model, "patch_embed", None), "grid_size", None):
            return built[0], built[1]
        assert self._patch is not None
        return self.spec.size[0] // self._patch[0], self.spec.size[1] // self._patch[1]


class PlainTeacher(Teacher):
    """Isotropic transformers: the last stage is the last `last_blocks` blocks and the norm before pooling."""

    def entry(self) -> nn.Module:
        return self._blocks()[-self.last_blocks]

    def exit(self) -> nn.Module:
        return self.model.get_submodule(self.layout.norm) if self.layout.norm else self._blocks()[-1]

    def last_stage(self, tokens: Tensor) -> Tensor:
        """Patch tokens (B, N, D), or with their prefix (B, P + N, D), to tokens of the same number.

        Blocks get the position terms that they got from the model. Terms that are sized for the prefix
        are kept in place by empty tokens that nothing attends to.
        """
        shape, positions, options = self._captured["entering"]
        prefix = shape[1] - tokens.shape[1]
        masked = self.layout.mask and prefix and self._has_position_terms(options)
        if masked:
            tokens = torch.cat([tokens.new_zeros(tokens.shape[0], prefix, tokens.shape[2]), tokens], dim=1)
            hidden = tokens.new_zeros(1, 1, 1, tokens.shape[1])
            hidden[..., :prefix].fill_(float("-inf"))  # a number that is assigned is copied from the host
            given = options.get(self.layout.mask)
            options = {**options, self.layout.mask: hidden if given is None else given + hidden}
        for block in self._blocks()[-self.last_blocks :]:
            tokens = first_tensor(block(tokens, *positions, **options))
        tokens = self.exit()(tokens) if self.layout.norm else tokens
        self._captured.pop("last", None)
        return tokens[:, prefix:] if masked else tokens

    def _has_position_terms(self, options: dict[str, Any]) -> bool:
        if self.layout.mask != "attn_mask":
            return True  # tables of relative positions
        return options.get("rope") is not None

    def _blocks(self) -> Any:
        return self.model.get_submodule(self.layout.blocks[0])

    def _check(self) -> None:
        super()._check()
        if not 1 <= self.last_blocks <= len(self._blocks()):
            raise ValueError(
                f"`teacher_last_blocks` must be between 1 and the {len(self._blocks())} blocks of `teacher` "
                f"{self.name!r}, got {self.last_blocks}."
            )

    def _as_map(self, output: Any) -> Tensor:
        grid = self._patch_grid()
        return output[:, output.shape[1] - grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)

    def _grids(self) -> tuple[Grid, Grid]:
        return self._patch_grid(), self._patch_grid()


class StagedTeacher(Teacher):
    """Hierarchical models of which the last stage is a chain of modules on maps."""

    def entry(self) -> nn.Module:
        return self._chain()[0]

    def exit(self) -> nn.Module:
        return self._chain()[-1]

    def last_stage(self, tokens: Tensor) -> Tensor:
        x = tokens.unflatten(1, self.penultimate_grid)  # (B, H_p, W_p, D_p)
        if self.layout.order == "NCHW":
            x = x.permute(0, 3, 1, 2)
        for module in self._chain():
            x = first_tensor(module(x))
        self._captured.pop("last", None)
        return self._as_map(x).flatten(2).transpose(1, 2)

    def _chain(self) -> list[Any]:
        modules = []
        for path in self.layout.blocks:
            parent, _, index = path.rpartition(".-")
            modules.append(self.model.get_submodule(parent)[-int(index)] if parent else self.model.get_submodule(path))
        return modules

    def _check(self) -> None:
        super()._check()
        for stage in getattr(self.model, "layers", ()):  # Swin
            block = stage.blocks[0]
            self._check_window(tuple(block.input_resolution), tuple(block.window_size))

    def _check_window(self, grid: Grid, window: Grid) -> None:
        if any(cells > side and cells % side for cells, side in zip(grid, window, strict=True)):
            height, width = self.spec.size
            raise ValueError(
                f"`teacher` {self.name!r} attends in windows of {window[0]}x{window[1]} tokens, which do not divide its "
                f"grid {grid[0]}x{grid[1]} at image size {height}x{width}. Choose another `teacher_image_size`."
            )

    def _as_map(self, output: Any) -> Tensor:
        return output if self.layout.order == "NCHW" else output.permute(0, 3, 1, 2)

    def _grids(self) -> tuple[Grid, Grid]:
        shape = self._captured["entering"][0]
        last = self._as_map(self._captured["last"]).shape
        before = shape[2:] if self.layout.order == "NCHW" else shape[1:3]
        return (before[0], before[1]), (last[2], last[3])


class TransformersSwin(StagedTeacher):
    """Swin and Swin V2 of transformers, whose merging sits at the end of the stage before, on tokens."""

    def entry(self) -> nn.Module:
        return self._layers()[-2].downsample

    def exit(self) -> nn.Module:
        return self.model.base_model.layernorm

    def last_stage(self, tokens: Tensor) -> Tensor:
        tokens = self._layers()[-2].downsample(tokens, self.penultimate_grid)
        tokens = self.exit()(first_tensor(self._layers()[-1](tokens, self.grid)))
        self._captured.pop("last", None)
        return tokens

    def _layers(self) -> Any:
        return self.model.base_model.encoder.layers

    def _stages(self) -> list[Grid]:
        grids = [self._patch_grid()]
        for _ in range(len(self._layers()) - 1):
            grids.append(((grids[-1][0] + 1) // 2, (grids[-1][1] + 1) // 2))  # merging pads odd grids
        return grids

    def _check(self) -> None:
        if len(self._layers()) < 2:
            raise ValueError(f"`teacher` {self.name!r} has one stage: there is no stage before its last one.")
        for grid in self._stages():
            self._check_window(grid, (self.model.config.window_size, self.model.config.window_size))
        super()._check()

    def _as_map(self, output: Any) -> Tensor:
        return output.transpose(1, 2).unflatten(2, self._stages()[-1])

    def _grids(self) -> tuple[Grid, Grid]:
        return self._stages()[-2], self._stages()[-1]


@dataclass(frozen=True)
class Layout:
    """Where a family keeps its last stage.

    Attributes:
        adapter: the class that reads it.
        blocks: of a plain transformer, the path of its blocks; of a hierarchical model, the paths of the chain that is
            its last stage, `.-1` for the last child.
        norm: path of the norm before pooling, of a plain transformer that has one there.
        mask: the blocks' argument for an additive mask, where position terms are sized for the prefix.
        order: of the maps in a hierarchical model.
    """

    adapter: type[Teacher]
    blocks: tuple[str, ...] = ("blocks",)
    norm: str = "norm"
    mask: str = ""
    order: str = "tokens"


def _transformers_plain(base: str, blocks: str = "layers", norm: str = "layernorm", mask: str = "") -> Layout:
    return Layout(PlainTeacher, (f"{base}.{blocks}",), f"{base}.{norm}" if norm else "", mask)


LAYOUTS: dict[tuple[str, str], Layout] = {
    ("timm", "VisionTransformer"): Layout(PlainTeacher),  # ViT, DeiT, DINOv2, CLIP, SigLIP
    ("timm", "Eva"): Layout(PlainTeacher, mask="attn_mask"),  # EVA, EVA-02, DINOv3
    ("timm", "Beit"): Layout(PlainTeacher, mask="shared_rel_pos_bias"),  # BEiT, BEiT v2
    ("timm", "SwinTransformer"): Layout(StagedTeacher, ("layers.-1", "norm"), order="NHWC"),
    ("timm", "SwinTransformerV2"): Layout(StagedTeacher, ("layers.-1", "norm"), order="NHWC"),
    ("timm", "ConvNeXt"): Layout(StagedTeacher, ("stages.-1", "norm_pre"), order="NCHW"),
    ("timm", "ResNet"): Layout(StagedTeacher, ("layer4",), order="NCHW"),
    ("timm", "RegNet"): Layout(StagedTeacher, ("s4", "final_conv"), order="NCHW"),
    ("transformers", "ViTForImageClassification"): _transformers_plain("vit"),
    ("transformers", "DeiTForImageClassification"): _transformers_plain("deit"),
    ("transformers", "DeiTForImageClassificationWithTeacher"): _transformers_plain("deit"),
    ("transformers", "BeitForImageClassification"): _transformers_plain("beit", mask="attention_mask"),
    ("transformers", "Dinov2ForImageClassification"): _transformers_plain("dinov2", "encoder.layer"),
    ("transformers", "Dinov2WithRegistersForImageClassification"): _transformers_plain(
        "dinov2_with_registers", "encoder.layer"
    ),
    ("transformers", "DINOv3ViTModel"): Layout(PlainTeacher, ("model.layer",), "norm"),
    ("transformers", "CLIPForImageClassification"): _transformers_plain("vision_model", "encoder.layers", norm=""),
    ("transformers", "SiglipForImageClassification"): _transformers_plain(
        "vision_model", "encoder.layers", norm="post_layernorm"
    ),
    ("transformers", "SwinForImageClassification"): Layout(TransformersSwin),
    ("transformers", "Swinv2ForImageClassification"): Layout(TransformersSwin),
    ("transformers", "ConvNextForImageClassification"): Layout(
        StagedTeacher, ("convnext.encoder.stages.-1",), order="NCHW"
    ),
    ("transformers", "ConvNextV2ForImageClassification"): Layout(
        StagedTeacher, ("convnextv2.encoder.stages.-1",), order="NCHW"
    ),
    ("transformers", "ResNetForImageClassification"): Layout(
        StagedTeacher, ("resnet.encoder.stages.-1",), order="NCHW"
    ),
}


def load_teacher(
    name_or_module: str | nn.Module,
    *,
    last_blocks: int = 2,
    drop_path: float = 0.0,
    pretrained: bool = True,
    **kwargs: Any,
) -> Teacher:
    """A frozen teacher from a name or module.

    Args:
        name_or_module: see `load_classifier`. Without a classifier head it teaches through its features alone.
        last_blocks: blocks that make the last stage of a plain ViT. Published: 2, of 12 or 24.
        drop_path: rate of stochastic depth that the teacher runs with while its student trains, as in the
            published loop; 0 for none. A module keeps the rate it was built with.
        pretrained: load its weights; turn off to inspect a pair without them.
        **kwargs: `image_size`, `mean`, `std`, and arguments of the model itself, see `load_classifier`.

    Raises:
        ValueError: an unknown name, a model without a last stage that can run on its own, an image size that
            patch or window does not divide, or a wrong `last_blocks`.
    """
    if isinstance(name_or_module, Teacher):
        return name_or_module
    if drop_path and isinstance(name_or_module, str):
        kwargs["drop_path_rate"] = drop_path
    classifier = load_classifier(name_or_module, role="teacher", pretrained=pretrained, **kwargs)
    for cls in type(classifier.module).__mro__:
        layout = LAYOUTS.get((classifier.library, cls.__name__))
        if layout is not None:
            return layout.adapter(classifier, layout, last_blocks, drop_path)
    known = ", ".join(f"{class_name} ({library})" for library, class_name in LAYOUTS)
    raise ValueError(
        f"`teacher` {classifier.name!r} is a {type(classifier.module).__name__} of {classifier.library}, of which no last "
        f"stage is known that ScaleKD can run on the student's tokens. Teachers known: {known}."
    )
