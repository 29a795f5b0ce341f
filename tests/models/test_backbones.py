"""Students without a classifier: built, tapped, and saved as backbones that timm and transformers load."""

import pytest
import timm
import torch
import transformers
from helpers import images, small_student, transformers_vit
from hub_server import WRITE
from student_families import STUDENTS
from transformers import AutoBackbone, AutoModel, Dinov2Config, TimmBackbone

from scalekd_hf import load_student
from scalekd_hf.models.saving import check_rebuildable, load_student_weights, save_student
from scalekd_hf.publishing.hub import create_repository, upload


def without_head(family):
    """The same network as in `STUDENTS`, without its classifier."""
    make, size, expected = STUDENTS[family]
    model = make()
    if family.startswith("timm"):
        model.reset_classifier(0)
        model._model_args["num_classes"] = 0
    else:
        model = AutoModel.from_config(model.config)
    return model, size, expected


def backbone(family):
    model, size, _ = without_head(family)
    student = load_student(model)
    student.spec = student.spec.updated(size=size, crop_pct=0.8)
    return student.eval()


def dinov2():
    options = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    return AutoModel.from_config(Dinov2Config(**options))


@pytest.mark.parametrize("family", STUDENTS)
def test_a_backbone_is_tapped_where_its_classifier_is(family):
    _, size, expected = without_head(family)
    student = backbone(family)
    assert (student.num_labels, student.labels) == (0, None)
    assert tuple(zip(student.dims, student.grids, strict=True)) == expected
    penultimate, last, features = student(images(2, size))
    assert [penultimate.shape, last.shape] == [(2, dim, *grid) for dim, grid in expected]
    assert torch.allclose(features, last.mean((2, 3))) and torch.equal(features, student.features(images(2, size)))
    frozen = student.freeze_unused()
    assert all(any(part in name for part in ("pooler", "norm", "mask_token")) for name in frozen)
    trained = [p for p in student.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(student(images(2, size))[1].square().sum(), trained)
    assert all(gradient is not None for gradient in gradients)


@pytest.mark.parametrize(
    "name, options",
    [
        ("timm/resnet18", {"channels": (8, 16, 24, 32), "layers": (1, 1, 1, 1)}),
        ("timm/vit_tiny_patch16_224", {"embed_dim": 24, "depth": 4, "image_size": 64}),
    ],
)
def test_a_backbone_is_asked_for_by_its_number_of_classes(name, options):
    student = load_student(name, num_classes=0, labels=["cat", "dog"], **options)
    assert (student.num_labels, student.labels) == (0, None)
    student.spec = student.spec.updated(size=64)
    assert student.eval().classify(images(2, 64)).shape == (2, student.dims[1])


def test_a_transformers_backbone_is_asked_for_by_its_number_of_classes(tmp_path):
    transformers_vit().save_pretrained(tmp_path)
    classifier = load_student(str(tmp_path), pretrained=True)
    student = load_student(str(tmp_path), pretrained=True, num_classes=0)
    assert (classifier.num_labels, student.num_labels) == (10, 0) and type(student.model).__name__ == "ViTModel"
    own = student.model.state_dict()
    shared = {name.removeprefix("vit."): tensor for name, tensor in classifier.model.state_dict().items()}
    assert all(torch.equal(own[name], tensor) for name, tensor in shared.items() if "classifier" not in name)
    assert torch.equal(student.eval().features(images()), classifier.eval().features(images()))
    assert load_student(str(tmp_path), num_classes=3).num_labels == 3


SAVED = {
    **{family: lambda family=family: backbone(family) for family in STUDENTS},
    "transformers_dinov2": lambda: load_student(dinov2(), crop_pct=0.8).eval(),
}


@pytest.mark.parametrize("family", SAVED)
def test_a_saved_backbone_loads_with_every_weight(tmp_path, family):
    student = SAVED[family]()
    check_rebuildable(student)
    save_student(student, tmp_path)
    own, size = student.model.state_dict(), student.spec.size[0]
    loaded, found = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = {name.removeprefix("timm_model."): tensor for name, tensor in loaded.state_dict().items()}
    assert set(state) == set(own) and all(torch.equal(state[name], tensor) for name, tensor in own.items())
    again = load_student(str(tmp_path), pretrained=True).eval()
    assert (again.num_labels, again.labels, again.spec) == (0, None, student.spec)
    assert torch.equal(again.features(images(2, size)), student.features(images(2, size)))
    fresh = load_student(str(tmp_path))
    load_student_weights(fresh, tmp_path)
    assert all(torch.equal(tensor, own[name]) for name, tensor in fresh.model.state_dict().items())


@pytest.mark.parametrize("family", [name for name in STUDENTS if name.startswith("timm")])
def test_a_saved_timm_backbone_loads_in_timm(tmp_path, family):
    student = backbone(family)
    save_student(student, tmp_path)
    size = student.spec.size[0]
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert loaded.num_classes == 0
    with torch.no_grad():
        assert torch.equal(loaded(images(2, size)), student.classify(images(2, size)))
        if family == "timm_mixer":  # which timm gives no maps of
            return
        options = {"strict_img_size": False} if family == "timm_swin" else {}
        maps = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True, **options).eval()
        last = student(images(2, size))[1]
        found = maps(images(2, size))[-1]
        found = found.permute(0, 3, 1, 2) if family == "timm_swin" else found
        normed = {"timm_swin", "timm_convnext", "timm_vit"}  # taken after the norm before pooling
        assert found.shape == last.shape and (family in normed or torch.equal(found, last))
        kept = TimmBackbone.from_pretrained(f"local-dir:{tmp_path}", **options).eval()
        assert all(
            torch.equal(a, b) for a, b in zip(maps.state_dict().values(), kept.state_dict().values(), strict=True)
        )
        own = student.model.state_dict()
        assert all(torch.equal(tensor, own[_own(name, own)]) for name, tensor in maps.state_dict().items())


