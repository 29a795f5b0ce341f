"""Image classifiers by name or module, from timm or transformers, with what is known of their images and labels.

One path serves teachers and students. A name is looked up in this order: a local folder (saved by
timm or by transformers), `timm/<name>`, `hf-hub:<id>`, and any other Hub id through transformers.
"""

from __future__ import annotations

import difflib
import json
import logging
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from timm.data import resolve_data_config
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
)

from ..borrowed.timm import construction_arguments, listed_weights
from ..borrowed.transformers import whole_models
from ..images import ImageSpec
from ..manifest import STUDENT_FILE, check_file
from ..network import lost_connection
from ..texts import redacted, without_secrets
from . import mixers, variants  # noqa: F401  which register students by their names
from .dry_run import SIZE_OPTIONS
from .processors import config_spec, processor_spec
from .vision_side import classifies, vision_side
from .weights import (
    WeightsError,
    pretrained_weights,
    runs_code,
    saved_backbone,
    take_off_untrained_head,
    trained_weights,
)


__all__ = ["Classifier", "check_patches", "load_classifier", "patch_size"]

logger = logging.getLogger(__name__)

RGB = 3  # channels of the images that are read
CHANNELS = ("in_chans", "num_channels")  # arguments of timm and transformers


@dataclass
class Classifier:
    """A module with its library ("timm", "transformers" or, of teachers, "torch"), image specification and label names, if known."""

    module: Any
    library: str
    spec: ImageSpec
    name: str
    labels: list[str] | None
    model_args: dict[str, Any] = field(default_factory=dict)
    classes: int | None = None  # of a module of neither library

    @property
    def num_labels(self) -> int:
        """Number of classes K; 0 without a classifier head."""
        if self.classes is not None:
            return self.classes
        if self.library == "timm":
            return int(self.module.num_classes)
        model = getattr(self.module, "cut_model", self.module)
        return int(model.config.num_labels) if classifies(model) else 0


@whole_models()
def load_classifier(
    name_or_module: str | nn.Module,
    *,
    role: str,
    pretrained: bool,
    labels: list[str] | None = None,
    image_size: int | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    crop_pct: float | None = None,
    **model_args: Any,
) -> Classifier:
    """Load or wrap an image classifier.

    Args:
        name_or_module: Hub id or local folder of a transformers classifier, `timm/<name>`, `hf-hub:<id>`,
            the folder of a saved timm model, or a module.
        role: the argument that errors name, "teacher" or "student".
        pretrained: load weights; otherwise build the architecture with fresh ones.
        labels: class names that a new head is built for.
        image_size: pixels, for models that are built for one size.
        mean, std, crop_pct: replace what the model's own data configuration says.
        **model_args: passed to `timm.create_model` or to the transformers configuration; `num_classes=0` builds a backbone.

    Raises:
        ValueError: a name that cannot be found, what would have to be executed, a download that broke off, a damaged checkpoint, a
            module that is neither timm's nor transformers', or a model of other images than RGB.
    """
    for name in CHANNELS:
        _check_channels(role, name, model_args.get(name))
    if isinstance(name_or_module, nn.Module):
        if model_args or image_size:
            given = {**model_args, **({"image_size": image_size} if image_size else {})}
            raise ValueError(f"`{role}` is a module already: {given} can only be given together with a name.")
        classifier = _wrap_module(name_or_module, role)
    else:
        if pretrained:
            check_file(Path(name_or_module.removeprefix("local-dir:"), STUDENT_FILE))
        load = _load_timm if _is_timm(name_or_module) else _load_transformers
        try:
            classifier = load(name_or_module, role, pretrained, labels, image_size, model_args)
        except Exception as error:  # those of network clients are of all kinds
            if (reason := runs_code(error)) is not None:
                raise ValueError(f"`{role}` {name_or_module!r} {reason}") from error
            if (lost := lost_connection(error)) is None:
                raise
            raise ValueError(
                f"`{role}` {name_or_module!r} was not downloaded whole: {type(lost).__name__}, {redacted(lost)}. The same command goes on with "
                f"the download; without a network, give `{role}` the folder of a model that you have."
            ) from without_secrets(error)
    _check_channels(role, *_channels(classifier))
    classifier.spec = classifier.spec.updated(mean=mean, std=std, crop_pct=crop_pct)
    if labels is not None and classifier.num_labels == len(labels):
        classifier.labels = list(labels)  # a new head, or one that will learn to mean these
    return classifier


def _channels(classifier: Classifier) -> tuple[str, Any]:
    """The name that a library has for the number of channels of a model's images, and that number, None where it is unknown."""
    if classifier.library == "timm":
        return "in_chans", getattr(classifier.module, "in_chans", classifier.model_args.get("in_chans"))
    config = classifier.module.config
    return "num_channels", getattr(getattr(config, "vision_config", config), "num_channels", None)


