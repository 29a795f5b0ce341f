"""A run that has come to its end is called again: what it was trained with stays told, and no other run is taken for it."""

import json
import shutil

import pytest
import yaml
from helpers import DIGITS, TEACHER

from scalekd_hf import ScaleKDTrainer
from scalekd_hf.cli import distill, train_teacher


RUN = {
    "train_files": str(DIGITS / "train-*.parquet"),
    "eval_files": str(DIGITS / "test-*.parquet"),
    "image_size": 32,
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}
SMALL = {"depths": [1, 1, 2, 1], "dims": [8, 12, 16, 24], "output_stride": 16}
PAIR = {
    "student": "timm/convnext_atto",
    "student_args": SMALL,
    "teacher": str(TEACHER),
    "evaluate_teacher": False,
    "penultimate_num_heads": 4,
    "last_num_heads": 4,
    "baseline": True,
}


def written(folder, **settings):
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(RUN | settings | {"output_dir": str(folder / "run")}))
    return str(file)


def settings_of(folder):
    return yaml.safe_load((folder / "run" / "config_resolved.yaml").read_text())


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folder of a distillation that has ended, the student alone with it."""
    folder = tmp_path_factory.mktemp("ended")
    distill.main([written(folder, **PAIR)])
    return folder


@pytest.fixture
def pair(ended, tmp_path):
    """A copy of it, and the words that call it again."""
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True)
    return tmp_path, [written(tmp_path, **PAIR), "--resume_from_checkpoint", "true"]


def test_other_settings_are_refused_and_nothing_is_rewritten(pair):
    folder, words = pair
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"finished run with other settings \(`learning_rate` .* -> 0.5\)"):
        distill.main([*words, "--learning_rate", "0.5"])
    with pytest.raises(ValueError, match="`eval_files`"):
        distill.main([*words, "--eval_files", str(DIGITS / "train-*.parquet")])
    assert all(path.read_bytes() == content for path, content in files.items() if path.name != "_lock")


def test_the_student_alone_that_has_finished_is_not_mixed_with_one_of_other_settings(pair):
    folder, words = pair
    for path in (folder / "run").iterdir():  # as killed after the student alone
        if path.name not in ("alone", "config_resolved.yaml"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match="`weight_decay`"):
        distill.main([*words, "--weight_decay", "0.5"])
    assert not (folder / "run" / "model.safetensors").exists()


def test_the_same_run_elsewhere_by_a_later_version_is_taken_for_it(pair, monkeypatch):
    folder, words = pair
    moved = shutil.copytree(DIGITS, folder / "scratch")
    file = folder / "run" / "config_resolved.yaml"
    kept = settings_of(folder)
    del kept["evaluate_teacher"], kept["stem"]
    file.write_text(yaml.safe_dump(kept))
    before = (folder / "run" / "model.safetensors").stat().st_mtime_ns
    places = ["--train_files", str(moved / "train-*.parquet"), "--eval_files", str(moved / "test-*.parquet")]
    distill.main([*words, *places, "--dataloader_num_workers", "1", "--evaluate_teacher", "true"])
    assert (folder / "run" / "model.safetensors").stat().st_mtime_ns == before
    assert list(json.loads((folder / "run" / "results.json").read_text()))[0] == "teacher"  # which was left out before
    assert settings_of(folder) == kept


def test_more_steps_go_on(pair):
    folder, words = pair
    kept, words = settings_of(folder), [*words, "--max_steps", "2"]
    with pytest.raises(ValueError, match="learning_rate 5e-05 to 0.01"):
        distill.main([*words, "--learning_rate", "0.01"])
    assert settings_of(folder) == kept
    distill.main([*words, "--learning_rate", "0.01", "--allow_settings_mismatch", "true"])
    assert (settings_of(folder)["max_steps"], settings_of(folder)["learning_rate"]) == (2, 0.01)
    assert json.loads((folder / "run" / "trainer_state.json").read_text())["global_step"] == 2


def test_results_of_before_go_as_more_steps_begin(pair, monkeypatch):
    folder, words = pair

    def die(*_, **__):
        raise RuntimeError("died")

    monkeypatch.setattr(ScaleKDTrainer, "training_step", die)
    with pytest.raises(RuntimeError, match="died"):
        distill.main([*words, "--max_steps", "2", "--learning_rate", "0.01", "--allow_settings_mismatch", "true"])
    assert settings_of(folder)["max_steps"] == 2 and not (folder / "run" / "results.json").exists()


def test_a_teacher_too(tmp_path):
    words = [written(tmp_path, model="timm/convnext_atto", model_args=SMALL, pretrained=False), "--num_classes", "10"]
    words += ["--ema_decay", "0.5", "--max_steps", "3", "--learning_rate", "0.01"]
    train_teacher.main(words)
    evaluated = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    train_teacher.main([*words, "--resume_from_checkpoint", "true"])
    again = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert [again[name] for name in ("eval_loss", "eval_top1")] == [
        evaluated[name] for name in ("eval_loss", "eval_top1")
    ]
    with pytest.raises(ValueError, match="finished run with other settings"):
        train_teacher.main([*words, "--seed", "7", "--resume_from_checkpoint", "true"])
    assert settings_of(tmp_path).get("seed") != 7
