"""A label of the data means the same class to the model, by whichever door the data comes in."""

import io
import tarfile

import datasets
import numpy as np
import pytest
import torch
from helpers import settings, small_student, some_slow
from PIL import Image

from scalekd_hf import ScaleKDTrainer, load_student
from scalekd_hf.cli import train_teacher
from scalekd_hf.data.dataset import shown_labels
from scalekd_hf.data.labels import LabelError
from scalekd_hf.models.saving import save_student


NAMES = ["ant", "bee", "cat", "dog"]


def pictures(names, streaming=False, rows=16):
    """Rows whose image tells the class by its brightness, with labels in the order of `names`."""
    classes = [NAMES[row % 4] for row in range(rows) if NAMES[row % 4] in names]
    images = [Image.fromarray(np.full((32, 32, 3), 60 * NAMES.index(name), np.uint8)) for name in classes]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": images, "label": [names.index(name) for name in classes]}
    data = datasets.Dataset.from_dict(rows, features=features)
    return data.to_iterable_dataset(num_shards=2) if streaming else data


def trainer_for(folder, train=None, evaluation=None, labels=NAMES):
    student = small_student(num_classes=4)
    student.labels = list(labels)
    return ScaleKDTrainer(student, None, settings(folder, max_steps=2), train, evaluation)


@pytest.mark.parametrize("streaming", [False, True])
def test_other_orders_of_the_same_classes_are_taken_by_name(tmp_path, caplog, streaming):
    """A student was evaluated at 0% instead of 75% where the names came in reverse order."""
    trainer = trainer_for(tmp_path)
    same, reverse = (pictures(names, streaming) for names in (NAMES, NAMES[::-1]))
    expected, found = trainer.evaluate(same), trainer.evaluate(reverse)
    assert (
        "the model's 4 classes in another order" in caplog.text
        and "label 0, 'dog', is the model's class 3" in caplog.text
    )
    for name in ("eval_loss", "eval_top1"):
        assert found[name] == pytest.approx(expected[name])
    both = trainer.evaluate({"same": same, "reverse": reverse})
    assert both["eval_same_loss"] == pytest.approx(both["eval_reverse_loss"])
    assert np.array_equal(trainer.predict(same).label_ids, trainer.predict(reverse).label_ids)


