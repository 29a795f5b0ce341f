"""`scalekd convert`: published checkpoints as student folders that say what they are, and students for OpenMMLab."""

import argparse
import hashlib
import json
import sys

import pytest
import timm
import torch
from helpers import DIGITS, ROOT, small_student
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from scalekd_hf.cli.main import main
from scalekd_hf.models.openmmlab import to_openmmlab
from scalekd_hf.models.saving import save_student
from scalekd_hf.models.students import load_student
from scalekd_hf.tools import convert as tool


sys.path.insert(0, str(ROOT / "tests/cli"))
from authors import AS_RUN  # noqa: E402


NARROW = {"channels": [8, 8, 8, 16], "layers": [1, 1, 1, 1]}
RESNET18 = ["--student", "timm/resnet18", "--student_args", json.dumps(NARROW)]
FILE = "epoch_300.pth"


@pytest.fixture
def model():
    return timm.create_model("resnet18", num_classes=10, **NARROW).eval()


def theirs(model, prefix=""):
    return {f"{prefix}{n}": v for n, v in to_openmmlab(type(model).__name__, model.state_dict()).items()}


def scaled(state):
    return {name: value * 2 for name, value in state.items()}


def save(folder, content, name=FILE):
    torch.save(content, folder / name)
    return str(folder / name)


def convert(*words):
    main(["convert", *map(str, words)])


def refused(capsys, *words):
    with pytest.raises(SystemExit) as left:
        convert(*words)
    assert left.value.code == 2
    return capsys.readouterr().err


def empty(name):
    """A checkpoint of a full network in OpenMMLab's names, all of whose tensors are views of single zeros."""
    with torch.device("meta"):
        state = theirs(timm.create_model(name))
    return {name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in state.items()}


def test_the_student_of_a_whole_distillation_becomes_a_folder_with_a_card(model, tmp_path, capsys):
    student, teacher = (
        theirs(model, "student."),
        {"teacher.backbone.x": torch.ones(1), "distill_losses.y": torch.ones(1)},
    )
    averaged = {f"module.{name}": value for name, value in scaled(student).items()}
    content = {"meta": {"epoch": 300}, "state_dict": student | teacher, "ema_state_dict": averaged | {"steps": 1}}
    file = save(tmp_path, content | {"message_hub": {"log": argparse.Namespace(x=1)}})
    convert(file, *RESNET18, "--output_dir", tmp_path / "student")
    told = capsys.readouterr().out
    assert "weights of the file: moving average" in told and "argparse.Namespace" in told
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "student").eval()(images).logits
        ours = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True).eval()(images)
    assert torch.equal(loaded, expected) and torch.equal(ours, expected)
    card = (tmp_path / "student/README.md").read_text(encoding="utf-8")
    assert hashlib.sha256((tmp_path / FILE).read_bytes()).hexdigest() in card
    assert f"converted by scalekd_hf from the checkpoint `{FILE}`" in card and "Nothing was trained here" in card
    assert "converted" in ModelCard(card).data.tags and "The paper" not in card and str(tmp_path) not in card
    convert(file, *RESNET18, "--output_dir", tmp_path / "raw", "--raw")
    raw = load_file(tmp_path / "raw/model.safetensors")["fc.weight"]
    assert torch.equal(raw, 2 * model.state_dict()["fc.weight"])


def test_a_published_student_has_the_authors_images_imagenets_classes_and_the_papers_number(tmp_path):
    file = save(tmp_path, {"state_dict": empty("swin_tiny_patch4_window7_224")})
    convert(file, "--student", "swin_t", "--teacher", "swin_l", "--output_dir", tmp_path / "swin")
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "swin").config
    assert config.id2label[0] == "tench, Tinca tinca" and len(set(config.id2label.values())) == 1000
    processor = AutoImageProcessor.from_pretrained(tmp_path / "swin")
    assert processor.data_config["crop_pct"] == 0.875 and processor.data_config["interpolation"] == "bicubic"
    card = (tmp_path / "swin/README.md").read_text(encoding="utf-8")
    assert "reports 83.80% top-1" in card and "81.18% for the student" in card and "the paper's numbers" in card
    assert ModelCard(card).data.base_model == AS_RUN["swin_l_to_swin_t"]["teacher"]
    assert ModelCard(card).data.eval_results is None  # the paper's number is no result of ours


