"""Student folders that transformers and timm load, and checkpoints that a run resumes from.

A student folder holds `model.safetensors`, `config.json` and `preprocessor_config.json`. A checkpoint is
a student folder plus the heads and the trainer's own files. The teacher is in neither.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn
from transformers import BitImageProcessor, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..training.gathering import whole_models
from .loading import INTERPOLATIONS
from .students import Student


__all__ = [
    "check_output_dir",
    "load_checkpoint",
    "load_strictly",
    "load_student_weights",
    "read_tensors",
    "save_student",
    "save_tensors",
]

logger = logging.getLogger(__name__)

STUDENT_FILE, HEADS_FILE, RUN_STATE_FILE = "model.safetensors", "mimicking_heads.safetensors", "scalekd_state.json"
UNFINISHED_FOLDER = "_unfinished_checkpoint"  # holds a checkpoint until it is whole; `_` keeps it from the Hub
REPLACED = "_replaced-"  # before the name of a checkpoint while another takes its place
LEFT_BEHIND = "_unfinished-"
INTERRUPTED_FILE = "_interrupted.json"  # the run was stopped by SIGTERM, with these settings
RESULTS_FILE = "results.json"  # metrics by the name of a model
NOT_OF_THE_RUN = ("output_dir", "resume_from_checkpoint", "allow_data_mismatch", "local_rank")


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
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state_dict = student.model.state_dict() if state_dict is None else state_dict
    for left in folder.glob(f"{LEFT_BEHIND}*"):  # by a process that died here
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=LEFT_BEHIND) as name:
        unfinished = Path(name)
        if student.classifier.library == "timm":
            state_dict = {name: tensor.contiguous() for name, tensor in state_dict.items()}
            _save_timm_config(student, unfinished)
            save_file(state_dict, unfinished / STUDENT_FILE, metadata={"format": "pt"})
        else:
            student.model.save_pretrained(unfinished, state_dict=state_dict)
            _image_processor(student).save_pretrained(unfinished)
        for file in sorted(unfinished.iterdir(), key=lambda file: file.suffix == ".safetensors"):  # weights come last
            file.replace(folder / file.name)


def _save_timm_config(student: Student, folder: Path) -> None:
    spec = student.spec
    config_file = folder / "config.json"
    save_config_for_hf(
        student.model,
        str(config_file),
        model_config={"label_names": student.labels} if student.labels else None,
        model_args=student.classifier.model_args,
        data_config={
            "input_size": (3, *spec.size),
            "mean": spec.mean,
            "std": spec.std,
            "interpolation": spec.interpolation,
            "crop_pct": spec.crop_pct,
        },
    )
    config = json.loads(config_file.read_text())
    config.get("model_args", {}).pop("num_classes", None)  # transformers would pass it twice
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def _image_processor(student: Student) -> BitImageProcessor:
    """The evaluation transform as an image processor: resize the shorter side, crop the centre, normalise."""
    spec = student.spec
    return BitImageProcessor(
        size={"shortest_edge": int(min(spec.size) / spec.crop_pct)},
        crop_size={"height": spec.size[0], "width": spec.size[1]},
        resample=INTERPOLATIONS.index(spec.interpolation),
        image_mean=list(spec.mean),
        image_std=list(spec.std),
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


def load_checkpoint(student: Student, heads: nn.Module | None, folder: str | Path) -> None:
    """Load student and heads of a checkpoint.

    Raises:
        ValueError: a checkpoint with a missing, unreadable or unsuitable file.
    """
    load_student_weights(student, folder)
    if heads is not None:
        load_strictly(heads, read_tensors(Path(folder), HEADS_FILE), Path(folder))


def check_output_dir(folder: str | Path, overwrite: bool) -> list[Path]:
    """Refuse an output folder that holds a run, before any work is done.

    Returns:
        The checkpoints and the student in it, which are to go when `overwrite` is true.

    Raises:
        ValueError: it holds a run and `overwrite` is false.
    """
    folder = Path(folder)
    held = sorted(path for path in (*folder.glob("checkpoint-*"), folder / STUDENT_FILE) if path.exists())
    if held and not overwrite:
        raise ValueError(
            f"`output_dir` {str(folder)!r} holds a run already ({', '.join(path.name for path in held)}). Resume it with "
            "`resume_from_checkpoint=True`, delete it with `overwrite_output_dir=True`, or choose another."
        )
    return held


def run_settings(args: TrainingArguments) -> dict[str, Any]:
    """All settings but those that a resumed run may have otherwise, as JSON has them."""
    settings = {name: value for name, value in args.to_dict().items() if name not in NOT_OF_THE_RUN}
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


def interrupted(folder: str | Path, settings: dict[str, Any]) -> bool:
    """Whether a folder holds a run with these settings that SIGTERM stopped."""
    try:
        note = json.loads(Path(folder, INTERRUPTED_FILE).read_text())
    except (OSError, ValueError):
        return False
    return bool(note["settings"] == settings and last_checkpoint(folder) is not None)


def finished(folder: str | Path, max_steps: int) -> bool:
    """Whether a folder holds a student that was trained to the end, whatever checkpoints lie beside it."""
    try:
        steps = json.loads(Path(folder, "trainer_state.json").read_text())["global_step"]
    except (OSError, ValueError, KeyError):
        steps = 0 if last_checkpoint(folder) else max_steps
    return Path(folder, STUDENT_FILE).exists() and bool(steps >= max_steps)


def last_checkpoint(folder: str | Path) -> str | None:
    """The last whole checkpoint in a folder, None where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        return None
    for replaced in folder.glob(f"{REPLACED}checkpoint-*"):  # a process died between two renames
        place = folder / replaced.name.removeprefix(REPLACED)
        if not place.exists():
            with contextlib.suppress(OSError):  # another process was first
                replaced.rename(place)
    found: str | None = get_last_checkpoint(str(folder))
    return found


