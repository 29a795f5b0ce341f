"""Folders as people have them: what is a split, what a class, and what is left out.

The table in docs/data.md is made of the same cases: SCALEKD_WRITE_DOCS=1 pytest tests/data/test_folders.py writes it.
"""

import json

import datasets
import pytest
from helpers import check_written
from PIL import Image

from scalekd_hf.data.folders import read_folder
from scalekd_hf.data.loading import DataArguments, load_data, load_local, load_split
from scalekd_hf.tools.evaluation import EvaluateArguments
from scalekd_hf.tools.evaluation import load_data as load_evaluation


def make(root, *paths):
    """A folder with a picture at each path, a text where it ends in .txt, and a folder where it ends in a slash."""
    for number, path in enumerate(paths):
        place = root / path
        if path.endswith("/"):
            place.mkdir(parents=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.suffix == ".txt":
            place.write_text("no picture")
        else:
            Image.new("RGB", (8, 8), (number, 0, 0)).save(place, "PNG")
    return root


def photos(*folders, number=3):
    return [f"{folder}/{index}.png" for folder in folders for index in range(number)]


def counts(root, folders="auto"):
    """Images by class by split."""
    found = read_folder(root, folders)
    return {split: {name: len(files) for name, files in classes.items()} for split, classes in found.splits.items()}


# Files, what is read, and the line of the log.
CASES = {
    "class folders": (photos("cat", "dog"), {"all": {"cat": 3, "dog": 3}}, "2 classes, 6 images, no splits"),
    "a class named like a split": (
        photos("bicycle", "car", "train"),
        {"all": {"bicycle": 3, "car": 3, "train": 3}},
        "3 classes, 9 images, no splits",
    ),
    "a class whose name holds a split's": (
        photos("test tube", "beaker", "flask"),
        {"all": {"beaker": 3, "flask": 3, "test tube": 3}},
        "3 classes, 9 images, no splits",
    ),
    "folders in class folders": (
        photos("cat/indoor", "cat/outdoor", "dog/indoor"),
        {"all": {"cat": 6, "dog": 3}},
        "2 classes, 9 images, no splits",
    ),
    "splits": (
        photos("train/cat", "train/dog", "val/cat", number=2),
        {"train": {"cat": 2, "dog": 2}, "validation": {"cat": 2}},
        "2 classes, 6 images, splits: train 4, validation 2",
    ),
    "folders in the classes of splits": (
        photos("training/cat/indoor", "training/dog", "testing/cat"),
        {"train": {"cat": 3, "dog": 3}, "test": {"cat": 3}},
        "2 classes, 9 images, splits: train 6, test 3",
    ),
    "a test split without labels": (
        photos("train/cat", "train/dog", "test"),
        {"train": {"cat": 3, "dog": 3}, "test": {None: 3}},
        "2 classes, 9 images, splits: train 6, test 3",
    ),
    "splits without classes": (
        photos("train", "test"),
        {"train": {None: 3}, "test": {None: 3}},
        "no classes, 6 images, splits: train 3, test 3",
    ),
    "no folders": (photos("."), {"all": {None: 3}}, "no classes, 3 images, no splits"),
    "other files": (
        [*photos("cat", "dog"), "cat/notes.txt", "readme.txt", "cat/.hidden.png", "beside.png", "dog/raw.cr2"],
        {"all": {"cat": 3, "dog": 3}},
        "2 classes, 6 images, no splits. Not used: 1 files that are no images here (.cr2): dog/raw.cr2; 2 files that are no "
        "images here (.txt): cat/notes.txt, readme.txt; 1 hidden files or folders: cat/.hidden.png; 1 images beside the folders "
        "of classes: beside.png",
    ),
    "files without an ending": (
        ["cat/one", "dog/two", "dog/3.PNG"],
        {"all": {"cat": 1, "dog": 2}},
        "2 classes, 3 images, no splits",
    ),
    "an empty class": (
        [*photos("cat", "dog"), "eel/"],
        {"all": {"cat": 3, "dog": 3, "eel": 0}},
        "3 classes, 6 images, no splits",
    ),
    "spaces, umlauts and brackets": (
        photos("schöne Tiere [v2]/Ölkäfer", "schöne Tiere [v2]/größer"),
        {"all": {"schöne Tiere [v2]": 6}},
        "1 classes, 6 images, no splits",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_as_what(tmp_path, caplog, case):
    caplog.set_level("INFO")
    files, expected, line = CASES[case]
    root = make(tmp_path / "my data [v2]", *files)
    if case == "other files":
        (root / "dog" / "raw.cr2").write_bytes(b"raw")
    assert counts(root) == expected
    assert line in caplog.text
    tables = load_local(DataArguments(dataset=str(root)))
    assert {split: len(table) for split, table in tables.items()} == {s: sum(c.values()) for s, c in expected.items()}
    for split, table in tables.items():
        labelled = set(expected[split]) != {None}
        assert ("label" in table.features) == labelled
        if labelled:
            names = table.features["label"].names
            assert names == sorted({name for classes in expected.values() for name in classes if name})
            given = [names[label] for label in table["label"]]
            assert {name: given.count(name) for name in expected[split]} == expected[split]
        assert table[0]["image"].size == (8, 8)


def test_an_empty_class_is_warned_of_and_numbers_sort_as_text(tmp_path, caplog):
    read_folder(make(tmp_path / "one", *photos("images")))
    assert "has a single class, 'images'" in caplog.text
    make(tmp_path / "numbers", *photos("1", "2", "10"), "3/")
    assert read_folder(tmp_path / "numbers").classes == ["1", "10", "2", "3"]
    assert "holds no image: its class is there" in caplog.text and "sorted as text: 1, 10, 2, 3" in caplog.text


def test_what_can_be_read_in_two_ways_is_refused_with_both_and_a_setting_overrules(tmp_path):
    make(tmp_path, *photos("train/steam", "train/electric", "car/red"))
    with pytest.raises(
        ValueError, match="'train' as splits that hold folders of classes, or 'car', 'train' as classes.*`folders`"
    ):
        read_folder(tmp_path)
    assert counts(tmp_path, "classes") == {"all": {"car": 3, "train": 6}}
    with pytest.raises(
        ValueError, match="`folders` is 'splits', but 'car'.* is no split's name. Known are train, training"
    ):
        read_folder(tmp_path, "splits")
    both = make(tmp_path / "both", *photos("train", "test"))
    assert counts(both, "classes") == {"all": {"test": 3, "train": 3}}
    assert list(counts(both)) == ["train", "test"]
    twice = make(tmp_path / "twice", *photos("val/cat", "valid/cat", "train/cat"))
    with pytest.raises(ValueError, match="two folders of the split 'validation'"):
        read_folder(twice)


def test_linked_class_folders_are_followed_and_circles_are_not(tmp_path):
    elsewhere = make(tmp_path / "elsewhere", *photos("."))
    root = make(tmp_path / "root", *photos("cat"))
    (root / "dog").symlink_to(elsewhere, target_is_directory=True)
    (root / "cat" / "again").symlink_to(root, target_is_directory=True)
    (root / "cat" / "self").symlink_to(root / "cat", target_is_directory=True)
    assert counts(root) == {"all": {"cat": 3, "dog": 3}}  # the dogs were cats as well


def test_tables_archives_and_metadata_are_left_to_datasets(tmp_path):
    make(tmp_path / "table", *photos("cat"))
    (tmp_path / "table" / "metadata.csv").write_text("file_name,label\n")
    beside = make(tmp_path / "beside", *photos("cat", "dog"))
    (beside / "labels.csv").write_text("a table of somebody's\n")
    assert read_folder(beside).unused == {"files that are no images here (.csv)": ["labels.csv"]}
    (tmp_path / "nothing").mkdir()
    assert read_folder(tmp_path / "table") is None and read_folder(tmp_path / "nothing") is None


def test_every_file_that_is_not_used_is_named_and_listed_in_the_output_folder(tmp_path, caplog):
    root = make(tmp_path / "photos", *photos("train/cat", "train/dog"), "train/beside.png", ".git/")
    for number in range(7):
        (root / "train" / "dog" / f"{number}.txt").touch()
    arguments = DataArguments(dataset=str(root), eval_split="none")
    load_data(arguments, tmp_path / "run")
    text, hidden = "files that are no images here (.txt)", "hidden files or folders"
    notes = [f"train/dog/{number}.txt" for number in range(7)]
    assert f"7 {text}: {', '.join(notes[:5])}, ...; 1 {hidden}: .git; 1 images beside the folders of" in caplog.text
    listed = [json.loads(line) for line in (tmp_path / "run" / "unused_files.jsonl").read_text().splitlines()]
    assert listed[:7] == [{"file": name, "reason": text} for name in notes] and listed[7]["file"] == ".git"
    assert listed[8] == {"file": "train/beside.png", "reason": "images beside the folders of classes"}
    unused = read_folder(root).unused
    assert len(listed) == 9 == sum(map(len, unused.values())) and unused[text] == notes
    for name in [*notes, "train/beside.png"]:
        (root / name).unlink()
    (root / ".git").rmdir()
    load_data(arguments, tmp_path / "run")
    assert not (tmp_path / "run" / "unused_files.jsonl").exists()


def test_what_the_folders_are_is_said_of_a_folder_of_images_alone(tmp_path):
    for name in ("user/on-the-hub", str(tmp_path)):
        with pytest.raises(ValueError, match="`folders` is 'classes', but `dataset` .* is no local folder of images"):
            load_local(DataArguments(dataset=name, folders="classes"))


def test_splits_slices_and_their_other_names(tmp_path):
    make(tmp_path, *photos("train/cat", "train/dog", "val/cat"))
    arguments = DataArguments(dataset=str(tmp_path))
    train, evaluation = load_data(arguments)
    assert (len(train), len(evaluation)) == (6, 3)
    local = load_local(arguments)
    for split, rows in (("train[:50%]", 3), ("val", 3), ("valid", 3), ("train+validation", 9), ("train[2:3]", 1)):
        assert len(load_split(arguments, None, split, local)) == rows, split
    with pytest.raises(ValueError, match='Unknown split "test".*--eval_split 0.1'):
        load_data(DataArguments(dataset=str(tmp_path), eval_split="test"))


@pytest.mark.parametrize("case", ["class folders", "a class named like a split", "a class whose name holds a split's"])
def test_evaluations_read_the_same_classes(tmp_path, case):
    make(tmp_path, *CASES[case][0])
    arguments = EvaluateArguments(model="m", dataset=str(tmp_path))
    data = load_evaluation(arguments)
    assert data.features["label"].names == sorted(CASES[case][1]["all"]) and arguments.eval_split == "validation"
    assert len(data) == sum(CASES[case][1]["all"].values())


def test_what_save_to_disk_wrote_is_read(tmp_path):
    make(tmp_path / "photos", *photos("cat", "dog"))
    table = load_local(DataArguments(dataset=str(tmp_path / "photos")))["all"]
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "validation": table.select([0])}).save_to_disk(str(tmp_path / "two"))
    one, none = load_data(DataArguments(dataset=str(tmp_path / "one"), eval_split="none"))
    two, evaluation = load_data(DataArguments(dataset=str(tmp_path / "two")))
    assert (len(one), none, len(two), len(evaluation)) == (6, None, 6, 1)
    assert one.features == table.features and two[5]["label"] == 1


def test_tables_in_folders_with_brackets_are_found(tmp_path):
    make(tmp_path / "photos", *photos("cat"))
    table = load_local(DataArguments(dataset=str(tmp_path / "photos")))["all"]
    (tmp_path / "my data [v2]").mkdir()
    table.to_parquet(tmp_path / "my data [v2]" / "train-0.parquet")
    for name in ("train-*.parquet", "train-0.parquet"):
        pattern = str(tmp_path / "my data [v2]" / name)
        for streaming in (False, True):
            train, _ = load_data(DataArguments(train_files=pattern, eval_split="none", streaming=streaming))
            assert len(list(train)) == 3


BEGIN, END = "<!-- folders: written by tests/data/test_folders.py -->\n", "<!-- end of folders -->\n"


def test_the_table_in_the_docs_is_that_of_these_cases():
    rows = ["| a folder with | is read as |", "|---|---|"]
    for files, _, line in CASES.values():
        folders = dict.fromkeys(path.rpartition("/")[0].strip(".") or "." for path in files)
        shown = ", ".join(f"`{folder}/`" if folder != "." else "images" for folder in folders)
        rows.append(f"| {shown} | {line} |")
    check_written("data.md", BEGIN, END, rows)
