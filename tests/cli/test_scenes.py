"""recipes/make_scenes.py: its scenes, their masks and boxes, and that training and validation share nothing."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from helpers import ROOT
from PIL import Image


sys.path.insert(0, str(ROOT / "recipes"))
import make_scenes


CIFAR10 = Path(os.environ.get("SCALEKD_CIFAR10", ROOT.parent / "shared" / "data" / "cifar10"))
SCENES = {"training": 12, "validation": 6}

needs_cifar10 = pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10's images, the scenes' objects, are not here")
SIDE = 100
IMAGES = (".jpg", ".png")


def needs_photographs():
    pytest.importorskip("skimage", reason="scikit-image, whose photographs are the backgrounds, is not installed")


def write(folder, scenes=SCENES, **settings):
    needs_photographs()
    make_scenes.write(folder, str(CIFAR10), scenes, SIDE, **settings)
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "scenes"
    return folder, write(folder)


def pixels(file):
    with Image.open(file) as image:
        return np.asarray(image)


@needs_cifar10
def test_a_seed_makes_the_same_files_and_another_seed_others(made, tmp_path):
    _, files = made
    assert len(files) == 2 * sum(SCENES.values()) + 3
    assert write(tmp_path / "again") == files
    fewer = write(tmp_path / "fewer", {"training": 2})
    scenes = {name: data for name, data in fewer.items() if name.endswith(IMAGES)}
    assert len(scenes) == 4 and all(files[name] == data for name, data in scenes.items())
    other = write(tmp_path / "other", {"training": 2}, seed=1)
    assert all(files[name] != data for name, data in other.items() if name.endswith(IMAGES))


@needs_cifar10
@pytest.mark.parametrize("split", SCENES)
def test_masks_boxes_and_areas_agree_as_pycocotools_reads_them(made, split):
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO

    folder, _ = made
    coco = COCO(str(folder / "annotations" / f"instances_{split}.json"))
    names = (folder / "classes.txt").read_text(encoding="utf-8").split()
    assert names == ["background", *(category["name"] for category in coco.loadCats(coco.getCatIds()))]
    assert coco.getCatIds() == list(range(1, 11)) and len(coco.getImgIds()) == SCENES[split]
    overlapping = 0
    for image in coco.loadImgs(coco.getImgIds()):
        classes = pixels(folder / "annotations" / split / image["file_name"].replace(".jpg", ".png"))
        assert pixels(folder / "images" / split / image["file_name"]).shape == (SIDE, SIDE, 3)
        assert classes.shape == (image["height"], image["width"]) == (SIDE, SIDE)
        found = coco.loadAnns(coco.getAnnIds(image["id"]))
        masks = [coco.annToMask(annotation).astype(bool) for annotation in found]
        assert 1 <= len(masks) <= 5 and sum(mask.astype(int) for mask in masks).max() == 1
        assert np.array_equal(classes, sum(a["category_id"] * m for a, m in zip(found, masks, strict=True)))
        for annotation, mask in zip(found, masks, strict=True):
            rows, columns = np.nonzero(mask)
            x, y, width, height = annotation["bbox"]
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width - 1, y + height - 1) == (columns.max(), rows.max())
            assert annotation["area"] == mask.sum() and annotation["iscrowd"] == 0
            overlapping += annotation["area"] < 0.7 * width * height  # an ellipse covers 79% of its box
    assert overlapping  # or nothing is said about what is hidden


@needs_cifar10
def test_training_and_validation_share_no_object_and_no_photograph(tmp_path, monkeypatch):
    needs_photographs()
    used = {}

    def load(path, split):
        used[split] = load_dataset(path, split=split)
        return used[split]

    compose, drawers = make_scenes.compose, []
    monkeypatch.setattr(make_scenes.datasets, "load_dataset", load)
    monkeypatch.setattr(make_scenes, "compose", lambda *words: drawers.append(words[1]) or compose(*words))
    make_scenes.write(tmp_path / "scenes", str(CIFAR10), {"training": 1, "validation": 1}, SIDE)
    assert list(used) == ["train", "test"]
    for draw, split in zip(drawers, used.values(), strict=True):
        for number in range(20):
            picture, label = draw(number)
            assert make_scenes.NAMES[label] == split.features["label"].names[split[number]["label"]]
            assert np.array_equal(picture, split[number]["image"])
    train, test = ({row["bytes"] for row in split.data["image"].to_pylist()} for split in used.values())
    assert (len(train), len(test)) == (50_000, 10_000) and not train & test
    photos = [photo.tobytes() for split in SCENES for photo in make_scenes.photographs(split)]
    assert len(set(photos)) == len(photos) == 13


def test_what_is_nearly_hidden_is_left_out_and_the_front_is_whole(monkeypatch):
    outlines, left_out = [], 0
    outline = make_scenes.outline
    monkeypatch.setattr(make_scenes, "outline", lambda *words: outlines.append(outline(*words)) or outlines[-1])
    colours = [Image.new("RGB", (32, 32), (0, 0, 20 * label)) for label in range(11)]
    photos = [np.full((200, 200, 3), 7, np.uint8)]
    for seed in range(60):
        outlines.clear()
        drawn = []  # which of the outlines, and the class

        def draw(number, drawn=drawn):
            drawn.append((len(outlines) - 1, number % 10 + 1))
            return colours[drawn[-1][1]], drawn[-1][1]

        scene = make_scenes.compose(photos, draw, 50_000, SIDE, np.random.default_rng(seed))
        assert scene.labels == [label for _, label in drawn]
        shades = np.array([20 * label if label else 7 for label in range(11)], np.uint8)
        assert np.array_equal(scene.image[..., 2], shades[scene.classes()])
        assert scene.masks[0].sum() == outlines[0].sum()
        for mask, (place, _) in zip(scene.masks, drawn, strict=True):
            assert mask.sum() >= 0.3 * outlines[place].sum()
        left_out += len(outlines) - len(drawn)
    assert left_out


def test_bad_settings_are_refused_before_anything_is_written(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("kept", encoding="utf-8")
    for folder, scenes, size, words in (
        ("new", SCENES, 64, "`size` 64"),
        ("full", SCENES, 128, "`output_dir` .*holds something"),
        ("new", {"training": 3, "validation": 0}, 128, "`scenes` .*one scene or more"),
    ):
        with pytest.raises(ValueError, match=words):
            make_scenes.write(tmp_path / folder, "nowhere", scenes, size)
    assert [file.name for file in tmp_path.rglob("*")] == ["full", "notes.txt"]


def test_another_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`cifar10` .*not CIFAR-10"):
        make_scenes.write(tmp_path / "scenes", str(ROOT / "recipes" / "data" / "numbers"), SCENES)
