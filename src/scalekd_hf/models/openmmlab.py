"""The same weights in OpenMMLab's names (mmcls 0.x and 1.0rc, mmpretrain 1.x) and in timm's: which tensor is which, in both directions.

For each family of networks there is one list of names, from timm's to theirs, and what has to be done to a tensor on the way. What is
missing or left over is an error, so that nothing is taken for what it is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


__all__ = ["FAMILIES", "classes_in", "family_of", "find_weights", "from_openmmlab", "is_openmmlab", "to_openmmlab"]

SHOWN = 6
BACKBONE = "backbone."
FFN = [(r"mlp\.fc1\.", "ffn.layers.0.0."), (r"mlp\.fc2\.", "ffn.layers.1.")]
EMBEDDING = [(r"^patch_embed\.proj\.", "patch_embed.projection.")]
BLOCK = [
    (r"^blocks\.", "layers."),
    (r"^norm\.", "ln1."),
    (r"^fc_norm\.", "ln2."),  # after pooling
    (r"(layers\.\d+)\.norm(\d)\.", r"\1.ln\2."),
]
VIT = [*EMBEDDING, *BLOCK, *FFN]
MIXER = [
    (r"^stem\.proj\.", "patch_embed.projection."),
    *BLOCK,
    (r"mlp_(token|channel)s\.fc1\.", r"\1_mix.layers.0.0."),
    (r"mlp_(token|channel)s\.fc2\.", r"\1_mix.layers.1."),
]
SWIN = [
    *EMBEDDING,
    (r"^norm\.", "norm3."),
    (
        r"^layers\.(\d+)\.downsample\.",
        lambda found: f"stages.{int(found[1]) - 1}.downsample.",
    ),  # at the end of a stage
    (r"^layers\.", "stages."),
    (r"\.attn\.", ".attn.w_msa."),
    *FFN,
]
CONVNEXT = [
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"^(stages\.\d+)\.blocks\.", r"\1."),
    (r"\.conv_dw\.", ".depthwise_conv."),
    (r"\.mlp\.fc", ".pointwise_conv"),
    (r"^(norm_pre|head\.norm)\.", "norm3."),
]
EVA02 = [
    *EMBEDDING,
    (r"^blocks\.", "layers."),
    (r"^fc_norm\.", "ln2."),
    (r"mlp\.fc1_[gx]\.", "mlp.w12."),  # one after the other
    (r"mlp\.fc2\.", "mlp.w3."),
]
DEEP_STEM = [
    (r"^conv1\.(\d)\.", lambda found: f"stem.{int(found[1]) // 3}.{'bn' if int(found[1]) % 3 else 'conv'}."),
    (r"^bn1\.", "stem.2.bn."),
]
POOLED = [
    (r"^(layer1\.0\.downsample)\.(\d)\.", lambda found: f"{found[1]}.{int(found[2]) - 1}."),
]  # a pooling that does nothing, which OpenMMLab leaves out
MOBILENET = [(r"^conv_stem\.", "model.0.0."), (r"^bn1\.", "model.0.1.")]
MOBILENET_LAYERS = {"conv_dw": 0, "bn1": 1, "conv_pw": 3, "bn2": 4}
# Parts of timm's names for which there are others in these lists. A network with further ones is another than OpenMMLab's.
TRANSFORMER = "pos_embed cls_token patch_embed proj blocks norm norm1 norm2 fc_norm attn qkv mlp fc1 fc2 head"
WORDS = {
    "ResNet": "conv1 conv2 conv3 bn1 bn2 bn3 downsample layer1 layer2 layer3 layer4 fc",
    "EfficientNet": "conv_stem blocks conv_dw conv_pw bn1 bn2 classifier",
    "ConvNeXt": "stem stages blocks conv_dw norm mlp fc1 fc2 gamma downsample norm_pre head fc",
    "SwinTransformer": f"{TRANSFORMER} layers relative_position_bias_table downsample reduction fc",
    "VisionTransformer": TRANSFORMER,
    "NormedTwice": TRANSFORMER,
    "MlpMixer": "stem proj blocks norm norm1 norm2 mlp_tokens mlp_channels fc1 fc2 head",
    "RotatedEva": f"{TRANSFORMER} fc1_g fc1_x",
}
ENDS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
ACTIVATIONS = {"ResNet": "ReLU", "EfficientNet": "ReLU", "RotatedEva": "SiLU"}  # of the others GELU
MODULES = ("activation", "activations", "activations_me")
OTHER_PARTS = {"ResPostBlock", "ParallelScalingBlock", "RmsNorm", "RmsNorm2d", "SimpleNorm", "SimpleNorm2d"}
HEAD = re.compile(r"^(?:head\.fc|head|fc|classifier)\.(weight|bias)$")
Names = list[tuple[str, Any]]

# Theirs that have no counterpart, because they are computed, or norms of maps that only distillation and dense tasks look at.
COMPUTED = r"(?:.*\.relative_position_index|(?:.*\.)?rope\.freqs_(?:cos|sin))"
OTHER_MAPS = r"norm[0-2]\.(?:weight|bias)"
UNUSED = re.compile(f"{BACKBONE}(?:{COMPUTED}|{OTHER_MAPS})$|data_preprocessor\\.(?:mean|std)$")
CLASS_TOKEN = f"{BACKBONE}cls_token"  # mmcls has it in ViTs without one, too, and a place in `pos_embed` for it
TOKENS_HEAD = "head.layers.head."  # of OpenMMLab's `VisionTransformerClsHead`

# The mixers of OpenMMLab have LayerNorms with an epsilon of 1e-5, those of timm 1e-6. What is normalised there is the sum of all that the
# blocks add. With that sum scaled by the root of the quotient, both norms put out the same.
MIXER_SCALE = (1e-6 / 1e-5) ** 0.5
ADDED = re.compile(r"^(?:stem\.proj|blocks\.\d+\.mlp_(?:tokens|channels)\.fc2)\.")
GATE = re.compile(r"\.mlp\.fc1_[gx]\.")
MERGING = re.compile(r"\.downsample\.(?:norm|reduction)\.")


def find_weights(content: Any, raw: bool = False) -> tuple[dict[str, Tensor], str]:
    """The weights of a classifier in a checkpoint: the student's, where the state of a whole distillation is in it.

    Args:
        content: of the file: of mmengine, mmcv, timm and the like, or a bare state.
        raw: take those of the last step where the file has a moving average, too; by default the average.

    Returns:
        Tensors by their names without `student.` or `module.`, and which they are: "moving average", "last step" or "only ones".

    Raises:
        ValueError: there are none, or `raw` where there is no average.
    """
    found = _state(content, "state_dict", "model", "model_state", "module") or _tensors(content)
    averaged = _state(content, "state_dict_ema", "model_ema")  # timm's
    last = found if averaged else {}
    if isinstance(content, Mapping) and "ema_state_dict" in content:
        # mmengine saves the average under the names of the model, and the model's own weights as the average's.
        averaged, last = found, _without(_tensors(content["ema_state_dict"]), "module.", only=True)
    elif beside := {name: found[_beside(name)] for name in found if _beside(name) in found}:
        averaged, last = {name: value for name, value in found.items() if not name.startswith("ema_")}, found | beside
        last = {name: last[name] for name in averaged}  # mmcv the same, in buffers
    if raw and not last:
        raise ValueError(
            "`raw` is on, but the checkpoint has one set of weights and no moving average beside it. Leave it out."
        )
    taken = last if raw else averaged or found
    taken = _without(taken, "module.")
    if not taken:
        raise ValueError("The checkpoint has no weights: nothing in it is a mapping of names to tensors.")
    return _without(
        taken, "student.", only=True
    ), "last step" if raw else "moving average" if averaged else "only ones"


def _beside(name: str) -> str:
    return f"ema_{name.replace('.', '_')}"


def _state(content: Any, *names: str) -> dict[str, Tensor]:
    """The first of these entries that holds tensors."""
    entries = (_tensors(content.get(name)) for name in names) if isinstance(content, Mapping) else ()
    return next((entry for entry in entries if entry), {})


def _tensors(entry: Any) -> dict[str, Tensor]:
    items = entry.items() if isinstance(entry, Mapping) else ()
    return {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}


def _without(tensors: dict[str, Tensor], prefix: str, only: bool = False) -> dict[str, Tensor]:
    """Names without a prefix, if all have it; those that have it if `only` and some do."""
    having = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return having if having and (only or len(having) == len(tensors)) else tensors


def is_openmmlab(names: Iterable[str]) -> bool:
    """Whether weights have the names of a classifier of OpenMMLab."""
    return any(name.startswith(BACKBONE) for name in names)


def classes_in(names: Mapping[str, Tensor]) -> int | None:
    """The number of classes of a classifier's weights, by OpenMMLab's or timm's names; None where no head is found."""
    theirs = _plain_head(names)
    return next((value.shape[0] for name, value in theirs.items() if HEAD.match(name) and value.ndim), None)


