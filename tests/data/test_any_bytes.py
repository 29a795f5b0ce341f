"""Any bytes become an image or an error that is counted, in bounded memory.

`SCALEKD_EXAMPLES=5000 pytest tests/data/test_any_bytes.py` looks further.
"""

import io
import random
import sys
import warnings
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import examples
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from scalekd_hf.data import decoding
from scalekd_hf.data.augmentation import Augmentation
from scalekd_hf.data.dataset import check_dataset
from scalekd_hf.data.decoding import BadImageError, jpeg_pixels, open_image, to_rgb
from scalekd_hf.data.folders import read_folder
from scalekd_hf.data.formats import FORMATS, image_endings, jxl_size, readable_formats
from scalekd_hf.data.preparation import Preparation
from scalekd_hf.images import ImageSpec


MODES = {
    "JPEG": ["L", "RGB", "CMYK"],
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "WEBP": ["RGB", "RGBA"],
    "GIF": ["L", "P"],
    "BMP": ["1", "L", "P", "RGB"],
    "TIFF": ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "LAB", "I", "I;16", "F"],
    "PPM": ["1", "L", "RGB"],
    "JPEG2000": ["L", "LA", "RGB", "RGBA", "I;16"],
    "AVIF": ["RGB", "RGBA"],
    "HEIF": ["L", "RGB", "RGBA"],
    "JXL": ["L", "LA", "RGB", "RGBA"],
}
FOREIGN = {
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n",
    "PDF": b"%PDF-1.4\n",
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(40),
    "FITS": b"SIMPLE  =                    T / conforms" + bytes(3000),
    "PSD": b"8BPS" + bytes(40),
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, of what is damaged
needs_simplejpeg = pytest.mark.skipif(decoding.simplejpeg is None, reason="simplejpeg is not installed")
PIXEL_LIMIT = 2_000_000  # in `MAX_IMAGE_PIXELS`: 16 MB for an image
TAKEN = 48  # MB at most that an image of it takes, with what Python and its decoder need


def picture(mode, size=(40, 30)):
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size[::-1])
    if mode == "F":
        return Image.fromarray((ramp / 255).astype(np.float32))
    if mode.startswith("I"):
        return Image.fromarray((ramp * 257).astype(np.int32 if mode == "I" else np.uint16))
    colours = Image.fromarray(np.stack([ramp, 255 - ramp, ramp / 2], 2).astype(np.uint8))
    return colours.convert("LA").convert("PA") if mode == "PA" else colours.convert(mode)


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@cache
def samples():
    """Small files of every format that can be written here, in every mode, and some of special kinds."""
    found = [encoded(picture(mode), form) for form in MODES if form in readable_formats() for mode in MODES[form]]
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    profile = b"\x00\x00\x02\x0clcms\x02\x10" + bytes(116)
    frames = [picture("P", (20, 20)).rotate(number) for number in range(3)]
    found += [
        encoded(picture("RGB"), form, exif=exif, icc_profile=profile) for form in ("JPEG", "PNG", "TIFF", "WEBP")
    ]
    found += [
        encoded(frames[0], form, save_all=True, append_images=frames[1:]) for form in ("GIF", "TIFF", "WEBP", "PNG")
    ]
    found += [
        encoded(picture("RGB"), "TIFF", compression=name) for name in ("tiff_lzw", "jpeg", "packbits", "tiff_deflate")
    ]
    found += [encoded(picture("RGB"), "JPEG", progressive=True), encoded(picture("RGB", (1, 300)), "PNG")]
    return [*found, encoded(picture("P"), "PNG", transparency=bytes(range(256))), *FOREIGN.values()]


@cache
def jpegs():
    """JPEGs that simplejpeg decodes in training: of all subsamplings, in one scan or several, with restarts or without."""
    ways = [{"subsampling": kind, "progressive": several} for kind in (0, 1, 2) for several in (False, True)]
    ways += [{"restart_marker_blocks": 2}, {"quality": 100, "optimize": True}]
    return [encoded(picture("RGB", size), "JPEG", **way) for way in ways for size in ((61, 45), (1, 1), (1, 90))]


@st.composite
def damaged(draw, files):
    """A file with bytes overwritten, left out, put in, or cut off."""
    content = bytearray(draw(st.sampled_from(files())))
    for _ in range(draw(st.integers(1, 4))):
        span = min(len(content), 2 ** draw(st.integers(3, 14)))  # headers more often than the rest
        place = draw(st.integers(0, span))
        new = draw(st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 4, bytes(4), b"\x7f\xff"])))
        kind = draw(st.sampled_from(["overwrite", "overwrite", "insert", "delete", "cut", "repeat"]))
        if kind == "overwrite":
            content[place : place + len(new)] = new
        elif kind == "insert":
            content[place:place] = new
        elif kind == "delete":
            del content[place : place + len(new)]
        elif kind == "cut":
            del content[max(place, 1) :]
        else:
            content[place:place] = content[place : place + 64]
    return bytes(content)


