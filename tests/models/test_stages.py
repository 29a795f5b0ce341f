"""What timm and transformers say of their models' stages, and students tapped by it or against it."""

import pytest
import timm
import torch
from helpers import build, images, some_slow
from processes import run_script
from transformers import FocalNetConfig, HieraConfig, ResNetConfig, SwinConfig, ViTConfig

from scalekd_hf import load_student
from scalekd_hf.models.stages import Stage, stated_stages


def timm_says(name):
    model = timm.create_model(name, num_classes=2)
    return load_student(model), {entry["module"]: entry["reduction"] for entry in model.feature_info}


# name: (modules, strides) as timm states them, but for the last map's norm or convolution
TAPPED = {
    "repvit_m1": (["stages.2", "stages"], (16, 32)),  # was inside the downsampling before the last stage
    "efficientvim_m1": (["stages.1", "stages.2"], (32, 64)),  # was the stem and the first block
    "convmixer_768_32": (["blocks.29", "blocks"], (7, 7)),  # was the middle of that block
    "tnt_s_legacy_patch16_224": (["blocks.8", "norm"], (16, 16)),  # was not found
    "vit_tiny_patch16_dinov3_qkvb": (["blocks.8", "norm"], (16, 16)),  # was at EVA-02's place
    "vit_small_resnet50d_s16_224": (["blocks.5", "norm"], (16, 16)),  # was in the network before the blocks
    "inception_v4": (["features.17", "features"], (16, 32)),  # was twice on the last grid
    "hrnet_w18_small": (["incre_modules.2", "final_layer"], (16, 32)),  # was the first layer
    "gcvit_xxtiny": (["stages.2", "stages"], (16, 32)),
    "sequencer2d_s": (["stages.2", "norm"], (14, 14)),  # was the first of four stages
    "nasnetalarge": (["reduction_cell_1.conv_1x1.act", "act"], (16, 32)),  # was the first convolution
    "mobilenetv5_base": (["blocks.2", "blocks.3"], (16, 32)),  # was a stage too early
}


@pytest.mark.parametrize("name", some_slow(TAPPED, 9))
def test_students_are_tapped_at_the_stages_of_timm(name):
    modules, strides = TAPPED[name]
    with torch.device("meta"):
        student, said = timm_says(name)
        assert [tap.module for tap in student.taps] == modules and not student.tap_remarks
    assert said.get(modules[0], 16) == strides[0]  # what timm states of HRNet are no modules
    size = student.spec.size
    assert all(Stage("", stride, 1).fits(tap.grid, size) for stride, tap in zip(strides, student.taps, strict=True))


def test_borders_without_padding_hide_no_stage_at_small_sizes():
    with torch.device("meta"):
        student = load_student("timm/inception_v4", num_classes=2, image_size=150)
        assert [tap.module for tap in student.taps] == ["features.17", "features"] and not student.tap_remarks


def test_the_keys_of_an_attention_that_pools_are_no_map():
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "class_token": False}
    student = load_student(timm.create_model("vit_tiny_patch16_224", global_pool="map", num_classes=2, **small))
    assert [(tap.module, tap.dim) for tap in student.taps] == [("blocks.2", 24), ("norm", 24)]


@pytest.mark.parametrize(
    ("name", "size", "modules"),
    [
        ("efficientvim_m1", 64, ["stages.0", "stages.1"]),
        ("convnext_atto", 32, ["stages.1", "stages.2"]),  # was within the last stage, of a cell
        ("repvit_m1", 32, ["stages.1", "stages.2"]),
    ],
)
def test_of_the_stages_that_end_in_more_than_a_cell_the_last_two_are_tapped(name, size, modules):
    with torch.device("meta"):
        student = load_student(f"timm/{name}", num_classes=2, image_size=size)
        assert [tap.module for tap in student.taps] == modules
    assert f"ends in a single cell at {size}x{size} px" in student.tap_remarks[0]


def test_a_student_of_which_a_single_stage_ends_in_more_than_a_cell_is_refused():
    with torch.device("meta"), pytest.raises(ValueError, match="no two stages or blocks.* at 32x32 px"):
        _ = load_student("timm/efficientvim_m1", num_classes=2, image_size=32).taps


@pytest.mark.parametrize("output_stride", [8, 16])
def test_a_stage_that_does_not_shrink_is_a_stage(output_stride):
    with torch.device("meta"):
        student = load_student("timm/resnet18", num_classes=2, image_size=64, output_stride=output_stride)
        assert [tap.module for tap in student.taps] == ["layer3", "layer4"]


def test_pooling_after_the_last_convolution_is_no_stage_and_this_is_said():
    with torch.device("meta"):
        student, said = timm_says("vgg11")
        assert [tap.module for tap in student.taps] == ["features.14", "features.19"]
        small = load_student("timm/vgg11", num_classes=2, image_size=32)
        assert small.grids == ((4, 4), (2, 2)) and "single cell" not in str(small.tap_remarks)
    assert (said["features.14"], said["features.19"], said["features.20"]) == (8, 16, 32)
    assert "timm says that its last two stages are features.19 (stride 16) and features.20" in student.tap_remarks[0]


def test_the_map_of_the_image_is_taken_of_several_tensors():
    student = load_student("timm/tnt_s_legacy_patch16_224", num_classes=2, depth=4).eval()
    blocks = student.model.forward_intermediates(images(size=224), indices=[2], intermediates_only=True, norm=False)
    assert (student.taps[0].module, student.taps[0].index) == ("blocks.2", 1)  # the first are of pixels in a patch
    assert torch.equal(student(images(size=224))[0], blocks[0])