def _plain_head(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(TOKENS_HEAD, "head.fc."): value for name, value in theirs.items()}


def _listed(pairs: Names) -> Callable[[list[str]], dict[str, str]]:
    """What names the tensors of a network by a list of replacements, each made in what the ones before have left."""

    def named(keys: list[str]) -> dict[str, str]:
        return {key: _replaced(key, pairs) for key in keys}

    return named


def _replaced(name: str, pairs: Names) -> str:
    for pattern, other in pairs:
        name = re.sub(pattern, other, name)
    return name


def _resnet(keys: list[str]) -> dict[str, str]:
    shortcut = "layer1.0.downsample.1.weight" in keys and "layer1.0.downsample.0.weight" not in keys
    return _listed([*(DEEP_STEM if "conv1.0.weight" in keys else []), *(POOLED if shortcut else [])])(keys)


def _mobilenet(keys: list[str]) -> dict[str, str]:
    """Of the authors' MobileNet-V1, which counts blocks through: eleven and the first convolution, then two of the last stage."""
    found = [re.match(r"blocks\.(\d+)\.(\d+)\.(\w+)\.(\w+)$", key) for key in keys]
    blocks = sorted({(int(match[1]), int(match[2])) for match in found if match})
    places = {block: place for place, block in enumerate(blocks)}
    named = _listed(MOBILENET)(keys)
    for key, match in zip(keys, found, strict=True):
        if match and match[3] in MOBILENET_LAYERS:
            place = places[int(match[1]), int(match[2])]
            first = len(blocks) - 2
            stage = f"model.{place + 1}" if place < first else f"s4.{place - first}"
            named[key] = f"{stage}.{MOBILENET_LAYERS[match[3]]}.{match[4]}"
    return named


