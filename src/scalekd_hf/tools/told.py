"""What a checkpoint file of OpenMMLab tells beside its weights: the text of its configuration, its classes, how its images are normalised."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..data.imagenet import CLASSES, class_names, class_places


__all__ = [
    "check_class_token",
    "classes_of",
    "configuration_of",
    "is_distillation",
    "norm_before_pooling",
    "normalisation_of",
]

# Words in the configuration that a file carries, and why its weights would then compute something else in timm's model.
OTHER_STYLES = {
    "style='caffe'": "it was trained with strides in the first convolutions of its blocks (`style='caffe'`), timm's has them in the second",
    "to_rgb=False": "it was trained on images with blue as the first channel (`to_rgb=False`), here red is the first",
}
POOLED_FIRST = "head_norm_first"  # timm's argument of ConvNeXt
WITHOUT_TOKEN = '`--student_args \'{"class_token": false, "global_pool": "avg", "fc_norm": false}\'`'
VALUES = r"([\[(][-\d.,eE+]+[\])])"
TOKEN_HEAD = "head.layers.head.weight"  # of the head for class tokens


def configuration_of(content: Any) -> str:
    """The texts in a file's `meta`, without spaces and with single quotes.

    Raises:
        ValueError: they say that the weights would compute something else in timm's model.
    """
    text = " ".join(str(value) for value in _meta(content).values()).replace('"', "'")
    compact = re.sub(r"\s", "", text)
    for words, reason in OTHER_STYLES.items():
        if words in compact:
            raise ValueError(f"The checkpoint is not converted: {reason}. There is no remedy in timm's architecture.")
    return compact


def is_distillation(content: Any) -> bool:
    """Whether a file has a student among others, as the authors' whole states have."""
    state = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    return any(str(name).startswith("student.") for name in state) if isinstance(state, Mapping) else False


def _meta(content: Any) -> Mapping[str, Any]:
    told = content.get("meta") if isinstance(content, Mapping) else None
    return told if isinstance(told, Mapping) else {}


def _said(text: str, name: str, value: str) -> str | None:
    """What a configuration's text says of a setting; None where it says nothing, or several things."""
    found = set(re.findall(rf"(?<!\w){name}'?[=:]{value}", text))
    return found.pop() if len(found) == 1 else None


def _flag(text: str, name: str) -> bool | None:
    """A setting that is on or off; None where a configuration's text says nothing of it, or both."""
    return {"true": True, "false": False}.get((_said(text, name, r"(?i:(true|false))\b") or "").lower())


def norm_before_pooling(text: str, given: Mapping[str, Any], authors: bool) -> bool:
    """Whether the last LayerNorm of a ConvNeXt stands before pooling: what its weights do not show.

    Args:
        text: of the configuration.
        given: arguments of the model that the user gives.
        authors: it is the student of a whole distillation of the authors', which stands before pooling.

    Raises:
        ValueError: nobody says it, or the user says other than the configuration.
    """
    last = _flag(text, "gap_before_final_norm")
    said = None if last is None else not last
    asked = given.get(POOLED_FIRST)
    if asked is not None and said is not None and asked != said:
        raise ValueError(
            f"`student_args` has {POOLED_FIRST} {asked}, but the configuration in the checkpoint says `gap_before_final_norm={last}`, which is "
            f"{said}. Leave it out."
        )
    if asked is None and said is None and not authors:
        raise ValueError(
            "The weights of a ConvNeXt do not show whether its last LayerNorm stands before pooling, as in the authors' student, or after it, "
            "as in mmpretrain's own. Say so with `--student_args '{\"head_norm_first\": true}'` for the former, `false` for the latter."
        )
    return bool(asked) if asked is not None else said if said is not None else True


