"""Random crop, flip, RandAugment and erasing as in timm's training transform, on pixels of 8 bits.

The policy and its distributions are timm's (`timm.data.create_transform`), and so is RandAugment's machinery.
What is slow in Pillow is computed otherwise, to the same levels or nearly: torch resizes; shears and translations
are interpolated along the one axis they move; and the noise of erasing is drawn from a table. NumPy compares, which
takes torch twenty times as long.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch import Tensor
from torch.nn import functional

from ..images import PLAIN_FILTERS
from .decoding import BAND, is_reducible, jpeg_pixels, pillow_errors, to_rgb


__all__ = ["Augmentation"]

RAND_AUGMENT = "rand-m9-mstd0.5-inc1-n2"  # as published; magnitude and deviation are set afterwards
RATIO = (3 / 4, 4 / 3)  # of the crop's width to its height


class Augmentation:
    """An image to uint8 pixels (3, height, width), cropped, flipped and distorted at random.

    Draws come from the global generators of `random` and of NumPy (`np.random`), not from torch's: whoever seeds
    these two repeats the result. Nothing else is kept from one call to the next.

    Args:
        size: height and width of the result in pixels.
        interpolation: filter of the resize, by Pillow's name in lower case. RandAugment's geometric operations use
            it too if it is bilinear, else they are bicubic: they know no others.
        antialias: widen the filter where the image shrinks; off as in OpenCV, of bilinear and bicubic filters only.
        mean, std: of the pixel values in 0..1, of the three channels. The mean fills what geometric operations
            leave bare; both describe the noise of erasing.
        crop_scale: range of the share of the image's area that the crop keeps.
        hflip: probability of a horizontal flip.
        rand_augment: magnitude of RandAugment, of 10; None for none. Two operations of fifteen, each applied with
            probability 0.5 at a normally distributed magnitude.
        rand_augment_std: its standard deviation.
        random_erasing: probability that a rectangle of 2 % to 33 % of the area is replaced by normal noise.
    """

    def __init__(
        self,
        size: tuple[int, int],
        interpolation: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        crop_scale: tuple[float, float] = (0.08, 1.0),
        hflip: float = 0.5,
        rand_augment: float | None = None,
        rand_augment_std: float = 0.5,
        random_erasing: float = 0.0,
        antialias: bool = True,
    ):
        self.size, self.interpolation, self.crop_scale, self.hflip = (
            (size[0], size[1]),
            interpolation,
            crop_scale,
            hflip,
        )
        self.random_erasing, self.resample = random_erasing, str_to_pil_interp(interpolation)
        self.antialias = antialias
        self.rand_augment: RandAugment | None = None
        if rand_augment is not None:
            self.rand_augment = _rand_augment(rand_augment, rand_augment_std, mean, interpolation != "bilinear")
        self.noise = _noise(mean, std)

    def __call__(self, image: Image.Image) -> Tensor:
        """Augment an image, best one that is opened but not decoded: a large JPEG is decoded no larger than needed.

        Raises:
            BadImageError: the encoded image is damaged or too large.
        """
        pixels = self._crop(image)
        if random.random() < self.hflip:
            pixels = pixels.flip(2)
        if self.rand_augment is not None:
            pixels = self.rand_augment(pixels)
        return self._erase(pixels.contiguous())

    def _crop(self, image: Image.Image) -> Tensor:
        if not is_reducible(image):
            image = to_rgb(image)  # turned upright before the crop is drawn
        full_width, full_height = image.size
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, self.crop_scale, RATIO)
        reduction = min(height / self.size[0], width / self.size[1]) if self.antialias else 1.0
        pixels = jpeg_pixels(image) if reduction < 2 and self.interpolation in PLAIN_FILTERS else None
        if pixels is None:
            image = to_rgb(image, reduction)  # decoding at less smooths
        rows, columns = _span(top, height, full_height, image.height), _span(left, width, full_width, image.width)
        if pixels is not None:
            return self._interpolate(pixels[:, slice(*rows), slice(*columns)], self.size)
        with pillow_errors():
            return self._resize(image, (columns[0], rows[0], columns[1], rows[1]))

    def _resize(self, image: Image.Image, box: tuple[int, int, int, int]) -> Tensor:
        """The part of an image in a box (left, top, right, bottom), resized."""
        if self.interpolation not in PLAIN_FILTERS:
            return _to_tensor(image.crop(box).resize((self.size[1], self.size[0]), self.resample))
        left, top, right, bottom = box
        rows = max(1, BAND // (right - left)) if self.antialias else bottom - top
        if rows >= bottom - top:
            return self._interpolate(_channels(image.crop(box)), self.size)
        # torch resizes along rows first, and so a large image is narrowed band by band, to the same pixels.
        starts = range(top, bottom, rows)
        bands = (image.crop((left, start, right, min(start + rows, bottom))) for start in starts)
        narrow = torch.cat([self._interpolate(_channels(band), (band.height, self.size[1])) for band in bands], 1)
        return self._interpolate(narrow, self.size)

    def _interpolate(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        return functional.interpolate(pixels[None], size, mode=self.interpolation, antialias=self.antialias)[0]

    def _erase(self, pixels: Tensor) -> Tensor:
        """Replace a rectangle by noise, with probability, area and aspect as in timm's `RandomErasing`."""
        if random.random() >= self.random_erasing:
            return pixels
        height, width = self.size
        for _ in range(10):
            area = random.uniform(0.02, 1 / 3) * height * width
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                top, left = random.randint(0, height - h), random.randint(0, width - w)
                ranks = np.frombuffer(np.random.bytes(3 * h * w * 2), dtype=np.uint16).reshape(3, h, w)
                noise = np.stack([levels[rank] for levels, rank in zip(self.noise, ranks, strict=True)])
                pixels[:, top : top + h, left : left + w] = torch.from_numpy(noise)
                break
        return pixels