@pytest.mark.parametrize("name", [name for name in AS_RUN if not name.endswith(("_traditional", "_600_epochs"))])
def test_students_are_prepared_for_as_the_authors_evaluate(name):
    student, as_run = tool.PAIR.match(name)[2], AS_RUN[name]
    for build in tool._published(student):
        arguments = {key: value for key, value in build.arguments.items() if key not in ("num_classes", "taps")}
        with torch.device("meta"):
            spec = load_student(build.name, **arguments).spec.updated(**build.spec)
        side = as_run["image size"]
        assert spec.size == (side, side) and int(side / spec.crop_pct) == as_run["shorter side in evaluation"]
        assert (spec.mean, spec.std) == tuple(as_run["student's normalisation"].values())
        assert (spec.interpolation, spec.antialias) == (as_run["interpolation"], as_run["antialias"])


def test_the_ten_published_students_are_known():
    known = tool.known_students()
    assert {"mobilenetv1", "resnet50", "resnet50d", "convnext_t", "mixer_s", "mixer_b", "mixer_b14"} < set(known)
    assert {"vit_s", "vit_b", "vit_b14", "swin_t", "eva02_s"} < set(known)


@pytest.mark.parametrize(
    ("name", "given", "fits"),
    [
        ("resnet50d", "resnet50", "resnet50d"),
        ("mixer_b16_224", "mixer_b14", "mixer_b"),
        ("vit_base_patch14_224_openmmlab", "vit_b", "vit_b14"),
    ],
)
def test_a_wrong_student_is_told_which_one_fits(name, given, fits, tmp_path, capsys):
    file = save(tmp_path, {"state_dict": empty(name)})
    said = refused(capsys, file, "--student", given, "--output_dir", tmp_path / "student")
    assert f"It fits `--student {fits}`." in said and not (tmp_path / "student").exists()


def changed(change):
    def made(model, folder):
        state = theirs(model)
        change(state)
        return save(folder, {"state_dict": state})

    return made


def styled(text):
    return lambda model, folder: save(folder, {"meta": {"cfg": text}, "state_dict": theirs(model)})


def a_convnext(model, folder):
    small = timm.create_model("convnext_tiny", depths=(1,) * 4, dims=(8,) * 4, num_classes=10)
    return save(folder, {"state_dict": theirs(small)})


