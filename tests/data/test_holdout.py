"""A share held out of a folder without splits: the same images for whoever asks, whatever the files are called."""

import random
import shutil

import numpy as np
import pytest
from helpers import DIGITS
from PIL import Image

from scalekd_hf.data.holdout import held_out_share, hold_out
from scalekd_hf.data.loading import DataArguments, load_data
from scalekd_hf.tools.evaluation import EvaluateArguments
from scalekd_hf.tools.evaluation import load_data as load_evaluation_data


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for index in range(120):
        place = folder / ("dog", "größe 2", "cat")[index % 3]
        place.mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (8, 8 + index % 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{index}.{'png' if index % 2 else 'jpg'}")
    return folder


def contents(dataset):
    return sorted((row["image"].tobytes(), row["label"]) for row in dataset)


def test_a_share_is_the_same_for_training_and_evaluation_and_parts_are_whole(photos):
    train, held_out = load_data(DataArguments(dataset=str(photos), eval_split="0.2"))
    assert len(train) + len(held_out) == 120 and 10 <= len(held_out) <= 40
    everything, _ = load_data(DataArguments(dataset=str(photos), eval_split="none"))
    assert sorted(contents(train) + contents(held_out)) == contents(everything)
    again = load_evaluation_data(EvaluateArguments(model="m", dataset=str(photos), eval_split="0.2"))
    assert contents(again) == contents(held_out)
    assert again.features["label"].names == train.features["label"].names == ["cat", "dog", "größe 2"]


def test_names_order_and_copies_of_files_change_nothing(photos, tmp_path):
    _, held_out = load_data(DataArguments(dataset=str(photos), eval_split="0.2"))
    files = [file for file in photos.glob("*/*")]
    random.Random(1).shuffle(files)
    for number, file in enumerate(files):
        (tmp_path / file.parent.name).mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / file.parent.name / f"test_{number}{file.suffix}")
        shutil.copy(file, tmp_path / file.parent.name / f"copy_{number}{file.suffix}")
    _, renamed = load_data(DataArguments(dataset=str(tmp_path), eval_split="0.2"))
    assert contents(renamed) == sorted(2 * contents(held_out))


def test_files_of_tables_are_divided_as_well_and_streams_are_not():
    arguments = DataArguments(train_files=str(DIGITS / "train-*.parquet"), eval_split="0.1", streaming=False)
    train, held_out = load_data(arguments)
    assert len(train) + len(held_out) == 1437 and 100 < len(held_out) < 190
    arguments.streaming = True
    with pytest.raises(
        ValueError, match="`eval_split` 0.1 holds out images of a whole data set: set `streaming` to false"
    ):
        load_data(arguments)


def test_a_share_beside_files_is_refused_in_training_and_meant_in_evaluation():
    files = str(DIGITS / "train-*.parquet")
    with pytest.raises(ValueError, match="holds out a share, but there are `eval_files`, too"):
        load_data(DataArguments(train_files=files, eval_files=files, eval_split="0.1", streaming=False))
    _, held_out = load_data(DataArguments(train_files=files, eval_split="0.1", streaming=False))
    again = load_evaluation_data(EvaluateArguments(model="m", eval_files=files, eval_split="0.1", streaming=False))
    assert contents(again) == contents(held_out)


def test_what_is_no_share_is_refused(photos):
    assert held_out_share("validation") is None and held_out_share("") is None
    with pytest.raises(ValueError, match="`eval_split` '1.5' is a share of the images"):
        load_data(DataArguments(dataset=str(photos), eval_split="1.5"))
    with pytest.raises(ValueError, match="leaves one part empty"):
        hold_out(load_data(DataArguments(dataset=str(photos), eval_split="none"))[0], 1e-9)


def test_a_class_without_an_image_on_a_side_is_named(tmp_path, photos, caplog):
    (tmp_path / "rare").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "rare" / "a.png")
    shutil.copytree(photos / "cat", tmp_path / "cat")
    load_data(DataArguments(dataset=str(tmp_path), eval_split="0.2"))
    assert "There is no image to" in caplog.text and "of rare" in caplog.text


def test_a_missing_split_says_how_to_hold_out_a_share(photos):
    with pytest.raises(
        ValueError, match=r"split 'validation'\) cannot be loaded: .*hold out a share .*--eval_split 0.1"
    ):
        load_data(DataArguments(dataset=str(photos)))


@pytest.mark.parametrize("ending", ["bmp", "tif", "ppm"])
def test_images_with_the_same_border_are_told_from_each_other(tmp_path, ending):
    for index in range(60):
        pixels = np.zeros((256, 256, 3), np.uint8)
        pixels[30:226, 30:226] = np.random.default_rng(index).integers(0, 256, (196, 196, 1))
        (tmp_path / "ab"[index % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "ab"[index % 2] / f"{index}.{ending}")
    train, held_out = load_data(DataArguments(dataset=str(tmp_path), eval_split="0.3"))
    assert 5 < len(held_out) < 35 and len(train) + len(held_out) == 60
