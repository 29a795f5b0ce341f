"""A student as a backbone: every tensor is the student's, its maps are the student's own, and what cannot be is refused."""

import copy
import functools
import logging
import re

import pytest
import timm
import torch
from helpers import build, images
from students import ONE_SIZE, PYRAMIDS, STUDENTS, of_timm, saved
from transformers import ConvNextConfig, SwinConfig, ViTConfig

from scalekd_hf import load_student
from scalekd_hf.models.saving import save_student
from scalekd_hf.transfer.backbone import load_backbone
from scalekd_hf.transfer.pyramid import pyramid_strides
from scalekd_hf.transfer.student_backbone import StudentBackbone


NEW = ("hidden_states_norms", "pyramid")


def own_name(key, own, prefix=""):
    """The student's name of a backbone's tensor, by what is cut off or put before it."""
    key = re.sub(r"^(_backbone|network)\.(model\.)?", "", key)
    candidates = [key, re.sub(r"_(\d)", r".\1", key, count=1), f"{prefix}.{key}", key.removeprefix(f"{prefix}.")]
    return next(name for name in candidates if name in own)


def maps_of_modules(student, pixel_values, names):
    """What modules of a student put out, as maps (B, C, h, w)."""
    found = {}
    hooks = [
        student.model.get_submodule(name).register_forward_hook(lambda _, __, x, name=name: found.update({name: x}))
        for name in names
    ]
    with torch.no_grad():
        student.model(pixel_values)
    for hook in hooks:
        hook.remove()
    return [found[name] for name in names]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A student, its folder and its backbone, made once for each family."""

    @functools.cache
    def build_once(family):
        folder = tmp_path_factory.mktemp(family)
        return saved(folder, family), folder, load_backbone(folder).eval()

    return build_once


@pytest.mark.parametrize("family", STUDENTS)
def test_every_tensor_of_a_backbone_is_the_students(built, family):
    _, size, kind, channels, strides = STUDENTS[family]
    student, folder, backbone = built(family)
    own, prefix = student.model.state_dict(), getattr(student.model, "base_model_prefix", "")
    names = {key: own_name(key, own, prefix) for key in backbone.state_dict() if not any(new in key for new in NEW)}
    assert len(names) > 20
    assert all(torch.equal(backbone.state_dict()[key], own[name]) for key, name in names.items())
    assert set(backbone.origin.left_out) == set(own) - set(names.values())
    assert backbone.origin.new == [key for key in backbone.state_dict() if key not in names]
    heads = ("head", "classifier", "fc", "norm", "bn2", "pooler")
    assert all(any(part in name for part in heads) for name in backbone.origin.left_out)
    assert bool(backbone.origin.new) == (family in (*PYRAMIDS, "transformers_convnext", "transformers_swin"))
    assert (type(backbone).__name__, backbone.channels, backbone.origin.strides) == (kind, channels, strides)
    assert (backbone.origin.spec.mean, backbone.origin.spec.size) == ((0.4, 0.5, 0.6), (size, size))
    with torch.no_grad():
        found = backbone(images(2, size)).feature_maps
    sides = [-(-size // stride) for stride in strides]
    assert [x.shape for x in found] == [(2, width, side, side) for width, side in zip(channels, sides, strict=True)]
    assert str(folder) not in backbone.config.to_json_string()


STAGES = {
    "timm_resnet": ["layer1", "layer2", "layer3", "layer4"],
    "timm_resnet_args": ["layer1", "layer2", "layer3", "layer4"],
    "timm_mobilenetv3": ["blocks.0", "blocks.1", "blocks.3", "blocks.5"],
    "timm_convnext": ["stages.0", "stages.1", "stages.2", "stages.3"],
    "timm_convnext_args": ["stages.0", "stages.1", "stages.2", "stages.3"],
    "timm_swin": ["layers.0", "layers.1", "layers.2"],
    "timm_vit": ["blocks.3"],
    "timm_vit_mean": ["blocks.3"],
    "timm_eva02": ["blocks.1"],
    "timm_mixer": ["blocks.7"],
    "transformers_resnet": [f"resnet.encoder.stages.{stage}" for stage in range(4)],
    "transformers_mobilenetv1": [f"mobilenet_v1.layer.{layer}" for layer in (5, 9, 21, 25)],
    "transformers_vit": ["vit.layers.3"],
    "transformers_dinov2": ["layernorm"],
}


@pytest.mark.parametrize("family", STAGES)
def test_the_maps_are_those_that_the_student_computes(built, family):
    size, kind = STUDENTS[family][1:3]
    student, _, backbone = built(family)
    pixel_values = images(2, size)
    expected = maps_of_modules(student, pixel_values, STAGES[family])
    with torch.no_grad():
        found = backbone(pixel_values).feature_maps
        if family in PYRAMIDS:
            network = backbone.network(pixel_values)
            found = getattr(network, "feature_maps", network)[-1:]
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        y = y[0] if isinstance(y, tuple) else y
        if y.ndim == 3:
            y = y[:, -x.shape[2] * x.shape[3] :].transpose(1, 2).unflatten(2, x.shape[2:])
        y = y.permute(0, 3, 1, 2) if family == "timm_swin" else y
        assert x.std() > 1e-3 and torch.allclose(x, y, rtol=1e-5, atol=1e-5 * y.abs().max()), kind


@pytest.mark.parametrize("family", [family for family in STUDENTS if family not in ONE_SIZE])
def test_backbones_take_other_sizes_and_oblong_images(built, family):
    strides = STUDENTS[family][4]
    backbone = built(family)[2]
    with torch.no_grad():
        found = backbone(torch.randn(1, 3, 69, 91)).feature_maps  # no multiple of any patch
    floor = "convnext" in family  # whose patches leave a remainder out
    sides = [
        [69 // stride if floor else -(-69 // stride), 91 // stride if floor else -(-91 // stride)]
        for stride in strides
    ]
    assert [list(x.shape[2:]) for x in found] == sides


OWN = [family for family, (*_, kind, _, _) in STUDENTS.items() if kind == "StudentBackbone"]


@pytest.mark.parametrize("family", OWN)
def test_a_saved_backbone_is_loaded_with_every_tensor_and_buffer(tmp_path, built, family):
    size = STUDENTS[family][1]
    backbone = built(family)[2]
    backbone.save_pretrained(tmp_path)
    loaded = StudentBackbone.from_pretrained(tmp_path).eval()
    for kept, again in (
        (backbone.state_dict(), loaded.state_dict()),
        (dict(backbone.named_buffers()), dict(loaded.named_buffers())),
    ):
        assert set(kept) == set(again) and all(torch.equal(tensor, again[name]) for name, tensor in kept.items())
    with torch.no_grad():
        pairs = [model(images(2, size)).feature_maps for model in (backbone, loaded)]
    assert all(torch.equal(x, y) for x, y in zip(*pairs, strict=True))


@pytest.mark.parametrize("family", ["timm_resnet", "timm_convnext_args", "timm_swin", "transformers_swin"])
def test_paths_are_dropped_at_the_rate_that_is_asked_for(built, family):
    folder = built(family)[1]

    def rates(**options):
        modules = load_backbone(folder, **options).modules()
        return [module.drop_prob for module in modules if "DropPath" in type(module).__name__]

    asked = rates(drop_path_rate=0.25)
    assert max(asked) == pytest.approx(0.25) and min(asked) < 0.2
    assert not any(rates())  # also of a student that was trained with some
    assert max(rates(drop_path_rate=0.25, pretrained=False)) == pytest.approx(0.25)


def test_fresh_weights_are_none_of_the_students(built):
    student, folder, _ = built("timm_resnet_args")
    backbone = load_backbone(folder, pretrained=False)
    weight = backbone.state_dict()["network.layer4.0.conv1.weight"]
    assert not torch.equal(weight, student.model.state_dict()["layer4.0.conv1.weight"])
    assert backbone.origin.new == list(backbone.state_dict()) and not backbone.origin.left_out


def test_maps_are_chosen_by_number(built):
    chosen = load_backbone(built("timm_resnet")[1], [2, 3])
    assert chosen.channels == [48, 192] and chosen.origin.strides == (8, 16)
    assert any(name.startswith("layer4.") for name in chosen.origin.left_out)
    assert load_backbone(built("timm_vit")[1], [-2, -1]).origin.strides == (16, 32)


@pytest.mark.parametrize("chosen", [[4, 5], [0, -6], [2, 1], [1, 1], []])
def test_maps_that_there_are_not_are_refused(built, chosen):
    folder = built("timm_resnet")[1]
    with pytest.raises(ValueError, match=r"`out_indices` \[.*1 \(stride 4\).*Choose some of them"):
        load_backbone(folder, chosen)


def test_a_student_of_one_size_is_refused_at_another(built):
    folder = built("timm_mixer")[1]
    with pytest.raises(ValueError, match="`image_size` 96x96.*MlpMixer.*It takes 64x64 px"):
        load_backbone(folder, image_size=96)


def test_a_student_that_needs_a_fixed_drop_path_is_refused(built):
    folder = built("transformers_resnet")[1]
    with pytest.raises(ValueError, match="`drop_path_rate` 0.1.*no blocks.*Leave it 0"):
        load_backbone(folder, drop_path_rate=0.1)


def test_a_student_without_maps_is_refused(tmp_path):
    model = of_timm("levit_128s")()
    model.feature_info = []
    student = load_student(model)
    with pytest.raises(ValueError, match="`student`.*gives no maps for a dense task.*Choose a network with stages"):
        load_backbone(student)


def test_a_folder_that_holds_no_student_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`student`.*neither a local folder"):
        load_backbone(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("no student", encoding="utf-8")
    with pytest.raises(ValueError, match="`student`"):
        load_backbone(tmp_path)


def test_layers_that_would_be_left_out_are_an_error(tmp_path):
    """A configuration that has forgotten how deep the student is would otherwise lose its last blocks without a word."""
    student = load_student(of_timm("convnext_atto", depths=(1, 1, 3, 1), dims=(8, 12, 16, 24))())
    student.classifier.model_args["depths"] = (1, 1, 2, 1)
    with pytest.raises(ValueError, match="without a place: stages.2.blocks.2"):
        load_backbone(student)


def test_what_was_left_out_and_what_is_new_is_logged(built, caplog):
    folder = built("timm_vit")[1]
    with caplog.at_level(logging.INFO, logger="scalekd_hf.transfer.backbone"):
        load_backbone(folder)
    (line,) = [record.getMessage() for record in caplog.records if "scalekd_hf.transfer" in record.name]
    assert re.search(r"\d+ tensors equal to the student's; left out: head.bias, .*; new: pyramid.levels", line)


@pytest.mark.parametrize("family", ["transformers_vit", "transformers_swin", "timm_vit", "timm_efficientnet"])
def test_no_parameter_waits_for_a_gradient(built, family):
    """DDP would wait for those of norms and tokens that no map depends on."""
    backbone = copy.deepcopy(built(family)[2])
    sum(x.square().sum() for x in backbone(images(2, 64)).feature_maps).backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["timm_mobilenetv3", "timm_resnet_args", "transformers_resnet"])
def test_batchnorm_is_frozen_with_its_activations(built, family):
    """Those of timm have activations in them, which D-FINE's own way of freezing takes out."""
    _, folder, plain = built(family)
    frozen = load_backbone(folder, freeze_batch_norm=True).train()
    with torch.no_grad():
        pairs = [model(images(2, 64)).feature_maps for model in (plain, frozen)]
    for x, y in zip(*pairs, strict=True):
        assert torch.allclose(x, y, rtol=1e-3, atol=1e-4 * x.abs().max())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in frozen.modules())


def test_a_pyramids_strides_are_those_that_heads_are_made_for():
    assert [pyramid_strides(patch) for patch in (8, 16, 32)] == [[4, 8, 16, 32]] * 3
    assert pyramid_strides(14) == [3.5, 7, 14, 28]


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, size",
    [
        (lambda: timm.create_model("resnet50"), 224),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), 224),
        (lambda: timm.create_model("convnext_tiny"), 224),
        (lambda: timm.create_model("vit_base_patch16_224"), 224),
        (lambda: build(SwinConfig()), 224),
        (lambda: build(ConvNextConfig()), 224),
        (lambda: build(ViTConfig()), 224),
    ],
)
def test_full_size_students_become_backbones_at_512_pixels(tmp_path, make, size):
    student = load_student(make())
    student.spec = student.spec.updated(size=size)
    save_student(student, tmp_path)
    backbone = load_backbone(tmp_path, image_size=512, drop_path_rate=0.0).eval()
    with torch.no_grad():
        found = backbone(torch.randn(1, 3, 512, 512)).feature_maps
    assert [x.shape[2] for x in found] == [128, 64, 32, 16]
