"""Segmentation and detection on students: weights, shapes, labels, what is saved and loaded, and what is refused."""

import shutil

import numpy as np
import pytest
import torch
from helpers import build, images, run
from students import saved
from torchvision.transforms.v2.functional import InterpolationMode, resize, to_pil_image
from transformers import (
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    ResNetConfig,
    RTDetrV2ForObjectDetection,
    pipeline,
)

from scalekd_hf import load_student
from scalekd_hf.images import Normaliser
from scalekd_hf.transfer.backbone import load_backbone
from scalekd_hf.transfer.detector import HEADS, build_detector, detect, detection_processor
from scalekd_hf.transfer.mask_rcnn import image_sizes
from scalekd_hf.transfer.segmenter import build_segmenter, segmentation_processor


NAMES = ["cat", "dog", "sky"]
SMALL = {
    "mask_rcnn": {"hidden_size": 16},
    "rt_detr_v2": {
        "hidden_size": 16,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "decoder_layers": 2,
        "num_queries": 12,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "num_denoising": 4,
    },
}


def segmenter(folder, **changes):
    return build_segmenter(folder, NAMES, **{"image_size": 64, "hidden_size": 8, **changes})


def detector(folder, head, **changes):
    return build_detector(folder, NAMES, head=head, **{"image_size": 64, **SMALL[head], **changes})


def backbone_of(model):
    """The backbone in a model, by where its library keeps it."""
    names = ("backbone", "model.backbone.model", "detector.backbone.backbone")
    return next(m for m in map(dict(model.named_modules()).get, names) if hasattr(m, "channels"))


def batch(size=64, padded=48):
    """Two images, the second without objects and padded at the bottom."""
    pixel_values, pixel_mask = images(2, size), torch.ones(2, size, size, dtype=torch.int64)
    pixel_values[1, :, padded:], pixel_mask[1, padded:] = 0, 0
    masks = torch.zeros(2, size, size, dtype=torch.uint8)
    masks[0, 16:48, 16:48] = masks[1, :32, 32:] = 1
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.75, 0.25, 0.5, 0.5]])
    full = {"class_labels": torch.tensor([0, 2]), "boxes": boxes, "masks": masks}
    empty = {name: value[:0] for name, value in full.items()}
    return {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "labels": [full, empty]}


READ = """
import sys, torch
from transformers import AutoModelForSemanticSegmentation
def check(folder):
    model, info = AutoModelForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    saved = torch.load(f"{folder}/expected")
    with torch.no_grad():
        assert torch.equal(model.eval()(saved["images"]).logits, saved["logits"]), folder
check(sys.argv[1])
assert "scalekd_hf" not in sys.modules  # what timm builds exactly loads without
import scalekd_hf.transfer
for folder in sys.argv[2:]:
    check(folder)
"""


def test_another_process_loads_what_was_built_on_students_whose_folders_are_gone(tmp_path):
    folders = []
    for family in ("timm_resnet", "timm_resnet_args", "timm_swin", "timm_vit"):
        saved(tmp_path / "student", family)
        model = build_segmenter(tmp_path / "student", ["a", "b"], image_size=64, hidden_size=8).eval()
        folders.append(tmp_path / family)
        model.save_pretrained(folders[-1])
        shutil.rmtree(tmp_path / "student")
        with torch.no_grad():
            expected = {"images": images(1, 64), "logits": model(images(1, 64)).logits}
        torch.save(expected, folders[-1] / "expected")
    done = run("python", "-c", READ, *folders)
    assert done.returncode == 0, done.stderr[-2000:]


BUILDERS = {"upernet": segmenter, **{head: lambda *a, head=head, **k: detector(a[0], head, **k) for head in HEADS}}
AUTO = {"upernet": AutoModelForSemanticSegmentation}
PAIRS = [
    ("upernet", "timm_resnet"),
    ("upernet", "transformers_swin"),
    ("upernet", "transformers_vit"),
    ("mask_rcnn", "timm_mobilenetv3"),
    ("mask_rcnn", "timm_vit"),
    ("mask_rcnn", "transformers_resnet"),
    ("rt_detr_v2", "timm_resnet_args"),
    ("rt_detr_v2", "timm_mobilenetv3"),
    ("rt_detr_v2", "transformers_resnet"),
    ("rt_detr_v2", "timm_swin"),
]


