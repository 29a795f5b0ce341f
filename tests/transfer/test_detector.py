"""Detection on students: what boxes are relative to, how detections are scaled, frozen BatchNorm, and what is refused."""

import pytest
import torch
from heads import NAMES, backbone_of, batch, detector
from helpers import build
from students import saved
from torchvision.transforms.v2.functional import to_pil_image
from transformers import DFineForObjectDetection, ResNetConfig, pipeline

from scalekd_hf import load_student
from scalekd_hf.transfer.detector import HEADS, build_detector, detect, detection_processor
from scalekd_hf.transfer.mask_rcnn import image_sizes


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
    model = detector(tmp_path, "d_fine").eval()
    with torch.no_grad():
        whole, alone = model(inputs["pixel_values"]), model(**inputs)
    assert torch.allclose(whole.pred_boxes[0], alone.pred_boxes[0], atol=1e-5)
    ratio = torch.tensor([1.0, 2.0, 1.0, 2.0])
    assert torch.allclose(whole.pred_boxes[1] * ratio, alone.pred_boxes[1], atol=1e-5)
    sizes, loaded = torch.tensor([[64, 64], [32, 64]]), DFineForObjectDetection(model.config).eval()
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


def test_the_detection_pipeline_does_what_is_evaluated(tmp_path):
    student = saved(tmp_path / "student", "timm_resnet")
    model = detector(tmp_path / "student", "d_fine").eval()
    model.save_pretrained(tmp_path / "saved")
    processor = detection_processor(student.spec, 64)
    processor.save_pretrained(tmp_path / "saved")
    image = to_pil_image((torch.rand(3, 50, 70) * 255).byte())
    inputs = processor(image, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    assert inputs["pixel_values"].min() < -0.1  # normalised, which D-FINE's own are not
    (found,) = detect(model, inputs, torch.tensor([[50, 70]]))
    answer = pipeline("object-detection", model=str(tmp_path / "saved"), threshold=0.0)(image)
    assert len(answer) == len(found["scores"]) > 0
    assert [part["label"] for part in answer] == [NAMES[number] for number in found["labels"]]
    assert answer[0]["score"] == pytest.approx(found["scores"][0].item(), abs=1e-4)
    assert list(answer[0]["box"].values()) == [int(side) for side in found["boxes"][0]]


def test_heads_and_sizes_that_cannot_be_are_refused(tmp_path):
    saved(tmp_path / "student", "timm_resnet_args")
    with pytest.raises(ValueError, match="`head` 'yolo' is none of mask_rcnn, d_fine"):
        build_detector(tmp_path / "student", NAMES, head="yolo")
    model = detector(tmp_path / "student", "d_fine")
    with pytest.raises(ValueError, match="`pixel_values` 64x72 px.*that 32 divides"):
        model(torch.zeros(1, 3, 64, 72))
    with pytest.raises(ValueError, match="`image_size` 72x72.*that 32 divides"):
        detector(tmp_path / "student", "d_fine", image_size=72)
    with pytest.raises(ValueError, match="`labels` are None in training"):
        detector(tmp_path / "student", "mask_rcnn").train()(torch.zeros(1, 3, 64, 64))
    two = load_student(build(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10)))
    with pytest.raises(ValueError, match="'d_fine' looks at 3 maps, but `student` .* has 2"):
        detector(two, "d_fine")
