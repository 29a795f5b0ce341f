"""The scale of pixels follows from their type, or is given."""

import io

import numpy as np
import pytest
from PIL import Image

from scalekd_hf.data.decoding import BadImageError, open_image, to_rgb


def encoded(image, form):
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


@pytest.mark.parametrize("pixel_range", [None, (0, 255), (0, 65535), (-1, 1), (0, 4095)])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_floats_are_read_in_the_range_that_is_given_else_from_0_to_1(pixel_range, kind):
    values = np.linspace(0, 1, 256).reshape(16, 16)
    low, high = pixel_range or (0, 1)
    scaled = (low + values * (high - low)).astype(kind).clip(low, high)
    for value in (scaled, Image.fromarray(scaled.astype(np.float32))):
        pixels = np.asarray(to_rgb(open_image(value, pixel_range)))
        assert np.abs(pixels[..., 1] - values * 255).max() < 1.01


def test_the_scale_of_pixels_follows_from_their_type_and_not_from_their_values(caplog):
    """An int32 image of 255 and one of 256 became 255 and 1, and 12 bits in 16 kept 16 levels."""
    for kind in (np.int32, np.int64, np.uint32):
        assert (np.asarray(to_rgb(open_image(np.full((4, 4), 255, kind)))) == 255).all()
        with pytest.raises(
            BadImageError,
            match=f"out of range: its pixels of type {np.dtype(kind)} are 256 to 256, not 0 to 255.*`pixel_range`",
        ):
            open_image(np.full((4, 4), 256, kind))
    for value in (np.full((4, 4), 0.5), np.full((4, 4), 1.0), Image.fromarray(np.full((4, 4), 0.5, np.float32))):
        open_image(value)
    for value in (np.full((4, 4), -0.5), np.full((4, 4), 1.5), np.full((4, 4), 255.0)):
        with pytest.raises(BadImageError, match="out of range.*not 0 to 1"):
            open_image(value)
    assert len([r for r in caplog.records if "type float64 are read as 0 for black and 1 for white" in r.message]) <= 1
    deep = np.arange(0, 4096, dtype=np.uint16).reshape(64, 64)
    for value in (deep, encoded(Image.fromarray(deep), "PNG")):
        assert len(np.unique(to_rgb(open_image(value, (0, 4095))))) == 256
    assert (np.asarray(to_rgb(open_image(np.ones((4, 4), bool)))) == 255).all()


def test_pixels_that_are_no_numbers_are_black_and_hide_no_others():
    for values in ([[np.nan, 0.5]], [[np.nan, np.nan]]):
        for value in (np.array(values), Image.fromarray(np.array(values, np.float32))):
            assert np.asarray(to_rgb(open_image(value)))[0, 0, 0] == 0
    for value in (np.array([[np.nan, 300.0]]), Image.fromarray(np.array([[300, np.nan]], np.float32))):
        with pytest.raises(BadImageError, match="out of range.* are 300 to 300, not 0 to 1"):
            open_image(value)