@pytest.mark.parametrize("head, family", PAIRS)
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
    loaded, info = AUTO.get(head, AutoModelForObjectDetection).from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for kept, again in (
        (model.state_dict(), loaded.state_dict()),
        (dict(model.named_buffers()), dict(loaded.named_buffers())),
    ):
        assert set(kept) == set(again) and all(torch.equal(tensor, again[name]) for name, tensor in kept.items())
    assert list(loaded.config.id2label.values()) == NAMES
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
    loaded = AUTO.get(head, AutoModelForObjectDetection).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["timm_resnet_args", "transformers_resnet"])
def test_batchnorm_is_frozen_with_a_students_weights_and_not_with_fresh_ones(tmp_path, head, family):
    saved(tmp_path, family)
    kinds = []
    for pretrained in (True, False):
        backbone = backbone_of(detector(tmp_path, head, pretrained=pretrained))
        kinds.append(any(isinstance(module, torch.nn.BatchNorm2d) for module in backbone.modules()))
    assert kinds == [False, True]


def test_boxes_are_relative_to_the_image_without_its_padding(tmp_path):
    saved(tmp_path, "timm_resnet_args")
    inputs = batch(padded=32)
    assert image_sizes(inputs["pixel_values"], inputs["pixel_mask"]) == [(64, 64), (32, 64)]
    model = detector(tmp_path, "rt_detr_v2").eval()
    with torch.no_grad():
        whole, alone = model(inputs["pixel_values"]), model(**inputs)
    assert torch.allclose(whole.pred_boxes[0], alone.pred_boxes[0], atol=1e-5)
    ratio = torch.tensor([1.0, 2.0, 1.0, 2.0])
    assert torch.allclose(whole.pred_boxes[1] * ratio, alone.pred_boxes[1], atol=1e-5)
    sizes, loaded = torch.tensor([[64, 64], [32, 64]]), RTDetrV2ForObjectDetection(model.config).eval()
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(detect(model, inputs, sizes)[1]["boxes"], detect(loaded, inputs, sizes)[1]["boxes"])
    # In labels, too: those of half an image are those of the whole one with half the height.
    label = inputs["labels"][0]
    half = {**label, "boxes": label["boxes"] / ratio}
    with torch.no_grad():
        losses = [
            model(inputs["pixel_values"][1:], mask, [x]).loss
            for mask, x in ((inputs["pixel_mask"][1:], label), (None, half))
        ]
    assert torch.allclose(*losses, rtol=1e-4)


def test_detections_are_scaled_to_the_original_images(tmp_path):
    saved(tmp_path, "timm_resnet_args")
    model = detector(tmp_path, "mask_rcnn").eval()
    inputs = batch(padded=32)
    small = detect(model, inputs, torch.tensor([[64, 64], [32, 64]]))
    large = detect(model, inputs, torch.tensor([[128, 192], [64, 192]]))
    assert len(small[0]["boxes"])
    for one, two, size in zip(small, large, ((128, 192), (64, 192)), strict=True):
        assert torch.allclose(one["boxes"] * torch.tensor([3.0, 2.0, 3.0, 2.0]), two["boxes"], atol=1e-3)
        assert two["masks"].shape[1:] == size and two["masks"].dtype is torch.bool
        assert torch.equal(one["labels"], two["labels"]) and set(one["labels"].tolist()) <= {0, 1, 2}
        assert (two["boxes"][:, [0, 1]] >= 0).all() and (two["boxes"][:, 3] <= size[0]).all()


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_a_detector_learns_an_image_by_heart(tmp_path, head):
    """Which it would not with corners for centres, classes that are one off, or boxes of another size."""
    saved(tmp_path, "timm_resnet_args")
    changes = {} if head == "mask_rcnn" else {"hidden_size": 32, "num_queries": 20}
    model = detector(tmp_path, head, pretrained=False, **changes).train()
    inputs = batch()
    label = inputs["labels"][0]
    for at, (left, top) in enumerate(((16, 16), (32, 0))):
        inputs["pixel_values"][0, at, top : top + 32, left : left + 32] += 3
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(120):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    found = detect(model.eval(), inputs, torch.tensor([[128, 64], [48, 64]]))[0]
    expected = {0: [16, 32, 48, 96], 2: [32, 0, 64, 64]}
    for number, box in expected.items():
        (best, *_) = [b for b, x in zip(found["boxes"], found["labels"], strict=True) if x == number]
        assert (best - torch.tensor(box)).abs().max() < 12, (number, best)
    assert len(label["boxes"]) == 2


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