def optimizer_in_parts(folder: str | Path) -> bool:
    """Whether a checkpoint's optimiser is kept by DeepSpeed or FSDP, in files of their own."""
    return any(any(Path(folder).glob(pattern)) for pattern in ("global_step*", "optimizer_0", "pytorch_model_fsdp*"))


def check_checkpoint(folder: str | Path, sharded: bool) -> None:
    """Refuse a checkpoint that training cannot go on from, before anything of it is loaded.

    Args:
        folder: the checkpoint.
        sharded: its optimiser is not in files of the Trainer's.

    Raises:
        ValueError: a folder without readable trainer state, optimiser or scheduler.
    """
    folder = Path(folder)
    for name in ("trainer_state.json", RUN_STATE_FILE):
        try:
            json.loads((folder / name).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(_broken(folder, name, error)) from error
    for file in folder.glob("rng_state*.pth"):
        if not zipfile.is_zipfile(file):
            raise ValueError(_broken(folder, file.name, "not a file that torch wrote"))
    for name in () if sharded else ("optimizer.pt", "scheduler.pt"):
        try:
            torch.load(folder / name, map_location="meta", weights_only=True)
        except Exception as error:  # what torch raises depends on where the file was cut
            raise ValueError(_broken(folder, name, error)) from error


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    try:
        return load_file(folder / name)
    except (OSError, SafetensorError) as error:
        raise ValueError(_broken(folder, name, error)) from error


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


def _broken(folder: Path, name: str, error: Any) -> str:
    others = sorted(path.name for path in folder.parent.glob("checkpoint-*") if path != folder)
    remedy = (
        f"Other checkpoints beside it: {', '.join(others)}." if others else "There is no other checkpoint beside it."
    )
    return f"The checkpoint {str(folder)!r} cannot be used: {name} is missing or damaged ({error}). {remedy}"
