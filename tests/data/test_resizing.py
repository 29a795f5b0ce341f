"""Resizing without antialiasing, as OpenCV does it."""

import pickle
import random

import cv2
import numpy as np
import pytest
from helpers import settings, small_student
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

from scalekd_hf import ScaleKDTrainer
from scalekd_hf.data.augmentation import Augmentation
from scalekd_hf.data.preparation import Preparation
from scalekd_hf.images import ImageSpec


PLAIN = ImageSpec((224, 224), interpolation="bilinear", antialias=False)


def picture(height, width):
    """Structure that resizing would alias."""
    cells = np.random.default_rng(0).integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (601, 400), (90, 100), (1600, 1200)])
def test_evaluation_without_antialiasing_is_opencvs(height, width):
    image = picture(height, width)
    ours = Preparation(PLAIN, training=False)({"image": image}, 0, 0)["pixel_values"].permute(1, 2, 0).numpy()
    shorter = min(height, width)
    size = (round(width * 256 / shorter), round(height * 256 / shorter))
    resized = cv2.resize(np.asarray(image), size, interpolation=cv2.INTER_LINEAR)
    top, left = round((resized.shape[0] - 224) / 2), round((resized.shape[1] - 224) / 2)
    theirs = resized[top : top + 224, left : left + 224]
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_training_without_antialiasing_is_opencvs_of_the_crop_that_timm_draws(tmp_path):
    file = tmp_path / "a.jpg"
    picture(1200, 1600).save(file, quality=95)
    augment = Augmentation((64, 48), "bilinear", PLAIN.mean, PLAIN.std, hflip=0.0, antialias=False)
    whole = np.asarray(Image.open(file))
    for seed in range(5):
        random.seed(seed)
        pixels = augment(Image.open(file)).permute(1, 2, 0).numpy()
        random.seed(seed)
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(
            Image.open(file), (0.08, 1), (3 / 4, 4 / 3)
        )
        crop = whole[top : top + height, left : left + width]
        theirs = cv2.resize(crop, (48, 64), interpolation=cv2.INTER_LINEAR)
        assert np.abs(pixels.astype(int) - theirs).max() <= 1


def test_workers_of_any_kind_can_be_sent_the_transform():
    image = picture(90, 100)
    sent = pickle.loads(pickle.dumps(Preparation(PLAIN, training=False)))
    ours, theirs = (p({"image": image}, 0, 0)["pixel_values"] for p in (sent, Preparation(PLAIN, training=False)))
    assert (ours == theirs).all()


def test_a_filter_that_always_smooths_is_refused_without_antialiasing(tmp_path):
    with pytest.raises(ValueError, match="`antialias` is false, which `interpolation` 'lanczos' cannot be"):
        ScaleKDTrainer(small_student(), None, settings(tmp_path, antialias=False, interpolation="lanczos"))
    with pytest.raises(ValueError, match="`interpolation` must be one of .*, got 'cubic'"):
        settings(tmp_path, interpolation="cubic")


def test_training_and_evaluation_take_the_filter_of_the_settings(tmp_path, digits):
    trainer = ScaleKDTrainer(
        small_student(), None, settings(tmp_path, antialias=False, interpolation="bilinear"), digits, digits
    )
    augmentation = trainer.train_dataset.preparation.transform
    assert (augmentation.interpolation, augmentation.antialias) == ("bilinear", False)
    evaluation = trainer.eval_dataset.preparation.spec
    assert (evaluation.interpolation, evaluation.antialias) == ("bilinear", False)
