"""What the weights of a checkpoint do not show: read from what else is in the file, or asked for."""

import json

import pytest
import timm
import torch
from test_convert import NARROW, RESNET18, convert, refused, save, theirs
from transformers import AutoModelForImageClassification

from scalekd_hf.data.imagenet import class_names
from scalekd_hf.models.saving import save_student
from scalekd_hf.models.students import load_student
from scalekd_hf.tools import convert as tool
from scalekd_hf.tools.told import classes_of


CONVNEXT = {"depths": [1] * 4, "dims": [8] * 4}
VIT = {"embed_dim": 16, "img_size": 64, "patch_size": 16, "depth": 1, "num_heads": 2}
FEATMAP = {"class_token": False, "global_pool": "avg", "fc_norm": False}
MEAN_OF_TOKENS = {"global_pool": "avg", "fc_norm": False}


def file_of(folder, name, options, text="", prefix="", **more):
    """A checkpoint in OpenMMLab's names, with the text of a configuration; and its network."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options).eval()
    state = theirs(model, prefix) | {f"{prefix}{key}": value for key, value in more.items()}
    return save(folder, {"meta": {"cfg": text}, "state_dict": state}), model


def same(folder, model, side=64):
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        found = load_student(str(folder), pretrained=True).eval().classify(images)
        return torch.allclose(found, model(images), atol=1e-6)


# ConvNeXt


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("student", ["timm/convnext_tiny", "convnext_t"])
@pytest.mark.parametrize(
    "form", ["dict(type='ConvNeXt', gap_before_final_norm={})", '{{"gap_before_final_norm": {}}}']
)
def test_the_configuration_says_where_a_convnexts_last_norm_stands(form, student, first, tmp_path, capsys):
    options = CONVNEXT | {"head_norm_first": first}
    text = "model = dict(backbone=" + form.format(not first) + ")"
    file, model = file_of(tmp_path, "convnext_tiny", options, text)
    convert(file, "--student", student, "--student_args", json.dumps(CONVNEXT), "--output_dir", tmp_path / "made")
    assert same(tmp_path / "made", model)
    wrong = ["--student_args", json.dumps(CONVNEXT | {"head_norm_first": not first})]
    said = refused(capsys, file, "--student", student, *wrong, "--output_dir", tmp_path / "wrong")
    assert f"the checkpoint says `gap_before_final_norm={not first}`" in said and not (tmp_path / "wrong").exists()


def test_norms_of_other_maps_prove_it_in_the_authors_whole_states_alone(tmp_path, capsys):
    options, norm = CONVNEXT | {"head_norm_first": True}, {"backbone.norm2.weight": torch.ones(8)}
    words = ["--student_args", json.dumps(CONVNEXT), "--output_dir", tmp_path / "made"]
    bare, model = file_of(tmp_path, "convnext_tiny", options, **norm)
    assert "head_norm_first" in refused(capsys, bare, "--student", "convnext_t", *words)
    whole, model = file_of(tmp_path, "convnext_tiny", options, prefix="student.", **norm)
    assert "head_norm_first" in refused(capsys, whole, "--student", "timm/convnext_tiny", *words)
    convert(whole, "--student", "convnext_t", *words)
    assert same(tmp_path / "made", model)


# ViT


def with_token():
    """A ViT and its weights with a class token that is taken out again, as mmcls 1.0rc saves it."""
    model = timm.create_model("vit_small_patch16_224", num_classes=10, **VIT, **FEATMAP).eval()
    state = theirs(model)
    state["backbone.pos_embed"] = torch.cat((torch.randn(1, 1, 16), state["backbone.pos_embed"]), dim=1)
    return model, state | {"backbone.cls_token": torch.randn(1, 1, 16)}


def vit(file, made, student="timm/vit_small_patch16_224", **options):
    return [file, "--student", student, "--student_args", json.dumps(VIT | options), "--output_dir", made]


def test_a_class_token_is_dropped_where_the_file_or_its_user_says_that_it_is_not_in_use(tmp_path, capsys):
    model, state = with_token()
    silent = save(tmp_path, {"state_dict": state}, "silent.pth")
    says = save(tmp_path, {"meta": {"config": "dict(with_cls_token = False)"}, "state_dict": state}, "says.pth")
    in_use = save(tmp_path, {"meta": {"config": "dict(with_cls_token=True)"}, "state_dict": state}, "in_use.pth")
    gap = "timm/vit_base_patch16_gap_224"  # without a class token by itself
    convert(*vit(says, tmp_path / "says", **FEATMAP))
    convert(*vit(silent, tmp_path / "named", student="vit_s"))
    convert(*vit(silent, tmp_path / "given", **FEATMAP))
    assert all(same(tmp_path / name, model) for name in ("says", "named", "given"))
    assert "does not say `with_cls_token=False`" in refused(capsys, *vit(silent, tmp_path / "x", student=gap))
    for student, options in (("vit_s", {}), ("timm/vit_small_patch16_224", FEATMAP)):
        said = refused(capsys, *vit(in_use, tmp_path / "x", student=student, **options))
        assert "so that it may be in use" in said and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("", {}, "do not show whether its classifier reads that token"),
        ("dict(out_type='featmap')", {}, "reads the mean of the tokens, but the model has `global_pool` 'token'"),
        ("dict(out_type='cls_token')", MEAN_OF_TOKENS, "reads its class token, but the model has `global_pool` 'avg'"),
        ("dict(out_type='featmap', with_cls_token=False)", {}, "but the model has a class token"),
    ],
)
def test_a_vit_that_reads_another_token_is_refused(text, options, said, tmp_path, capsys):
    file, _ = file_of(tmp_path, "vit_small_patch16_224", VIT | options, text)
    assert said in refused(capsys, *vit(file, tmp_path / "x", **options)) and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("text", "read", "given"),
    [
        ("dict(out_type='cls_token')", {}, {}),
        ("dict(out_type='featmap')", MEAN_OF_TOKENS, MEAN_OF_TOKENS),
        ("", {}, {"global_pool": "token"}),
        ("", MEAN_OF_TOKENS, MEAN_OF_TOKENS),
    ],
)
def test_a_vit_with_a_class_token_is_converted_where_it_is_said_what_it_reads(text, read, given, tmp_path):
    file, model = file_of(tmp_path, "vit_small_patch16_224", VIT | read, text)
    convert(*vit(file, tmp_path / "made", **given))
    assert same(tmp_path / "made", model)


def test_the_head_for_class_tokens_says_that_one_is_read(tmp_path, capsys):
    model = timm.create_model("vit_small_patch16_224", num_classes=10, **VIT).eval()
    state = {name.replace("head.fc", "head.layers.head"): value for name, value in theirs(model).items()}
    file = save(tmp_path, {"state_dict": state})
    convert(*vit(file, tmp_path / "made"))
    assert same(tmp_path / "made", model)
    assert "reads its class token" in refused(capsys, *vit(file, tmp_path / "x", **MEAN_OF_TOKENS))


def test_a_second_norm_says_that_the_mean_of_the_tokens_is_read(tmp_path, capsys):
    file, model = file_of(tmp_path, "eva_large_patch14_196", VIT)
    convert(*vit(file, tmp_path / "made", student="timm/eva_large_patch14_196"))
    assert same(tmp_path / "made", model)
    wrong = vit(file, tmp_path / "x", global_pool="token", fc_norm=True, final_norm=True)
    assert "reads the mean of the tokens" in refused(capsys, *wrong)


# Classes and images


@pytest.mark.parametrize("meta", [{"CLASSES": tuple("abcdefghij")}, {"dataset_meta": {"classes": list("abcdefghij")}}])
def test_classes_are_called_what_the_file_says(meta, tmp_path):
    model = timm.create_model("resnet18", num_classes=10, **NARROW)
    convert(save(tmp_path, {"meta": meta, "state_dict": theirs(model)}), *RESNET18, "--output_dir", tmp_path / "made")
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "made").config
    assert list(config.id2label.values()) == list("abcdefghij")


def test_imagenets_names_are_for_1000_classes_without_names_or_with_these():
    other = [f"kind {number}" for number in range(1000)]
    assert classes_of({"meta": {"CLASSES": other}}, 1000) == other
    repeated = [name.split(" (n0")[0] for name in class_names()]
    for content in ({}, {"meta": {"CLASSES": repeated}}, {"meta": {"CLASSES": other[:10]}}, {"meta": 3}):
        assert classes_of(content, 1000) == class_names()
    assert classes_of({}, 10) is None and classes_of({"meta": {"CLASSES": other}}, 10) is None


OTHER = "data_preprocessor = dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], to_rgb=True)"
USUAL = "img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])"


@pytest.mark.parametrize(
    ("text", "stored", "mean", "said"),
    [
        (OTHER, {}, 0.5, "the checkpoint's"),
        ("", {"data_preprocessor.mean": torch.full((3, 1, 1), 127.5)}, 0.5, "the checkpoint's"),
        ("", {}, 0.485, "the model's own, assumed"),
        (f"{OTHER}\n{USUAL}", {}, 0.485, "the model's own, assumed"),
    ],
)
def test_images_are_normalised_as_the_file_says_or_it_is_told_that_this_is_assumed(
    text, stored, mean, said, tmp_path, capsys
):
    if stored:
        stored = stored | {"data_preprocessor.std": torch.full((3, 1, 1), 127.5)}
    file, _ = file_of(tmp_path, "resnet18", NARROW, text, **stored)
    convert(file, *RESNET18, "--output_dir", tmp_path / "made")
    assert f"images: {said}" in capsys.readouterr().out
    assert load_student(str(tmp_path / "made")).spec.mean[0] == mean
    words = ["--student_args", json.dumps(NARROW | {"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]})]
    convert(file, "--student", "timm/resnet18", *words, "--output_dir", tmp_path / "given")
    assert load_student(str(tmp_path / "given")).spec.mean == (0.1, 0.2, 0.3)


# What is written


def test_a_timm_file_has_as_many_classes_as_its_head(tmp_path):
    model = timm.create_model("resnet18", num_classes=7, **NARROW).eval()
    convert(save(tmp_path, {"state_dict": model.state_dict()}), *RESNET18, "--output_dir", tmp_path / "made")
    assert same(tmp_path / "made", model)


def test_the_card_has_no_path_of_this_machine_and_says_what_the_conversion_measured(tmp_path):
    model = timm.create_model("resnet18", num_classes=10, **NARROW)
    save_student(load_student("timm/resnet18", num_classes=10, **NARROW), tmp_path / "local")
    file = save(tmp_path, {"state_dict": theirs(model)})
    convert(file, "--student", tmp_path / "local", "--output_dir", tmp_path / "made")
    card = (tmp_path / "made/README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in card and "`local`" in card
    assert "The conversion measured no accuracy" in card and "conversion repeated neither" in card


def test_a_failed_write_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    student, write = load_student("timm/resnet18", num_classes=3, **NARROW), torch.save

    def fails(content, file):
        file.write_bytes(b"half")
        raise OSError("no room")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="no room"):
        tool.write_openmmlab(student, tmp_path / "made")
    assert not list((tmp_path / "made").iterdir())
    monkeypatch.setattr(torch, "save", write)
    assert tool.write_openmmlab(student, tmp_path / "made").name == "student.pth"


def test_a_card_that_cannot_be_written_leaves_no_student_without_one(tmp_path, monkeypatch):
    def fails(*arguments):
        raise OSError("no room")

    file, _ = file_of(tmp_path, "resnet18", NARROW)
    monkeypatch.setattr(tool, "make_card", fails)
    with pytest.raises(OSError, match="no room"):
        tool.convert(file, "timm/resnet18", tmp_path / "made", student_args=NARROW)
    assert not list((tmp_path / "made").iterdir())