def memory(field):
    """Memory of this process in MB, from its status in /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def taken(function, *arguments):
    """What a call gives, or its `BadImageError`, and the memory in MB that it takes at its peak, beside what there was."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
    try:
        result = function(*arguments)
    except BadImageError as error:
        result = error
    return result, memory("VmHWM") - before if sys.platform == "linux" else 0.0


AUGMENT = Augmentation((24, 32), "bicubic", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def both_ways(content):
    random.seed(0)
    pixels = AUGMENT(open_image(content))
    return pixels, to_rgb(open_image(content))


@pytest.fixture(autouse=True, scope="module")
def few_pixels():
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(Image, "MAX_IMAGE_PIXELS", PIXEL_LIMIT)
        yield


def check(content):
    result, megabytes = taken(both_ways, content)
    if isinstance(result, BadImageError):
        assert result.kind in decoding.REMEDIES
    else:
        assert result[0].shape == (3, 24, 32) and result[1].mode == "RGB"
    assert megabytes < TAKEN
    return result


def test_every_format_and_mode_is_decoded():
    for content in samples()[: -len(FOREIGN)]:
        assert not isinstance(check(content), BadImageError), content[:40]


@examples(300)
@given(st.one_of(st.binary(max_size=200), st.builds(lambda c, b: c[:16] + b, st.sampled_from(samples()), st.binary())))
@example(b"\n\x05\x01\x08")
@example(b"P1 99999 99999 ")
def test_random_bytes_are_decoded_or_counted(content):
    check(content)


@examples(300)
@given(damaged(samples))
def test_damaged_files_are_decoded_or_counted(content):
    check(content)


@needs_simplejpeg
@examples(300)
@given(damaged(jpegs))
def test_both_decoders_of_jpegs_give_the_same_pixels(content):
    try:
        pixels = jpeg_pixels(open_image(content))
    except BadImageError:
        return
    if pixels is not None:
        assert np.array_equal(pixels.permute(1, 2, 0), to_rgb(open_image(content)))


@needs_simplejpeg
def test_a_sound_jpeg_is_decoded_by_simplejpeg_where_the_decoders_agree(monkeypatch, caplog):
    for content in jpegs():
        pixels = jpeg_pixels(open_image(content))
        assert pixels is not None and np.array_equal(pixels.permute(1, 2, 0), to_rgb(open_image(content)))
        random.seed(1)
        fast = AUGMENT(open_image(content))
        random.seed(1)
        assert torch.equal(fast, AUGMENT(to_rgb(open_image(content))))
    for other in (
        encoded(picture("L"), "JPEG"),
        encoded(picture("CMYK"), "JPEG"),
        encoded(picture("RGB"), "PNG"),
        picture("RGB"),
    ):
        assert jpeg_pixels(open_image(other)) is None
    plain = decoding.simplejpeg.decode_jpeg
    monkeypatch.setattr(decoding.simplejpeg, "decode_jpeg", lambda data, mode: plain(data, mode, fastdct=True))
    decoding._decoders_agree.cache_clear()
    assert (
        jpeg_pixels(open_image(jpegs()[0])) is None and "simplejpeg decodes to other pixels than Pillow" in caplog.text
    )
    decoding._decoders_agree.cache_clear()


# What is not even tried


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_formats_of_pillow_are_not_opened_at_any_door(tmp_path, kind):
    named, bare = tmp_path / "cat" / f"1.{kind.lower()}", tmp_path / "cat" / "1"
    named.parent.mkdir()
    for file in (named, bare):
        file.write_bytes(FOREIGN[kind])
    encoded_images = [
        FOREIGN[kind],
        named,
        {"bytes": None, "path": str(bare)},
        {"bytes": FOREIGN[kind], "path": "1.png"},
    ]
    for value in encoded_images:
        with pytest.raises(
            BadImageError, match=f"of another format: it looks like {kind}, and those that are read are JPEG, "
        ) as e:
            to_rgb(open_image(value))
        assert e.value.kind == "of another format"
    (tmp_path / "cat" / "2.png").write_bytes(encoded(picture("RGB"), "PNG"))
    folder = read_folder(tmp_path)
    assert [len(files) for files in folder.splits["all"].values()] == [1] and sum(
        map(len, folder.unused.values())
    ) == 2


def test_an_image_of_another_format_comes_decoded_or_not_at_all(tmp_path):
    content = encoded(picture("RGB"), "TGA")
    with pytest.raises(BadImageError, match="of another format: it looks like TGA"):
        open_image(Image.open(io.BytesIO(content)))
    decoded = Image.open(io.BytesIO(content))
    decoded.load()
    assert np.array_equal(to_rgb(open_image(decoded)), picture("RGB"))
    assert to_rgb(open_image(Image.open(io.BytesIO(encoded(picture("RGB"), "PNG"))))).mode == "RGB"


def test_endings_are_those_of_the_formats_that_are_read():
    kinds = {Image.registered_extensions()[ending] for ending in image_endings()}
    assert kinds <= set(FORMATS) and {"JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM"} <= kinds


def test_columns_of_images_are_decoded_by_nobody_else():
    image = {"bytes": FOREIGN["EPS"], "path": None}
    features = datasets.Features({"image": datasets.Image(), "more": [{"shown": datasets.Image()}]})
    table = datasets.Dataset.from_dict({"image": [image] * 2, "more": [[{"shown": image}]] * 2}, features=features)
    for data in (table, table.to_iterable_dataset()):
        _, first = check_dataset(data, "train_dataset", Preparation(ImageSpec(), False, label_column=None))
        assert first["image"] == image and first["more"][0]["shown"] == image


# Memory


BOMBS = {
    "PNG": lambda mode, size: encoded(Image.new(mode, size), "PNG"),
    "TIFF": lambda mode, size: encoded(Image.new(mode, size), "TIFF", compression="tiff_deflate"),
    "WEBP": lambda mode, size: encoded(Image.new(mode, size), "WEBP", lossless=True, method=0),
    "JPEG2000": lambda mode, size: encoded(Image.new(mode, size), "JPEG2000"),
    "GIF": lambda mode, size: encoded(Image.new(mode, size), "GIF"),
    "JPEG": lambda mode, size: encoded(Image.new(mode, size), "JPEG", progressive=True, subsampling=0),
}
LARGE = [("PNG", "L"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"), ("TIFF", "F"), ("TIFF", "I")]
LARGE += [("WEBP", "RGB"), ("WEBP", "RGBA"), ("JPEG2000", "RGB"), ("GIF", "P"), ("JPEG", "RGB")]


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")
@pytest.mark.parametrize(("form", "mode"), LARGE)
def test_images_take_no_more_memory_than_the_largest_rgb_image(form, mode):
    """A float TIFF of a megabyte took 2.7 GB."""
    outcomes = {}
    for side in (600, 1400, 1800, 1990):  # the last within Pillow's own limit
        result, megabytes = taken(both_ways, BOMBS[form](mode, (side, side)))
        outcomes[side] = getattr(result, "kind", "decoded")
        assert megabytes < 1.25 * 16 + 12, side  # what bands and the interpreter add
    assert outcomes[600] == "decoded" and set(outcomes.values()) <= {"decoded", "too large"}
    assert outcomes[1990] == ("decoded" if (form, mode) == ("PNG", "RGB") else "too large")


@pytest.mark.skipif("JXL" not in readable_formats(), reason="pillow_jxl is not installed")
def test_the_size_of_a_jpeg_xl_is_known_before_it_is_decoded():
    for size in [(1, 1), (8, 16), (40, 30), (256, 256), (300, 200), (160, 90), (700, 3)]:
        for options in ({}, {"use_container": True}, {"lossless": True}):
            assert jxl_size(encoded(Image.new("RGB", size), "JXL", **options)) == size
    huge = b"\xff\x0a" + (1 << 1 | 3 << 1 | (59_999 << 3) | 1 << 33).to_bytes(8, "little") + bytes(40)
    assert jxl_size(huge) == (60_000, 60_000)
    with pytest.raises(BadImageError, match="60000 x 60000 pixels take 57600 MB, more than 16 MB.*MAX_IMAGE_PIXELS"):
        open_image(huge)


@pytest.mark.parametrize("form", ["GIF", "TIFF", "WEBP", "PNG"])
def test_of_hundreds_of_frames_one_is_decoded(form):
    frames = [Image.new("L", (300, 300), number) for number in range(200)]
    content = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    (pixels, image), megabytes = taken(both_ways, content)
    assert np.array_equal(image, frames[0].convert("RGB")) and pixels.max() == 0 and megabytes < 24