def _own(name, own):
    """The name that timm's extractor of features, which flattens stages, gives a weight."""
    candidates = [name, name.removeprefix("model."), name.replace("stages_", "stages.").replace("layers_", "layers.")]
    candidates += [name.replace("blocks_", "blocks.").replace("stem_", "stem.")]
    return next(candidate for candidate in candidates if candidate in own)


@pytest.mark.parametrize(
    "family, name, new",
    [
        ("transformers_resnet", "ResNetBackbone", ()),
        ("transformers_dinov2", "Dinov2Backbone", ()),
        ("transformers_convnext", "ConvNextBackbone", ("hidden_states_norms",)),
        ("transformers_swin", "SwinBackbone", ("hidden_states_norms",)),
    ],
)
def test_a_saved_transformers_backbone_loads_as_one_with_maps(tmp_path, family, name, new):
    student = SAVED[family]()
    save_student(student, tmp_path)
    loaded, found = getattr(transformers, name).from_pretrained(tmp_path, out_indices=[1, 2], output_loading_info=True)
    assert all(any(part in key for part in new) for key in found["missing_keys"])
    own = student.model.state_dict()
    compared = 0
    for key, tensor in loaded.state_dict().items():
        if not any(part in key for part in new):
            assert torch.equal(tensor, own[key.removeprefix("swin.")]), key
            compared += 1
    assert compared >= len(own) - 2  # ConvNeXt's norm after pooling stays behind


def test_a_backbone_on_the_hub_loads_as_auto_backbone(tmp_path, hub):
    """Of a local folder `AutoBackbone` asks the Hub, which knows no such name; the classes above take it."""
    student = SAVED["transformers_resnet"]()
    save_student(student, tmp_path / "student")
    create_repository("me/backbone", WRITE, None, None)
    upload("me/backbone", sorted((tmp_path / "student").iterdir()), "A backbone", token=WRITE)
    loaded = AutoBackbone.from_pretrained("me/backbone", out_indices=[2, 3], cache_dir=tmp_path / "loaded")
    own = student.model.state_dict()
    assert set(loaded.state_dict()) == set(own) and all(
        torch.equal(tensor, own[name]) for name, tensor in loaded.state_dict().items()
    )


def test_evaluating_and_building_by_name_do_not_invent_a_classifier(tmp_path):
    """A folder of a backbone, as the Hub has DINOv2: a new random head would be measured without a word."""
    dinov2().save_pretrained(tmp_path)
    assert load_student(str(tmp_path), pretrained=True).num_labels == 0
    assert load_student(str(tmp_path), pretrained=True, labels=["a", "b", "c"]).num_labels == 3
    assert small_student().num_labels == 10