FAMILIES: dict[str, Callable[[list[str]], dict[str, str]]] = {  # by the class of timm's module
    "ResNet": _resnet,
    "EfficientNet": _mobilenet,
    "ConvNeXt": _listed(CONVNEXT),
    "SwinTransformer": _listed(SWIN),
    "VisionTransformer": _listed(VIT),
    "NormedTwice": _listed(VIT),
    "MlpMixer": _listed(MIXER),
    "RotatedEva": _listed(EVA02),
}


def family_of(module: nn.Module) -> str | None:
    """The family of a classifier of timm, if OpenMMLab has its architecture; else None."""
    family = type(module).__name__
    if family not in FAMILIES or not hasattr(module, "pretrained_cfg"):
        return None
    words = {word for name in module.state_dict() for word in name.split(".") if not word.isdecimal()}
    made = {_activation(part) for part in module.modules() if type(part).__module__.endswith(MODULES)}
    normed = "running_mean" in words or ACTIVATIONS.get(family) != "ReLU"  # by BatchNorm, as others are by LayerNorm
    same = normed and words <= {*WORDS[family].split(), *ENDS} and made <= {ACTIVATIONS.get(family, "GELU"), "Softmax"}
    return family if same and _has_their_parts(module) else None


def _activation(part: nn.Module) -> str:
    approximate = getattr(part, "approximate", "none")  # of torch's GELU
    return type(part).__name__ if approximate == "none" else f"{type(part).__name__} with {approximate}"


def _has_their_parts(module: nn.Module) -> bool:
    """Whether a network has no part without tensors, or of other arithmetic with the same ones, that OpenMMLab's has not."""
    kinds = {type(part).__name__ for part in module.modules()}
    smoothed = any(not isinstance(getattr(part, "aa", None), nn.Identity | None) for part in module.modules())
    pool = getattr(module, "global_pool", "avg")
    placed_apart = getattr(module, "no_embed_class", False) and getattr(module, "cls_token", None) is not None
    stem = getattr(module, "stem", None)
    overlapping = isinstance(stem, nn.Sequential) and len(stem) > 2  # of a ConvNeXt
    plain = isinstance(getattr(module, "maxpool", None), nn.MaxPool2d | None)  # of a ResNet
    pooled = getattr(pool, "pool_type", pool) in ("avg", "token")
    return plain and pooled and not (smoothed or placed_apart or overlapping or kinds & OTHER_PARTS)


