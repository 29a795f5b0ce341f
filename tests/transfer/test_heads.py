"""Segmentation and detection on students: their weights, what is saved and loaded, the pipeline, and what is refused."""

import copy
import shutil

import numpy as np
import pytest
import torch
from heads import AUTO, BUILDERS, NAMES, backbone_of, batch, segmenter
from helpers import images, some_slow
from students import saved
from torchvision.transforms.v2.functional import InterpolationMode, resize, to_pil_image
from transformers import pipeline

from scalekd_hf.images import Normaliser
from scalekd_hf.transfer.backbone import load_backbone
from scalekd_hf.transfer.detector import HEADS, build_detector, detect
from scalekd_hf.transfer.segmenter import build_segmenter, segmentation_processor


PAIRS = [
    ("upernet", "timm_resnet"),
    ("upernet", "transformers_swin"),
    ("mask_rcnn", "timm_vit"),
    ("d_fine", "timm_efficientnet"),
    ("d_fine", "transformers_resnet"),
    ("upernet", "transformers_vit"),
    ("upernet", "timm_mixer"),
    ("mask_rcnn", "timm_mobilenetv3"),
    ("mask_rcnn", "transformers_resnet"),
    ("d_fine", "timm_resnet_args"),
    ("d_fine", "timm_swin"),
]


@pytest.mark.parametrize("head, family", some_slow(PAIRS, 5))
def test_the_students_weights_are_in_a_head_before_and_after_saving(tmp_path, head, family):
    saved(tmp_path / "student", family)
    model = BUILDERS[head](tmp_path / "student").eval()
    origin = (getattr(model, "origin", None) or model.backbone.origin).new
    alone = load_backbone(tmp_path / "student", freeze_batch_norm=head != "upernet").state_dict()
    inside = backbone_of(model).state_dict()
    shared = [name for name in inside if name not in origin]
    assert len(shared) > 20 and all(torch.equal(inside[name], alone[name]) for name in shared)
    model.save_pretrained(tmp_path / "saved")
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")
    shutil.rmtree(tmp_path / "student")
    loaded, info = AUTO[head].from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for kept, again in (
        (model.state_dict(), loaded.state_dict()),
        (dict(model.named_buffers()), dict(loaded.named_buffers())),
    ):
        assert set(kept) == set(again) and all(torch.equal(tensor, again[name]) for name, tensor in kept.items())
    assert list(loaded.config.id2label.values()) == NAMES
    # As read from a file, tensors begin anywhere in memory, and some CPUs round by that.
    loaded = copy.deepcopy(loaded)
    with torch.no_grad():
        inputs = {"pixel_values": images(2, 64)}
        if head == "upernet":
            assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)
            return
        sizes = torch.tensor([[64, 64], [64, 64]])
        for one, other in zip(detect(model, inputs, sizes), detect(loaded.eval(), inputs, sizes), strict=True):
            assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("head, family", [("upernet", "timm_swin"), *[(head, "timm_vit") for head in HEADS]])
def test_a_step_reaches_every_parameter(tmp_path, head, family):
    saved(tmp_path, family)
    model = BUILDERS[head](tmp_path, drop_path_rate=0.0).train()
    inputs = batch()
    if head == "upernet":
        labels = torch.randint(0, 3, (2, 64, 64))
        labels[:, :8] = 255
        inputs = {"pixel_values": inputs["pixel_values"], "labels": labels}
    output = model(**inputs)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert any(p.grad.abs().max() > 0 for p in backbone_of(model).parameters() if p.requires_grad)
    if head == "upernet":
        assert output.logits.shape == (2, 3, 64, 64)
        counted = labels != 255
        expected = torch.nn.functional.cross_entropy(output.logits.permute(0, 2, 3, 1)[counted], labels[counted])
        model.config.auxiliary_loss_weight = 0.0
        assert torch.allclose(model.eval()(**inputs).loss, model.eval()(**inputs).loss) and expected < output.loss
    else:
        assert all(value.isfinite() for value in output.loss_dict.values())


def test_the_second_head_looks_at_a_map_that_is_there(tmp_path):
    saved(tmp_path / "three", "timm_swin")
    saved(tmp_path / "four", "timm_resnet")
    assert segmenter(tmp_path / "three").config.auxiliary_in_channels == 48
    assert segmenter(tmp_path / "four").config.auxiliary_in_channels == 192


@pytest.mark.parametrize("head", ["upernet", *HEADS])
def test_paths_are_dropped_in_a_head_whose_saved_configuration_loads_without(tmp_path, head):
    saved(tmp_path / "student", "timm_convnext")
    model = BUILDERS[head](tmp_path / "student", drop_path_rate=0.2)
    rates = [module.drop_prob for module in backbone_of(model).modules() if type(module).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.2)
    model.save_pretrained(tmp_path / "saved")
    loaded = AUTO[head].from_pretrained(tmp_path / "saved")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_segmentation_pipeline_does_what_is_evaluated(tmp_path):
    student = saved(tmp_path / "student", "timm_vit")
    model = segmenter(tmp_path / "student", image_size=48).eval()
    model.save_pretrained(tmp_path / "saved")
    processor = segmentation_processor(student.spec, 48)
    processor.save_pretrained(tmp_path / "saved")
    pixels = (torch.rand(3, 50, 70) * 255).byte()
    image = to_pil_image(pixels)
    resized = resize(pixels, [48], InterpolationMode.BILINEAR, antialias=True)
    ours = Normaliser(student.spec).for_student(resized[None])
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    assert theirs.shape == (1, 3, 48, 67) and (ours - theirs).abs().max() < 0.05
    with torch.no_grad():
        logits = torch.nn.functional.interpolate(model(theirs).logits, (50, 70), mode="bilinear")
    answer = pipeline("image-segmentation", model=str(tmp_path / "saved"))(image)
    for part in answer:
        mask = torch.from_numpy(np.array(part["mask"])) > 0
        assert torch.equal(mask, logits[0].argmax(0) == NAMES.index(part["label"]))
    square = segmentation_processor(student.spec, 48, square=True)(image, return_tensors="pt")["pixel_values"]
    assert square.shape == (1, 3, 48, 48)


def test_class_names_that_cannot_be_are_refused(tmp_path):
    saved(tmp_path, "timm_resnet_args")
    for make in (build_segmenter, build_detector):
        with pytest.raises(ValueError, match="`class_names` has 'cat' more than once"):
            make(tmp_path, ["cat", "dog", "cat"])
    with pytest.raises(ValueError, match="`class_names` has 1 names.*2 classes or more"):
        build_segmenter(tmp_path, ["cat"])
    with pytest.raises(ValueError, match="`class_names` has 0 names"):
        build_detector(tmp_path, [])


@pytest.mark.parametrize("head", ["upernet", *HEADS])
def test_a_folder_that_holds_no_student_is_refused(tmp_path, head):
    with pytest.raises(ValueError, match="`student`.*neither a local folder"):
        BUILDERS[head](tmp_path / "nothing")