def test_where_names_are_no_modules_the_map_is_that_which_timm_gives_out():
    student = load_student("timm/hrnet_w18_small", num_classes=2, image_size=64).eval()
    given = student.model.forward_intermediates(images(size=64), indices=[3], intermediates_only=True)
    assert torch.equal(student(images(size=64))[0], given[0])


@pytest.mark.parametrize(
    ("name", "taps", "size"),
    [
        ("crossvit_tiny_240", ["blocks.1", "blocks.2"], 240),
        pytest.param("coat_tiny", ["serial_blocks3.1", "serial_blocks4.1"], 224, marks=pytest.mark.slow),
    ],
)
def test_a_student_that_cannot_be_tapped_is_refused_with_modules_that_can(name, taps, size):
    with torch.device("meta"):
        with pytest.raises(ValueError, match="Name two modules with `student_taps`; these put out maps") as refused:
            _ = load_student(f"timm/{name}", num_classes=2).taps
        assert all(f"{tap} (" in str(refused.value) for tap in taps)
        student = load_student(f"timm/{name}", num_classes=2, taps=taps)
        maps = student.train()(torch.zeros(2, 3, size, size))[:2]
    assert [value.shape[2:] for value in maps] == list(student.grids)


def test_the_tokens_of_hiera_are_brought_into_the_order_of_the_image():
    options = {"stages": (1, 1, 1, 1), "embed_dim": 8, "num_heads": 1, "num_classes": 2}
    model = timm.create_model("hiera_tiny_224", **options, img_size=(64, 128)).eval()
    pixels = torch.randn(2, 3, 64, 128)
    stages = model.forward_intermediates(pixels, indices=[2, 3], intermediates_only=True, norm=False)
    student = load_student(model)
    student.spec = student.spec.updated(size=(64, 128))
    penultimate, last, _ = student(pixels)
    assert torch.equal(penultimate, stages[0]) and torch.equal(last, stages[1])


def test_the_tokens_of_hiera_of_transformers_are_brought_into_the_order_of_the_image():
    sizes = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 4], "image_size": [64, 128]}
    model = build(HieraConfig(**sizes, num_labels=2)).eval()
    pixels = torch.randn(2, 3, 64, 128)
    stages = model.hiera(pixels, output_hidden_states=True).reshaped_hidden_states
    penultimate, last, _ = load_student(model)(pixels)
    assert torch.equal(penultimate, stages[-2].permute(0, 3, 1, 2))
    assert torch.equal(last, stages[-1].permute(0, 3, 1, 2))


SMALL = {"depths": [1, 1, 1, 1], "embed_dim": 8, "num_labels": 2, "image_size": 64}


@pytest.mark.parametrize(
    ("config", "strides"),
    [
        (ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]), (16, 32)),
        (SwinConfig(**SMALL, num_heads=[1, 1, 1, 1], window_size=2, patch_size=2), (8, 16)),
        (HieraConfig(**{**SMALL, "image_size": [64, 64]}, num_heads=[1, 1, 1, 1]), (16, 32)),
        (ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8), ()),
    ],
)
def test_the_backbones_of_transformers_state_the_last_two_stages(config, strides):
    student = load_student(build(config))
    student.spec = student.spec.updated(size=64)
    assert tuple(stage.stride for stage in stated_stages(student.model, (64, 64))) == strides
    if strides:
        assert student.taps and not student.tap_remarks


def test_where_the_library_says_otherwise_both_are_named(caplog):
    model = timm.create_model("resnet18", num_classes=2, channels=(8, 8, 8, 8))
    model.feature_info[-1]["module"], model.feature_info[-1]["reduction"] = "no_module", 64
    student = load_student(model)
    student.spec = student.spec.updated(size=128)
    assert [tap.module for tap in student.taps] == ["layer3", "layer4"]
    (remark,) = student.tap_remarks
    assert "tapped at layer3 (stride 16) and layer4 (stride 32)" in remark and remark in caplog.text
    assert "timm says that its last two stages are layer3 (stride 16) and no_module (stride 64)" in remark


def test_focalnet_of_transformers_is_tapped_before_it_shrinks_as_the_method_wants_it():
    student = load_student(build(FocalNetConfig(**SMALL, focal_levels=[1] * 4, focal_windows=[3] * 4)))
    assert student.grids == ((4, 4), (2, 2))
    assert "transformers says that its last two stages are stage3 (stride 32)" in student.tap_remarks[0]


REFUSED = {"PPLCNetForImageClassification"}
REFUSED |= {f"PerceiverForImageClassification{kind}" for kind in ("Learned", "Fourier", "ConvProcessing")}


@pytest.mark.slow
def test_families_with_a_small_model_are_tapped_where_their_library_says():
    found = run_script("benchmarks/models.py", "--largest", 3)
    assert found.returncode == 0, found.stderr
    rows = [line.split() for line in found.stdout.splitlines()[1:-1]]
    verdicts = {verdict: {row[0] for row in rows if row[1] == verdict} for verdict in ("agrees", "differs", "refused")}
    assert len(verdicts["agrees"]) > 20 and not verdicts["differs"]
    assert verdicts["refused"] == REFUSED and "shuffled" not in found.stdout


@pytest.mark.slow
def test_families_with_a_small_model_have_an_exact_last_stage():
    found = run_script("benchmarks/models.py", "--role", "teacher", "--largest", 3)
    assert found.returncode == 0, found.stderr
    rows = [line.split() for line in found.stdout.splitlines()[1:-1]]
    exact = [float(row[2]) for row in rows if row[1] == "exact"]
    assert len(exact) > 25 and max(exact) < 1e-5
    assert {row[0] for row in rows if row[1] == "refused"} <= REFUSED
