"""A run goes on under the settings it was started with, or says which have changed."""

import json

import pytest
import torch
from helpers import small_student, timm_swin
from trainers import trainer_for

from scalekd_hf import load_student, load_teacher
from scalekd_hf.manifest import MANIFEST_FILE
from scalekd_hf.models.taps import find_taps
from scalekd_hf.training.position import RUN_STATE_FILE


OPTIONS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def rates(trainer):
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("run")
    trainer_for(folder, digits, **OPTIONS).train()
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_drop_path": 0.5}, "teacher_drop_path 0.0 to 0.5"),
        ({"learning_rate": 1e-4}, r"learning_rate \S+ to 0.0001"),
        ({"spatial_weight": 0.1, "weight_decay": 0.1}, r"spatial_weight 0.08 to 0.1, weight_decay 0.0 to 0.1"),
        ({"rand_augment": 9}, "rand_augment None to 9"),
        ({"task_loss": "binary_cross_entropy"}, "task_loss cross_entropy to binary_cross_entropy"),
    ],
)
def test_a_run_is_not_resumed_under_other_settings(run, digits, changes, message):
    with pytest.raises(ValueError, match=f"other settings: {message}.*`allow_settings_mismatch=True`"):
        trainer_for(run, digits, **OPTIONS, **changes).train(resume_from_checkpoint=str(run / "checkpoint-2"))


def other_teacher():
    torch.manual_seed(1)
    return timm_swin()


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (lambda: {"teacher": other_teacher()}, "teacher's weights"),
        (lambda: {"teacher": load_teacher(timm_swin(), mean=[0, 0, 0])}, "teacher's images .*'mean'"),
        (lambda: {"student": small_student(drop_path_rate=0.5)}, r"student's drop rates \[\] to \[0"),
        (lambda: {"student": small_student(mean=[0, 0, 0])}, "student's images .*'mean'"),
        (lambda: {"student": small_student(act_layer="relu")}, r"student's activations \['GELU'\] to \['ReLU'\]"),
    ],
)
def test_a_run_is_not_resumed_with_another_teacher_body_or_other_images(run, digits, models, message):
    with pytest.raises(ValueError, match=f"other settings: {message}"):
        trainer_for(run, digits, **models(), **OPTIONS).train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_what_comes_to_the_same_is_no_change(run, digits):
    same = {"interpolation": "bicubic", "antialias": True, "crop_pct": 0.5, "last_num_heads": 24, "image_size": 32}
    trainer_for(run, digits, **OPTIONS, **same).train(resume_from_checkpoint=str(run / "checkpoint-2"))


@pytest.mark.parametrize(
    "changes",
    [
        {"decay_all": True},
        {"timm_optim": "lamb"},
        {"penultimate_norm": True},
        {"student_taps": ["stages.0", "stages.1"]},
    ],
)
def test_what_no_checkpoint_can_go_on_with_is_refused_whatever_is_accepted(run, digits, changes):
    trainer = trainer_for(run, digits, **OPTIONS, **changes, allow_settings_mismatch=True)
    with pytest.raises(ValueError, match="go back to them, or begin a new run from its student"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_settings_are_those_that_the_run_was_trained_with(tmp_path, digits):
    trainer = trainer_for(tmp_path, digits, **OPTIONS, learning_rate=0.01)
    trainer.args.learning_rate = 0.002  # as people do
    trainer.train()
    trainer_for(tmp_path, digits, **OPTIONS, learning_rate=0.002).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    with pytest.raises(ValueError, match="learning_rate 0.002 to 0.01"):
        trainer_for(tmp_path, digits, **OPTIONS, learning_rate=0.01).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_a_schedule_that_cannot_begin_anew_says_so_and_the_rest_takes_effect(tmp_path, digits, caplog):
    options = {**OPTIONS, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2}
    trainer_for(tmp_path, digits, digits, **options, learning_rate=0.01, weight_decay=0.1).train()
    changes = {"learning_rate": 0.001, "weight_decay": 0.3, "allow_settings_mismatch": True}
    resumed = trainer_for(tmp_path, digits, digits, **options, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "The learning rate stays the checkpoint's" in caplog.text
    assert {(group["lr"], group["weight_decay"]) for group in resumed.optimizer.param_groups} == {
        (0.01, 0.3),
        (0.01, 0.0),
    }


def test_a_longer_run_is_no_other_run(run, digits):
    resumed = trainer_for(run, digits, **{**OPTIONS, "max_steps": 5, "logging_steps": 1})
    resumed.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert resumed.state.global_step == 5


def test_settings_that_were_accepted_take_effect(tmp_path, digits):
    options = {**OPTIONS, "logging_steps": 1, "lr_scheduler_type": "linear", "weight_decay": 0.1}
    trainer_for(tmp_path, digits, **options, learning_rate=0.01).train()
    changes = {"learning_rate": 0.001, "weight_decay": 0.3, "adam_beta1": 0.5, "allow_settings_mismatch": True}
    resumed = trainer_for(tmp_path, digits, **{**options, **changes})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rates(resumed) == pytest.approx([0.01, 0.0075, 0.0005, 0.00025])
    assert {(group["weight_decay"], group["betas"][0]) for group in resumed.optimizer.param_groups} == {
        (0.3, 0.5),
        (0.0, 0.5),
    }


def test_a_checkpoint_that_does_not_tell_its_settings_is_resumed(run, digits):
    file = run / "checkpoint-2" / RUN_STATE_FILE
    state = json.loads(file.read_text())
    del state["settings"]
    file.write_text(json.dumps(state))
    (file.parent / MANIFEST_FILE).unlink()
    resumed = trainer_for(run, digits, **OPTIONS)
    resumed.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert resumed.state.global_step == 4


def test_an_old_checkpoint_of_a_mixer_goes_on_where_it_was_tapped(tmp_path, digits):
    def student(taps=None):
        small = {"image_size": 32, "patch_size": 8, "num_blocks": 4, "embed_dim": 24, "num_classes": 10}
        return load_student("timm/mixer_b14_224", taps=taps, **small)

    before = [tap.module for tap in find_taps(student(), mixers_after_norm=True)[0]]
    trainer_for(tmp_path, digits, student=student(before), **OPTIONS).train()
    file = tmp_path / "checkpoint-2" / RUN_STATE_FILE
    state = json.loads(file.read_text())
    del state["settings"]
    file.write_text(json.dumps(state))
    (file.parent / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match=r"tapped at blocks\.\d, norm; .* Set `student_taps` to the former"):
        trainer_for(tmp_path, digits, student=student(), **OPTIONS).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )
    resumed = trainer_for(tmp_path, digits, student=student(before), **OPTIONS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
