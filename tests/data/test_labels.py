"""A label of the data means the same class to the model, by whichever door the data comes in."""

import datasets
import numpy as np
import pytest
from helpers import settings, small_student
from PIL import Image

from scalekd_hf import ScaleKDTrainer


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


def test_images_without_labels_are_predicted(tmp_path):
    data = pictures(NAMES).remove_columns("label")
    assert trainer_for(tmp_path).predict(data).predictions.shape == (16, 4)
