"""Student folders, which transformers and timm load: `model.safetensors`, `config.json`, and a preprocessor's."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BitImageProcessor

from ..borrowed.timm import write_config
from ..borrowed.transformers import whole_models
from ..images import INTERPOLATIONS
from ..manifest import MANIFEST_FILE, STUDENT_FILE, check_file
from .students import Student


__all__ = [
    "STUDENT_FILE",
    "broken_checkpoint",
    "broken_file",
    "check_rebuildable",
    "load_strictly",
    "load_student_weights",
    "read_student",
    "read_tensors",
    "replacing",
    "save_student",
    "save_tensors",
]

UNFINISHED = "_unfinished-"  # begins the name of a folder whose files are moved in place once they are whole

logger = logging.getLogger(__name__)


def check_rebuildable(student: Student) -> None:
    """Refuse a timm student that its saved configuration would not rebuild, before any work is lost.

    Raises:
        ValueError: a timm module whose constructor arguments are unknown.
    """
    if student.classifier.library != "timm":
        if student.spec.size[0] != student.spec.size[1]:
            raise ValueError(
                f"`student` {student.name!r} takes images of {student.spec.size[0]}x{student.spec.size[1]} px: image "
                "processors of transformers cannot say how they are cut to that shape. Choose a square, or a timm student."
            )
        return
    module, arguments = student.model, student.classifier.model_args
    architecture = module.pretrained_cfg.get("architecture")
    try:
        with torch.device("meta"):
            rebuilt = timm.create_model(architecture, **{**arguments, "num_classes": module.num_classes})
        shapes = {name: tensor.shape for name, tensor in rebuilt.state_dict().items()}
        same = shapes == {name: tensor.shape for name, tensor in module.state_dict().items()}
        with tempfile.TemporaryDirectory() as folder:
            _save_timm_config(student, Path(folder))
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        logger.debug("Rebuilding %s failed: %s", architecture, error)
        same = False
    if not same:
        raise ValueError(
            f"`student` is a timm {type(module).__name__} that `timm.create_model({architecture!r}, **{arguments})` does "
            "not rebuild from a saved configuration, so that nobody could load it. Give its name and plain arguments instead: "
            "`load_student('timm/<name>', **arguments)`."
        )


def save_student(student: Student, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write a student folder.

    Args:
        student: what to save.
        folder: made where it does not exist; a student in it is replaced once the new one is whole.
        state_dict: full weights by the names of `student.model`, where the module's own are sharded.

    Raises:
        OSError: it cannot be written. A student that was there before is as it was.
    """
    state_dict = student.model.state_dict() if state_dict is None else state_dict
    with replacing(folder) as unfinished:
        if student.classifier.library == "timm":
            state_dict = {name: tensor.contiguous() for name, tensor in state_dict.items()}
            _save_timm_config(student, unfinished)
            save_file(state_dict, unfinished / STUDENT_FILE, metadata={"format": "pt"})
        else:
            student.model.save_pretrained(unfinished, state_dict=state_dict)
            _image_processor(student).save_pretrained(unfinished)


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """A folder to write a model into; its files take their place in `folder` once all of them are written.

    Raises:
        OSError: they cannot be written. A model that was there before is as it was.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{UNFINISHED}*"):  # by a process that died here
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as name:
            unfinished = Path(name)
            yield unfinished
            (folder / MANIFEST_FILE).unlink(missing_ok=True)  # of what is replaced
            weights_last = sorted(unfinished.iterdir(), key=lambda file: file.suffix == ".safetensors")
            for file in weights_last:
                file.replace(folder / file.name)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The student cannot be written into {str(folder)!r} ({error}); what was there is as it was. Make room, or choose another "
            "folder, and save it once more; after the process has ended, resume from the last checkpoint."
        ) from error


def _save_timm_config(student: Student, folder: Path) -> None:
    spec = student.spec
    data = {
        "input_size": (3, *spec.size),
        "mean": spec.mean,
        "std": spec.std,
        "interpolation": spec.interpolation,
        "crop_pct": spec.crop_pct,
        "crop_mode": spec.crop_mode,
    }
    config_file = folder / "config.json"
    write_config(student.model, config_file, student.classifier.model_args, student.labels, data)
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)  # transformers would pass it twice
    if not spec.antialias:
        config["antialias"] = False  # beside what timm reads, which knows no such word
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _image_processor(student: Student) -> BitImageProcessor:
    """The evaluation transform as an image processor: resize the shorter side and crop the centre, or resize both; normalise."""
    spec = student.spec
    height, width = (int(side / spec.crop_pct) for side in spec.size)
    squashed = spec.crop_mode == "squash"
    return BitImageProcessor(
        size={"height": height, "width": width} if squashed else {"shortest_edge": min(height, width)},
        crop_size={"height": spec.size[0], "width": spec.size[1]},
        resample=INTERPOLATIONS.index(spec.interpolation),
        image_mean=list(spec.mean),
        image_std=list(spec.std),
        **(
            {} if spec.antialias else {"antialias": False}
        ),  # for `load_student`: the processor itself does not read it
    )


def load_student_weights(student: Student, folder: str | Path) -> None:
    """Load the weights of a student folder into a student of the same architecture, strictly.

    Raises:
        ValueError: a missing or unreadable file, or weights of another architecture.
    """
    load_strictly(student.model, read_student(student, folder), Path(folder))


def read_student(student: Student, folder: str | Path) -> dict[str, Tensor]:
    """Weights of a student folder by the names of `student.model`.

    Raises:
        ValueError: see `load_student_weights`.
    """
    state_dict = read_tensors(Path(folder), STUDENT_FILE)
    if student.classifier.library == "transformers":
        # Names on disk may differ from those of the module: transformers knows how.
        with whole_models():
            loaded, info = type(student.model).from_pretrained(
                folder,
                config=student.model.config,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        wrong = {kind: keys for kind, keys in info.items() if keys and kind.endswith("_keys")}
        if wrong:
            raise ValueError(_unsuitable(student.model, Path(folder), wrong))
        state_dict = loaded.state_dict()
    return state_dict


def save_tensors(state_dict: dict[str, Tensor], file: str | Path) -> None:
    """Write tensors by name."""
    save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, file)


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    check_file(folder / name)
    try:
        return load_file(folder / name)
    except (OSError, SafetensorError) as error:
        raise ValueError(broken_file(folder, name, error)) from error


def load_strictly(module: nn.Module, state_dict: dict[str, Tensor], folder: Path) -> None:
    try:
        module.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        raise ValueError(_unsuitable(module, folder, error)) from error


def _unsuitable(module: nn.Module, folder: Path, reason: Any) -> str:
    return (
        f"The weights in {str(folder)!r} do not fit this {type(module).__name__}: {reason} Resume with the models and "
        "settings that the run was started with."
    )


def broken_file(folder: Path, name: str, error: Any) -> str:
    """What to say of a file of a checkpoint, or of a student's folder, that is missing or damaged."""
    if isinstance(error, UnpicklingError):  # torch would advise to run what is in it
        error = "it is damaged, or holds more than tensors and numbers, which could run code and is not loaded"
    return broken_checkpoint(folder, f"{name} is missing or damaged ({error})")


def broken_checkpoint(folder: Path, what: str) -> str:
    """What to say of a checkpoint of which something is wrong: `what`, in words."""
    others = sorted(path.name for path in folder.parent.glob("checkpoint-*") if path != folder)
    remedy = (
        f"Other checkpoints beside it: {', '.join(others)}." if others else "There is no other checkpoint beside it."
    )
    return f"The checkpoint {str(folder)!r} cannot be used: {what}. {remedy}"
