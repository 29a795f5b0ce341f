"""Students that cannot learn here, and are refused with the true reason; and some that can, and seemed not to."""

import pytest
import timm
import torch
from helpers import build, images, timm_swin, timm_vit, transformers_vit
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ImageGPTConfig,
    LevitConfig,
    LevitForImageClassification,
    LevitForImageClassificationWithTeacher,
    PerceiverConfig,
    PerceiverForImageClassificationLearned,
    PPLCNetConfig,
    PreTrainedConfig,
    Siglip2Config,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from scalekd_hf import load_student, load_teacher
from scalekd_hf.models import students
from scalekd_hf.models.saving import check_rebuildable, save_student
from scalekd_hf.tools.plan import plan


VIT = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48, "num_labels": 3}
LEVIT = {"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(("name", "model"), [("in_chans", "timm/vit_tiny_patch16_224"), ("num_channels", "folder")])
def test_other_channels_than_three_are_refused_by_name(role, name, model, tmp_path):
    load = {"student": load_student, "teacher": load_teacher}[role]
    if model == "folder":
        transformers_vit().save_pretrained(tmp_path)
        model = str(tmp_path)
    with pytest.raises(ValueError, match=f"`{role}` has `{name}` 4, but images are read.* as RGB"):
        load(model, **{name: 4})


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("make", [timm_vit, timm_swin, lambda **args: timm.create_model("vgg11", **args)])
def test_other_channels_than_three_are_refused_by_module_and_folder(make, channels, tmp_path):
    with torch.device("meta" if make not in (timm_vit, timm_swin) else "cpu"):
        model = make(in_chans=channels)
    for load, role in ((load_student, "student"), (load_teacher, "teacher")):
        with pytest.raises(ValueError, match=f"`{role}` has `in_chans` {channels}, but.*grey images are read as RGB"):
            load(model)
    if make is timm_vit:
        timm.models.save_for_hf(model, tmp_path, model_args={**model._model_args})
        with pytest.raises(ValueError, match=f"`student` has `in_chans` {channels}"):
            load_student(str(tmp_path))


def test_other_channels_than_three_are_refused_by_configuration(tmp_path):
    transformers_vit(num_channels=1).save_pretrained(tmp_path)
    for given in (str(tmp_path), transformers_vit(num_channels=1)):
        for load, role in ((load_student, "student"), (load_teacher, "teacher")):
            with pytest.raises(ValueError, match=f"`{role}` has `num_channels` 1"):
                load(given)


def test_a_plan_refuses_other_channels(tmp_path):
    words = {
        "dataset": "uoft-cs/cifar10",
        "teacher": "timm/swin_tiny_patch4_window7_224",
        "student": "timm/resnet18",
        "num_classes": 1000,
    }
    found = plan({**words, "student_args": {"in_chans": 1}, "output_dir": str(tmp_path / "run"), "max_steps": 1})
    assert "`in_chans` 1" in found.error


def test_a_plan_warns_of_a_last_stage_of_one_cell_and_refuses_an_oblong_student_of_transformers(tmp_path):
    words = {
        "dataset": "uoft-cs/cifar10",
        "teacher": "timm/swin_tiny_patch4_window7_224",
        "num_classes": 10,
        "logit_weight": 0.0,
        "max_steps": 1,
    }
    words |= {"output_dir": str(tmp_path / "run"), "teacher_args": {"patch_size": 2, "window_size": 2}}
    found = plan({**words, "student": "timm/resnet18", "image_size": 32, "teacher_image_size": 32})
    assert found.error is None and any("ends in a single cell at 32x32 px" in said for said in found.warnings)
    transformers_vit(image_size=(32, 48)).save_pretrained(tmp_path / "oblong")
    found = plan({**words, "student": str(tmp_path / "oblong"), "teacher_image_size": 32})
    assert "takes images of 32x48 px" in found.error and "Choose a square, or a timm student" in found.error


def test_an_oblong_student_of_transformers_is_tapped_and_evaluated_but_not_trained(tmp_path):
    transformers_vit(image_size=(32, 48)).save_pretrained(tmp_path)
    student = load_student(str(tmp_path), pretrained=True).eval()
    assert (student.spec.size, student.grids) == ((32, 48), ((4, 6), (4, 6)))
    assert student(torch.zeros(2, 3, 32, 48))[2].shape == (2, 10)
    with pytest.raises(ValueError, match="32x48 px.*Choose a square"):
        check_rebuildable(student)


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: build(ImageGPTConfig(n_embd=8, n_layer=1, n_head=1, num_labels=3)), "`input_ids`"),
        (lambda: PerceiverForImageClassificationLearned(PerceiverConfig(num_labels=3)), "`inputs`"),
        (lambda: build(Siglip2Config(num_labels=3)), "cut patches with their `spatial_shapes`"),
    ],
)
def test_students_that_take_no_images_are_not_told_to_choose_another_size(make, wanted):
    with torch.device("meta"), pytest.raises(ValueError, match=rf"takes {wanted}, not images") as refused:
        load_student(make())
    assert "Choose an `image_size`" not in str(refused.value)


def test_a_classifier_without_logits_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="puts out last_hidden_state, but no `logits`") as refused:
        _ = load_student(build(PPLCNetConfig(num_labels=3))).taps
    assert "image_size" not in str(refused.value)


def test_an_error_of_the_search_is_not_taken_for_a_student_without_taps(monkeypatch):
    def broken(student):
        raise AttributeError("no attribute 'grad_fn'")

    monkeypatch.setattr(students, "find_taps", broken)
    student = load_student(timm_vit())
    for name in ("taps", "dims", "grids"):
        with pytest.raises(RuntimeError, match="could not be tapped: no attribute 'grad_fn'"):
            getattr(student, name)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**VIT, image_size=32, patch_size=8)),
        lambda: LevitForImageClassificationWithTeacher(LevitConfig(**LEVIT, image_size=64, num_labels=3)),
        lambda: LevitForImageClassification(LevitConfig(**LEVIT, image_size=64, num_labels=3)),
    ],
)
def test_students_with_a_distillation_head_learn_and_load_again(make, tmp_path):
    torch.manual_seed(0)
    student = load_student(make())
    student.freeze_unused()
    pixels = images(2, student.spec.size[0])
    penultimate, last, logits = student.train()(pixels)
    (penultimate.square().sum() + last.square().sum() + logits.square().sum()).backward()
    assert not [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
    check_rebuildable(student)
    save_student(student, tmp_path)
    again = load_student(str(tmp_path), pretrained=True)
    assert type(again.model) is type(student.model)
    assert torch.equal(again.eval().classify(pixels), student.eval().classify(pixels))


@pytest.mark.parametrize(
    "config", [DeiTConfig(**VIT, image_size=32, patch_size=8), LevitConfig(**LEVIT, image_size=64)]
)
def test_a_configuration_of_several_classes_that_names_none_is_of_the_plain_one(config, tmp_path):
    config.save_pretrained(tmp_path)
    student = load_student(str(tmp_path), labels=["a", "b"])
    assert type(student.model).__name__.endswith("ForImageClassification") and student.num_labels == 2
    assert student.taps[0].grid == (4, 4)


def test_a_timm_model_in_transformers_wrapper_needs_no_data_configuration():
    config = TimmWrapperConfig(architecture="resnet18", num_labels=3, model_args={"channels": (8, 8, 8, 8)})
    assert isinstance(config, PreTrainedConfig) and not hasattr(config, "pretrained_cfg")
    student = load_student(TimmWrapperForImageClassification(config))
    assert [tap.module for tap in student.taps] == ["layer3", "layer4"] and student.num_labels == 3