def _span(start: int, length: int, full: int, actual: int) -> tuple[int, int]:
    """Where a part of an axis of `full` pixels begins and ends if `actual` were decoded; at least one pixel."""
    first = min(round(start * actual / full), actual - 1)
    return first, max(round((start + length) * actual / full), first + 1)


def _noise(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Levels 0..255 of normal noise by channel and rank (3, 65536): a random rank gives a random level."""
    normal = torch.special.ndtri((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536)
    levels = 255 * (torch.tensor(mean)[:, None] + torch.tensor(std)[:, None] * normal)
    return levels.round().clamp(0, 255).to(torch.uint8).numpy()


def _rand_augment(magnitude: float, deviation: float, mean: tuple[float, ...], bicubic: bool) -> RandAugment:
    """timm's RandAugment, on uint8 tensors (3, height, width)."""
    resample = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    options = {"img_mean": tuple(min(255, round(255 * value)) for value in mean), "interpolation": resample}
    augment = rand_augment_transform(RAND_AUGMENT, options)
    for operation in augment.ops:
        operation.magnitude, operation.magnitude_std = magnitude, deviation
        operation.aug_fn = OPERATIONS[operation.name]
    return augment


def _channels(image: Image.Image) -> Tensor:
    """Pixels (3, height, width) as torch resizes them fastest, their channels side by side in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(band) for band in image.split()]))


def _looked_up(pixels: Tensor, table_of: Callable[[np.ndarray], np.ndarray | None]) -> Tensor:
    """Each channel's levels through a table (256,) of its own; None leaves it as it is. A translation of bytes is the fastest."""
    channels = pixels.contiguous().numpy()
    found = [(channel, table_of(channel)) for channel in channels]
    new = b"".join(x.tobytes() if t is None else x.tobytes().translate(t.astype(np.uint8).tobytes()) for x, t in found)
    return torch.frombuffer(bytearray(new), dtype=torch.uint8).view(pixels.shape)


def _auto_contrast(pixels: Tensor, **options: Any) -> Tensor:
    """Each channel from its least and largest level to 0 and 255, as Pillow rounds: towards 0."""

    def table(channel: np.ndarray) -> np.ndarray | None:
        low, high = int(channel.min()), int(channel.max())
        if high <= low:
            return None
        scale = 255.0 / (high - low)
        return np.clip((np.arange(256) * scale - low * scale).astype(int), 0, 255)

    return _looked_up(pixels, table)


def _equalize(pixels: Tensor, **options: Any) -> Tensor:
    """Each channel's levels equally often, as Pillow counts: those below a level, in steps of a 255th of all but the largest's."""

    def table(channel: np.ndarray) -> np.ndarray | None:
        counts = np.array(Image.fromarray(channel).histogram())  # NumPy's takes three times as long
        step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
        return np.minimum((step // 2 + counts.cumsum() - counts) // step, 255) if step else None

    return _looked_up(pixels, table)


def _invert(pixels: Tensor, **options: Any) -> Tensor:
    return 255 - pixels


def _solarize(pixels: Tensor, threshold: int, **options: Any) -> Tensor:
    if threshold > 255:
        return pixels
    return pixels ^ _ones(pixels.numpy() >= threshold) * 255  # several times as fast as torch.where


def _solarize_add(pixels: Tensor, added: int, **options: Any) -> Tensor:
    return pixels + _ones(pixels.numpy() < 128) * added  # at most 110


def _ones(where: np.ndarray) -> Tensor:
    """1 where it is so, else 0, as uint8."""
    return torch.from_numpy(where.view(np.uint8))


def _posterize(pixels: Tensor, bits_to_keep: int, **options: Any) -> Tensor:
    return pixels & (256 - 2 ** (8 - bits_to_keep))  # Pillow 13 refuses the 0 bits of magnitude 10


def _brightness(pixels: Tensor, factor: float, **options: Any) -> Tensor:
    return _whole(pixels * factor)


def _luma(pixels: Tensor) -> Tensor:
    """Brightness (height, width) in whole levels, by the weights of ITU-R 601-2 as in Pillow."""
    return torch.tensordot(torch.tensor([0.299, 0.587, 0.114]), pixels.float(), 1).round_()


def _contrast(pixels: Tensor, factor: float, **options: Any) -> Tensor:
    return _whole(torch.lerp(_luma(pixels).mean().round(), pixels.float(), factor))


def _color(pixels: Tensor, factor: float, **options: Any) -> Tensor:
    return _whole(torch.lerp(_luma(pixels), pixels.float(), factor))


def _sharpness(pixels: Tensor, factor: float, **options: Any) -> Tensor:
    """Away from, or towards, the mean of the pixel five times and its eight neighbours; edges stay."""
    sharp = pixels.float()
    rows = sharp[:, :-2] + sharp[:, 1:-1] + sharp[:, 2:]
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = sharp.clone()
    smooth[:, 1:-1, 1:-1].mul_(4).add_(around).div_(13).round_()
    return _whole(torch.lerp(smooth, sharp, factor))


def _rotate(pixels: Tensor, degrees: float, fillcolor: tuple[int, ...], resample: int) -> Tensor:
    """Counter-clockwise about the centre. torch's bicubic kernel has a = -0.75, and Pillow's -1."""
    height, width = pixels.shape[1:]
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = torch.arange(0.5, width) - width / 2, (torch.arange(0.5, height) - height / 2)[:, None]
    grid = torch.empty(1, height, width, 2)  # of positions in the source, -1 to 1 from edge to edge
    torch.sub(x * (cosine * 2 / width), y * (sine * 2 / width), out=grid[0, ..., 0])
    torch.add(x * (sine * 2 / height), y * (cosine * 2 / height), out=grid[0, ..., 1])
    mode = "bilinear" if resample == Image.Resampling.BILINEAR else "bicubic"
    rotated = functional.grid_sample(pixels[None].float(), grid, mode, padding_mode="border", align_corners=False)[0]
    across, down = np.abs(grid[0, ..., 0].numpy()), np.abs(grid[0, ..., 1].numpy())
    return _filled(rotated, (across < 1) & (down < 1), fillcolor)


def _shear_x(pixels: Tensor, factor: float, **options: Any) -> Tensor:
    return _shift_rows(pixels, factor * np.arange(0.5, pixels.shape[1]), **options)


def _shear_y(pixels: Tensor, factor: float, **options: Any) -> Tensor:
    return _shear_x(pixels.transpose(1, 2), factor, **options).transpose(1, 2)


def _translate_x(pixels: Tensor, share: float, **options: Any) -> Tensor:
    return _shift_rows(pixels, np.full(pixels.shape[1], share * pixels.shape[2]), **options)


def _translate_y(pixels: Tensor, share: float, **options: Any) -> Tensor:
    return _translate_x(pixels.transpose(1, 2), share, **options).transpose(1, 2)


def _shift_rows(pixels: Tensor, shifts: np.ndarray, fillcolor: tuple[int, ...], resample: int) -> Tensor:
    """Each row y sampled `shifts[y]` pixels further right, as by Pillow's affine transform.

    Args:
        pixels: uint8 (3, height, width).
        shifts: float64 (height,).
        fillcolor: of what lies outside the image.
        resample: Pillow's bicubic or bilinear filter.
    """
    width = pixels.shape[2]
    whole = np.floor(shifts).astype(int)
    weights = torch.from_numpy(_weights(shifts - whole, resample)).float()[..., None]
    taps = torch.from_numpy(_windows(pixels.numpy(), whole)).float()
    shifted = taps[..., :width] * weights[0]
    for tap in (1, 2, 3):
        shifted.addcmul_(taps[..., tap : tap + width], weights[tap])
    position = np.arange(0.5, width, dtype=np.float32) + shifts.astype(np.float32)[:, None]
    return _filled(shifted, (position >= 0) & (position < width), fillcolor)


def _filled(pixels: Tensor, inside: np.ndarray, fillcolor: tuple[int, ...]) -> Tensor:
    """Pixels to uint8, with the fill colour where they are not inside; products are faster than `torch.where`."""
    shown, fill = _ones(inside), torch.tensor(fillcolor, dtype=torch.uint8)[:, None, None]
    return _whole(pixels) * shown + fill * (1 - shown)


def _whole(pixels: Tensor) -> Tensor:
    """Floats to uint8, cut off as Pillow does it; NumPy's conversion is the faster one."""
    return torch.from_numpy(pixels.clamp_(0, 255).numpy().astype(np.uint8))


def _weights(fraction: np.ndarray, resample: int) -> np.ndarray:
    """Weights (4, ...) of the two neighbours on either side; Pillow's affine bicubic kernel has a = -1."""
    d = fraction
    if resample == Image.Resampling.BILINEAR:
        return np.stack([0 * d, 1 - d, d, 0 * d])
    return np.stack([-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2])


def _windows(pixels: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Of each row y, width + 3 pixels from `starts[y]` - 1 on; the edge's pixels go on beyond it."""
    channels, height, width = pixels.shape
    margin = int(np.abs(starts).max()) + 2
    padded = np.empty((channels, height, width + 2 * margin), dtype=np.uint8)
    padded[..., :margin] = pixels[..., :1]
    padded[..., margin : margin + width] = pixels
    padded[..., margin + width :] = pixels[..., -1:]
    windows = np.lib.stride_tricks.sliding_window_view(padded, width + 3, axis=2)
    return windows[:, np.arange(height), starts + margin - 1]


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "PosterizeIncreasing": _posterize,
    "ColorIncreasing": _color,
    "ContrastIncreasing": _contrast,
    "BrightnessIncreasing": _brightness,
    "SharpnessIncreasing": _sharpness,
    "Rotate": _rotate,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
}
