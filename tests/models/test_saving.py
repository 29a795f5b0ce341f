"""Student folders load in transformers and timm with equal weights and logits; the teacher is in no file."""

import pytest
import timm
import torch
from helpers import SMALL_SWIN, build, images, settings, small_student, timm_swin, transformers_vit
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, ResNetConfig, pipeline

from scalekd_hf import ScaleKDTrainer, load_student
from scalekd_hf.data.preparation import Preparation
from scalekd_hf.images import Normaliser
from scalekd_hf.models.saving import check_rebuildable, load_student_weights, save_student


LABELS = [f"digit {number}" for number in range(10)]
SMALL_SWIN_STUDENT = {name: value for name, value in SMALL_SWIN.items() if name != "img_size"}


def transformers_resnet():
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24], depths=[1, 1, 1], downsample_in_first_stage=False
    )
    config.id2label = dict(enumerate(LABELS))
    return load_student(build(config))


def named(name, **options):
    return lambda: load_student(f"timm/{name}", labels=LABELS, image_size=32, **options)


STUDENTS = {
    "timm_convnext": lambda: small_student(labels=LABELS),
    "timm_resnet": named("resnet18", channels=(8, 16, 24, 32)),
    "timm_mobilenet": named("mobilenetv1_100"),
    "timm_mixer": named("mixer_s32_224"),
    "timm_swin": named("swin_tiny_patch4_window7_224", **SMALL_SWIN_STUDENT),
    "timm_eva02": named("eva02_small_patch14_224", patch_size=8, embed_dim=24, depth=2, num_heads=2),
    "timm_vit": lambda: load_student(
        "timm/vit_tiny_patch16_224", labels=LABELS, image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2
    ),
    "transformers_resnet": transformers_resnet,
    "transformers_vit": lambda: load_student(transformers_vit(id2label=dict(enumerate(LABELS)))),
}


@pytest.mark.parametrize("family", STUDENTS)
def test_a_saved_student_loads_with_equal_weights_logits_and_labels(tmp_path, family):
    student = STUDENTS[family]().eval()
    student.spec = student.spec.updated(size=32, mean=[0.4, 0.5, 0.6], crop_pct=0.8)
    save_student(student, tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    own = {name.removeprefix("timm_model."): tensor for name, tensor in loaded.state_dict().items()}
    for name, tensor in student.model.state_dict().items():
        assert torch.equal(tensor, own[name]), name
    with torch.no_grad():
        assert torch.allclose(loaded(images()).logits, student.classify(images()), atol=1e-6)
    assert all(
        torch.equal(own[name], tensor)
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
        if name in own
    )
    assert [loaded.config.id2label[index] for index in range(10)] == LABELS
    again = load_student(str(tmp_path), pretrained=True)
    assert (again.spec, again.labels) == (student.spec, LABELS)


@pytest.mark.parametrize("family", [name for name in STUDENTS if name.startswith("timm")])
def test_a_saved_timm_student_loads_in_timm(tmp_path, family):
    student = STUDENTS[family]().eval()
    save_student(student, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images()), student.classify(images()))


@pytest.mark.parametrize("family", STUDENTS)
def test_the_published_preprocessing_is_the_one_that_is_evaluated(tmp_path, family):
    student = STUDENTS[family]().eval()
    student.spec = student.spec.updated(size=32, mean=[0.4, 0.5, 0.6], crop_pct=0.8)
    save_student(student, tmp_path)
    image = Image.fromarray((torch.rand(50, 70, 3) * 255).byte().numpy())
    pixels = Preparation(student.spec, training=False)({"image": image}, 0, 0)["pixel_values"]
    ours = Normaliser(student.spec).for_student(pixels)
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 0.1  # resizing as uint8 against float, in units of the deviation
    assert (ours - theirs).abs().mean() < 0.01
    answer = pipeline("image-classification", model=str(tmp_path), top_k=1)(image)
    with torch.no_grad():
        assert answer[0]["label"] == LABELS[student.classify(ours[None]).argmax()]


