"""Images are evaluated as a model's own image processor, or timm, prepares them."""

import numpy as np
import pytest
import timm
import torch
import transformers
from helpers import transformers_vit
from PIL import Image

from scalekd_hf import load_student
from scalekd_hf.data.preparation import _evaluation_transform
from scalekd_hf.images import ImageSpec, Normaliser
from scalekd_hf.models.processors import processor_spec
from scalekd_hf.models.saving import save_student


def photo(width=300, height=200):
    pixels = np.random.default_rng(0).integers(0, 255, (height // 20, width // 20, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def prepared(spec, image):
    pixels = _evaluation_transform(spec)(image)
    return Normaliser(spec).for_student(torch.as_tensor(pixels)[None])[0]


@pytest.mark.parametrize("kind", ["ViT", "Bit", "Levit", "EfficientNet", "ConvNext", "CLIP", "DeiT"])
def test_images_are_those_of_the_processor(tmp_path, kind):
    getattr(transformers, f"{kind}ImageProcessor")().save_pretrained(tmp_path)
    processor, image = transformers.AutoImageProcessor.from_pretrained(tmp_path), photo()
    expected = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
    found = prepared(processor_spec(str(tmp_path), ImageSpec()), image)
    assert found.shape == expected.shape and (found - expected).abs().max() < 0.05


def test_channels_in_another_order_are_refused(tmp_path):
    transformers.MobileViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="`do_flip_channel_order` in its preprocessor_config.json: it takes images with their"
    ):
        processor_spec(str(tmp_path), ImageSpec())


def test_images_that_timm_squashes_are_squashed_also_after_saving(tmp_path):
    student = load_student("timm/test_resnet", num_classes=3)
    student.spec = student.spec.updated(crop_mode="squash", size=96)
    save_student(student, tmp_path)
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}"))
    assert data["crop_mode"] == "squash" and load_student(str(tmp_path)).spec == student.spec
    transform = timm.data.create_transform(**{**data, "input_size": (3, 96, 96)}, is_training=False)
    assert torch.allclose(prepared(student.spec, photo()), transform(photo()), atol=1e-5)
    assert load_student("timm/tf_efficientnetv2_b3", num_classes=3).spec.crop_mode == "squash"


def test_a_transformers_student_is_prepared_the_same_after_saving(tmp_path):
    transformers_vit(num_labels=3).save_pretrained(tmp_path / "published")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "published")
    student = load_student(str(tmp_path / "published"), pretrained=True)
    assert student.spec.crop_mode == "squash"
    save_student(student, tmp_path / "saved")
    again = load_student(str(tmp_path / "saved"), pretrained=True)
    assert again.spec == student.spec
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "saved")
    expected = torch.as_tensor(np.asarray(processor(photo())["pixel_values"][0]))
    assert (prepared(again.spec, photo()) - expected).abs().max() < 0.05
