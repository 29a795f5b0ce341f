"""Converted networks put out mmpretrain's logits: a lane of its own, for the packages of OpenMMLab (`pytest -m openmmlab`)."""

import importlib.util
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from scalekd_hf.cli.main import main
from scalekd_hf.models.openmmlab import to_openmmlab
from scalekd_hf.models.saving import save_student
from scalekd_hf.models.students import load_student


PACKAGES = ("mmpretrain", "mmengine", "mmcv")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.openmmlab,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
SCRIPT = ROOT / "tests/scripts/openmmlab_models.py"
BY_MMPRETRAIN = ["resnet50", "resnet50d", "convnext_t", "swin_t", "mixer_s", "mixer_b", "mixer_b14", "vit_s", "vit_b"]
BY_MMPRETRAIN += [
    "vit_b14",
    "eva02_s",
    "timm/resnet50c",
    "timm/swin_large_patch4_window7_224",
    "timm/eva_large_patch14_196",
]


def theirs(folder, name):
    """mmpretrain's images (2, 3, h, w) and logits (2, 1000) of a network, in a process of its own."""
    command = [sys.executable, SCRIPT, folder, name]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-2000:]
    found = torch.load(folder / f"{name.replace('/', '-')}.logits.pt", weights_only=True)
    return found["images"], found["logits"]


@pytest.mark.parametrize("name", BY_MMPRETRAIN)
def test_a_converted_network_puts_out_mmpretrains_logits(name, tmp_path):
    images, logits = theirs(tmp_path, name)
    file = tmp_path / f"{name.replace('/', '-')}.pth"
    main(["convert", str(file), "--student", name, "--output_dir", str(tmp_path / "student")])
    student = load_student(str(tmp_path / "student"), pretrained=True).eval()
    with torch.no_grad():
        ours = student.classify(images)
    assert logits.std() > 0.2 and (ours - logits).abs().max() < 1e-5
    state = torch.load(file, weights_only=True)["state_dict"]
    back = to_openmmlab(type(student.model).__name__, student.model.state_dict())
    assert all(torch.allclose(value, state[name], rtol=1e-6, atol=0) for name, value in back.items())


@pytest.mark.parametrize("name", ["swin_t", "mixer_s", "vit_s"])
def test_mmpretrain_loads_what_is_written_for_it_and_puts_out_our_logits(name, tmp_path):
    images, logits = theirs(tmp_path, name)
    main(["convert", str(tmp_path / f"{name}.pth"), "--student", name, "--output_dir", str(tmp_path / "student")])
    student = load_student(str(tmp_path / "student"), pretrained=True).eval()
    with torch.no_grad():
        for parameter in student.model.parameters():  # no longer the weights that they made
            parameter.mul_(1.1)
        ours = student.classify(images)
    family = type(student.model).__name__
    torch.save({"state_dict": to_openmmlab(family, student.model.state_dict())}, tmp_path / f"{name}.ours.pth")
    again, others = theirs(tmp_path, name)
    assert torch.equal(again, images) and (logits - others).abs().max() > 0.05
    assert (ours - others).abs().max() < 1e-5


def test_the_lines_on_the_page_load_what_is_written_for_mmpretrain(tmp_path):
    page = (ROOT / "docs/published.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    save_student(load_student("timm/resnet50"), tmp_path / "student")
    main(
        [
            "convert",
            str(tmp_path / "student"),
            "--to",
            "openmmlab",
            "--output_dir",
            str(tmp_path / "resnet50-openmmlab"),
        ]
    )
    (tmp_path / "page.py").write_text(
        f"{block}\nimport torch\ntorch.save(model.state_dict(), 'loaded.pth')\n", encoding="utf-8"
    )
    result = subprocess.run(
        [sys.executable, SCRIPT, ".", "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-2000:]
    written = torch.load(tmp_path / "resnet50-openmmlab/student.pth", weights_only=True)["state_dict"]
    loaded = torch.load(tmp_path / "loaded.pth", weights_only=True)
    assert set(loaded) == set(written) and all(torch.equal(loaded[name], value) for name, value in written.items())