@pytest.mark.parametrize("family", ["timm_convnext", "transformers_resnet"])
def test_a_student_keeps_the_filter_it_was_trained_with(tmp_path, family):
    student = STUDENTS[family]().eval()
    student.spec = student.spec.updated(size=32, crop_pct=0.8, interpolation="bilinear", antialias=False)
    save_student(student, tmp_path)
    assert load_student(str(tmp_path), pretrained=True).spec == student.spec
    if family.startswith("timm"):
        assert load_student(f"local-dir:{tmp_path}", pretrained=True).spec == student.spec
    assert load_student(AutoModelForImageClassification.from_pretrained(tmp_path)).spec == student.spec
    image = Image.fromarray((torch.rand(36, 40, 3) * 255).byte().numpy())
    smoothed = Preparation(student.spec.updated(antialias=True), training=False)({"image": image}, 0, 0)[
        "pixel_values"
    ]
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
    # A preprocessor has the filter, and nothing to keep it from smoothing.
    assert (Normaliser(student.spec).for_student(smoothed) - theirs).abs().max() < 0.1
    if family.startswith("timm"):
        assert (
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True).pretrained_cfg["interpolation"] == "bilinear"
        )


def test_weights_of_another_architecture_are_refused(tmp_path):
    for make, other in (
        (transformers_vit, lambda: transformers_vit(num_hidden_layers=3)),
        (lambda: small_student().model, lambda: small_student(depths=(1, 1, 1, 1)).model),
    ):
        save_student(load_student(make()), tmp_path)
        with pytest.raises(ValueError, match="do not fit this"):
            load_student_weights(load_student(other()), tmp_path)


def test_a_student_with_arguments_that_no_file_can_hold_is_refused(tmp_path, digits):
    student = load_student("timm/resnet18", labels=LABELS, act_layer=torch.nn.SiLU)
    with pytest.raises(ValueError, match="does not rebuild from a saved configuration.*plain arguments"):
        ScaleKDTrainer(student, None, settings(tmp_path), digits)


def test_a_transformers_student_of_oblong_images_is_refused(tmp_path):
    student = load_student(transformers_vit(image_size=(32, 48)))
    with pytest.raises(ValueError, match="32x48 px.*Choose a square"):
        check_rebuildable(student)


def test_no_file_of_a_run_holds_the_teacher_or_a_pickled_model(tmp_path, digits):
    args = settings(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = ScaleKDTrainer(small_student(), timm_swin(), args, digits)
    trainer.train()
    trainer.save_model()
    teacher_shapes = {tuple(tensor.shape) for tensor in trainer.model.teacher.parameters() if tensor.ndim > 1}
    trained = {tuple(p.shape) for _, module in trainer.model.trained_modules() for p in module.parameters()}
    for file in tmp_path.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():
                assert "teacher" not in key
                assert tuple(tensors.get_slice(key).get_shape()) not in teacher_shapes - trained
    checkpoint = tmp_path / "checkpoint-2"
    assert {"model.safetensors", "mimicking_heads.safetensors", "config.json"} <= {
        p.name for p in checkpoint.iterdir()
    }
    optimiser = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    moments = [value for state in optimiser["state"].values() for value in state.values() if value.ndim]
    count = sum(p.numel() for _, module in trainer.model.trained_modules() for p in module.parameters())
    assert sum(value.numel() for value in moments) == 2 * count
    assert not (tmp_path / "mimicking_heads.safetensors").exists()
    assert not list(tmp_path.rglob("training_args.bin"))


def test_a_timm_module_that_could_not_be_rebuilt_is_refused_before_training(tmp_path, digits):
    model = timm.create_model("resnet18", num_classes=10)
    model.layer4 = torch.nn.Sequential(*list(model.layer4)[:1])
    with pytest.raises(ValueError, match=r"create_model\('resnet18'.*does not rebuild.*load_student"):
        ScaleKDTrainer(model, None, settings(tmp_path), digits)
    check_rebuildable(load_student(timm.create_model("resnet18", num_classes=10)))
