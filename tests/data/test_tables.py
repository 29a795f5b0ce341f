"""The same labels in Parquet and Arrow files, WebDataset archives and in memory: what is read as what.

The tables in docs/data.md are made of the same cases: SCALEKD_WRITE_DOCS=1 pytest tests/data/test_tables.py writes them.
"""

import io
import itertools
import tarfile

import datasets
import pyarrow
import pytest
from helpers import check_written, settings, small_student, some_slow
from test_labels import INTEGER, NAMES, with_labels

from scalekd_hf.data.dataset import ImageDataset, shown_labels
from scalekd_hf.data.loading import DataArguments, load_data
from scalekd_hf.images import IGNORED_LABEL
from scalekd_hf.training.feeding import prepare_images


TEXT, STUDENT = datasets.Value("string"), ["ant", "bee", "cat", "dog"]
NAMED, REVERSED = datasets.ClassLabel(names=NAMES), datasets.ClassLabel(names=NAMES[::-1])
ASKED = "`num_classes`, or `class_names`"
NEEDED, TAKEN_OUT = "refused: an image to train on needs a label", "refused: one entry may be the label"
NO_COLUMN = "refused: Set `label_column` to one of them, or to none"
ALL, FILES = ["parquet", "arrow", "memory"], ["webdataset"]
# What is in the column or the archives, its kind or the ending of its files, and where it is. Then how an evaluation takes it, and
# how training, of a student of the four classes; and what the classes of a new student are, also of a stream.
CASES = {
    "0 and 3, named ant, bee, cat, dog": (ALL, NAMED, [0, 3], "ant, dog", "ant, dog", "ant, bee, cat, dog", None),
    "0 and 3, named dog, cat, bee, ant": (ALL, REVERSED, [0, 3], "dog, ant", "dog, ant", "dog, cat, bee, ant", None),
    "0 and 3": (ALL, INTEGER, [0, 3], "ant, dog", "ant, dog", "0, 1, 2, 3", None),
    "the names ant and dog": (ALL, TEXT, ["ant", "dog"], "ant, dog", "ant, dog", "ant, dog", None),
    "0 and -1": (ALL, INTEGER, [0, -1], "ant, none", NEEDED, "0", None),
    "0 and nothing": (ALL, INTEGER, [0, None], "ant, none", NEEDED, "0", None),
    "4": (ALL, INTEGER, [4, 4], "refused: 0 to 3", "refused: 0 to 3", "0, 1, 2, 3, 4", None),
    "no column": (ALL, None, [0, 0], NO_COLUMN, NO_COLUMN, ASKED, None),
    "`.cls` with 0 and 3": (FILES, "cls", ["0", "3\n"], "ant, dog", "ant, dog", "0, 1, 2, 3", ASKED),
    "`.cls` with 0 and -1": (FILES, "cls", ["0", "-1"], "ant, none", NEEDED, "0", ASKED),
    "`.cls` with names": (FILES, "cls", ["ant", "dog"], *["refused: Call those with names `.txt`"] * 3, None),
    "`.txt` with the names ant and dog": (FILES, "txt", ["ant\n", "dog"], "ant, dog", "ant, dog", "ant, dog", ASKED),
    "`.json` with 0 and 3": (FILES, "json", ["0", "3"], "ant, dog", "ant, dog", "0, 1, 2, 3", ASKED),
    '`.json` with `{"label": 0}`': (FILES, "json", ['{"label": 0}'] * 2, TAKEN_OUT, TAKEN_OUT, ASKED, None),
    "images without such files": (FILES, None, ["0", "0"], NO_COLUMN, NO_COLUMN, ASKED, None),
}


def archive(file, contents, ending, texts, image="png"):
    """A WebDataset of images, each with a file of that ending beside it."""
    with tarfile.open(file, "w") as opened:
        for number, (content, text) in enumerate(zip(contents, texts, strict=True)):
            for name, part in ((image, content), (ending, text.encode())):
                if name is not None:
                    member = tarfile.TarInfo(f"{number:03d}.{name}")
                    member.size = len(part)
                    opened.addfile(member, io.BytesIO(part))


