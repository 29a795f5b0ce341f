"""From a row of a data set to a sample."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from scalekd_hf.data.dataset import dataset_labels, prepare_dataset
from scalekd_hf.data.preparation import Preparation, collate
from scalekd_hf.images import ImageSpec, Normaliser


SPEC = ImageSpec((16, 16), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bicubic", 1.0)


def picture(number):
    """A 16x16 image whose first channel is constant and tells its number."""
    array = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    array[..., 0] = number
    return Image.fromarray(array)


def training(**changes):
    return Preparation(SPEC, training=True, **{"crop_scale": (0.3, 1.0), "seed": 3, **changes})


def test_sixteen_bit_images_and_floats_keep_their_range():
    grey = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    encoded = io.BytesIO()
    Image.fromarray(grey).save(encoded, "PNG")
    plain = Preparation(SPEC, training=False)
    deep = plain({"image": {"bytes": encoded.getvalue()}}, 0, 0)["pixel_values"]
    eight = plain({"image": (grey // 256).astype(np.uint8)}, 0, 0)["pixel_values"]
    share = plain({"image": (grey // 256) / 255.0}, 0, 0)["pixel_values"]
    assert torch.equal(deep, eight) and (share.int() - eight.int()).abs().max() <= 1


def test_a_batch_with_some_labels_is_refused():
    image = torch.zeros(3, 2, 2)
    with pytest.raises(ValueError, match="1 of 2 images in a batch have no label"):
        collate([{"pixel_values": image, "labels": 1}, {"pixel_values": image, "labels": None}])


def test_augmenting_leaves_the_random_states_alone():
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    training()({"image": picture(1), "label": 1}, 0, 0)
    assert torch.equal(states[0], torch.get_rng_state()) and np.array_equal(states[1], np.random.get_state()[1])


def test_normalising_gives_what_timm_gives():
    spec = ImageSpec((4, 4), (0.5, 0.4, 0.3), (0.25, 0.2, 0.1))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.allclose(Normaliser(spec).for_student(pixels), (pixels / 255 - mean) / std, atol=1e-5)


def test_evaluation_resizes_and_crops_the_centre():
    preparation = Preparation(SPEC.updated(crop_pct=0.5), training=False)
    array = np.zeros((64, 64, 3), np.uint8)
    array[16:48, 16:48] = 255  # the half of the side that the crop keeps
    value = preparation({"image": Image.fromarray(array)}, 0, 0)["pixel_values"]
    assert value.shape == (3, 16, 16) and value.dtype == torch.uint8 and value[:, 2:-2, 2:-2].min() == 255


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_images_of_every_mode_become_rgb(mode):
    image = picture(7).convert(mode)
    encoded = io.BytesIO()
    image.save(encoded, "TIFF")
    for value in (image, {"bytes": encoded.getvalue(), "path": None}, encoded.getvalue()):
        assert Preparation(SPEC, training=False)({"image": value}, 0, 0)["pixel_values"].shape == (3, 16, 16)


def test_labels_may_be_absent_or_soft():
    image = torch.zeros(3, 2, 2)
    assert "labels" not in collate([{"pixel_values": image}])
    batch = collate([{"pixel_values": image, "labels": [0.5, 0.5]}, {"pixel_values": image, "labels": [1.0, 0.0]}])
    assert batch["labels"].shape == (2, 2) and batch["pixel_values"].shape == (2, 3, 2, 2)


def test_label_names_come_from_the_data_set(digits):
    assert dataset_labels(digits, "label") == list("0123456789")
    assert dataset_labels(digits, "other") is None and dataset_labels([1, 2], "label") is None


def test_finished_samples_stay_as_they_are():
    samples = [{"pixel_values": torch.zeros(3, 4, 4), "labels": 1}]
    assert prepare_dataset(samples, "train_dataset", training()) is samples


def test_columns_may_have_other_names(digits):
    data = digits.rename_columns({"image": "img", "label": "fine_label"})
    preparation = Preparation(SPEC, training=False, image_column="img", label_column="fine_label")
    assert prepare_dataset(data, "eval_dataset", preparation)[0]["labels"] == data[0]["fine_label"]
