"""Nothing that comes with a model is executed, at any door that it may come in by."""

import io
import json
import shutil
import sys

import pytest
import torch
from foreign import Payload, works
from helpers import DIGITS, TEACHER, transformers_vit

from scalekd_hf import load_student, load_teacher
from scalekd_hf.cli import evaluate, export, visualize
from scalekd_hf.models.saving import save_student
from scalekd_hf.training.distillation_checkpoints import HEADS_FILE


OWN_CODE = """
import os
from transformers import PreTrainedConfig, ViTForImageClassification, ViTImageProcessor
os.mkdir({mark!r})
class Config(PreTrainedConfig):
    model_type = "theirs"
class Model(ViTForImageClassification):
    pass
class Processor(ViTImageProcessor):
    pass
"""
AUTO_MAP = {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"}
AUTO_MAP["AutoModelForImageClassification"] = "theirs.Model"


def doors(model, folder):
    """Every way in for the name of a model."""
    words = ["--train_files", str(DIGITS / "train-00000*"), "--eval_files", str(DIGITS / "test-00000*"), "--use_cpu"]
    words += ["--output_dir", str(folder / "out")]
    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / HEADS_FILE).touch()
    (folder / "pair.yaml").write_text(f"student: timm/resnet18\nteacher: {model}\n")
    seen = ["--checkpoint", str(checkpoint)]
    yield lambda: load_student(str(model), pretrained=True)
    yield lambda: load_student(str(model), labels=["a", "b"], pretrained=True)
    yield lambda: load_teacher(str(model))
    yield lambda: evaluate.main([str(model), "--eval_files", words[3], *words[4:]])
    yield lambda: export.main([str(model), "--output_dir", str(folder)])
    yield lambda: visualize.main([str(folder / "pair.yaml"), *seen, *words])


@pytest.fixture
def vit(tmp_path):
    transformers_vit().save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_a_pickle_that_comes_as_weights_is_not_executed(tmp_path, vit):
    mark = tmp_path / "mark"
    assert works(mark)
    state = transformers_vit().state_dict()
    (vit / "model.safetensors").unlink()
    torch.save(state, vit / "pytorch_model.bin")
    assert load_student(str(vit), pretrained=True).num_labels == 10  # tensors alone are read
    shutil.copytree(TEACHER, tmp_path / "timm", ignore=shutil.ignore_patterns("*.safetensors"))
    for folder in (vit, tmp_path / "timm"):
        torch.save({**state, "more": Payload(mark)}, folder / "pytorch_model.bin")
        for door in doors(folder, tmp_path):
            with pytest.raises(ValueError, match=f"{folder}' has weights in a file of pickle"):
                door()
    torch.save({"state_dict": Payload(mark)}, tmp_path / "theirs.pth")
    for load, options in ((load_student, {}), (load_teacher, {"pretrained": False})):
        with pytest.raises(ValueError, match="has weights in a file of pickle"):
            load("timm/convnext_atto", checkpoint_path=str(tmp_path / "theirs.pth"), **options)
    config = json.loads((TEACHER / "config.json").read_text())
    place = {"url": (tmp_path / "theirs.pth").as_uri(), "file": str(tmp_path / "theirs.pth"), "custom_load": True}
    (tmp_path / "timm" / "pytorch_model.bin").unlink()
    shutil.copy(TEACHER / "model.safetensors", tmp_path / "timm")
    (tmp_path / "timm" / "config.json").write_text(
        json.dumps(config | {"pretrained_cfg": config["pretrained_cfg"] | place})
    )
    load_teacher(str(tmp_path / "timm"))  # the folder's own weights, wherever its configuration points
    assert not mark.exists()


def test_code_that_comes_with_a_model_is_not_executed_whoever_agrees(tmp_path, vit, monkeypatch):
    mark = tmp_path / "mark"
    (vit / "theirs.py").write_text(OWN_CODE.format(mark=str(mark)))
    config = json.loads((vit / "config.json").read_text()) | {"auto_map": AUTO_MAP}
    (vit / "config.json").write_text(json.dumps(config | {"model_type": "theirs"}))
    for door in doors(vit, tmp_path):
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))  # transformers would ask
        with pytest.raises(ValueError, match=f"{vit}' asks for code of its own"):
            door()
    (vit / "config.json").write_text(json.dumps(config))  # of a kind that transformers knows, too
    with pytest.raises(ValueError, match="asks for code of its own"):
        load_student(str(vit), pretrained=True, trust_remote_code=True)
    save_student(load_student(str(vit), pretrained=True), tmp_path / "saved")
    assert "auto_map" not in (tmp_path / "saved" / "config.json").read_text()
    processor = {"image_processor_type": "Theirs", "auto_map": {"AutoImageProcessor": "theirs.Processor"}}
    (vit / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match="asks for code of its own"):
        load_teacher(str(vit))
    assert not mark.exists()
