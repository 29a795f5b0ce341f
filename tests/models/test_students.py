"""Students: any timm or transformers classifier whose stages the dry run finds."""

import pytest
import timm
import torch
from helpers import build, images, settings, some_slow, timm_swin
from transformers import (
    BitImageProcessor,
    ConvNextConfig,
    EfficientNetConfig,
    MobileNetV1Config,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
)

from scalekd_hf import load_student, load_teacher
from scalekd_hf.training.model import build_model


def timm_student(name, **changes):
    return lambda: timm.create_model(name, num_classes=10, **changes)


# name: (model built small, image size, ((C_p, grid_p), (C_l, grid_l)))
STUDENTS = {
    "timm_resnet": (timm_student("resnet18", channels=(8, 16, 24, 32)), 64, ((24, (4, 4)), (32, (2, 2)))),
    "timm_mobilenetv1": (timm_student("mobilenetv1_100"), 64, ((512, (4, 4)), (1024, (2, 2)))),
    "timm_convnext": (
        timm_student("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 12, 16, 24)),
        64,
        ((16, (4, 4)), (24, (2, 2))),
    ),
    "timm_swin": (timm_swin, 32, ((24, (8, 8)), (48, (4, 4)))),
    "timm_vit": (
        timm_student("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=12, num_heads=2),
        32,
        ((24, (4, 4)), (24, (4, 4))),
    ),
    "timm_mixer": (
        timm_student("mixer_s16_224", img_size=64),
        64,
        ((512, (4, 4)), (512, (4, 4))),
    ),
    "transformers_resnet": (
        lambda: build(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], num_labels=10)
        ),
        64,
        ((24, (4, 4)), (32, (2, 2))),
    ),
    "transformers_mobilenetv1": (
        lambda: build(MobileNetV1Config(depth_multiplier=0.25, image_size=64, num_labels=10)),
        64,
        ((128, (4, 4)), (256, (2, 2))),
    ),
    "transformers_convnext": (
        lambda: build(ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 2, 1], image_size=64, num_labels=10)),
        64,
        ((16, (4, 4)), (24, (2, 2))),
    ),
    "transformers_swin": (
        lambda: build(
            SwinConfig(
                image_size=32,
                patch_size=2,
                window_size=4,
                embed_dim=12,
                depths=[1, 2, 2],
                num_heads=[1, 2, 4],
                num_labels=10,
            )
        ),
        32,
        ((24, (8, 8)), (48, (4, 4))),
    ),
    "transformers_vit": (
        lambda: build(
            ViTConfig(
                image_size=32,
                patch_size=8,
                hidden_size=24,
                num_hidden_layers=4,
                num_attention_heads=2,
                intermediate_size=48,
                num_labels=10,
            )
        ),
        32,
        ((24, (4, 4)), (24, (4, 4))),
    ),
}


@pytest.mark.parametrize("family", STUDENTS)
def test_one_forward_gives_two_maps_and_the_classifiers_own_logits(family):
    make, size, expected = STUDENTS[family]
    student = load_student(make())
    student.spec = student.spec.updated(size=size)
    assert tuple(zip(student.dims, student.grids, strict=True)) == expected
    calls = []
    student.model.register_forward_hook(lambda *_: calls.append(1))
    student.train()
    penultimate, last, logits = student(images(2, size))
    assert len(calls) == 1
    assert [penultimate.shape, last.shape] == [(2, dim, *grid) for dim, grid in expected]
    assert logits.shape == (2, 10)
    first = next(student.model.parameters())
    for value in (penultimate, last):
        (gradient,) = torch.autograd.grad(value.square().sum(), first, retain_graph=True)
        assert gradient.abs().sum() > 0
    student.eval()
    with torch.no_grad():
        outputs = student.model(images(2, size))
        assert torch.equal(student.classify(images(2, size)), getattr(outputs, "logits", outputs))


def test_isotropic_students_are_tapped_at_the_published_blocks():
    vit = load_student(STUDENTS["timm_vit"][0](), mean=None)
    vit.spec = vit.spec.updated(size=32)
    mixer = load_student(STUDENTS["timm_mixer"][0]())
    assert [tap.module for tap in vit.taps] == ["blocks.8", "norm"]  # blocks 9 and 12 of 12, counted from 1
    assert [tap.module for tap in mixer.taps] == ["blocks.5", "norm"]  # the third from the end of 8, and the last