def write(file, labels, kind):
    """Images with labels in a file, of the kind that its ending says."""
    if file.suffix == ".tar":
        rows = with_labels([0] * len(labels), INTEGER).cast_column("image", datasets.Image(decode=False))
        return archive(file, [row["bytes"] for row in rows["image"]], kind, labels)
    table = with_labels(labels, kind) if kind is not None else with_labels(labels, INTEGER).remove_columns("label")
    if file.suffix == ".parquet":
        return table.to_parquet(file)
    with pyarrow.ipc.new_stream(str(file), table.data.table.schema) as writer:
        writer.write_table(table.data.table)


ENDINGS = {"parquet": ".parquet", "arrow": ".arrow", "webdataset": ".tar"}


def doors(folder, place, kind, labels):
    """Arguments under which the same images are loaded, each time in two splits."""
    if place == "memory":
        table = with_labels(labels, kind or INTEGER)
        table = table if kind is not None else table.remove_columns("label")
        datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(str(folder / "kept"))
        return [DataArguments(dataset=str(folder / "kept"))]
    ending = ENDINGS[place]
    for split in ("train", "validation"):
        write(folder / f"{split}-0{ending}", labels, kind)
    files = {"train_files": str(folder / f"train-*{ending}"), "eval_files": str(folder / f"validation-*{ending}")}
    return [
        DataArguments(dataset=str(folder), streaming=True),
        *(DataArguments(**files, streaming=s) for s in (True, False)),
    ]


@pytest.fixture(scope="module")
def student():
    return small_student(num_classes=4, labels=STUDENT)


def taken(data, name, student, args):
    """How the labels of the first two images are taken, by the names of the student's classes, or why they are refused."""
    try:
        prepared = prepare_images(data, name, student, args)
        if isinstance(prepared, ImageDataset):
            samples = [prepared[row] for row in range(2)]
        else:
            samples = list(itertools.islice(prepared, 2))
    except ValueError as error:
        return f"refused: {error}"
    return [STUDENT[label] if label != IGNORED_LABEL else "none" for label in (int(s["labels"]) for s in samples)]


@pytest.mark.parametrize("case", CASES)
def test_labels_mean_the_same_wherever_they_are(tmp_path, case, student):
    places, kind, labels, evaluated, trained, shown, of_stream = CASES[case]
    for place in places:
        (tmp_path / place).mkdir()
        columns = {"image_column": "png", "label_column": kind or "cls"} if place == "webdataset" else {}
        args = settings(tmp_path, **columns)
        for arguments in doors(tmp_path / place, place, kind, labels):
            try:
                train, evaluation = load_data(arguments)
            except ValueError as error:
                assert all(matches(f"refused: {error}", wanted) for wanted in (evaluated, trained, shown)), arguments
                continue
            found = taken(evaluation, "eval_dataset", student, args), taken(train, "train_dataset", student, args)
            assert matches(found[0], evaluated) and matches(found[1], trained, shuffled=True), (arguments, found)
            classes = shown_labels(train, args.label_column)
            wanted = of_stream if of_stream is not None and arguments.streaming else shown
            assert (", ".join(classes) if classes is not None else ASKED) == wanted, arguments


def matches(found, wanted, shuffled=False):
    """Whether labels are those wanted; of what is refused, whether it is said why."""
    if isinstance(found, str) or wanted.startswith("refused"):
        return isinstance(found, str) and all(part in found for part in wanted.split(": "))
    order = sorted if shuffled else list
    return order(found) == order(wanted.split(", "))


# Names of files, and rows in each split that `train_split` and `eval_split` find; the error where there is none.
SPLITS = {
    ("train-0", "train-1", "validation-0"): {"train": 4, "validation": 2},
    ("training/0", "val/0"): {"train": 2, "validation": 2},
    ("train", "dev"): {"train": 2, "validation": 2},
    ("train-0", "test-0"): {"train": 2, "test": 2, "validation": "refused"},
    ("train-0", "eval-0"): {"train": 2, "test": 2, "validation": "refused"},
    ("part-0", "part-1"): {"train": 4, "validation": "refused"},
}