def _their_names(family: str, keys: list[str]) -> dict[str, str]:
    named = FAMILIES[family]([key for key in keys if not HEAD.match(key)])
    heads = {key: f"head.fc.{match[1]}" for key in keys if (match := HEAD.match(key))}
    return {key: heads.get(key) or BACKBONE + named[key] for key in keys}


def from_openmmlab(
    family: str, shapes: Mapping[str, tuple[int, ...]], theirs: Mapping[str, Tensor], without_token: bool = False
) -> dict[str, Tensor]:
    """OpenMMLab's weights of a classifier in timm's names.

    Args:
        family: class of timm's module, one of `FAMILIES`.
        shapes: of timm's tensors, by name.
        theirs: by OpenMMLab's names, such as `backbone.layer1.0.conv1.weight` and `head.fc.weight`.
        without_token: leave out a class token that the network takes out again before its first block, with its place in `pos_embed`.

    Returns:
        A tensor for each of `shapes`; those that `num_batches_tracked` counts may be missing in old files, and are then 0.

    Raises:
        ValueError: tensors that are missing, left over or of another shape; all of them are counted, and the first named.
    """
    names, theirs = _their_names(family, list(shapes)), _plain_head(theirs)
    found = {ours: _taken(family, ours, theirs[name]) for ours, name in names.items() if name in theirs}
    without_token = without_token and CLASS_TOKEN in theirs and "cls_token" not in shapes
    if without_token and "pos_embed" in found:
        found["pos_embed"] = found["pos_embed"][:, 1:]
    known = {*names.values(), *([CLASS_TOKEN] if without_token else [])}
    missing = [name for ours, name in names.items() if ours not in found and not ours.endswith("num_batches_tracked")]
    left = [name for name in theirs if name not in known and not UNUSED.match(name)]
    other = [
        f"{names[ours]} {tuple(value.shape)} instead of {tuple(shapes[ours])}"
        for ours, value in found.items()
        if tuple(value.shape) != tuple(shapes[ours])
    ]
    told = [
        f"{len(some)} {what} ({', '.join(some[:SHOWN])}{', ...' if len(some) > SHOWN else ''})"
        for what, some in (("missing", missing), ("left over", left), ("of another shape", other))
        if some
    ]
    if told:
        raise ValueError(f"weights are {'; '.join(told)}")
    counters = {name: value.new_zeros(()).long() for name in shapes if name not in found for value in [_any(found)]}
    return found | counters


def _any(tensors: dict[str, Tensor]) -> Tensor:
    return next(iter(tensors.values()))


def to_openmmlab(family: str, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's weights of a classifier in the names of mmpretrain 1.x.

    Args:
        family: class of timm's module, one of `FAMILIES`.
        ours: by timm's names.
    """
    theirs: dict[str, list[Tensor]] = {}
    for key, name in _their_names(family, list(ours)).items():
        theirs.setdefault(name, []).append(_given(family, key, ours[key]))
    return {name: torch.cat(parts) if len(parts) > 1 else parts[0].contiguous() for name, parts in theirs.items()}


def _taken(family: str, name: str, tensor: Tensor) -> Tensor:
    """A tensor of theirs as timm's of this name."""
    if family == "SwinTransformer" and MERGING.search(name):
        # From (C, row, column) of the four cells that are merged to (column, row, C).
        return tensor.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3)
    if family == "MlpMixer" and ADDED.match(name):
        return tensor * MIXER_SCALE
    if GATE.search(name):
        return tensor.chunk(2)[name.count(".fc1_x.")]
    return tensor


def _given(family: str, name: str, tensor: Tensor) -> Tensor:
    """The inverse of `_taken`."""
    if family == "SwinTransformer" and MERGING.search(name):
        return tensor.unflatten(-1, (2, 2, -1)).transpose(-3, -1).flatten(-3)
    if family == "MlpMixer" and ADDED.match(name):
        return tensor / MIXER_SCALE
    return tensor