@pytest.mark.parametrize("streaming", [False, True])
def test_training_takes_labels_by_name_too(tmp_path, streaming):
    labels = []
    for names in (NAMES, NAMES[::-1]):
        trainer = trainer_for(tmp_path / names[0], pictures(names, streaming), pictures(names))
        batch = next(iter(trainer.get_train_dataloader()))
        labels.append(batch["labels"].tolist())
        assert trainer.student.labels == NAMES
    assert labels[0] == labels[1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["ant", "cat", "dog"], "3 classes and the model 4.* The model alone has 'bee'"),
        (["ant", "bee", "cat", "eel"], "The data alone has 'eel'. The model alone has 'dog'"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_other_classes_are_refused_at_every_door(tmp_path, names, message, streaming):
    trainer, data = trainer_for(tmp_path), pictures(names, streaming)
    doors = [
        lambda: trainer.evaluate(data),
        lambda: trainer.evaluate({"one": data}),
        lambda: trainer.predict(data),
        lambda: trainer_for(tmp_path / "train", data),
        lambda: trainer_for(tmp_path / "evaluation", pictures(NAMES), data),
    ]
    for door in doors:
        with pytest.raises(ValueError, match=message):
            door()


def with_labels(labels, kind, streaming=False):
    images = [Image.fromarray(np.full((32, 32, 3), 10 * row, np.uint8)) for row in range(len(labels))]
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    data = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    return data.to_iterable_dataset(num_shards=2) if streaming else data


INTEGER, NUMBER = datasets.Value("int64"), datasets.Value("float32")
NO_CLASS = [
    (
        4,
        INTEGER,
        r"'label' has 4 in row \d+, but the model's classes are 0 to 3. Labels that begin at 1 must be one less",
    ),
    (-7, INTEGER, r"has -7 in row \d+, but the model's classes are 0 to 3"),
    (1.0, NUMBER, r"has 1.0 in row \d+: class indices are whole numbers. Cast the column"),
    (True, datasets.Value("bool"), r"has True in row \d+: class indices are whole numbers"),
    ([1], datasets.Sequence(INTEGER), r"has \[1\] in row \d+: a list with one index"),
    (
        [0, 1],
        datasets.Sequence(INTEGER),
        r"has \[0, 1\] in row \d+: neither a class index nor a share for each of the 4",
    ),
    ([1, 0, 1, 0], datasets.Sequence(INTEGER), r"has \[1, 0, 1, 0\] in row \d+: soft labels are shares.*multi-label"),
    (
        "eel",
        datasets.Value("string"),
        r"has 'eel' in row \d+, which is no class of the model: 'ant', 'bee', 'cat', 'dog'",
    ),
]


@pytest.mark.parametrize(("label", "kind", "message"), NO_CLASS)
@pytest.mark.parametrize("streaming", some_slow([False, True], 1))
def test_a_label_that_means_no_class_is_refused_at_every_door(tmp_path, label, kind, message, streaming):
    data, trainer = with_labels([label] * 6, kind, streaming), trainer_for(tmp_path)
    for door in (
        lambda: trainer.evaluate(data),
        lambda: trainer.predict(data),
        lambda: trainer_for(tmp_path / "train", data),
        lambda: trainer_for(tmp_path / "evaluation", pictures(NAMES), data),
    ):
        with pytest.raises(ValueError, match=message):
            door()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", some_slow([0, 1], 1))
def test_a_wrong_label_anywhere_ends_a_run_with_a_checkpoint_and_its_row(tmp_path, streaming, workers):
    data = with_labels([0, 1, 2, 3, 0, 1, 2, 9], INTEGER, streaming)
    student = small_student(num_classes=4)
    options = {
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": workers,
        "max_steps": 9,
        "save_strategy": "no",
    }
    trainer = ScaleKDTrainer(student, None, settings(tmp_path, **options), data)
    with pytest.raises(LabelError, match="'label' has 9 in row 7, but the model's classes are 0 to 3"):
        trainer.train()
    assert list(tmp_path.glob("checkpoint-*")) or trainer.state.global_step == 0
    with pytest.raises(LabelError, match="'label' has 9 in row 7"):
        trainer.evaluate(data)


@pytest.mark.parametrize("streaming", [False, True])
def test_images_without_labels_are_predicted_without_a_loss(tmp_path, streaming):
    trainer = trainer_for(tmp_path)
    bare = pictures(NAMES, streaming).remove_columns("label")
    unlabelled = with_labels([-1] * 6, INTEGER, streaming)
    for data, rows in ((bare, 16), (unlabelled, 6)):
        found = trainer.predict(data)
        assert found.predictions.shape == (rows, 4)
        assert not {"test_loss", "test_top1"} & set(found.metrics)
    mixed = trainer.predict(with_labels([0, -1, 2, -1, 1, 3], INTEGER, streaming))
    assert mixed.predictions.shape == (6, 4) and mixed.metrics["test_loss"] > 0 and "test_top1" in mixed.metrics
    with pytest.raises(LabelError, match="has -1 in row 0: an image to train on needs a label"):
        trainer_for(tmp_path / "train", unlabelled)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 7]), "one is 7, but the model's classes are 0 to 3"),
        (torch.tensor([0.0, 1.0]), "of type torch.float32: class indices are whole numbers"),
        (torch.tensor([[0, 1], [1, 2]]), "neither a class index nor a share"),
        (torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0]]), "multi-label"),
    ],
)
def test_finished_samples_are_checked_before_they_reach_a_device(tmp_path, labels, message):
    samples = [{"pixel_values": torch.zeros(3, 32, 32), "labels": label} for label in labels]
    with pytest.raises(LabelError, match=message):
        trainer_for(tmp_path, samples).train()
    with pytest.raises(LabelError, match=message):
        trainer_for(tmp_path).evaluate(samples)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_metric_of_the_users_sees_the_images_that_count_alone(tmp_path, streaming):
    """Labels of -100 counted as wrong."""
    seen = []

    def metric(prediction):
        seen.append((np.asarray(prediction.predictions).shape, prediction.label_ids.tolist()))
        return {"share": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    data = with_labels([0, -1, 2, 3, 1, 2, 3], INTEGER)
    contents = [row["bytes"] for row in data.cast_column("image", datasets.Image(decode=False))["image"]]
    contents[3] = b"no image"
    file = tmp_path / "data.parquet"
    rows = {"image": [{"bytes": content, "path": None} for content in contents], "label": data["label"]}
    datasets.Dataset.from_dict(rows, features=data.features).to_parquet(file)
    data = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=streaming)
    trainer = ScaleKDTrainer(small_student(num_classes=4), None, settings(tmp_path), compute_metrics=metric)
    found = trainer.predict(data)
    assert seen == [((5, 4), [0, 2, 1, 2, 3])] and "test_share" in found.metrics
    assert found.label_ids.tolist() == [0, -100, 2, -100, 1, 2, 3] and len(found.predictions) == 7


def test_an_evaluation_drops_no_last_batch(tmp_path):
    args = settings(tmp_path, per_device_eval_batch_size=8, dataloader_drop_last=True)
    trainer = ScaleKDTrainer(small_student(num_classes=4), None, args)
    assert len(trainer.predict(pictures(NAMES, rows=18)).predictions) == 18
    samples = [{"pixel_values": torch.zeros(3, 32, 32), "labels": 1} for _ in range(18)]
    assert len(trainer.predict(samples).predictions) == 18