@pytest.mark.parametrize("files", SPLITS)
@pytest.mark.parametrize("ending", some_slow([".parquet", ".tar"], 1))
def test_splits_of_a_folder_of_files_follow_from_their_names(tmp_path, files, ending):
    for file in files:
        place = tmp_path / f"{file}{ending}"
        place.parent.mkdir(exist_ok=True)
        write(place, ["0", "3"] if ending == ".tar" else [0, 3], "cls" if ending == ".tar" else INTEGER)
    for split, rows in SPLITS[files].items():
        arguments = DataArguments(dataset=str(tmp_path), train_split=split, eval_split="none")
        if rows == "refused":
            arguments = DataArguments(dataset=str(tmp_path), eval_split=split)
            with pytest.raises(ValueError, match="(?s)(nknown split|Bad split).*Name one of these with `eval_split`"):
                load_data(arguments)
        else:
            assert len(list(load_data(arguments)[0])) == rows, split


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_files_that_name_their_classes_in_different_ways_are_refused(tmp_path, streaming, ending):
    """The names of the first were taken for the labels of all, also in another split, so that a dog was an ant."""
    write(tmp_path / f"train-0{ending}", [0, 3], NAMED)
    write(tmp_path / f"train-1{ending}", [0, 3], REVERSED)
    doors = [DataArguments(train_files=str(tmp_path / f"train-*{ending}"), eval_split="none", streaming=streaming)]
    doors += [DataArguments(dataset=str(tmp_path), eval_split="none", streaming=streaming)]
    for arguments in doors:
        with pytest.raises(
            ValueError, match="train-1.* has other names for the classes in its column 'label' than .*train-0"
        ):
            load_data(arguments)
    (tmp_path / f"train-1{ending}").rename(tmp_path / f"validation-0{ending}")
    with pytest.raises(ValueError, match="has other names.*apart, as `train_files` and `eval_files`"):
        load_data(DataArguments(dataset=str(tmp_path), streaming=streaming))
    files = [str(tmp_path / f"{split}-0{ending}") for split in ("train", "validation")]
    train, evaluation = load_data(DataArguments(train_files=files[0], eval_files=files[1], streaming=streaming))
    assert train.features["label"].names == NAMES == evaluation.features["label"].names[::-1]


def test_a_stream_whose_files_have_the_names_in_another_order_is_refused(tmp_path, student):
    """As on the Hub, where `datasets` reads a split by the names of another."""
    files = {"train": str(tmp_path / "train.parquet"), "validation": str(tmp_path / "validation.parquet")}
    write(tmp_path / "train.parquet", [0, 3], NAMED)
    write(tmp_path / "validation.parquet", [0, 3], REVERSED)
    both = datasets.load_dataset("parquet", data_files=files, streaming=True)
    args = settings(tmp_path)
    prepare_images(both["train"], "train_dataset", student, args)
    with pytest.raises(ValueError, match="validation.parquet' has the classes of its column 'label' in another order"):
        prepare_images(both["validation"], "eval_dataset", student, args)
    alone = datasets.load_dataset("parquet", data_files=files["validation"], split="train", streaming=True)
    for stream in (alone, alone.cast_column("label", NAMED)):  # who casts, has said so
        prepare_images(stream, "eval_dataset", student, args)


def test_several_splits_in_place_of_a_data_set_are_refused(tmp_path):
    table = with_labels([0, 3], INTEGER)
    with pytest.raises(
        ValueError, match=r"`train_dataset` is a `DatasetDict` of \['train'\]: give.*`data\['train'\]`"
    ):
        prepare_images(datasets.DatasetDict({"train": table}), "train_dataset", small_student(), settings(tmp_path))


BEGIN, END = "<!-- tables: written by tests/data/test_tables.py -->\n", "<!-- end of tables -->\n"


def test_the_tables_in_the_docs_are_those_of_these_cases():
    rows = [
        "| labels | an evaluation takes | training takes | classes of a new student | of a stream |",
        "|---|---|---|---|---|",
    ]
    for case, (_, _, _, evaluated, trained, shown, of_stream) in CASES.items():
        rows.append(f"| {case} | {evaluated} | {trained} | {shown} | {of_stream or 'the same'} |")
    rows += ["", "| a folder with the files | splits |", "|---|---|"]
    for files, splits in SPLITS.items():
        found = ", ".join(split for split, rows_ in splits.items() if rows_ != "refused")
        rows.append(f"| {', '.join(f'`{file}.*`' for file in files)} | {found} |")
    check_written("data.md", BEGIN, END, rows)