def _check_channels(role: str, name: str, channels: Any) -> None:
    if channels not in (None, RGB):
        raise ValueError(
            f"`{role}` has `{name}` {channels}, but images are read, augmented and normalised as RGB, {RGB} channels. Leave `{name}` "
            f"out: grey images are read as RGB, too. Of images with more bands, choose {RGB} and save them as RGB."
        )


def patch_size(classifier: Classifier) -> tuple[int, int] | None:
    """Sides (height, width) in pixels of the patches of a transformer or mixer; None for other models."""
    module = classifier.module
    if classifier.library == "timm":
        embedding = getattr(module, "patch_embed", getattr(module, "stem", None))
        patch = getattr(embedding, "patch_size", None)
        if patch is not None:  # overlapping patches lie a stride apart
            patch = getattr(getattr(embedding, "proj", None), "stride", patch)
    elif classifier.library == "transformers":
        config = getattr(module.config, "vision_config", module.config)
        has_attention = any(hasattr(config, name) for name in ("num_attention_heads", "num_heads"))
        patch = getattr(config, "patch_size", None) if has_attention else None
        if patch is not None:
            patch = getattr(config, "patch_stride", patch)
    else:
        patch = None
    if isinstance(patch, int):
        return patch, patch
    return (patch[0], patch[1]) if isinstance(patch, (tuple, list)) else None


def check_patches(classifier: Classifier, role: str) -> None:
    """Refuse an image size that the patches of a transformer or mixer do not divide.

    Raises:
        ValueError: it names both, and the option to set.
    """
    patch = patch_size(classifier)
    if patch is None:
        return
    patch_height, patch_width = patch
    height, width = classifier.spec.size
    if height % patch_height or width % patch_width:
        raise ValueError(
            f"`{role}` {classifier.name!r} cuts images into patches of {patch_height}x{patch_width} px, which do not "
            f"divide its image size {height}x{width}. Choose a multiple with `{SIZE_OPTIONS[role]}`."
        )


def _is_timm(name: str) -> bool:
    if Path(name).is_dir():
        config = Path(name, "config.json")
        return config.is_file() and "architecture" in json.loads(config.read_text(encoding="utf-8"))
    return name.startswith(("timm/", "hf-hub:", "local-dir:"))


def _wrap_module(module: nn.Module, role: str) -> Classifier:
    name = type(module).__name__
    if isinstance(module, PreTrainedModel):
        labels, source = _config_labels(module.config), module.config.name_or_path
        if hasattr(module, "timm_model"):  # transformers' wrapper keeps the data configuration to itself
            data = getattr(module.config, "pretrained_cfg", None)  # not there in configurations made by hand
            wrapped = _timm_classifier(module.timm_model, source or name, labels, data)
            wrapped.spec = wrapped.spec.updated(antialias=getattr(module.config, "antialias", None))
            return wrapped
        if role == "teacher":
            module = vision_side(module)
        labels = labels if classifies(module) else None
        spec = config_spec(module.config)
        return Classifier(module, "transformers", processor_spec(source, spec) if source else spec, name, labels)
    if hasattr(module, "forward_features") and hasattr(module, "pretrained_cfg"):
        return _timm_classifier(module, name)
    raise ValueError(
        f"`{role}` must be an image classifier of timm or transformers, or its name; got a {name}. Only those can "
        "be saved so that `from_pretrained` loads them again."
    )


def _load_timm(
    name: str,
    role: str,
    pretrained: bool,
    labels: list[str] | None,
    image_size: int | None,
    model_args: dict[str, Any],
) -> Classifier:
    timm_name = f"local-dir:{name}" if Path(name).is_dir() else name.removeprefix("timm/")
    if labels is not None:
        model_args = {"num_classes": len(labels), **model_args}
    if image_size is not None:
        model_args = {"img_size": image_size, **model_args}
    missing: list[str] = []
    trained = role == "teacher" and pretrained
    without_head = trained and model_args.get("num_classes") == 0
    if without_head:  # taken off afterwards: with other classes than its own timm would pass over missing weights, too
        model_args = {name: value for name, value in model_args.items() if name != "num_classes"}
    try:
        with listed_weights() if trained else nullcontext(missing) as missing:
            module = _created(timm_name, pretrained, model_args)
    except (RuntimeError, OSError, ValueError, AssertionError, TypeError, SafetensorError) as error:
        close = difflib.get_close_matches(timm_name.split(".")[0], timm.list_models(), n=3)
        hint = (
            f" Did you mean {', '.join(f'timm/{match}' for match in close)}?" if "nknown model" in str(error) else ""
        )
        raise ValueError(
            f"`{role}` {name!r} could not be built by timm with {model_args or 'no arguments'}: {redacted(error)}.{hint}"
        ) from error
    if without_head:
        module.reset_classifier(0)
    elif trained and module.num_classes != (published := module.pretrained_cfg["num_classes"]):
        raise ValueError(
            f"`{role}` {name!r} has a classifier of {published} classes, but `num_classes` {module.num_classes} asks for a new one, "
            "which would teach noise. Leave `num_classes` out, or set it to 0 for a teacher of features alone."
        )
    take_off_untrained_head(module, name, missing)
    classifier = _timm_classifier(module, name)
    classifier.spec = classifier.spec.updated(size=image_size, antialias=_saved_antialias(name))
    return classifier


