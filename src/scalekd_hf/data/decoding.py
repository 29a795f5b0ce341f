"""From what a row of a data set holds to an RGB image, with one error for everything that is no image.

Opening and decoding are two steps: a JPEG that is opened only can still be decoded at a fraction of its
resolution (`PIL.Image.Image.draft`). An image may take as much memory, converted to RGB, as the largest RGB image
that Pillow opens (`PIL.Image.MAX_IMAGE_PIXELS`): 716 MB, if nothing else is set.
"""

from __future__ import annotations

import io
import logging
import math
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, JpegImagePlugin, UnidentifiedImageError
from PIL.JpegImagePlugin import get_sampling
from torch import Tensor

from .formats import FORMATS, JXL_STARTS, foreign_format, jxl_size, package_for_bytes, readable_formats


try:
    import simplejpeg
except ImportError:
    simplejpeg = None

__all__ = ["BadImageError", "is_reducible", "jpeg_pixels", "open_image", "pillow_errors", "to_rgb"]

logger = logging.getLogger(__name__)

JPEG_START = b"\xff\xd8\xff"
BAND = 2**20  # pixels that are converted at a time
# Bytes a pixel that decoders take beside the image: those that decode it as a whole, as measured.
DECODERS = {"WEBP": 12, "JPEG2000": 15, "AVIF": 6, "HEIF": 6, "JXL": 12}
PROGRESSIVE = 6  # coefficients of all scans, at whatever resolution
SUBSAMPLINGS = (0, 1, 2)  # by Pillow's numbers: 4:4:4, 4:2:2 and 4:2:0, on which all versions of libjpeg-turbo agree
REMEDIES = {
    "empty": "Leave out the row, or store the image again.",
    "missing": "Check the path, or store the images in the data set itself.",
    "not an image": "Leave out the row, or check that the column holds images.",
    "of another format": "Save it in one of these, or leave it out.",
    "without a decoder": "Install it, or store the images in another format.",
    "truncated": "Fetch the file again, or leave it out.",
    "out of range": "Give the least and the largest value that such pixels have as `pixel_range`, or store them as uint8.",
    "too large": "Scale the image down, or raise `PIL.Image.MAX_IMAGE_PIXELS`.",
    "unreadable": "Save the image in another format, or leave it out.",
}


class BadImageError(ValueError):
    """A value that no image can be made of.

    Attributes:
        kind: "empty", "missing", "not an image", "of another format", "without a decoder", "truncated", "too large",
            "out of range", or "unreadable" for the rest.
    """

    def __init__(self, message: str, kind: str = "unreadable"):
        super().__init__(message)
        self.kind = kind


def _bad(kind: str, detail: Any) -> BadImageError:
    return BadImageError(f"An image is {kind}: {detail}. {REMEDIES[kind]}", kind)


def open_image(value: Any, pixel_range: tuple[float, float] | None = None) -> Image.Image:
    """Open an image, without decoding it where it is encoded with 8 bits a channel.

    Args:
        value: a row's {"bytes": ..., "path": ...}, encoded bytes, a path, a PIL image, or pixels as an array or
            nested list (height, width), with 1, 3 or 4 channels behind or without.
        pixel_range: what black and white are in pixels that are not uint8. By default their type alone says so: 0 and
            65535 with 16 bits and in Pillow's mode I, 0 and 1 in floats and booleans, 0 and 255 in other integers.

    Raises:
        BadImageError: the value is no image, or has pixels out of their range.
    """
    image = _opened(value, pixel_range)
    if image.mode.startswith("I") or image.mode == "F":  # Pillow would cut off at 255
        with pillow_errors():
            image.load()
            if _is_rotated(image):
                image = ImageOps.exif_transpose(image)
            return Image.fromarray(_of_deep_image(image, pixel_range))
    return image


def _of_deep_image(image: Image.Image, pixel_range: tuple[float, float] | None) -> np.ndarray:
    """Pixels (height, width) as uint8 of an image with more bits, copied band by band."""

    def band(top: int, bottom: int) -> np.ndarray:
        return np.asarray(image.crop((0, top, image.width, bottom)))

    kind = np.dtype("uint16") if image.mode.startswith("I") else np.dtype("float32")
    return _eight_bits(band, (image.height, image.width), f"Pillow's mode {image.mode}", kind, pixel_range)


def _opened(value: Any, pixel_range: tuple[float, float] | None) -> Image.Image:
    if isinstance(value, Image.Image):
        _check(value)
        return value
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if value is None:
        raise _bad("empty", "there are neither bytes nor a path")
    if isinstance(value, (str, os.PathLike)):
        value = _read(Path(value))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _open_bytes(bytes(value))
    if isinstance(value, (list, tuple, np.ndarray)):
        return _from_pixels(value, pixel_range)
    raise _bad("not an image", f"a value of type {type(value).__name__} is neither bytes, a path nor pixels")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise _bad("missing", f"there is no file {str(path)!r}") from None
    except OSError as error:
        raise _bad("unreadable", f"{str(path)!r} cannot be read ({error})") from error


