"""A student as the backbone of a dense task: its maps, and the proof that its weights are in it."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoBackbone, AutoConfig

from ..borrowed.transformers import whole_models
from ..images import ImageSpec
from ..models.loading import patch_size
from ..models.students import Student, load_student
from .copying import copy_weights, shown
from .pyramid import LEVELS, SimpleFeaturePyramid, pyramid_strides
from .student_backbone import HiddenMaps, StudentBackboneConfig


__all__ = ["Origin", "load_backbone"]

OTHER_SIZES: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
NOT_OF_MAPS = (
    "num_classes",
    "drop_path_rate",
    "in_chans",
)  # arguments of timm: of the head, asked for anew, always RGB
POOLING = "global_pool"  # of no maps, but a ViT without a class token is not built without it
OF_MACHINES = ("_name_or_path", "architectures", "dtype", "id2label", "label2id", "transformers_version")

logger = logging.getLogger(__name__)


@dataclass
class Origin:
    """Where a backbone's tensors are from.

    Attributes:
        student: its name or folder.
        spec: the images it takes.
        strides: in pixels, of its maps.
        left_out: names of the student's tensors that the backbone has no use for: a classifier, a final norm, later stages.
        new: names of the backbone's tensors that the student has not; all of them where it was built with fresh weights.
    """

    student: str
    spec: ImageSpec
    strides: tuple[float, ...]
    left_out: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)


@dataclass
class Stages:
    """The stages of a network as its library numbers them: strides in pixels, and channels."""

    numbers: list[int]
    strides: list[float]
    channels: list[int]

    def last_of_each_stride(self) -> list[int]:
        """Positions of the stages after which the grid changes."""
        return sorted({stride: place for place, stride in enumerate(self.strides)}.values())


@whole_models()
def load_backbone(
    student: str | Path | Student,
    out_indices: Sequence[int] | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    drop_path_rate: float = 0.0,
    pretrained: bool = True,
    freeze_batch_norm: bool = False,
    maps: int = 4,
) -> Any:
    """A student as a backbone of transformers, with every tensor of it equal to the student's.

    A class of timm or transformers is taken where it is exact, so that what is built on it loads without this package; for others
    `StudentBackbone`. Networks of one stride get a pyramid of four maps.

    Args:
        student: what `load_student` takes: a folder that `save_student` wrote, a name, or a student.
        out_indices: which stages give maps, ascending, as their library counts them, or of a pyramid 0 to 3; by default the last stage of
            each stride.
        image_size: pixels, one side or (height, width), of the images that are to come; by default the student's own.
        drop_path_rate: of the last block, rising from 0 at the first.
        pretrained: with the student's weights; otherwise with fresh ones.
        freeze_batch_norm: replace BatchNorm by one that keeps its statistics and weights.
        maps: how many there are by default, at most: those of the coarsest strides.

    Returns:
        A `PreTrainedModel` with `channels`, `forward(pixel_values).feature_maps`, a tuple of (B, C, H / stride, W / stride), finest first, and
        `origin`, an `Origin`.

    Raises:
        ValueError: a folder that holds no student, a student without maps, with weights that do not all find their place, or of another image size
            than it can take, stages that there are not, or a drop path rate for a network that drops none.
    """
    loaded = student if isinstance(student, Student) else load_student(str(student), pretrained=pretrained)
    size = loaded.spec.updated(size=image_size).size
    config, options = _configuration(loaded, out_indices, size, drop_path_rate, freeze_batch_norm, maps)
    backbone: Any = _built(loaded, config, options, drop_path_rate)
    if freeze_batch_norm:
        backbone = freeze_batch_norm_2d(backbone)
    strides = _checked(loaded, backbone, size)
    backbone.origin = origin = Origin(loaded.name, loaded.spec, strides)
    if pretrained:
        origin.left_out, origin.new = copy_weights(loaded, backbone)
        described = f"{len(backbone.state_dict()) - len(origin.new)} tensors equal to the student's"
    else:
        origin.new = list(backbone.state_dict())
        described = "fresh weights"
    logger.info(
        "Backbone %s of %r: %s; left out: %s; new: %s.",
        type(backbone).__name__,
        loaded.name,
        described,
        shown(origin.left_out),
        shown(origin.new),
    )
    return backbone


def _configuration(
    student: Student, out_indices: Sequence[int] | None, size: tuple[int, int], rate: float, freeze: bool, maps: int
) -> tuple[Any, dict[str, Any]]:
    """A backbone's configuration, and arguments for building it that are not saved."""
    if student.classifier.library == "timm":
        arguments, stages = _timm_stages(student, size)
        places = stages.last_of_each_stride()
        own = {name: value for name, value in student.classifier.model_args.items() if name not in NOT_OF_MAPS}
        if len(places) > 1 and not set(own) - {POOLING} and "feature_cls" not in arguments:
            chosen = _chosen(student, stages, places[-maps:], out_indices)
            config = AutoConfig.for_model(
                "timm_backbone",
                backbone=student.model.pretrained_cfg["architecture"],
                out_indices=chosen,
                freeze_batch_norm_2d=freeze,
            )
            return config, {"drop_path_rate": rate}
        name, arguments = student.model.pretrained_cfg["architecture"], {**own, **arguments}
        arguments["drop_path_rate"] = rate  # 0, too: Swin has another default
    else:
        name, arguments = student.model.config.model_type, _plain(student.model.config)
        if "drop_path_rate" in arguments or hasattr(student.model.config, "drop_path_rate"):
            arguments["drop_path_rate"] = rate
        stages, with_class = _transformers_stages(student, name, arguments, size)
        places = stages.last_of_each_stride()
        if len(places) > 1 and with_class:
            chosen = _chosen(student, stages, places[-maps:], out_indices)
            return AutoConfig.for_model(name, **{**arguments, "out_indices": chosen, "out_features": None}), {}
    return _own(student, stages, places, out_indices, name, arguments, freeze, maps), {}


