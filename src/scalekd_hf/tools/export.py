"""A student as ONNX or as a `torch.export` program, checked against the student that it was made from."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.students import Student


__all__ = ["FORMATS", "export_student"]

FORMATS = {"onnx": "model.onnx", "torch": "model.pt2"}
BATCHES = (1, 2, 5)  # of the check
TOLERANCE = 1e-4  # of the largest logit


class _Logits(nn.Module):
    """A student as a function of normalised images alone."""

    def __init__(self, student: Student):
        super().__init__()
        self.student = student

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.student.classify(pixel_values)


def export_student(
    student: Student, folder: str | Path, formats: tuple[str, ...] = ("onnx", "torch")
) -> dict[str, float]:
    """Write `model.onnx` and `model.pt2`, which take any number of images, and compare them with the student.

    Both map `pixel_values` (B, 3, height, width), float32 and normalised, to `logits` (B, K), and carry labels, size,
    mean, std, interpolation and crop. An earlier export in the folder is replaced once the new one has passed.

    Args:
        student: on the CPU, in float32.
        folder: made where it does not exist.
        formats: "onnx", "torch" or both.

    Returns:
        By file name, the largest difference of a logit from the student's, as a share of the largest logit.

    Raises:
        ImportError: ONNX without its packages.
        ValueError: a student without a classifier, an unknown format, a student elsewhere or in another precision, or a program that differs by more
            than 1e-4 or cannot be made; no file of it is left.
    """
    if not student.num_labels:
        raise ValueError(
            f"`student` {student.name!r} has no classifier, and what is exported puts out logits. `timm.create_model` and "
            "`AutoModel.from_pretrained` load it for the exporters of torch."
        )
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise ValueError(f"`formats` must be among {sorted(FORMATS)}, got {list(formats)}.")
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if "onnx" in formats and missing:
        raise ImportError(f'Exporting to ONNX needs {", ".join(missing)}: pip install "scalekd-hf[export]".')
    other = sorted({f"{p.dtype} on {p.device}" for p in student.parameters()} - {"torch.float32 on cpu"})
    if other:
        raise ValueError(
            f"`student` {student.name!r} must be in float32 on the CPU, where its export is checked, got "
            f"{', '.join(other)}. Move it with `student.to('cpu', torch.float32)`."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    differences = {}
    for kind in formats:
        file = folder / FORMATS[kind]
        unfinished = file.with_name(f"_unfinished_{file.name}")
        try:
            differences[file.name] = _write_and_compare(student, kind, unfinished)
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)
    return differences


def _write_and_compare(student: Student, kind: str, file: Path) -> float:
    modes = {module: module.training for module in student.modules()}
    model = _Logits(student).eval()
    try:
        with torch.no_grad():
            run = (_write_onnx if kind == "onnx" else _write_torch)(model, student, file)
            differences = [_difference(model, run, student.spec.size, batch) for batch in BATCHES]
    except Exception as error:  # of which kind depends on the exporter
        raise ValueError(
            f"`student` {student.name!r} cannot be exported as {kind!r}: {error} Try another of `formats`."
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    worst = torch.stack(differences).max().item()  # NaN, where one is
    if not worst <= TOLERANCE:
        raise ValueError(
            f"`student` {student.name!r} and its export {FORMATS[kind]!r} differ by {worst:.2e} of the largest logit "
            f"on random images, more than {TOLERANCE:g}: nothing was written. Try another of `formats`."
        )
    return worst


def _difference(model: nn.Module, run: Any, size: tuple[int, int], batch: int) -> Tensor:
    images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))
    expected, found = model(images), run(images)
    return (found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)


def _example(student: Student) -> dict[str, Any]:
    """Arguments of both exporters: two images, of which the number may change."""
    images = torch.randn(2, 3, *student.spec.size, generator=torch.Generator().manual_seed(0))
    return {"args": (images,), "dynamic_shapes": ({0: torch.export.Dim("batch")},)}


def _write_onnx(model: nn.Module, student: Student, file: Path) -> Any:
    import onnxruntime

    exported: Any = torch.onnx.export(
        model,
        **_example(student),
        dynamo=True,
        input_names=["pixel_values"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )
    exported.model.metadata_props.update(_facts(student))
    exported.save(str(file), external_data=False)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"pixel_values": images.numpy()})[0])


def _write_torch(model: nn.Module, student: Student, file: Path) -> Any:
    program = torch.export.export(model, **_example(student))
    torch.export.save(program, file, extra_files=_facts(student))
    return torch.export.load(file).module()


def _facts(student: Student) -> dict[str, str]:
    """What inference needs beside the weights, as JSON by name."""
    spec = student.spec
    labels = student.labels or [f"LABEL_{number}" for number in range(student.num_labels)]  # as transformers has it
    facts: dict[str, Any] = {"labels": labels, "size": spec.size, "mean": spec.mean, "std": spec.std}
    facts |= {"interpolation": spec.interpolation, "crop_pct": spec.crop_pct, "antialias": spec.antialias}
    facts |= {"crop_mode": spec.crop_mode}
    return {name: json.dumps(value) for name, value in facts.items()}
