"""Where students are tapped: at the ends of stages, at the published blocks, or where they are told to be."""

import pytest
import timm
import torch
from helpers import build, images, some_slow
from student_families import STUDENTS
from transformers import (
    EfficientNetConfig,
)

from scalekd_hf import load_student


def test_isotropic_students_are_tapped_at_the_published_blocks():
    vit = load_student(STUDENTS["timm_vit"][0](), mean=None)
    vit.spec = vit.spec.updated(size=32)
    mixer = load_student(STUDENTS["timm_mixer"][0]())
    assert [tap.module for tap in vit.taps] == ["blocks.8", "norm"]  # blocks 9 and 12 of 12, counted from 1
    assert [tap.module for tap in mixer.taps] == ["blocks.5", "blocks.7"]  # the third from the end of 8, and the last


@pytest.mark.parametrize(
    ("name", "modules", "maps"),
    [
        ("resnet50", ["layer3", "layer4"], ((1024, (14, 14)), (2048, (7, 7)))),
        ("mobilenetv1_100", ["blocks.3", "bn2"], ((512, (14, 14)), (1024, (7, 7)))),
        ("convnext_tiny", ["stages.2", "stages"], ((384, (14, 14)), (768, (7, 7)))),
        ("swin_tiny_patch4_window7_224", ["layers.2", "norm"], ((384, (14, 14)), (768, (7, 7)))),
        ("mixer_s16_224", ["blocks.5", "blocks.7"], ((512, (14, 14)), (512, (14, 14)))),
        ("vit_small_patch16_224", ["blocks.8", "norm"], ((384, (14, 14)), (384, (14, 14)))),
    ],
)
def test_full_size_students_are_tapped_as_published(name, modules, maps):
    with torch.device("meta"):
        student = load_student(f"timm/{name}")
    assert [tap.module for tap in student.taps] == modules
    assert tuple(zip(student.dims, student.grids, strict=True)) == maps


@pytest.mark.parametrize(
    ("name", "penultimate"),
    [
        ("efficientnet_b0", "blocks.4"),
        ("regnety_004", "s3"),
        ("mobilenetv2_100", "blocks.4"),
        ("mobilenetv3_large_100", "blocks.4"),
        ("mobilenetv4_conv_small", "blocks.2"),
        ("fastvit_t8", "stages.2"),
        ("efficientformerv2_s0", "stages.2"),
        ("poolformer_s12", "stages.2"),
        ("deit_tiny_patch16_224", "blocks.8"),
        ("pvt_v2_b0", "stages.2"),
        ("resnet50d", "layer3"),
        ("eva02_tiny_patch14_336", "blocks.9"),
        ("mixer_b14_224", "blocks.9"),
    ],
)
def test_further_students_are_tapped_at_the_end_of_their_stages(name, penultimate):
    with torch.device("meta"):
        student = load_student(f"timm/{name}", labels=["a", "b"])
        assert student.taps[0].module == penultimate
        assert student.grids[0][0] in (student.grids[1][0], 2 * student.grids[1][0])
        maps = student.train()(torch.zeros(2, 3, *student.spec.size))
    assert [value.shape[1:] for value in maps[:2]] == [
        (dim, *grid) for dim, grid in zip(student.dims, student.grids, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "last"),
    [("gmlp_s16_224", "blocks.29"), ("resmlp_12_224", "blocks.11"), ("convmixer_768_32", "blocks")],
)
def test_the_last_map_of_mixers_has_not_passed_their_final_norm(name, last):
    with torch.device("meta"):
        assert load_student(f"timm/{name}", labels=["a", "b"]).taps[1].module == last


@pytest.mark.parametrize("name", ["resnetv2_50", "dpn48b", "dla34"])
def test_a_classifier_of_two_classes_that_is_a_convolution_is_no_map(name):
    with torch.device("meta"):
        assert load_student(f"timm/{name}", labels=["a", "b"]).taps[1].grid == (7, 7)