def test_the_detection_pipeline_does_what_is_evaluated(tmp_path):
    student = saved(tmp_path / "student", "timm_resnet")
    model = detector(tmp_path / "student", "rt_detr_v2").eval()
    model.save_pretrained(tmp_path / "saved")
    processor = detection_processor(student.spec, 64)
    processor.save_pretrained(tmp_path / "saved")
    image = to_pil_image((torch.rand(3, 50, 70) * 255).byte())
    inputs = processor(image, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    assert inputs["pixel_values"].std() > 0.5  # normalised, which RT-DETR's own are not
    (found,) = detect(model, inputs, torch.tensor([[50, 70]]))
    answer = pipeline("object-detection", model=str(tmp_path / "saved"), threshold=0.0)(image)
    assert len(answer) == len(found["scores"]) > 0
    assert [part["label"] for part in answer] == [NAMES[number] for number in found["labels"]]
    assert answer[0]["score"] == pytest.approx(found["scores"][0].item(), abs=1e-4)
    assert list(answer[0]["box"].values()) == [int(side) for side in found["boxes"][0]]


def test_class_names_that_cannot_be_are_refused(tmp_path):
    saved(tmp_path, "timm_resnet_args")
    for make in (build_segmenter, build_detector):
        with pytest.raises(ValueError, match="`class_names` has 'cat' more than once"):
            make(tmp_path, ["cat", "dog", "cat"])
    with pytest.raises(ValueError, match="`class_names` has 1 names.*2 classes or more"):
        build_segmenter(tmp_path, ["cat"])
    with pytest.raises(ValueError, match="`class_names` has 0 names"):
        build_detector(tmp_path, [])


def test_heads_and_sizes_that_cannot_be_are_refused(tmp_path):
    saved(tmp_path / "student", "timm_resnet_args")
    with pytest.raises(ValueError, match="`head` 'yolo' is none of mask_rcnn, rt_detr_v2"):
        build_detector(tmp_path / "student", NAMES, head="yolo")
    model = detector(tmp_path / "student", "rt_detr_v2")
    with pytest.raises(ValueError, match="`pixel_values` 64x72 px.*that 32 divides"):
        model(torch.zeros(1, 3, 64, 72))
    with pytest.raises(ValueError, match="`image_size` 72x72.*that 32 divides"):
        detector(tmp_path / "student", "rt_detr_v2", image_size=72)
    with pytest.raises(ValueError, match="`labels` are None in training"):
        detector(tmp_path / "student", "mask_rcnn").train()(torch.zeros(1, 3, 64, 64))
    two = load_student(build(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10)))
    with pytest.raises(ValueError, match="'rt_detr_v2' looks at 3 maps, but `student` .* has 2"):
        detector(two, "rt_detr_v2")


@pytest.mark.parametrize("head", ["upernet", *HEADS])
def test_a_folder_that_holds_no_student_is_refused(tmp_path, head):
    with pytest.raises(ValueError, match="`student`.*neither a local folder"):
        BUILDERS[head](tmp_path / "nothing")
