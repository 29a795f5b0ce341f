"""Images of formats that Pillow decodes with a plugin alone: read where it is installed, else counted with its name."""

import io
from importlib.util import find_spec

import datasets
import numpy as np
import pytest
from helpers import run, settings, small_student
from PIL import Image
from test_folders import make, photos
from test_tables import archive

from scalekd_hf import ScaleKDTrainer
from scalekd_hf.data import formats
from scalekd_hf.data.decoding import BadImageError, open_image, to_rgb
from scalekd_hf.data.folders import read_folder
from scalekd_hf.data.formats import PACKAGES, package_for_bytes, package_for_ending


# By format, the plugin and an ending.
PLUGINS = {"HEIF": ("pillow_heif", ".heic"), "JXL": ("pillow_jxl", ".jxl"), "AVIF": (None, ".avif")}
STARTS = {
    "HEIF": b"\x00\x00\x00\x1cftypheic\x00\x00\x00\x00mif1heicmiaf" + bytes(40),
    "JXL": b"\x00\x00\x00\x0cJXL \r\n\x87\n\x00\x00\x00\x14ftypjxl " + bytes(40),
    "AVIF": b"\x00\x00\x00\x20ftypavif\x00\x00\x00\x00avifmif1miafMA1B" + bytes(40),
}


@pytest.fixture(params=PLUGINS)
def kind(request):
    """A format that can be decoded here."""
    plugin = PLUGINS[request.param][0]
    if plugin is not None and find_spec(plugin) is None:
        pytest.skip(f"{plugin} is not installed")
    if not formats._is_known(request.param):
        pytest.skip(f"this Pillow is built without {request.param}")
    return request.param


@pytest.fixture
def without(monkeypatch):
    """Pillow as it is without plugins."""
    for kind in PACKAGES:
        monkeypatch.delitem(Image.OPEN, kind, raising=False)
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind not in PACKAGES])
    formats.image_endings.cache_clear()
    yield
    formats.image_endings.cache_clear()


def encoded(kind, number=0, **options):
    file = io.BytesIO()
    image = Image.fromarray(np.full((32, 48, 3), 40 + 30 * number, np.uint8))
    image.paste((250, 0, 0), (0, 0, 24, 16))
    image.save(file, kind, **options)
    return file.getvalue()


def photos_of(kind, root):
    """A class of PNG files and one of another kind."""
    make(root, *photos("cat"))
    (root / "dog").mkdir()
    for number in range(3):
        (root / "dog" / f"{number}{PLUGINS[kind][1]}").write_bytes(encoded(kind, number))
    return root


def test_they_are_images_of_a_folder_and_of_files(tmp_path, kind):
    folder = read_folder(photos_of(kind, tmp_path / "photos"))
    assert {name: len(files) for name, files in folder.splits["all"].items()} == {"cat": 3, "dog": 3}
    assert not folder.unused
    table = folder.tables()["all"]
    rows = table.cast_column("image", datasets.Image(decode=False))
    contents = [{"bytes": open(row["image"]["path"], "rb").read(), "path": None} for row in rows]
    features = datasets.Features({"image": datasets.Image(decode=False), "label": table.features["label"]})
    stored = datasets.Dataset.from_dict({"image": contents, "label": table["label"]}, features=features)
    stored.to_parquet(tmp_path / "data.parquet")
    stream = datasets.load_dataset("parquet", data_files=str(tmp_path / "data.parquet"), split="train", streaming=True)
    ending = PLUGINS[kind][1].removeprefix(".")
    archive(tmp_path / "data.tar", [content["bytes"] for content in contents], "cls", map(str, table["label"]), ending)
    archived = datasets.load_dataset(
        "webdataset", data_files=str(tmp_path / "data.tar"), split="train", streaming=True
    )
    trainer = ScaleKDTrainer(small_student(num_classes=2), None, settings(tmp_path / "run"))
    found = [trainer.predict(data) for data in (table, stream)]
    trainer.args.image_column, trainer.args.label_column = ending, "cls"
    found.append(trainer.predict(archived))
    assert not (tmp_path / "run" / "bad_images.jsonl").exists()
    assert np.array_equal(found[0].predictions, found[2].predictions)
    assert found[0].label_ids.tolist() == [0, 0, 0, 1, 1, 1] and np.array_equal(
        found[0].predictions, found[1].predictions
    )