def _open_bytes(content: bytes) -> Image.Image:
    if not content:
        raise _bad("empty", "it has 0 bytes")
    if content.startswith(JXL_STARTS) and "JXL" in readable_formats():
        _check_jxl(content)
    with pillow_errors():
        try:
            image: Image.Image = Image.open(io.BytesIO(content), formats=readable_formats())
        except UnidentifiedImageError:
            _refuse_unidentified(content)
            raise
        except Image.DecompressionBombError:
            if not content.startswith(JPEG_START):
                raise
            image = JpegImagePlugin.JpegImageFile(io.BytesIO(content))
    _check(image)
    return image


def _refuse_unidentified(content: bytes) -> None:
    """Name the package, or the format, of content that no format is found for, where it has any."""
    if (package := package_for_bytes(content)) is not None:
        raise _bad("without a decoder", f"it needs the package {package}") from None
    if (kind := foreign_format(content)) is not None:
        raise _of_another_format(kind) from None


def _of_another_format(kind: str | None) -> BadImageError:
    return _bad(
        "of another format", f"it looks like {kind}, and those that are read are {', '.join(readable_formats())}"
    )


def _check(image: Image.Image) -> None:
    """Refuse an image that is opened, but not decoded, if it is of another format or would take too much memory."""
    if not isinstance(image, ImageFile.ImageFile):
        return
    if image.format not in (*FORMATS, "MPO") and (image.tile or isinstance(image, ImageFile.StubImageFile)):
        raise _of_another_format(image.format)
    _check_memory(_memory(image, 8 if _is_draftable(image) else 1), image.size)


def _check_jxl(content: bytes) -> None:
    size = jxl_size(content)
    if size is None:
        raise _bad("truncated", "its header has no size")
    _check_memory((4 + DECODERS["JXL"]) * size[0] * size[1], size)


def _check_memory(needed: float, size: tuple[int, int]) -> None:
    limit = _memory_limit()
    if needed > limit:
        raise _bad(
            "too large", f"{size[0]} x {size[1]} pixels take {needed / 1e6:.0f} MB, more than {limit / 1e6:.0f} MB"
        )


def _memory(image: Image.Image, scale: int = 1) -> float:
    """Bytes that an image takes while it is decoded and converted to RGB, if a JPEG at 1 / scale of its resolution."""
    pixels = image.width * image.height
    size = 1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;16") else 4
    converted = 0 if image.mode == "RGB" else 8 if "transparency" in image.info else 4
    # A PNG without EXIF data before its pixels would be decoded to look behind them.
    may_turn = image.format != "PNG" or "exif" in image.info
    turned = size if may_turn and _is_rotated(image) else 0
    decoder = PROGRESSIVE if image.info.get("progressive") else DECODERS.get(image.format or "", 0)
    return pixels * decoder + pixels / scale**2 * (size + converted + turned)


def _memory_limit() -> float:
    """Bytes of the largest RGB image, at 4 a pixel, that Pillow does not refuse to open."""
    return 4 * 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else math.inf


def _from_pixels(value: Any, pixel_range: tuple[float, float] | None) -> Image.Image:
    try:
        pixels = np.asarray(value)
    except ValueError as error:
        raise _bad("not an image", f"its rows differ in length ({error})") from None
    if pixels.size == 0:
        raise _bad("empty", f"its shape is {pixels.shape}")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    colour = pixels.ndim == 3 and pixels.shape[2] in (3, 4)
    if not (colour or pixels.ndim == 2) or pixels.dtype.kind not in "buif":
        shape = f"pixels of shape {pixels.shape} and type {pixels.dtype}"
        raise _bad("not an image", f"{shape} are not (height, width) or (height, width, 3)")
    if pixels.dtype == np.uint8:
        return Image.fromarray(pixels)
    return Image.fromarray(
        _eight_bits(_rows_of(pixels), pixels.shape, f"type {pixels.dtype}", pixels.dtype, pixel_range)
    )


def _rows_of(pixels: np.ndarray) -> Callable[[int, int], np.ndarray]:
    return lambda top, bottom: pixels[top:bottom]