def check_class_token(
    text: str, weights: Mapping[str, Any], pool: str, has_token: bool, given: Mapping[str, Any], authors: bool
) -> None:
    """Check that a ViT reads what the file's did, its class token or the mean of the others; which of them its weights do not show.

    Args:
        text: of the configuration.
        weights: by OpenMMLab's names.
        pool, has_token: of timm's model that they are for.
        given: arguments of the model that the user gives.
        authors: it is one of the authors' students, which have the place of a class token and no class token.

    Raises:
        ValueError: nobody says it, or it is another than the model's.
    """
    in_use = _flag(text, "with_cls_token")
    in_file = "backbone.cls_token" in weights
    if not has_token and in_file:
        told = in_use is False or (in_use is None and (authors or given.get("class_token") is False))
        if not told or TOKEN_HEAD in weights:
            raise ValueError(
                "The checkpoint has a class token, which the model has not, and does not say `with_cls_token=False`, so that it may be in use. "
                f'Give {WITHOUT_TOKEN} if its network was built so; otherwise a model with a class token, such as `"class_token": true`.'
            )
    if has_token and in_use is False:
        raise ValueError(
            f"The configuration in the checkpoint says `with_cls_token=False`, but the model has a class token. Give {WITHOUT_TOKEN}."
        )
    if has_token:
        _check_pooling(text, weights, pool, "global_pool" in given)


def _check_pooling(text: str, weights: Mapping[str, Any], pool: str, given: bool) -> None:
    read = "avg" if "backbone.ln2.weight" in weights else "token" if TOKEN_HEAD in weights else None
    out = _said(text, "out_type", r"'(\w+)'")
    read = read or {"cls_token": "token", "featmap": "avg", "avg_featmap": "avg"}.get(out or "")
    if read is None and not given:
        raise ValueError(
            "The weights of a ViT with a class token do not show whether its classifier reads that token or the mean of the others. Say so "
            'with `--student_args \'{"global_pool": "token"}\'` for `out_type="cls_token"`, which is OpenMMLab\'s default, or '
            '`{"global_pool": "avg", "fc_norm": false}` for `out_type="featmap"`.'
        )
    if read is not None and read != pool:
        normed_after = str(read == "avg" and "backbone.ln1.weight" not in weights).lower()
        raise ValueError(
            f"The checkpoint's classifier reads {'its class token' if read == 'token' else 'the mean of the tokens'}, but the model has "
            f'`global_pool` {pool!r}. Give `--student_args \'{{"global_pool": "{read}", "fc_norm": {normed_after}}}\'`.'
        )


def classes_of(content: Any, count: int) -> list[str] | None:
    """Names of the classes in a file of mmcls or mmengine, if there are as many as classes.

    ImageNet's are given as this package has them, of which no two are equal; they are taken for any 1000 without names.
    """
    meta = _meta(content)
    nested = meta.get("dataset_meta")
    entries = [meta.get("CLASSES"), *(nested.get(n) for n in ("classes", "CLASSES") if isinstance(nested, Mapping))]
    found = (entry for entry in entries if isinstance(entry, list | tuple) and len(entry) == count)
    names = next((list(entry) for entry in found if all(isinstance(name, str) for name in entry)), None)
    if count != CLASSES:
        return names
    try:
        usual = names is None or class_places(names, "checkpoint") == list(range(CLASSES))
    except ValueError:  # classes of another data set
        usual = False
    return class_names() if usual else names


def normalisation_of(text: str, weights: Mapping[str, Tensor]) -> dict[str, list[float]] | None:
    """Mean and standard deviation of images with values from 0 to 1, from a file's weights or configuration; None where both say nothing.

    A configuration with several, as of a teacher and a student, says nothing.
    """
    values = {}
    for name in ("mean", "std"):
        stored = weights.get(f"data_preprocessor.{name}")
        said = _said(text, name, VALUES)
        if stored is not None:
            values[name] = stored.flatten().tolist()
        elif said is not None:
            values[name] = json.loads(f"[{said[1:-1].rstrip(',')}]")
    if len(values) < 2 or any(len(value) != 3 for value in values.values()) or min(values["std"]) <= 0:
        return None
    return {name: [round(number / 255, 6) for number in value] for name, value in values.items()}
