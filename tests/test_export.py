"""Exported students compute what the students compute, for any number of images, and say how to prepare them."""

import contextlib
import io
import os
import re

import pytest
import torch
from helpers import ROOT, images, small_student, some_slow, timm_swin, timm_vit, transformers_swin, transformers_vit
from PIL import Image
from processes import in_child, run_script

from scalekd_hf import load_student
from scalekd_hf.export import export_student
from scalekd_hf.preparation import Preparation, normalise
from scalekd_hf.saving import save_student


LABELS = [f"digit {number}" for number in range(10)]
STUDENTS = {
    "timm_resnet": lambda: load_student("timm/resnet18", labels=LABELS, channels=(8, 8, 8, 8), image_size=32),
    "transformers_vit": lambda: load_student(transformers_vit()),
    "timm_convnext": lambda: small_student(labels=LABELS),
    "timm_vit": lambda: load_student(timm_vit()),
    "timm_swin": lambda: load_student(timm_swin()),
    "transformers_swin": lambda: load_student(transformers_swin()),
    "timm_mixer": lambda: load_student("timm/mixer_s32_224", labels=LABELS, image_size=64),
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
    differences = export_student(student, folder)
    assert set(differences) == {"model.onnx", "model.pt2"} and max(differences.values()) < 1e-4
    assert student.training and {file.name for file in folder.iterdir()} == {"model.onnx", "model.pt2"}
    pixels = images(3, student.spec.size[0])
    with torch.no_grad():
        expected = student.eval().classify(pixels)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    (found,) = session.run(None, {"pixel_values": pixels.numpy()})
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-4 * expected.abs().max().item())
    assert torch.allclose(torch.export.load(folder / "model.pt2").module()(pixels), expected, atol=1e-5)


def test_the_examples_of_the_document_run_and_answer_as_the_student(tmp_path):
    pytest.importorskip("onnxruntime")
    outcome = in_child(tmp_path / "log", run_the_examples, tmp_path)
    assert outcome.status == 0, outcome.text[-3000:]


def run_the_examples(folder):
    student = STUDENTS["timm_resnet"]().eval()
    student.spec = student.spec.updated(crop_pct=0.8)
    save_student(student, folder)
    finished = run_script("recipes/export.py", folder)
    assert finished.returncode == 0 and "model.onnx: " in finished.stdout, finished.stderr
    image = Image.fromarray((torch.rand(50, 70, 3) * 255).byte().numpy())
    image.save(folder / "image.png")
    text = (ROOT / "docs" / "export.md").read_text()
    os.chdir(folder)
    answers = []
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(example, {})
        answers.append(output.getvalue().strip())
    pixels = Preparation(student.spec, training=False)({"image": image}, 0, 0)["pixel_values"]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (student.spec.mean, student.spec.std))
    with torch.no_grad():
        expected = LABELS[student.classify(normalise(pixels, mean, std)[None]).argmax()]
    assert answers[0] == expected and "values=tensor" in answers[1]


def test_a_program_that_differs_is_not_kept_and_the_former_one_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("scalekd_hf.export.TOLERANCE", -1.0)
    outcome = in_child(tmp_path / "log", export_one_that_differs, tmp_path / "exported")
    assert outcome.status == 0, outcome.text[-3000:]


def export_one_that_differs(folder):
    folder.mkdir()
    (folder / "model.pt2").write_text("the former")
    with pytest.raises(ValueError, match="differ by .* nothing was written"):
        export_student(STUDENTS["timm_resnet"](), folder, ("torch",))
    assert [file.name for file in folder.iterdir()] == ["model.pt2"]
    assert (folder / "model.pt2").read_text() == "the former"


def test_what_is_missing_or_unknown_is_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"`formats` must be among \['onnx', 'torch'\], got \['tflite'\]"):
        export_student(small_student(), tmp_path, ("tflite",))
    monkeypatch.setattr("scalekd_hf.export.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'scalekd-hf\[export\]'"):
        export_student(small_student(), tmp_path)