def test_a_last_stage_of_one_cell_is_said_and_nothing_is_said_of_pooling(caplog):
    with torch.device("meta"):
        taps = load_student("timm/resnet18", num_classes=10, image_size=32).taps
        assert taps[1].grid == (2, 2) and "ends in a single cell at 32x32 px" in caplog.text
        caplog.clear()
        for name in ("resnet18", "vgg11", "mobilenetv3_large_100", "swin_tiny_patch4_window7_224"):
            student = load_student(
                f"timm/{name}", labels=["a", "b"], taps=["features.14", "features.19"] if "vgg" in name else None
            )
            assert student.taps
    assert "single cell" not in caplog.text


def test_prefix_tokens_are_left_out_of_the_maps():
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=4,
        num_heads=2,
        reg_tokens=3,
        num_classes=10,
    )
    student = load_student(model).train()
    assert [tap.prefix for tap in student.taps] == [4, 4]
    expected = model.forward_features(images())[:, 4:]
    assert torch.equal(student(images())[1].flatten(2).transpose(1, 2), expected)


def test_images_need_not_be_square():
    model = timm.create_model("resnet18", channels=(8, 16, 24, 32), num_classes=10)
    student = load_student(model)
    student.spec = student.spec.updated(size=(64, 96))
    assert student.grids == ((4, 6), (2, 3))


@pytest.mark.parametrize(
    ("name", "penultimate"),
    [
        ("rexnet_100", "features.10"),
        ("mobilevit_xxs", "stages.3"),
        ("inception_v3", "Mixed_6e"),
        ("tiny_vit_5m_224", "stages.2"),
    ],
)
def test_the_expansion_of_the_last_stage_is_not_taken_for_the_penultimate_map(name, penultimate):
    with torch.device("meta"):
        assert load_student(f"timm/{name}").taps[0].module == penultimate


def test_padding_before_a_strided_convolution_hides_no_stage():
    sizes = {"image_size": 224, "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}
    with torch.device("meta"):
        student = load_student(build(EfficientNetConfig(**sizes)))
        assert student.taps[0].module == "efficientnet.encoder.blocks.10"
        assert (student.dims, student.grids) == ((112, 1280), ((14, 14), (7, 7)))


def test_a_student_can_be_tapped_by_name():
    with torch.device("meta"):
        assert load_student("timm/vgg11", taps=["features.9", "features.20"]).grids == ((56, 56), (7, 7))
        with pytest.raises(ValueError, match="`student_taps` must name two modules.*the earlier first"):
            _ = load_student("timm/vgg11", taps=["features.20", "features.9"]).taps


def test_the_dry_run_leaves_the_model_as_it_was():
    model = timm.create_model("resnet18", channels=(8, 16, 24, 32), num_classes=10).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student = load_student(model)
    student.spec = student.spec.updated(size=64)
    assert student.taps
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


SWEEP = [  # whose last map, or the one before, a norm puts out; then some where none does
    *("efficientnet_b0", "mobilenetv2_050", "densenet121", "resnetv2_50", "mnasnet_small", "mixnet_s"),
    *("resnet18", "regnetx_002", "ghostnet_100", "hrnet_w18_small", "repvgg_a0", "levit_128s", "fastvit_t8"),
]


@pytest.mark.parametrize("name", some_slow(SWEEP, 4))
def test_synchronised_batchnorms_leave_the_maps_where_they_were(name):
    student = load_student(f"timm/{name}", num_classes=10, image_size=64).eval()
    with torch.no_grad():
        before = student(images(size=64))
        student.synchronise_batchnorms()
        after = student.eval()(images(size=64))
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in student.modules())
    assert all(torch.equal(first, second) for first, second in zip(before, after, strict=True))


def test_a_part_that_was_replaced_after_tapping_is_named():
    student = load_student("timm/resnet18", num_classes=10, image_size=64, channels=(8, 16, 24, 32))
    assert student.taps[1].module == "layer4"
    student.model.layer4 = torch.nn.Sequential(torch.nn.Conv2d(24, 32, 1))
    with pytest.raises(RuntimeError, match="gave no map at layer4: .*another module has taken its place"):
        student(images(size=64))
