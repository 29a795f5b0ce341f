"""Decoding of every kind of image and damage, and augmentation by timm's policy."""

import io
import math
import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from timm.data import create_transform
from timm.data.auto_augment import NAME_TO_OP, RandAugment
from timm.data.transforms import RandomResizedCropAndInterpolation

from scalekd_hf.data import augmentation as module
from scalekd_hf.data.augmentation import Augmentation
from scalekd_hf.data.decoding import BadImageError, open_image, to_rgb


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = (124, 116, 104)


def scene(width=120, height=90):
    """A smooth image with large and small waves, different in each channel."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = [np.sin(9 * x + 4 * y), np.cos(7 * y - 3 * x), np.sin(11 * x * y)]
    return Image.fromarray((127 + 100 * np.stack(waves, axis=2)).astype(np.uint8))


def encoded(image, form="JPEG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def augmentation(size=(48, 64), interpolation="bicubic", **options):
    return Augmentation(size, interpolation, MEAN, STD, **options)


def seed(number):
    random.seed(number)
    np.random.seed(number)


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def difference(pixels, image):
    """Levels between a tensor (3, height, width) and a PIL image, sign removed."""
    return (pixels.int() - tensor(image).int()).abs()


# Decoding


def sixteen_bits():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    return ramp, (ramp // 256).astype(np.uint8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_a_png_of_any_mode_becomes_what_pillow_makes_of_it(mode):
    content = encoded(scene().convert(mode), "PNG")
    expected = Image.open(io.BytesIO(content)).convert("RGB")
    assert np.array_equal(to_rgb(open_image(content)), expected)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB", "YCbCr"])
def test_a_jpeg_of_any_mode_becomes_what_pillow_makes_of_it(mode):
    content = encoded(scene().convert(mode))
    expected = Image.open(io.BytesIO(content)).convert("RGB")
    assert np.array_equal(to_rgb(open_image(content)), expected)


def test_a_palette_with_transparency_loses_it_without_a_warning():
    content = encoded(scene().convert("P"), "PNG", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_rgb(open_image(content)).mode == "RGB"


def test_sixteen_bits_keep_their_range():
    ramp, expected = sixteen_bits()
    wide = Image.fromarray(ramp.astype(np.int32), "I")
    for value in (encoded(Image.fromarray(ramp), "PNG"), encoded(Image.fromarray(ramp), "TIFF"), ramp, wide):
        assert np.array_equal(np.asarray(to_rgb(open_image(value)))[..., 0], expected)


@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 1), (8, 6, 3), (8, 6, 4)])
def test_pixels_come_as_arrays_or_nested_lists(shape):
    pixels = np.arange(math.prod(shape)).reshape(shape) % 256
    for value in (pixels.astype(np.uint8), pixels.tolist()):
        assert np.array_equal(np.asarray(to_rgb(open_image(value)))[..., 0], pixels.reshape(8, 6, -1)[..., 0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    for form in ("JPEG", "PNG", "TIFF"):
        content = encoded(scene(), form, exif=exif)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        assert np.array_equal(to_rgb(open_image(content)), expected)


def test_a_row_gives_bytes_or_a_path(tmp_path):
    content = encoded(scene())
    (tmp_path / "a.jpg").write_bytes(content)
    path = str(tmp_path / "a.jpg")
    values = [content, path, {"bytes": content, "path": None}, {"bytes": None, "path": path}, {"path": path}]
    for value in values:
        image = open_image(value)
        assert image.size == (120, 90) and image.tile  # not decoded yet
    assert open_image(image) is image


def half(form, **options):
    content = encoded(scene(), form, **options)
    return content[: len(content) // 2]


DAMAGES = [
    (b"", "empty"),
    (None, "empty"),
    ({"bytes": b"", "path": "a.jpg"}, "empty"),
    ({"bytes": None, "path": None}, "empty"),
    (np.zeros((0, 4)), "empty"),
    ("/nowhere/image.jpg", "missing"),
    ({"bytes": None, "path": "/nowhere/image.jpg"}, "missing"),
    ("/", "unreadable"),
    (b"<html>404 Not Found</html>" * 9, "not an image"),
    (encoded(scene())[:12], "truncated"),
    ([[1, 2], [3]], "not an image"),
    (np.zeros((2, 3, 4, 5)), "not an image"),
    (17, "not an image"),
    (half("JPEG"), "truncated"),
    (half("JPEG", progressive=True), "truncated"),
    (half("PNG"), "truncated"),
    (half("GIF"), "truncated"),
    (half("BMP"), "truncated"),
]


@pytest.mark.parametrize(("value", "kind"), DAMAGES)
def test_each_kind_of_damage_is_told_from_the_others(value, kind):
    for decode in (to_rgb, augmentation()):
        with pytest.raises(BadImageError, match=kind) as caught:
            decode(open_image(value))
        assert caught.value.kind == kind
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_an_error_survives_the_way_out_of_a_worker():
    import pickle

    with pytest.raises(BadImageError) as caught:
        open_image(b"")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.kind, str(again)) == ("empty", str(caught.value))


def test_a_large_image_is_decoded_without_a_warning():
    content = encoded(Image.new("RGB", (12000, 9000), (200, 30, 60)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = open_image(content)
        pixels = augmentation(crop_scale=(0.5, 1.0))(image)
    assert image.size == (1500, 1125)
    assert (pixels.float().mean((1, 2)) - torch.tensor([200.0, 30.0, 60.0])).abs().max() < 2


def test_a_large_image_that_is_no_jpeg_is_cropped_without_a_warning(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        augmentation(crop_scale=(1.0, 1.0))(open_image(encoded(scene(200, 150), "PNG")))


def test_beyond_pillows_limit_only_a_plain_jpeg_can_be_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    large = scene(400, 300)
    for content in (encoded(large, "PNG"), encoded(large, progressive=True)):
        with pytest.raises(BadImageError) as caught:
            open_image(content)
        assert caught.value.kind == "too large"
    assert to_rgb(open_image(encoded(large))).size == (200, 150)
    assert augmentation()(open_image(encoded(large))).shape == (3, 48, 64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(BadImageError, match="too large"):
        open_image(encoded(large))


# Crop, flip and erasing


def test_the_crop_is_the_one_that_timm_draws_and_pillow_resizes():
    augment = augmentation(hflip=0)
    for number in range(40):
        image = scene(200 + number, 150)
        seed(number)
        pixels = augment(image)
        seed(number)
        timm = RandomResizedCropAndInterpolation((48, 64), (0.08, 1), interpolation="bicubic")(image)
        assert difference(pixels, timm).max() <= 2


@pytest.mark.parametrize("interpolation", ["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"])
def test_every_filter_resizes_as_pillow_does(interpolation):
    seed(1)
    pixels = augmentation(interpolation=interpolation, hflip=0)(scene())
    seed(1)
    timm = RandomResizedCropAndInterpolation((48, 64), (0.08, 1), interpolation=interpolation)(scene())
    assert difference(pixels, timm).max() <= 2


def test_a_large_photograph_is_decoded_smaller_and_looks_the_same():
    content = encoded(scene(1600, 1200), quality=95)
    augment, sizes = augmentation((260, 340), hflip=0), set()
    for number in range(12):
        seed(number)
        image = open_image(content)
        pixels = augment(image)
        sizes.add(image.size)
        seed(number)
        whole = augment(to_rgb(open_image(content)))
        assert (pixels.int() - whole.int()).abs().max() <= 6
    assert sizes == {(1600, 1200), (800, 600), (400, 300)}  # a small crop needs the whole resolution


def test_half_of_the_images_are_flipped():
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], (90, 1, 3)))
    for hflip in (0.0, 0.5, 1.0):
        augment = augmentation((16, 16), hflip=hflip)
        seed(0)
        flips = sum(bool(pixels[0, 0, 0] > pixels[0, 0, -1]) for pixels in (augment(ramp) for _ in range(400)))
        assert abs(flips / 400 - hflip) < 0.08


def test_the_area_erased_and_its_noise_are_timms():
    from timm.data.random_erasing import RandomErasing

    grey = Image.new("RGB", (64, 64), (1, 1, 1))
    augment, timm = augmentation((64, 64), random_erasing=0.25), RandomErasing(0.25, mode="pixel", device="cpu")
    seed(0)
    erased = [(pixels != 1).any(0) for pixels in (augment(grey) for _ in range(1500))]
    expected = [(timm(torch.ones(3, 64, 64)) != 1).any(0) for _ in range(1500)]
    for masks in (erased, expected):
        shares = torch.stack(masks).float().mean((1, 2))
        assert abs((shares > 0).float().mean() - 0.25) < 0.04
        assert abs(shares[shares > 0].mean() - 0.165) < 0.015
    noise = torch.cat([pixels[:, m] for pixels, m in ((p, (p != 1).any(0)) for p in map(augment, [grey] * 200))], 1)
    clipped = (torch.randn(3, 10**5) * torch.tensor(STD)[:, None] + torch.tensor(MEAN)[:, None]).clamp(0, 1) * 255
    assert (noise.float().mean(1) - clipped.mean(1)).abs().max() < 1.5
    assert (noise.float().std(1) - clipped.std(1)).abs().max() < 1.5


# RandAugment


def options(resample):
    return {"fillcolor": FILL, "resample": resample}


GEOMETRY = {
    "Rotate": [29.3, -13.0, 0.0],
    "ShearX": [0.3, -0.27, 0.01],
    "ShearY": [0.3, -0.27, 0.01],
    "TranslateXRel": [0.45, -0.4049, 0.0],
    "TranslateYRel": [0.45, -0.4049, 0.0],
}


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize("name", list(GEOMETRY))
def test_geometric_operations_move_pixels_as_pillow_does(name, resample):
    for size in ((120, 90), (50, 131)):
        for level in GEOMETRY[name]:
            image = scene(*size)
            expected = NAME_TO_OP[name](image, level, **options(resample))
            levels = difference(module.OPERATIONS[name](tensor(image), level, **options(resample)), expected)
            assert (levels > 2).float().mean() < 1e-3  # a pixel on the very edge may be filled or not
            assert levels.float().mean() < 0.3


COLOUR = {
    "AutoContrast": [()],
    "Equalize": [()],
    "Invert": [()],
    "SolarizeIncreasing": [(0,), (26,), (256,)],
    "SolarizeAdd": [(0,), (110,)],
    "PosterizeIncreasing": [(1,), (4,)],
    "ColorIncreasing": [(0.1,), (1.81,)],
    "ContrastIncreasing": [(0.1,), (1.81,)],
    "BrightnessIncreasing": [(0.1,), (1.81,)],
    "SharpnessIncreasing": [(0.1,), (1.81,)],
}


@pytest.mark.parametrize("name", list(COLOUR))
def test_colour_operations_give_pillows_levels(name):
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    narrow = (noise % 7 + (3, 100, 248)).astype(np.uint8)  # seven levels
    flat = Image.new("RGB", (9, 8), (0, 7, 255))
    for image in (scene(), Image.fromarray(noise), Image.fromarray(narrow), flat):
        for arguments in COLOUR[name]:
            expected = NAME_TO_OP[name](image, *arguments, **options(3))
            assert difference(module.OPERATIONS[name](tensor(image), *arguments, **options(3)), expected).max() <= 1


def test_every_operation_that_is_computed_otherwise_is_compared_with_pillow():
    assert set(module.OPERATIONS) == {*GEOMETRY, *COLOUR}


def timm_transform(size, magnitude):
    transform = create_transform(
        (3, *size), is_training=True, auto_augment=module.RAND_AUGMENT, interpolation="bicubic", mean=MEAN, std=STD
    )
    (augment,) = (step for step in transform.transforms if isinstance(step, RandAugment))
    for operation in augment.ops:
        operation.magnitude = magnitude
        if operation.name.startswith("Posterize"):
            operation.aug_fn = lambda image, bits, **_: image.point(lambda value: value & (256 - 2 ** (8 - bits)))
    return augment


@pytest.mark.parametrize("magnitude", [2.5, 9, 10])
def test_the_same_draws_give_timms_images(magnitude):
    image, timm = scene(), timm_transform((90, 120), magnitude)
    ours = augmentation(rand_augment=magnitude).rand_augment
    for number in range(150):
        seed(number)
        expected = timm(image)
        seed(number)
        assert (difference(ours(tensor(image)), expected) > 24).float().mean() < 0.01


def test_magnitude_ten_posterizes_to_no_bits():
    pixels = module._posterize(tensor(scene()), 0)
    assert pixels.max() == 0
    augment = augmentation(rand_augment=10)
    for number in range(60):
        seed(number)
        augment(scene())


# Reproducibility and odd shapes


def test_the_same_seeds_give_the_same_pixels_whatever_torch_draws():
    augment, content = augmentation(rand_augment=9, random_erasing=0.5), encoded(scene())
    for number in range(30):
        seed(number)
        first = augment(open_image(content))
        torch.rand(3)
        augment(open_image(content))  # leaves nothing behind
        seed(number)
        state = torch.random.get_rng_state()
        assert torch.equal(augment(open_image(content)), first)
        assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (1, 1), (3, 50)])
@pytest.mark.parametrize("image_size", [(1, 1), (2, 1), (1, 3000), (3000, 1), (3000, 7), (64, 48)])
def test_odd_shapes_come_out_at_the_size_asked_for(size, image_size):
    augment, image = augmentation(size, rand_augment=9, random_erasing=1.0), scene(*image_size)
    for number in range(12):
        seed(number)
        for value in (image, encoded(image)):
            pixels = augment(open_image(value))
            assert pixels.shape == (3, *size) and pixels.dtype == torch.uint8 and pixels.is_contiguous()


def test_an_image_in_memory_stays_as_it_is():
    image = scene(64, 48)
    before = image.tobytes()
    augment = augmentation(crop_scale=(1.0, 1.0), hflip=0, random_erasing=1.0)
    for number in range(5):
        seed(number)
        augment(image)
    assert image.tobytes() == before