def _created(name: str, pretrained: bool, model_args: dict[str, Any]) -> Any:
    try:
        return timm.create_model(name, pretrained=pretrained, **model_args)
    except TypeError:
        if model_args.pop("img_size", None) is None:  # most CNNs take any size and no such argument
            raise
        return timm.create_model(name, pretrained=pretrained, **model_args)


def _saved_antialias(name: str) -> bool | None:
    """What the configuration of a student of ours says beside what timm reads; None where it says nothing."""
    source, _, revision = name.removeprefix("hf-hub:").removeprefix("local-dir:").partition("@")
    if not Path(source).is_dir() and not name.startswith("hf-hub:"):
        return None
    try:
        config, _ = PreTrainedConfig.get_config_dict(source, revision=revision or None)
    except (OSError, ValueError):  # timm has found what it needs
        return None
    found: bool | None = config.get("antialias")
    return found


def _timm_classifier(
    module: Any, name: str, labels: list[str] | None = None, pretrained_cfg: dict[str, Any] | None = None
) -> Classifier:
    data = resolve_data_config(pretrained_cfg=pretrained_cfg or module.pretrained_cfg)
    size = tuple(data["input_size"][1:])
    patch_embed = getattr(module, "patch_embed", getattr(module, "stem", None))
    if built_for := getattr(patch_embed, "img_size", None):  # wins over the configuration of its source
        size = tuple(built_for)
    spec = ImageSpec(size, tuple(data["mean"]), tuple(data["std"]), data["interpolation"], data["crop_pct"])
    spec = spec.updated(crop_mode=data["crop_mode"])
    names = module.pretrained_cfg.get("label_names")
    if labels is None and names:
        labels = list(names.values()) if isinstance(names, dict) else list(names)
    if labels is not None and len(labels) != module.num_classes:
        labels = None
    return Classifier(module, "timm", spec, name, labels, construction_arguments(module))


def _load_transformers(
    name: str,
    role: str,
    pretrained: bool,
    labels: list[str] | None,
    image_size: int | None,
    model_args: dict[str, Any],
) -> Classifier:
    changes = dict(model_args)
    num_classes = changes.pop("num_classes", None)
    if num_classes:
        changes["num_labels"] = num_classes
    if labels is not None and num_classes != 0:
        changes |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    if image_size is not None:
        changes["image_size"] = image_size
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **changes)
        vars(config).pop("auto_map", None)  # a student that is saved with it would offer that code to others
        if isinstance(config, TimmWrapperConfig):  # a Hub id of a timm model, without timm's prefix
            return _load_timm(f"hf-hub:{name}", role, pretrained, labels, image_size, model_args)
        headless = num_classes == 0 or type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
        headless = headless or saved_backbone(config)
        if role == "student":
            asks_classes = labels is not None or num_classes is not None
            headless = num_classes == 0 or (not asks_classes and saved_backbone(config))
        kinds: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), None)
        if isinstance(kinds, tuple) and not config.architectures:  # the plain one of DeiT's and LeViT's
            config.architectures = [kinds[0].__name__]
        auto = AutoModel if headless else AutoModelForImageClassification
        if not pretrained:
            module = auto.from_config(config, trust_remote_code=False)
        else:
            load = trained_weights if role == "teacher" else pretrained_weights
            module = load(auto, name, config)
    except WeightsError as error:
        raise ValueError(f"`{role}` {name!r}: {error}") from error
    except (OSError, ValueError, SafetensorError) as error:
        reason = redacted(str(error).strip().splitlines()[0])
        raise ValueError(
            f"`{role}` {name!r} is neither a local folder, nor `timm/<name>`, nor an image classifier on the Hub that "
            f"transformers can load: {reason} "
            "Check the spelling, `hf auth login` for gated models, and the connection."
        ) from error
    classifier = _wrap_module(module, role)
    classifier.name = name
    if classifier.library == "transformers":
        classifier.spec = processor_spec(name, classifier.spec).updated(size=image_size)
    return classifier


def _config_labels(config: Any) -> list[str] | None:
    names = [str(config.id2label[index]) for index in sorted(config.id2label)] if config.id2label else []
    unnamed = all(name == f"LABEL_{index}" for index, name in enumerate(names))
    return None if unnamed else names