def _own(
    student: Student,
    stages: Stages,
    places: list[int],
    out_indices: Sequence[int] | None,
    name: str,
    arguments: dict[str, Any],
    freeze: bool,
    maps: int,
) -> Any:
    numbers, pyramid = stages.numbers, len(places) == 1
    patch = max(patch_size(student.classifier) or (0,)) or None
    if pyramid:
        patch = round(stages.strides[-1])
        channels = SimpleFeaturePyramid(stages.channels[-1], patch).channels
        stages = Stages(list(range(len(LEVELS))), pyramid_strides(patch), channels)
        places = stages.numbers
    return AutoConfig.for_model(
        StudentBackboneConfig.model_type,
        library=student.classifier.library,
        architecture=name,
        model_args=arguments,
        strides=stages.strides,
        channels=stages.channels,
        stages=numbers,
        patch=patch,
        pyramid=pyramid,
        freeze_batch_norm_2d=freeze,
        out_indices=_chosen(student, stages, places[-maps:], out_indices),
    )


def _timm_stages(student: Student, size: tuple[int, int]) -> tuple[dict[str, Any], Stages]:
    """Arguments that a timm student's maps are made with, and its stages, from a run without values."""
    arguments = dict(student.classifier.model_args)
    architecture = student.model.pretrained_cfg["architecture"]
    info: Any = getattr(student.model, "feature_info", None)
    getter = {"feature_cls": "getter"} if hasattr(student.model, "forward_intermediates") else {}
    kinds: list[dict[str, Any]] = [{}, *({**getter, **other} for other in OTHER_SIZES)]
    failed: Exception | None = None
    network: Any
    for kind in kinds if info else ():
        options = {name: value for name, value in {**arguments, **kind}.items() if name not in NOT_OF_MAPS}
        try:
            with torch.device("meta"), torch.no_grad():
                network = timm.create_model(
                    architecture, features_only=True, out_indices=tuple(range(len(info))), **options
                )
                maps = network.eval()(torch.zeros(1, 3, *size))
        except Exception as error:  # of all kinds: of arguments, of sizes, of networks without maps
            failed = error
            continue
        channels = network.feature_info.channels()
        if all(x.ndim == 4 and x.shape[1] == width for x, width in zip(maps, channels, strict=True)):
            strides = [float(stride) for stride in network.feature_info.reduction()]
            stages = Stages(list(range(len(maps))), strides, channels)
            if not kind and len(stages.last_of_each_stride()) == 1:
                continue  # a ViT may take this size only because it was built for it
            return kind, stages
    raise ValueError(_no_maps(student, size, failed))


def _transformers_stages(
    student: Student, name: str, arguments: dict[str, Any], size: tuple[int, int]
) -> tuple[Stages, bool]:
    """The stages of a transformers student, and whether they are those of its library's backbone class."""
    config = AutoConfig.for_model(name, **arguments)
    with_class = type(config) in MODEL_FOR_BACKBONE_MAPPING
    try:
        with torch.device("meta"), torch.no_grad():
            if with_class:
                config.out_indices = list(range(len(config.stage_names)))
                maps = list(AutoBackbone.from_config(config).eval()(torch.zeros(1, 3, *size)).feature_maps)
                numbers = list(range(len(maps)))
            else:
                numbers, maps = _hidden_maps(student, config, size)
    except Exception as error:  # of all kinds, see above
        raise ValueError(_no_maps(student, size, error)) from error
    if not maps:
        raise ValueError(_no_maps(student, size, None))
    strides = [2.0 ** round(math.log2(size[0] / x.shape[2])) for x in maps]
    if len(set(strides)) == 1:  # patches, of any side
        strides = [float(round(size[0] / x.shape[2])) for x in maps]
    return Stages(numbers, strides, [x.shape[1] for x in maps]), with_class