def test_every_process_has_the_plugins_by_the_module_that_decodes(tmp_path, kind):
    (tmp_path / "image").write_bytes(encoded(kind))
    code = "import sys; from scalekd_hf.data.decoding import *; print(to_rgb(open_image(sys.argv[1])).size)"
    result = run("python", "-c", code, tmp_path / "image")
    assert result.stdout.strip() == "(48, 32)", result.stderr


def test_what_is_turned_is_turned_once(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # to the right
    pixels = np.asarray(to_rgb(open_image(encoded(kind, exif=exif.tobytes()))))
    if kind == "JXL":  # by its standard, the pixels' own turn counts, which EXIF data only repeats
        assert pixels.shape == (32, 48, 3) and pixels[2, 2, 0] > 200
        (tmp_path / "turned.jpg").write_bytes(encoded("JPEG", exif=exif.tobytes()))
        Image.open(tmp_path / "turned.jpg").save(tmp_path / "turned.jxl", lossless_jpeg=True)
        pixels = np.asarray(to_rgb(open_image(tmp_path / "turned.jxl")))
    assert pixels.shape == (48, 32, 3) and pixels[2, -3, 0] > 200 and pixels[-3, 2, 0] < 100


def test_what_is_cut_short_is_no_image(kind):
    content = encoded(kind)
    with pytest.raises(BadImageError) as error:
        to_rgb(open_image(content[: len(content) // 2]))
    assert error.value.kind != "without a decoder"


def test_without_the_plugin_files_are_counted_with_what_reads_them(tmp_path, caplog, without):
    make(tmp_path / "photos", *photos("cat"))
    for name in ("dog/1.heic", "dog/2.HEIC", "dog/3.jxl", "dog/4.avif", "dog/5.svg"):
        make(tmp_path / "photos", name)
    folder = read_folder(tmp_path / "photos")
    assert folder.unused == {
        "images that need the package pillow-heif (.heic)": ["dog/1.heic", "dog/2.HEIC"],
        "images that need the package pillow-jxl-plugin (.jxl)": ["dog/3.jxl"],
        "images that need the package pillow-avif-plugin (.avif)": ["dog/4.avif"],
        "files that are no images here (.svg)": ["dog/5.svg"],
    }
    assert "2 images that need the package pillow-heif (.heic): dog/1.heic, dog/2.HEIC" in caplog.text
    only = make(tmp_path / "only", "cat/1.heic", "dog/1.heic")
    with pytest.raises(ValueError, match=r"holds no image that can be decoded here: 2 images.*pillow-heif \(.heic\)"):
        read_folder(only)


@pytest.mark.parametrize("name", PLUGINS)
def test_without_the_plugin_encoded_images_are_bad_with_its_name(name, without):
    with pytest.raises(
        BadImageError, match=f"without a decoder: it needs the package {PACKAGES[name][0]}. Install it"
    ) as e:
        open_image(STARTS[name])
    assert e.value.kind == "without a decoder" and package_for_ending(PLUGINS[name][1]) == PACKAGES[name][0]
    for other in (b"", b"\x00\x00\x00\x18ftypmp42" + bytes(20), b"no image at all"):
        assert package_for_bytes(other) is None
    assert package_for_ending(".jpg") is None


def test_a_plugin_that_cannot_be_loaded_is_warned_of(monkeypatch, caplog, tmp_path):
    (tmp_path / "pillow_jxl.py").write_text("raise OSError('libjxl is missing')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(formats.sys.modules, "pillow_jxl", raising=False)
    formats._register()
    assert "The plugin pillow_jxl of Pillow cannot be loaded (libjxl is missing)" in caplog.text