def _eight_bits(
    band: Callable[[int, int], np.ndarray],
    shape: tuple[int, ...],
    what: str,
    kind: np.dtype,
    pixel_range: tuple[float, float] | None,
) -> np.ndarray:
    """Scale pixels to uint8 by their range, which is that of their `kind` if none is given, a band of rows at a time.

    Args:
        band: gives the rows from one number to before another.
        shape: of all pixels, (height, width) or (height, width, channels).
        what: the pixels, in words.
    """
    low, high = pixel_range or (0, 65535 if kind == np.uint16 else 1 if kind.kind in "bf" else 255)
    if pixel_range is None and kind.kind != "b":
        _say_range(what, high)
    scaled, rows = np.empty(shape, np.uint8), max(1, BAND // math.prod(shape[1:]))
    for top in range(0, shape[0], rows):
        pixels = band(top, min(top + rows, shape[0]))
        least, most = np.fmin.reduce(pixels, axis=None), np.fmax.reduce(pixels, axis=None)  # beside what is no number
        if kind.kind != "b" and (least < low or most > high):
            raise _bad("out of range", f"its pixels of {what} are {least:g} to {most:g}, not {low:g} to {high:g}")
        if (low, high) == (0, 65535):
            scaled[top : top + rows] = pixels // 256
        else:
            with np.errstate(invalid="ignore"):  # some that are no numbers are meant to be told of
                exact = (pixels - np.float64(low)) * (255.0 / (high - low))
            scaled[top : top + rows] = np.nan_to_num(exact).clip(0, 255)
    return scaled


@cache
def _say_range(what: str, high: float) -> None:
    logger.warning("Pixels of %s are read as 0 for black and %g for white; `pixel_range` says otherwise.", what, high)


def to_rgb(image: Image.Image, reduction: float = 1.0) -> Image.Image:
    """Decode an image, turn it as its EXIF orientation says, and convert it to RGB with 8 bits a channel.

    Args:
        image: from `open_image`. Where it was not decoded yet, it is afterwards.
        reduction: a JPEG may be decoded at a half, a quarter or an eighth of its resolution, 1 / reduction at the
            least. One over Pillow's limit of pixels is decoded at what brings it below, whatever the reduction.

    Raises:
        BadImageError: the encoded image is damaged or too large.
    """
    with pillow_errors():
        _draft(image, reduction)
        image.load()
        if _is_rotated(image):
            image = ImageOps.exif_transpose(image)
        if image.mode == "RGB":
            return image
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # Pillow warns of the direct way
        return image.convert("RGB")


def _draft(image: Image.Image, reduction: float) -> None:
    """Let a JPEG be decoded smaller; any other image takes no notice."""
    if not _is_draftable(image):
        return
    width, height = image.size
    scale = max((scale for scale in (2, 4, 8) if scale <= reduction), default=1)
    while scale < 8 and _memory(image, scale) > _memory_limit():
        scale *= 2
    if scale > 1:
        image.draft("RGB", (width // scale, height // scale))


def _is_draftable(image: Image.Image) -> bool:
    """Whether the image is a JPEG, not yet decoded."""
    return isinstance(image, JpegImagePlugin.JpegImageFile) and bool(image.tile)


def is_reducible(image: Image.Image) -> bool:
    """Whether `to_rgb` can decode the image at less than its resolution: a JPEG, not yet decoded, not rotated."""
    return _is_draftable(image) and not _is_rotated(image)


def jpeg_pixels(image: Image.Image) -> Tensor | None:
    """Decode a JPEG that `open_image` opened by simplejpeg, which is faster, to the pixels of `to_rgb`.

    Returns:
        uint8 (3, height, width); None for other images, for large ones, for damaged ones that Pillow is to judge, and
        where simplejpeg is not installed or would give other pixels.
    """
    if not (image.format == "JPEG" and image.mode == "RGB" and _is_draftable(image)):
        return None
    stream, small = getattr(image, "fp", None), image.width * image.height <= 4 * BAND
    if not (small and type(stream) is io.BytesIO and get_sampling(image) in SUBSAMPLINGS and _decoders_agree()):
        return None
    return _by_simplejpeg(stream.getvalue())


def _by_simplejpeg(content: bytes) -> Tensor | None:
    try:
        return torch.from_numpy(simplejpeg.decode_jpeg(content, "RGB")).permute(2, 0, 1)
    except ValueError:  # of anything that libjpeg-turbo warns of
        return None


@cache
def _decoders_agree() -> bool:
    """Whether simplejpeg is there and gives Pillow's pixels: both have libjpeg-turbo in their wheels."""
    if simplejpeg is None:
        return False
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8))
    for sampling in SUBSAMPLINGS:
        for progressive in (False, True):
            file = io.BytesIO()
            noise.save(file, "JPEG", quality=90, subsampling=sampling, progressive=progressive)
            pixels = _by_simplejpeg(file.getvalue())
            if pixels is None or not np.array_equal(pixels.permute(1, 2, 0), np.asarray(Image.open(file))):
                logger.warning("simplejpeg decodes to other pixels than Pillow here: it is not used.")
                return False
    return True


def _is_rotated(image: Image.Image) -> bool:
    """Whether the EXIF orientation asks for a turn or a flip; one that cannot be read asks for none."""
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return (
            False  # its decoder has turned it, and its EXIF data does not count, but in a JPEG that it is restored to
        )
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except Exception:  # of what kind, depends on what its data says
        return False


@contextmanager
def pillow_errors() -> Iterator[None]:
    """Turn what Pillow raises into a `BadImageError`, and keep it from warning of large images."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except (BadImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise what they like on damaged files
        unknown = isinstance(error, UnidentifiedImageError)  # it would name a buffer, at an address
        detail = "Pillow knows no format that begins like it" if unknown else f"{type(error).__name__}, {error}"
        raise _bad(_kind(error), detail) from error


def _kind(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return "too large"
    if isinstance(error, (SyntaxError, struct.error, EOFError, zlib.error)):
        return "truncated"
    told = str(error).lower()
    if isinstance(error, OSError) and ("truncated" in told or "broken" in told):
        return "truncated"
    return "unreadable"
