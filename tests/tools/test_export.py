"""Exported students compute what the students compute, for any number of images, and say how to prepare them."""

import contextlib
import io
import json
import os
import re
import sys

import pytest
import torch
from helpers import (
    ROOT,
    assert_close,
    images,
    small_student,
    some_slow,
    timm_swin,
    timm_vit,
    transformers_swin,
    transformers_vit,
)
from PIL import Image
from processes import in_child, run_script

from scalekd_hf import load_student
from scalekd_hf.data.preparation import Preparation
from scalekd_hf.images import Normaliser
from scalekd_hf.models.saving import save_student
from scalekd_hf.tools.export import FORMATS, export_student


LABELS = [f"digit {number}" for number in range(10)]


def mixer():
    student = load_student("timm/mixer_s32_224", labels=LABELS, image_size=64)
    torch.nn.init.normal_(student.model.head.weight)  # timm begins with zeros, and all logits would be 0
    return student


STUDENTS = {
    "timm_resnet": lambda: load_student("timm/resnet18", labels=LABELS, channels=(8, 8, 8, 8), image_size=32),
    "transformers_vit": lambda: load_student(transformers_vit()),
    "timm_convnext": lambda: small_student(labels=LABELS),
    "timm_vit": lambda: load_student(timm_vit()),
    "timm_swin": lambda: load_student(timm_swin()),
    "transformers_swin": lambda: load_student(transformers_swin()),
    "timm_mixer": mixer,
}


@pytest.mark.parametrize("family", some_slow(STUDENTS, 1))
def test_both_files_compute_what_the_student_computes(tmp_path, family):
    pytest.importorskip("onnxruntime")
    # In a process of its own: the exporter starts threads of autograd, after which no test could fork.
    outcome = in_child(tmp_path, export_and_compare, tmp_path / "exported", STUDENTS[family])
    assert outcome.status == 0, outcome.text[-3000:]


def export_and_compare(folder, make):
    import onnxruntime

    student = make().train()
    next(student.model.children()).eval()
    modes = [module.training for module in student.modules()]
    differences = export_student(student, folder)
    assert set(differences) == {"model.onnx", "model.pt2"} and max(differences.values()) < 1e-4
    assert [module.training for module in student.modules()] == modes
    assert {file.name for file in folder.iterdir()} == {"model.onnx", "model.pt2"}
    pixels = images(3, student.spec.size[0])
    with torch.no_grad():
        expected = student.eval().classify(pixels)
    scale = expected.abs().max().item()
    assert (expected[0] - expected[1]).abs().max() > 0.01 * scale, "the logits do not depend on the images"
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    assert session.get_inputs()[0].shape == ["batch", 3, *student.spec.size]
    (found,) = session.run(None, {"pixel_values": pixels.numpy()})
    assert torch.allclose(torch.from_numpy(found), expected, rtol=0, atol=1e-4 * scale)
    program = torch.export.load(folder / "model.pt2").module()
    assert torch.allclose(program(pixels), expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_the_examples_of_the_document_run_and_answer_as_the_student(tmp_path, crop_mode):
    pytest.importorskip("onnxruntime")
    outcome = in_child(tmp_path / "log", run_the_examples, tmp_path, crop_mode)
    assert outcome.status == 0, outcome.text[-3000:]


def run_the_examples(folder, crop_mode):
    student = STUDENTS["timm_resnet"]().eval()
    student.spec = student.spec.updated(crop_pct=0.8, crop_mode=crop_mode)
    save_student(student, folder)
    saved = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    finished = run_script("recipes/export.py", folder)
    assert finished.returncode == 0 and "model.onnx: " in finished.stdout, finished.stderr
    assert all(file.read_bytes() == content for file, content in saved.items())
    image = Image.fromarray((torch.rand(51, 37, 3) * 255).byte().numpy())  # neither resize nor crop is even
    image.save(folder / "image.png")
    os.chdir(folder)
    pixels = Preparation(student.spec, training=False)({"image": image}, 0, 0)["pixel_values"]
    with torch.no_grad():
        expected = student.classify(Normaliser(student.spec).for_student(pixels[None]))
    first, second = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    assert sum(map(bool, first.splitlines())) == 10  # as promised
    names, printed = execute(first)
    assert_close(torch.from_numpy(names["logits"]), expected, "logits of the example")
    assert printed == LABELS[expected.argmax()]
    names, printed = execute(second)
    with torch.no_grad():
        assert_close(names["model"](names["images"]), student.classify(names["images"]), "logits of the program")
    assert names["about"]["labels"] == LABELS and "values=tensor" in printed


def execute(example):
    """The names that an example leaves, and what it prints."""
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(example, names)
    return names, output.getvalue().strip()


@pytest.mark.parametrize("factor", [1.001, float("nan")])
@pytest.mark.parametrize("kind", some_slow(sorted(FORMATS, reverse=True), 1))
def test_a_program_that_differs_is_not_kept_and_the_former_one_stays(tmp_path, kind, factor):
    pytest.importorskip("onnxruntime")
    outcome = in_child(tmp_path / "log", export_one_that_differs, tmp_path / "exported", kind, factor)
    assert outcome.status == 0, outcome.text[-3000:]


def export_one_that_differs(folder, kind, factor):
    folder.mkdir()
    (folder / FORMATS[kind]).write_text("the former")
    student = STUDENTS["timm_resnet"]()
    student.model.register_forward_hook(lambda *call: call[2] * factor if torch.compiler.is_exporting() else call[2])
    with pytest.raises(ValueError, match="differ by .* nothing was written"):
        export_student(student, folder, (kind,))
    assert [file.name for file in folder.iterdir()] == [FORMATS[kind]]
    assert (folder / FORMATS[kind]).read_text() == "the former"


def test_a_student_that_no_exporter_can_follow_is_refused(tmp_path):
    outcome = in_child(tmp_path / "log", export_one_that_looks_at_values, tmp_path / "exported")
    assert outcome.status == 0, outcome.text[-3000:]


def export_one_that_looks_at_values(folder):
    student = STUDENTS["timm_resnet"]()
    student.model.register_forward_hook(lambda *call: call[2] if call[2].sum() > 0 else -call[2])
    with pytest.raises(ValueError, match=r"(?s)cannot be exported as 'torch': .* Try another of `formats`"):
        export_student(student, folder, ("torch",))
    assert not list(folder.iterdir())


def test_what_is_unknown_or_unsuitable_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"`formats` must be among \['onnx', 'torch'\], got \['tflite'\]"):
        export_student(small_student(), tmp_path, ("tflite",))
    with pytest.raises(ValueError, match="has no classifier, and what is exported puts out logits"):
        export_student(small_student(num_classes=0), tmp_path)
    half = small_student()
    half.to(torch.bfloat16)
    with pytest.raises(ValueError, match="must be in float32 on the CPU, .* got torch.bfloat16 on cpu"):
        export_student(half, tmp_path, ("torch",))


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_onnx_names_the_extra_that_it_needs(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ImportError, match=rf'needs {package}: pip install "scalekd-hf\[export\]"'):
        export_student(small_student(), tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_torch_needs_no_extra(tmp_path, monkeypatch):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, package, None)
    outcome = in_child(tmp_path / "log", export_without_names, tmp_path / "exported")
    assert outcome.status == 0, outcome.text[-3000:]


def export_without_names(folder):
    export_student(small_student(), folder, ("torch",))
    about = {"labels": ""}
    torch.export.load(folder / "model.pt2", extra_files=about)
    assert json.loads(about["labels"]) == [f"LABEL_{number}" for number in range(10)]