def _hidden_maps(student: Student, config: Any, size: tuple[int, int]) -> tuple[list[int], list[Tensor]]:
    """The hidden states that are maps, or the last one as a map where all are tokens of patches."""
    patch = getattr(config, "patch_size", None)
    network = HiddenMaps(config, [], None).eval()
    states = network.model(torch.zeros(1, 3, *size), output_hidden_states=True, **network.options).hidden_states
    found = {index: x for index, x in enumerate(states) if x.ndim == 4}
    if not found and isinstance(patch, int):
        last = len(states) - 1
        found = {last: HiddenMaps(config, [last], patch)(torch.zeros(1, 3, *size))[0]}
    return list(found), list(found.values())


def _plain(config: Any) -> dict[str, Any]:
    """The values of a transformers configuration that describe its network, as a file holds them."""
    values = type(config).from_dict(config.to_dict()).to_diff_dict()
    return {name: value for name, value in values.items() if name not in (*OF_MACHINES, "model_type")}


def _chosen(student: Student, stages: Stages, places: list[int], out_indices: Sequence[int] | None) -> list[int]:
    """The stages that are asked for, as numbers from 0.

    Raises:
        ValueError: some that are not there, or not ascending.
    """
    if out_indices is None:
        return places
    count = len(stages.strides)
    asked = [index + count if index < 0 else index for index in out_indices]
    if not asked or asked != sorted(set(asked)) or not all(0 <= index < count for index in asked):
        listed = ", ".join(f"{index} (stride {stride:g})" for index, stride in enumerate(stages.strides))
        raise ValueError(
            f"`out_indices` {list(out_indices)}: `student` {student.name!r} gives the maps {listed}. Choose some of them, ascending."
        )
    return asked


def _built(student: Student, config: Any, options: dict[str, Any], rate: float) -> Any:
    try:
        backbone = AutoBackbone.from_config(config, **options)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        backbone = None
        if not rate:
            (getattr(config, "model_args", None) or {}).pop("drop_path_rate", None)
            backbone = AutoBackbone.from_config(config)
    if rate and (backbone is None or not any(getattr(module, "drop_prob", 0) for module in backbone.modules())):
        raise ValueError(
            f"`drop_path_rate` {rate}: `student` {student.name!r} ({type(student.model).__name__}) has no blocks that it could drop. Leave it 0."
        )
    return backbone


def _checked(student: Student, backbone: Any, size: tuple[int, int]) -> tuple[float, ...]:
    """The strides of a backbone's maps, from a run without values, which also tells the parameters that no map depends on: DDP would
    wait for their gradients, so that they are frozen.

    Raises:
        ValueError: other channels than the library says.
    """
    shadow = copy.deepcopy(backbone).to("meta").eval()
    with torch.enable_grad():
        maps = shadow(torch.zeros(1, 3, *size, device="meta")).feature_maps
        total = sum(x.sum() for x in maps)
    if [x.shape[1] for x in maps] != list(backbone.channels):
        raise ValueError(
            f"`student` {student.name!r}: its maps have {[x.shape[1] for x in maps]} channels, but its library says {backbone.channels}. "
            "Choose another student."
        )
    names, parameters = zip(*[(n, p) for n, p in shadow.named_parameters() if p.requires_grad], strict=True)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is None:
            backbone.get_parameter(name).requires_grad_(False)
    if isinstance(backbone.config, StudentBackboneConfig):
        strides: Any = backbone.config.strides
        return tuple(strides[index] for index in backbone.config.out_indices)
    return tuple(2.0 ** round(math.log2(size[0] / x.shape[2])) for x in maps)


def _no_maps(student: Student, size: tuple[int, int], error: Exception | None) -> str:
    own = student.spec.size
    name = f"`student` {student.name!r} ({type(student.model).__name__})"
    if error is not None and size != own:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return (
            f"`image_size` {size[0]}x{size[1]}: {name} gives no maps of such images ({reason[0]}). It takes {own[0]}x{own[1]} px; choose that, or a "
            "student of any size."
        )
    return f"{name} gives no maps for a dense task{f' ({error})' if error else ''}. Choose a network with stages or patches."
