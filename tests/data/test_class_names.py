"""Names for classes: stated by `class_names`, or sorted where the labels can be read without the images."""

import json
import logging
from types import SimpleNamespace

import datasets
import pyarrow
import pytest
import yaml
from helpers import TEACHER, settings, small_student, timm_vit, transformers_vit
from test_labels import INTEGER, NAMES, pictures, with_labels
from timm.data import ImageNetInfo

from scalekd_hf import ScaleKDTrainer, load_student
from scalekd_hf.cli import distill, train_teacher
from scalekd_hf.data.dataset import shown_labels
from scalekd_hf.data.labels import LabelError, read_class_names
from scalekd_hf.models.saving import save_student
from scalekd_hf.tools.evaluation import evaluate_model
from scalekd_hf.tools.plan import plan
from scalekd_hf.tools.recipe import TeacherArguments, parse_config, write_config
from scalekd_hf.training.setup import check_imagenet_order


TEXT = datasets.Value("string")
LABELS = ["dog", "ant", "cat", "bee", "ant", "dog"]


def stored(data, folder, kind="parquet"):
    """A stream of two files that hold the data, and their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(2):
        table, file = data.shard(2, part, contiguous=True), folder / f"part-{part}.{kind.split('-')[0]}"
        if kind == "parquet":
            table.to_parquet(file)
            continue
        rows = table.data.table.replace_schema_metadata(table.features.arrow_schema.metadata)
        opener = pyarrow.ipc.new_stream if kind == "arrow-stream" else pyarrow.ipc.new_file
        with opener(str(file), rows.schema) as writer:
            writer.write_table(rows)
    pattern = str(folder / f"*.{kind.split('-')[0]}")
    files = sorted(str(file) for file in folder.iterdir())
    return datasets.load_dataset(kind.split("-")[0], data_files=files, split="train", streaming=True), pattern


@pytest.mark.parametrize("kind", ["parquet", "arrow-stream", "arrow-file"])
def test_labels_of_a_stream_of_files_here_are_read_without_its_images(tmp_path, kind, monkeypatch):
    stream, _ = stored(with_labels(LABELS, TEXT), tmp_path / "names", kind)
    numbers, _ = stored(with_labels([0, 3, 1, 2], INTEGER), tmp_path / "numbers", kind)
    monkeypatch.setattr(datasets.IterableDataset, "__iter__", None)  # nor are rows
    assert shown_labels(stream, "label") == NAMES == shown_labels(stream.select_columns(["label"]), "label")
    assert shown_labels(numbers, "label") == list("0123")
    assert shown_labels(stream.map(lambda row: row), "label") is None
    assert shown_labels(stream.filter(lambda row: row["label"] != "ant"), "label") is None


def test_a_part_of_the_files_shows_its_own_labels_alone(tmp_path):
    data = with_labels(LABELS, TEXT)
    data.to_parquet(tmp_path / "data.parquet", batch_size=2)  # three row groups
    stream = datasets.load_dataset("parquet", data_files=str(tmp_path / "data.parquet"), split="train", streaming=True)
    part = stream.reshard().shard(3, 1)
    assert [row["label"] for row in part] == ["cat", "bee"] and shown_labels(part, "label") == ["bee", "cat"]


WRONG = [
    (["cat", "dog", "cat"], None, "has 'cat' as classes 0 and 2: a label of that name would mean two"),
    (["cat", " "], None, "has ' ' as class 1: a name is a text and not empty"),
    ([True, False], None, "has True as class 0: a name is a text.*In YAML, put it in quotes"),
    ([], None, r"is \[\], which lists no names"),
    ({"cat": 0}, None, "which lists no names. Give a list, or a file"),
    (["cat", "dog"], 3, "`num_classes` is 3, but `class_names` has 2 names. Leave `num_classes` out"),
    ("missing.txt", None, "'missing.txt' cannot be read as a text file.*Give the path of one, or the names as a list"),
    ("[cat", None, "is no list in JSON"),
]


@pytest.mark.parametrize(("value", "number", "message"), WRONG)
def test_what_is_no_list_of_classes_is_refused(value, number, message):
    with pytest.raises(ValueError, match=f"{message}"):
        read_class_names(value, number)


def test_a_list_is_read_from_files_yaml_and_words_and_kept_whole(tmp_path):
    names = ["great tit", "--none", "Ölkäfer", "7"]
    (tmp_path / "names.txt").write_text("\ufeff" + "\r\n".join(names) + "\r\n\r\n", encoding="utf-8", newline="")
    file = str(tmp_path / "names.txt")
    (tmp_path / "list.yaml").write_text(yaml.safe_dump({"class_names": names}, allow_unicode=True))
    (tmp_path / "file.yaml").write_text(f"class_names: {file}\n")
    words = ["--model", "m", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    for given in ([str(tmp_path / "list.yaml")], [str(tmp_path / "file.yaml")], ["--class_names", file]):
        arguments, config = parse_config(TeacherArguments, [*given, *words])
        assert arguments.class_names == names
    arguments, _ = parse_config(TeacherArguments, [*words, "--class_names", json.dumps(names), "--num_classes", "4"])
    write_config(arguments, config, tmp_path / "resolved.yaml")
    assert parse_config(TeacherArguments, [str(tmp_path / "resolved.yaml")])[0].class_names == names
    (tmp_path / "gap.txt").write_text("cat\n\ndog\n")
    with pytest.raises(ValueError, match="has '' as class 1"):
        read_class_names(str(tmp_path / "gap.txt"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_list_that_is_not_the_datas_is_refused(tmp_path, streaming, caplog):
    named, numbered = with_labels(LABELS, TEXT), with_labels([0, 5], INTEGER)
    if streaming:
        (named, _), (numbered, _) = stored(named, tmp_path / "named"), stored(numbered, tmp_path / "numbered")
    with pytest.raises(
        ValueError, match="`class_names` has 3 names, and `label_column` 'label' others: 'dog'. Add them"
    ):
        shown_labels(named, "label", class_names=NAMES[:3])
    with pytest.raises(ValueError, match="has labels up to 5: label 5 has no name. List 6 names at least"):
        shown_labels(numbered, "label", class_names=NAMES)
    with pytest.raises(
        ValueError, match="names 4 classes of its own. The data alone has 'dog'. `class_names` alone has 'eel'"
    ):
        shown_labels(pictures(NAMES, streaming), "label", class_names=["ant", "bee", "cat", "eel"])
    with pytest.raises(ValueError, match="`num_classes` is 5, but the data set names 4"):
        shown_labels(named, "label", 5)
    assert not caplog.records
    assert shown_labels(named, "label", class_names=[*NAMES, "eel"]) == [*NAMES, "eel"]
    assert "classes of which there is no image: 'eel'" in caplog.text


def test_a_name_of_two_classes_is_refused_and_not_taken_for_the_last(tmp_path):
    student = small_student(num_classes=4, labels=["crane", "bee", "crane", "dog"])
    trainer = ScaleKDTrainer(student, None, settings(tmp_path))
    assert trainer.predict(with_labels(["bee", "dog"], TEXT)).label_ids.tolist() == [1, 3]
    with pytest.raises(LabelError, match="'crane' in row 0, which several of the model's classes are called"):
        trainer.predict(with_labels(["crane"], TEXT))


@pytest.mark.parametrize("names", [None, NAMES[::-1]])
def test_a_teacher_learns_a_stream_of_names(tmp_path, names):
    """A stream of names needed a model that had them already."""
    _, pattern = stored(with_labels(LABELS, TEXT), tmp_path / "data")
    save_student(small_student(num_classes=6), tmp_path / "old")
    words = [
        "--model",
        str(tmp_path / "old"),
        "--pretrained",
        "true",
        "--train_files",
        pattern,
        "--eval_files",
        pattern,
    ]
    words += ["--output_dir", str(tmp_path / "new"), "--max_steps", "1", "--use_cpu", "true", "--disable_tqdm", "true"]
    words += ["--per_device_train_batch_size", "2", "--save_strategy", "no", "--report_to", "none"]
    train_teacher.main([*words, *(["--class_names", json.dumps(names)] if names else [])])
    new = load_student(str(tmp_path / "new"), pretrained=True)
    assert new.labels == (names or NAMES)
    args = settings(tmp_path / "evaluation")
    found = evaluate_model(new, with_labels(LABELS, TEXT), args)
    same = with_labels([new.labels.index(label) for label in LABELS], INTEGER)
    assert found["images"] == 6 and found == pytest.approx(evaluate_model(new, same, args))


def test_a_stream_that_cannot_be_looked_through_names_the_setting(tmp_path):
    stream = with_labels(LABELS, TEXT, streaming=True)
    student = small_student(num_classes=4)
    with pytest.raises(
        ValueError, match=r"'dog' in row 0.*Name them.*`class_names`.*`load_student\(name, labels=names\)`"
    ):
        ScaleKDTrainer(student, None, settings(tmp_path), stream)
    student.name_labels(NAMES)
    named = ScaleKDTrainer(student, None, settings(tmp_path), stream)
    assert named.predict(stream).label_ids.tolist() == [NAMES.index(label) for label in LABELS]
    with pytest.raises(
        ValueError, match="'dog' in row 0, which is no class of the model: 'ant', 'bee'. A new student's"
    ):
        ScaleKDTrainer(small_student(num_classes=2, labels=["ant", "bee"]), None, settings(tmp_path), stream)


def test_names_given_in_python_are_kept_and_none_is_passed_over(tmp_path):
    student = load_student(transformers_vit(num_labels=4), labels=NAMES)
    save_student(student, tmp_path)
    assert load_student(str(tmp_path), pretrained=True).labels == NAMES == student.labels
    with pytest.raises(ValueError, match="`labels` has 2 names, but the student 4 classes"):
        load_student(timm_vit(num_classes=4), labels=NAMES[:2])
    with pytest.raises(ValueError, match=r"for a `Student`, which is loaded already. Use its `name_labels\(labels\)`"):
        load_student(student, labels=NAMES[::-1])


def test_a_plan_and_a_student_of_a_recipe_have_the_stated_classes(tmp_path):
    digits = [str(number) for number in range(10)]
    names = [f"number {digit}" for digit in digits]
    _, pattern = stored(with_labels([names[3], names[0]], TEXT), tmp_path / "data")
    small = {"depths": [1, 1, 2, 1], "dims": [8, 12, 16, 24], "patch_size": 2}
    given = {
        "student": "timm/convnext_atto",
        "student_args": json.dumps(small),
        "image_size": 32,
        "teacher": str(TEACHER),
        "train_files": pattern,
    }
    given |= {"logit_weight": 0.0, "max_steps": 2, "output_dir": str(tmp_path / "run"), "eval_split": "none"}
    assert "'number 3' in row 0, which is no class of the model" in plan(given).error
    assert plan({**given, "class_names": names}).error is None
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    words += ["--use_cpu", "--class_names", json.dumps(names)]
    arguments, config = parse_config(distill.DistillArguments, words)
    train, _ = distill.load_data(arguments)
    assert distill.fresh_model(arguments, config, train).student.labels == names


def test_a_run_is_not_resumed_with_its_classes_in_another_order(tmp_path):
    data = with_labels([0, 1, 2, 3], INTEGER)
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}

    def trainer(names):
        return ScaleKDTrainer(small_student(num_classes=4, labels=names), None, settings(tmp_path, **options), data)

    trainer(NAMES).train()
    with pytest.raises(ValueError, match=r"other settings: student's classes \['ant', .* to \['dog'"):
        trainer(NAMES[::-1]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    trainer(NAMES).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_what_the_labels_are_read_as_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    shown_labels(stored(with_labels(LABELS, TEXT), tmp_path)[0], "label")
    assert "labels are names, sorted as text: 4 classes" in caplog.text


def test_imagenet_in_another_order_than_the_teachers_is_refused():
    config = {"tag": "ms_in22k_ft_in1k"}
    teacher = SimpleNamespace(
        model=SimpleNamespace(pretrained_cfg=config), labels=None, name="timm/swin", num_labels=1000
    )
    usual = ImageNetInfo().label_descriptions()
    first = [words.split(",")[0] for words in usual]  # as torchvision has them; two classes are a "Cardigan"
    for names in (usual, first, usual[:10], [f"part {number}" for number in range(1000)], None):
        check_imagenet_order(teacher, names)
    for names in (sorted(usual), sorted(map(str, range(1000)))):
        with pytest.raises(ValueError, match=r"Class \d+ is .* in the data, and .* to the teacher 'timm/swin', whose"):
            check_imagenet_order(teacher, names)
    teacher.labels = sorted(usual)  # it says itself what they are
    check_imagenet_order(teacher, teacher.labels)