@pytest.mark.parametrize(
    ("name", "modules", "maps"),
    [
        ("resnet50", ["layer3", "layer4"], ((1024, (14, 14)), (2048, (7, 7)))),
        ("mobilenetv1_100", ["blocks.3", "bn2"], ((512, (14, 14)), (1024, (7, 7)))),
        ("convnext_tiny", ["stages.2", "stages"], ((384, (14, 14)), (768, (7, 7)))),
        ("swin_tiny_patch4_window7_224", ["layers.2", "norm"], ((384, (14, 14)), (768, (7, 7)))),
        ("mixer_s16_224", ["blocks.5", "norm"], ((512, (14, 14)), (512, (14, 14)))),
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
    ("name", "options"),
    [
        ("efficientnet_b0", {}),
        ("regnety_004", {}),
        ("mobilenetv2_100", {}),
        ("mobilenetv3_large_100", {}),
        ("mobilenetv4_conv_small", {}),
        ("fastvit_t8", {}),
        ("poolformer_s12", {}),
        ("pvt_v2_b0", {}),
        ("resnet50d", {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}),
        ("deit_tiny_patch16_224", {"image_size": 64, "depth": 4}),
        ("eva02_tiny_patch14_336", {"image_size": 56, "depth": 4}),
        ("mixer_b14_224", {"image_size": 56}),
    ],
)
def test_further_students_run_small(name, options):
    student = load_student(f"timm/{name}", labels=["a", "b"], **options)
    student.spec = student.spec.updated(size=options.get("image_size", 64))
    penultimate, last, logits = student.train()(images(2, student.spec.size[0]))
    assert penultimate.shape[1:] == (student.dims[0], *student.grids[0])
    assert last.shape[1:] == (student.dims[1], *student.grids[1]) and logits.shape == (2, 2)
    penultimate.square().sum().backward()
    assert sum(parameter.grad is not None and bool(parameter.grad.any()) for parameter in student.parameters()) > 4


FLATTENED = {
    "efficientnet_b0": {},
    "regnety_004": {},
    "mobilenetv3_large_100": {},
    "resnet50d": {"layers": (1, 1, 1, 1)},
}


@pytest.mark.parametrize("family", some_slow([*FLATTENED, *STUDENTS], 6))
def test_recomputed_activations_give_the_same_maps_and_gradients(family):
    if family in FLATTENED:  # timm runs the children of their stages, not the stages
        student = load_student(timm.create_model(family, num_classes=10, **FLATTENED[family]))
        student.spec = student.spec.updated(size=64)
    else:
        make, size, _ = STUDENTS[family]
        student = load_student(make())
        student.spec = student.spec.updated(size=size)
    found = []
    for recompute in (False, True):
        if recompute and not getattr(student.model, "supports_gradient_checkpointing", True):
            with pytest.raises(ValueError, match="cannot recompute its activations"):
                student.checkpoint_activations()
            return
        if recompute:
            student.checkpoint_activations()
        torch.manual_seed(0)
        maps = student.train()(images(2, student.spec.size[0]))
        found.append([*maps, *torch.autograd.grad(sum(x.square().sum() for x in maps), [*student.parameters()])])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4 * one.abs().max().item())


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("size", [196, 224, 256, 336, 384])
def test_isotropic_students_without_class_token_take_other_sizes_and_patches(size, patch):
    if size % patch:
        with pytest.raises(ValueError, match="do not divide"), torch.device("meta"):
            _ = load_student("timm/vit_small_patch16_224", image_size=size, patch_size=patch).taps
        return
    options = {"image_size": size, "patch_size": patch, "class_token": False, "global_pool": "avg"}
    with torch.device("meta"):
        student = load_student("timm/vit_small_patch16_224", **options)
        assert student.grids == ((size // patch, size // patch),) * 2
        assert [tap.prefix for tap in student.taps] == [0, 0]


@pytest.mark.parametrize("size", [196, 224, 336])
def test_mixers_take_other_sizes(size):
    with torch.device("meta"):
        student = load_student("timm/mixer_b14_224", image_size=size)
        assert student.grids == ((size // 14, size // 14),) * 2


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


def test_a_student_by_name_is_built_for_the_labels_and_the_size():
    student = load_student("timm/vit_tiny_patch16_224", labels=["cat", "dog"], image_size=32, patch_size=8, depth=2)
    assert (student.num_labels, student.labels, student.spec.size) == (2, ["cat", "dog"], (32, 32))
    assert student.grids == ((4, 4), (4, 4))


def test_maps_are_given_in_eval_mode_too():
    student = load_student(timm_swin()).eval()
    with torch.no_grad():
        penultimate, last, logits = student(images())
        assert torch.equal(logits, student.classify(images()))
    assert (penultimate.shape[1], last.shape[1]) == student.dims


def saved_vit(folder, dtype=torch.float32, **processor):
    model = STUDENTS["transformers_vit"][0]().to(dtype)
    model.save_pretrained(folder)
    if processor:
        BitImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, **processor
        ).save_pretrained(folder)
    return str(folder)


def test_half_precision_checkpoints_are_loaded_in_float32(tmp_path):
    folder = saved_vit(tmp_path, torch.bfloat16)
    for model in (load_student(folder, pretrained=True), load_teacher(folder)):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        model(images())


def test_the_published_preprocessing_is_taken(tmp_path, caplog):
    spec = load_student(saved_vit(tmp_path / "a", image_mean=[0.1] * 3, image_std=[0.2] * 3), pretrained=True).spec
    assert (spec.size, spec.mean, spec.std) == ((32, 32), (0.1,) * 3, (0.2,) * 3)
    spec = load_student(saved_vit(tmp_path / "b", do_normalize=False), pretrained=True).spec
    assert (spec.mean, spec.std) == ((0.0,) * 3, (1.0,) * 3)
    load_student(saved_vit(tmp_path / "c"), pretrained=True)
    assert "says nothing of its preprocessing" in caplog.text
    (tmp_path / "a" / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="preprocessor_config.json that cannot be read"):
        load_student(str(tmp_path / "a"), pretrained=True)


def test_pretrained_weights_get_a_new_head_and_nothing_else_new(tmp_path):
    folder = saved_vit(tmp_path)
    student = load_student(folder, pretrained=True, labels=["a", "b", "c"])
    assert (student.num_labels, student.labels) == (3, ["a", "b", "c"])
    with pytest.raises(ValueError, match="position_embeddings.*other shapes"):
        load_student(folder, pretrained=True, labels=["a", "b", "c"], image_size=64)
    with pytest.raises(ValueError, match="position_embeddings.*other shapes"):
        load_teacher(folder, image_size=64)


def test_a_damaged_model_file_is_refused(tmp_path):
    folder = saved_vit(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="`student`"):
        load_student(folder, pretrained=True)


def test_an_image_size_for_a_module_that_was_built_for_another_is_refused(tmp_path):
    student = load_student(timm_swin())
    assert student.taps
    for model, teacher, option in ((student, None, "image_size"), (student, timm_swin(), "teacher_image_size")):
        with pytest.raises(ValueError, match=f"`{option}` is 64"):
            build_model(model, teacher, settings(tmp_path, **{option: 64}))


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


def test_a_student_whose_stages_are_not_found_can_be_tapped_by_name():
    with torch.device("meta"):
        with pytest.raises(ValueError, match="Name two modules with `student_taps`"):
            _ = load_student("timm/vgg11").taps
        assert load_student("timm/vgg11", taps=["features.14", "features.19"]).grids == ((28, 28), (14, 14))


def test_the_dry_run_leaves_the_model_as_it_was():
    model = timm.create_model("resnet18", channels=(8, 16, 24, 32), num_classes=10).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student = load_student(model)
    student.spec = student.spec.updated(size=64)
    assert student.taps
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: load_student("timm/resnet81"), "`student` 'timm/resnet81'.*Did you mean"),
        (lambda: load_student("no-such-team/no-such-model"), "`student`.*neither a local folder"),
        (lambda: load_student(timm.create_model("resnet18", num_classes=0)), "no classifier head"),
        (lambda: load_student(torch.nn.Linear(2, 2)), "image classifier of timm or transformers"),
        (lambda: load_student("timm/resnet18", image_size=2, num_classes=10).taps, "larger than 1x1 at 2x2 px"),
        (lambda: load_student(STUDENTS["timm_vit"][0](), image_size=64), "a module already"),
    ],
)
def test_unsuitable_students_are_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("family", ["timm_vit", "timm_mixer", "transformers_vit", "transformers_swin"])
def test_an_image_size_that_the_patch_does_not_divide_is_refused(family):
    student = load_student(STUDENTS[family][0]())
    student.spec = student.spec.updated(size=student.spec.size[0] + 1)
    with pytest.raises(ValueError, match=r"`student`.*patches of .* do not divide its image size .*`image_size`"):
        _ = student.taps


def test_an_image_size_the_student_cannot_take_is_refused():
    student = load_student(STUDENTS["timm_vit"][0]())
    student.spec = student.spec.updated(size=40)
    with pytest.raises(ValueError, match="does not run on images of 40x40 px"):
        _ = student.taps


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