def test_integer_labels_make_a_head_of_their_own_classes(tmp_path):
    """A model of six named classes kept them, so that class 0 was 'tench'."""
    data = with_labels([0, 3, 1, 2, 3, 0], INTEGER)
    assert shown_labels(data, "label") == list("0123") and shown_labels(data, "label", 6) == list("012345")
    assert shown_labels(data.to_iterable_dataset(), "label") is None
    assert shown_labels(pictures(NAMES), "label") == NAMES
    with pytest.raises(ValueError, match="`num_classes` is 3, but the data set names 4"):
        shown_labels(pictures(NAMES), "label", 3)
    trainer = ScaleKDTrainer("timm/convnext_atto", None, settings(tmp_path, image_size=32), data)
    assert trainer.student.num_labels == 4 and trainer.student.labels == list("0123")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_teacher_of_another_task_is_given_new_classes(tmp_path, streaming, monkeypatch):
    student = small_student(num_classes=6, labels=["tench", "shark", "ray", "cock", "hen", "finch"])
    save_student(student, tmp_path / "old")
    (tmp_path / "data").mkdir()
    with_labels([0, 3, 1, 2], INTEGER).to_parquet(tmp_path / "data" / "train.parquet")
    words = [
        "--model",
        str(tmp_path / "old"),
        "--pretrained",
        "true",
        "--train_files",
        str(tmp_path / "data" / "*.parquet"),
    ]
    words += ["--eval_split", "none", "--output_dir", str(tmp_path / "new"), "--max_steps", "1", "--use_cpu", "true"]
    words += ["--streaming", str(streaming).lower(), "--per_device_train_batch_size", "2", "--save_strategy", "no"]
    monkeypatch.setattr(train_teacher, "shown_labels", lambda *_: None)  # as of a stream that tells nothing
    with pytest.raises(ValueError, match="set `num_classes` to their number, or `class_names` to their names"):
        train_teacher.main(words)
    monkeypatch.undo()
    train_teacher.main(words)
    assert load_student(str(tmp_path / "new"), pretrained=True).labels == list("0123")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_labels_in_files_are_checked_as_those_in_memory(tmp_path, kind, streaming):
    data = with_labels([0, 1, 2, 3, 0, 9], INTEGER)
    if kind == "parquet":
        data.to_parquet(tmp_path / "data.parquet")
        columns, files = {}, str(tmp_path / "data.parquet")
    else:
        columns, files = {"image_column": "png", "label_column": "cls"}, str(tmp_path / "data.tar")
        with tarfile.open(files, "w") as archive:
            for number, row in enumerate(data.cast_column("image", datasets.Image(decode=False))):
                for ending, content in (("png", row["image"]["bytes"]), ("cls", str(row["label"]).encode())):
                    member = tarfile.TarInfo(f"{number:03d}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    loaded = datasets.load_dataset(kind, data_files=files, split="train", streaming=streaming)
    trainer = ScaleKDTrainer(small_student(num_classes=4), None, settings(tmp_path / "run", **columns), loaded)
    with pytest.raises(LabelError, match="has 9 in row 5, but the model's classes are 0 to 3"):
        trainer.train()
    with pytest.raises(LabelError, match="has 9 in row 5"):
        trainer.evaluate(loaded)


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_that_are_names_are_taken_by_name(tmp_path, streaming):
    indices = [0, 1, 2, 3, 3, 1]
    named = with_labels([NAMES[index] for index in indices], datasets.Value("string"), streaming)
    trainer = trainer_for(tmp_path, named, named)
    assert trainer.predict(named).label_ids.tolist() == indices
    assert trainer.evaluate()["eval_loss"] > 0 and set(
        next(iter(trainer.get_train_dataloader()))["labels"].tolist()
    ) <= {0, 1, 2, 3}
    student = small_student(num_classes=4)
    if streaming:
        with pytest.raises(ValueError, match="'ant' in row 0: class indices are needed, not names.*`class_names`"):
            ScaleKDTrainer(student, None, settings(tmp_path), named)
    else:
        assert ScaleKDTrainer(student, None, settings(tmp_path), named).student.labels == NAMES
        built = ScaleKDTrainer("timm/convnext_atto", None, settings(tmp_path, image_size=32), named).student
        assert built.labels == NAMES and built.num_labels == 4


def test_finished_samples_in_another_order_are_refused_since_they_cannot_be_taken_by_name(tmp_path):
    features = datasets.Features(
        {"pixel_values": datasets.Array3D((3, 32, 32), "float32"), "label": datasets.ClassLabel(names=NAMES[::-1])}
    )
    rows = {"pixel_values": np.zeros((4, 3, 32, 32), np.float32), "label": [0, 1, 2, 3]}
    samples = datasets.Dataset.from_dict(rows, features=features)
    trainer = trainer_for(tmp_path)
    for door in (
        lambda: trainer.evaluate(samples),
        lambda: trainer.predict(samples),
        lambda: trainer_for(tmp_path / "train", samples),
    ):
        with pytest.raises(ValueError, match="holds finished samples.*in another order"):
            door()


def test_a_metric_of_the_users_is_not_asked_where_no_image_has_a_label(tmp_path):
    def metric(prediction):
        raise AssertionError("there is nothing to measure")

    trainer = ScaleKDTrainer(small_student(num_classes=4), None, settings(tmp_path), compute_metrics=metric)
    assert len(trainer.predict(with_labels([-1] * 6, INTEGER)).predictions) == 6