@pytest.mark.parametrize(
    ("made", "words", "said"),
    [
        (changed(lambda s: s.update({"backbone.x": torch.ones(1)})), RESNET18, "1 left over (backbone.x)"),
        (changed(lambda s: s.pop("backbone.bn1.weight")), RESNET18, "1 missing (backbone.bn1.weight)"),
        (changed(lambda s: None), ["--student", "resnet"], "'resnet' is not known. Did you mean `resnet50`"),
        (changed(lambda s: None), [], "`--student` is missing"),
        (changed(lambda s: None), [*RESNET18, "--raw"], "one set of weights"),
        (changed(lambda s: None), [*RESNET18, "--teacher", "swin_l"], "no published pair has it"),
        (changed(lambda s: None), ["--student", "resnet50", "--teacher", "swin_x"], "Those with it: eva_l, swin_b"),
        (changed(lambda s: None), ["--student", "timm/densenet121"], "OpenMMLab has no such DenseNet"),
        (changed(lambda s: None), ["--student", "timm/mobilenetv1_100"], "OpenMMLab has no such EfficientNet"),
        (styled("backbone=dict(type='ResNet', depth=50, style='caffe')"), RESNET18, "style='caffe'"),
        (a_convnext, ["--student", "convnext_t"], "do not show whether its last LayerNorm stands before pooling"),
        (lambda model, folder: folder / "missing.pth", RESNET18, "missing.pth' is no file"),
        (lambda model, folder: folder, RESNET18, "is no file"),
        (lambda model, folder: save(folder, {"epoch": 3}), RESNET18, "has no weights"),
        (changed(lambda s: s.update({"backbone.conv1.weight": torch.ones(2)})), RESNET18, "of another shape"),
        (lambda model, folder: save(folder, {"a": torch.ones(1), **model.state_dict()}), RESNET18, "such as a"),
        (styled("img_norm_cfg = dict(mean=[1, 2, 3], to_rgb=False)"), RESNET18, "to_rgb=False"),
    ],
)
def test_what_cannot_be_converted_is_refused_before_anything_is_written(made, words, said, model, tmp_path, capsys):
    assert said in refused(capsys, made(model, tmp_path), *words, "--output_dir", tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_a_convnext_says_where_its_last_norm_stands(tmp_path):
    small = {"depths": [1] * 4, "dims": [8] * 4}
    expected = timm.create_model("convnext_tiny", num_classes=10, head_norm_first=False, **small).eval()
    file = save(tmp_path, {"state_dict": theirs(expected)})
    words = ["--student_args", json.dumps({**small, "head_norm_first": False})]
    convert(file, "--student", "convnext_t", *words, "--output_dir", tmp_path / "student")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(
            load_student(str(tmp_path / "student"), pretrained=True).eval().classify(images), expected(images)
        )


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_timms_own_checkpoints_are_converted_too(suffix, model, tmp_path):
    state = model.state_dict()
    content = {"epoch": 3, "args": argparse.Namespace(lr=1), "state_dict": scaled(state), "state_dict_ema": state}
    file = tmp_path / f"model_best.{suffix}"
    if suffix == "pth":
        torch.save(content, file)
    else:
        save_file(state, file)
    words = ["--student_args", json.dumps({**NARROW, "num_classes": 10})]
    convert(file, "--student", "timm/resnet18", *words, "--output_dir", tmp_path / "student")
    found = load_file(tmp_path / "student/model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_a_student_folder_is_left_alone_and_one_is_not_replaced_unasked(model, tmp_path, capsys):
    student = small_student()
    save_student(student, tmp_path / "student")
    before = {file: file.read_bytes() for file in (tmp_path / "student").iterdir()}
    convert(tmp_path / "student", "--student", "convnext_t", "--output_dir", tmp_path / "new")
    assert "is a student folder already" in capsys.readouterr().out and not (tmp_path / "new").exists()
    file = save(tmp_path, theirs(model))
    assert "holds something already" in refused(capsys, file, *RESNET18, "--output_dir", tmp_path / "student")
    assert {file: file.read_bytes() for file in (tmp_path / "student").iterdir()} == before


def test_a_converted_student_is_evaluated_and_written_for_openmmlab(model, tmp_path, capsys):
    convert(save(tmp_path, theirs(model)), *RESNET18, "--output_dir", tmp_path / "student")
    words = ["--eval_files", f"{DIGITS}/test-*.parquet", "--output_dir", tmp_path / "out", "--image_size", "32"]
    main(["evaluate", str(tmp_path / "student"), *map(str, words), "--update_card", "--use_cpu", "true"])
    assert "top-1" in (tmp_path / "student/README.md").read_text(encoding="utf-8")
    convert(tmp_path / "student", "--to", "openmmlab", "--output_dir", tmp_path / "back")
    found = torch.load(tmp_path / "back/student.pth", weights_only=True)["state_dict"]
    assert set(found) == set(theirs(model)) and all(torch.equal(found[n], v) for n, v in theirs(model).items())
    assert "no student folder" in refused(capsys, tmp_path / FILE, "--to", "openmmlab", "--output_dir", tmp_path / "x")
    save_student(
        load_student("timm/densenet121", num_classes=3, growth_rate=4, block_config=(1, 1)), tmp_path / "dense"
    )
    said = refused(capsys, tmp_path / "dense", "--to", "openmmlab", "--output_dir", tmp_path / "x")
    assert "DenseNet of timm, which cannot be written" in said and not (tmp_path / "x").exists()
