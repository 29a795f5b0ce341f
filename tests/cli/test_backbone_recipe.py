"""A student without a classifier through the commands: planned, trained, described and evaluated."""

import json

import pytest
import timm
import torch
import yaml
from helpers import DIGITS, TEACHER
from transformers import AutoModel

from scalekd_hf.cli.main import main
from scalekd_hf.tools.plan import plan
from scalekd_hf.tools.recipe import DistillArguments, TeacherArguments


PAIR = {
    "student": "timm/convnext_atto",
    "student_args": {"depths": [1, 1, 2, 1], "dims": [8, 12, 16, 24], "output_stride": 16},
    "teacher": str(TEACHER),
    "num_classes": 0,
    "train_files": str(DIGITS / "train-*.parquet"),
    "eval_files": str(DIGITS / "test-*.parquet"),
    "image_size": 32,
    "penultimate_num_heads": 4,
    "last_num_heads": 4,
    "max_steps": 2,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}


@pytest.fixture
def pair(tmp_path):
    """The configuration file of a run, and its folder."""
    file = tmp_path / "pair.yaml"
    file.write_text(yaml.safe_dump(PAIR | {"output_dir": str(tmp_path / "run")}))
    return file, tmp_path / "run"


def test_a_backbone_is_planned_and_distilled(pair, capsys):
    file, folder = pair
    planned = plan(file)
    assert planned.error is None and any("the student has no classifier" in note for note in planned.notes)
    main(["distill", str(file)])
    said = capsys.readouterr().out
    assert "It has no classifier: its loss is the sum of the feature terms" in said
    assert "20 nearest among the others" in said and f"AutoModel.from_pretrained({str(folder)!r})" in said
    assert "top-5" not in said and "ForImageClassification" not in said
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == ["student distilled"] and 0 < results["student distilled"]["neighbours_top1"] <= 1
    backbone = timm.create_model(f"local-dir:{folder}", pretrained=True)
    state = {name.removeprefix("timm_model."): x for name, x in AutoModel.from_pretrained(folder).state_dict().items()}
    assert backbone.num_classes == 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.state_dict().items())
    assert "neighbours' top-1" in (folder / "README.md").read_text()
    assert yaml.safe_load((folder / "training_config.yaml").read_text())["num_classes"] == 0
    main(["distill", str(file)])  # it has come to its end
    assert "nothing is trained again" in (again := capsys.readouterr().out) and "AutoModel.from_pretrained" in again


def test_the_students_arguments_may_say_so_too():
    given = {"student": "a", "teacher": "b", "student_args": {"num_classes": 0, "depth": 2}}
    arguments = DistillArguments(**given)
    assert (arguments.num_classes, arguments.student_args) == (0, {"depth": 2})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"baseline": True}, "`baseline` is on, but `num_classes` is 0"),
        ({"num_classes": -1}, "`num_classes` is -1, but must be at least 0"),
        ({"logit_weight": 0.3}, "`logit_weight` is 0.3, but the student has no classifier"),
        ({"mixup_alpha": 0.2}, "`mixup_alpha` is 0.2, but the student has no classifier"),
        ({"student_args": {}}, "ends in a single cell at 32x32 px"),
    ],
)
def test_what_a_backbone_cannot_have_is_refused_by_plan_and_run(pair, changes, message, capsys):
    file, _ = pair
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))
    assert message in str(plan(file).error)
    with pytest.raises(SystemExit):
        main(["distill", str(file)])
    assert message in capsys.readouterr().err


def test_a_teacher_to_be_trained_needs_classes():
    with pytest.raises(ValueError, match="`num_classes` is 0, but must be at least 1"):
        TeacherArguments(model="timm/resnet18", num_classes=0)
