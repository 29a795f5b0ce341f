"""Torch data sets of (image, class index), as torchvision has them."""

import numpy as np
import pytest
import torch
import torchvision
from helpers import settings, small_student
from PIL import Image
from test_folders import make, photos

from scalekd_hf import ScaleKDTrainer


class Pairs(torch.utils.data.Dataset):
    def __init__(self, kind=Image.fromarray, classes=None, rows=12):
        self.kind, self.rows = kind, rows
        if classes:
            self.classes = classes

    def __len__(self):
        return self.rows

    def __getitem__(self, row):
        if row >= self.rows:
            raise IndexError(row)
        return self.kind(np.full((32, 32, 3), 20 * row, np.uint8)), row % 4


@pytest.mark.parametrize("kind", [Image.fromarray, np.asarray])
def test_they_train_resume_and_are_evaluated_as_tables_are(tmp_path, kind):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
    weights = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        student = small_student(num_classes=4)
        trainer = ScaleKDTrainer(student, None, settings(tmp_path, **options), Pairs(kind), Pairs(kind, rows=7))
        trainer.train(resume_from_checkpoint=resume)
        weights.append(student.state_dict())
        assert len(trainer.predict(Pairs(kind, rows=7)).predictions) == 7 and trainer.evaluate()["eval_loss"] > 0
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_their_class_names_are_compared_and_saved(tmp_path):
    names = ["ant", "bee", "cat", "dog"]
    trainer = ScaleKDTrainer(
        small_student(num_classes=4), None, settings(tmp_path), Pairs(classes=names), Pairs(classes=names[::-1])
    )
    assert trainer.student.labels == names
    with pytest.raises(ValueError, match="The data alone has 'eel'"):
        trainer.evaluate(Pairs(classes=["ant", "bee", "cat", "eel"]))
    part = torch.utils.data.Subset(Pairs(classes=names[::-1]), range(8))
    assert trainer.predict(part).label_ids.tolist() == [3, 2, 1, 0] * 2


def test_a_folder_of_torchvisions_is_read(tmp_path):
    make(tmp_path / "photos", *photos("cat", "dog"))
    folder = torchvision.datasets.ImageFolder(str(tmp_path / "photos"))
    trainer = ScaleKDTrainer("timm/convnext_atto", None, settings(tmp_path / "run", image_size=32), folder)
    assert trainer.student.labels == ["cat", "dog"]
    assert next(iter(trainer.get_train_dataloader()))["pixel_values"].dtype == torch.uint8


def test_tensors_of_unknown_scale_and_wrong_labels_are_refused(tmp_path):
    def tensor(pixels):
        return torch.from_numpy(pixels).permute(2, 0, 1) / 255

    with pytest.raises(
        ValueError, match=r"gives \(tensor, label\): whether its pixels are normalised.*`transform` out"
    ):
        ScaleKDTrainer(small_student(), None, settings(tmp_path), Pairs(tensor))
    with pytest.raises(ValueError, match="'label' has 3 in row .*, but the model's classes are 0 to 2"):
        ScaleKDTrainer(small_student(num_classes=3), None, settings(tmp_path), Pairs()).train()
