"""What was built on students loads in another process, without their folders, and where timm is exact without this package."""

import shutil

import pytest
import torch
from heads import segmenter
from helpers import images, run
from students import saved


READ = """
import copy, sys, torch
from transformers import AutoModelForSemanticSegmentation
def check(folder):
    model, info = AutoModelForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    model = copy.deepcopy(model)  # as read from a file, tensors begin anywhere in memory, and some CPUs round by that
    saved = torch.load(f"{folder}/expected")
    with torch.no_grad():
        assert torch.equal(model.eval()(saved["images"]).logits, saved["logits"]), folder
check(sys.argv[1])
assert "scalekd_hf" not in sys.modules  # what timm builds exactly loads without
import scalekd_hf.transfer
for folder in sys.argv[2:]:
    check(folder)
"""


@pytest.mark.slow
def test_another_process_loads_what_was_built_on_students_whose_folders_are_gone(tmp_path):
    folders = []
    for family in ("timm_resnet", "timm_resnet_args", "timm_swin", "timm_vit"):
        saved(tmp_path / "student", family)
        model = segmenter(tmp_path / "student").eval()
        folders.append(tmp_path / family)
        model.save_pretrained(folders[-1])
        shutil.rmtree(tmp_path / "student")
        with torch.no_grad():
            expected = {"images": images(1, 64), "logits": model(images(1, 64)).logits}
        torch.save(expected, folders[-1] / "expected")
    done = run("python", "-c", READ, *folders)
    assert done.returncode == 0, done.stderr[-2000:]
