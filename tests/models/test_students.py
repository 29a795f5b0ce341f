"""Students: any timm or transformers classifier whose stages the dry run finds."""

import pytest
import timm
import torch
from helpers import images, settings, some_slow, timm_swin
from student_families import STUDENTS
from transformers import (
    BitImageProcessor,
)

from scalekd_hf import load_student, load_teacher
from scalekd_hf.training.model import build_model


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
    ("make", "message"),
    [
        (lambda: load_student("timm/resnet81"), "`student` 'timm/resnet81'.*Did you mean"),
        (lambda: load_student("no-such-team/no-such-model"), "`student`.*neither a local folder"),
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
