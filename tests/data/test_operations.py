"""RandAugment operation by operation beside timm's in Pillow, over random images and magnitudes.

`python tests/data/test_operations.py` prints how far the levels are apart, of 0 to 255; the mean is that of the worst image.
"""

import random
import sys

import numpy as np
import torch
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from scalekd_hf.data import augmentation as module


MEAN = (0.485, 0.456, 0.406)
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# Levels that any pixel may differ by, and that pixels do on average, where the image is smooth and where it is noise. Pixels on
# the edge of what is filled are left out. Rotations of noise differ by the kernel: torch's bicubic has a = -0.75, and Pillow's -1.
ALONG = {"smooth": (1, 1), "noise": (1, 1)}  # a shift of 1e-14 pixels cuts off what is a hair below a whole level
BOUNDS = {
    "Rotate": {"smooth": (6, 1.5), "noise": (40, 7.0)},
    **dict.fromkeys(["ShearX", "ShearY", "TranslateXRel", "TranslateYRel"], ALONG),
}
EXACT = ["AutoContrast", "Equalize", "Invert", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd"]
ROUNDED = ["ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"]
OPERATIONS = [*EXACT, *ROUNDED, *BOUNDS]


def picture(kind, width, height, seed):
    """Waves of a few pixels or more, or noise, of 8 bits."""
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    rates, phases = rng.uniform(0, 0.35, (2, 3)), rng.uniform(0, 6, 3)
    waves = np.sin(x[..., None] * rates[0] + y[..., None] * rates[1] + phases)
    return (127.5 + rng.uniform(10, 127) * waves).astype(np.uint8)


def pair(name, filter_name, magnitude):
    """The same operation here and in timm, at one magnitude."""
    ours = module._rand_augment(magnitude, 0.0, MEAN, filter_name == "bicubic").ops
    fill = tuple(min(255, round(255 * value)) for value in MEAN)
    theirs = rand_augment_transform(module.RAND_AUGMENT, {"img_mean": fill, "interpolation": FILTERS[filter_name]}).ops
    found = [next(operation for operation in operations if operation.name == name) for operations in (ours, theirs)]
    for operation in found:
        operation.prob, operation.magnitude, operation.magnitude_std = 1.0, magnitude, 0.0
    if name == "PosterizeIncreasing":  # Pillow refuses the 0 bits of magnitude 10
        found[1].aug_fn = lambda image, bits, **_: image.point(lambda value: value & (256 - 2 ** (8 - bits)))
    return found


def differences(name, filter_name, magnitude, pixels, seed):
    """Levels (height, width, 3), sign removed, between the two; 0 on pixels that only one of them fills."""
    ours, theirs = pair(name, filter_name, magnitude)
    random.seed(seed)
    made = ours(torch.from_numpy(pixels).permute(2, 0, 1).contiguous()).permute(1, 2, 0).numpy().astype(int)
    random.seed(seed)
    expected = np.asarray(theirs(Image.fromarray(pixels))).astype(int)
    apart = np.abs(made - expected)
    fill = np.array([min(255, round(255 * value)) for value in MEAN])
    edge = (made == fill).all(2) != (expected == fill).all(2)
    assert edge.sum() <= 2 * max(edge.shape)
    return np.where(edge[..., None], 0, apart)


def test_every_operation_is_compared():
    assert sorted(OPERATIONS) == sorted(operation.name for operation in module._rand_augment(9, 0.5, MEAN, True).ops)


@examples(300)
@given(
    st.sampled_from(OPERATIONS),
    st.sampled_from(list(FILTERS)),
    st.floats(0, 10),
    st.sampled_from(["smooth", "noise"]),
    st.integers(8, 90),
    st.integers(8, 90),
    st.integers(0, 2**32 - 1),
)
def test_operations_give_timms_levels(name, filter_name, magnitude, kind, width, height, seed):
    apart = differences(name, filter_name, magnitude, picture(kind, width, height, seed), seed)
    most, mean = BOUNDS[name][kind] if name in BOUNDS else (0, 0) if name in EXACT else (1, 1)
    assert apart.max() <= most and apart.mean() <= mean


def main(images=400):
    rng = np.random.default_rng(0)
    sys.stdout.write(f"{'':30}{'equal':>8}{'1 apart':>9}{'mean':>8}{'most':>6}\n")
    for name in OPERATIONS:
        for kind in ("smooth", "noise"):
            found = []
            for seed in range(images):
                pixels = picture(kind, *rng.integers(8, 91, 2), seed)
                found.append(differences(name, "bicubic", rng.uniform(0, 10), pixels, seed).ravel())
            levels, mean = np.concatenate(found), max(part.mean() for part in found)
            shares = f"{(levels == 0).mean():>8.2%}{(levels == 1).mean():>9.2%}"
            sys.stdout.write(f"{name:22}{kind:8}{shares}{mean:>8.3f}{levels.max():>6}\n")


if __name__ == "__main__":
    main()
