"""A run that is stopped, at any step and in any way, goes on as if it had not been."""

import json
import os
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from helpers import settings, small_student, some_slow
from processes import in_child, in_processes
from stopped_runs import EVALUATING, result, train, trainer_for
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState

from scalekd_hf import ScaleKDTrainer
from scalekd_hf.training.run_folder import RunFolder, last_checkpoint


ROWS = 28  # of three shards; 3.5 steps of 8 a pass


@pytest.mark.parametrize("kind", some_slow(["stream", "map"], 1))
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_at_any_step_equals_the_uninterrupted_one_to_the_bit(tmp_path, shards, kind, workers):
    options = {"kind": kind, "dataloader_num_workers": workers}
    train(tmp_path, shards, **options)
    whole = result(tmp_path)
    assert whole["images_seen"] == 72 and whole["epoch"] == pytest.approx(72 / ROWS)
    for step in (1, 3, 4, 7) if workers == 0 else (3, 5):  # in the first pass, about its end, in the second
        train(tmp_path, shards, resume=str(tmp_path / f"checkpoint-{step}"), **options)
        assert result(tmp_path) == whole, step


@pytest.mark.parametrize("kind", some_slow(["stream", "map"], 1))
def test_two_processes_resume_to_the_bit(tmp_path, shards, kind):
    options = {"kind": kind, "dataloader_num_workers": 2, "per_device_train_batch_size": 2, "ema_decay": 0.9}

    results = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        for outcome in in_processes(tmp_path, lambda: train(tmp_path, shards, resume, **options), processes=2):  # noqa: B023
            assert outcome.status == 0, outcome.text[-3000:]
        results.append(result(tmp_path))
    assert (results[0]["world_size"], results[0]["kind"]) == (2, "DistributedType.MULTI_CPU")
    assert results[0] == results[1]


@pytest.mark.parametrize(("point", "last"), some_slow([("step", 4), ("moving", 3), ("saving", 3)], 2))
def test_a_run_that_is_killed_goes_on_from_its_last_whole_checkpoint(tmp_path, shards, point, last):
    # Killed in the middle of a step (between its two micro-batches), or of writing a checkpoint.
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole, shards, save_strategy="no")
    outcome = in_child(tmp_path, lambda: train(killed, shards, at=(point, 4), save_total_limit=1))
    assert outcome.status == -signal.SIGKILL, outcome.text[-3000:]
    assert [path.name for path in killed.glob("checkpoint-*")] == [f"checkpoint-{last}"]
    train(killed, shards, resume=True, save_total_limit=1)
    assert result(killed) == result(whole)
    assert sorted(path.name for path in killed.iterdir() if path.is_dir()) == ["checkpoint-9"]


@pytest.mark.parametrize("kind", ["stream", "map"])
def test_evaluating_does_not_change_what_is_trained(tmp_path, shards, kind):
    train(tmp_path / "with", shards, kind=kind, **EVALUATING)
    train(tmp_path / "without", shards, kind=kind, save_strategy="no")
    assert result(tmp_path / "with") == result(tmp_path / "without")


@pytest.mark.parametrize("kind", some_slow(["stream", "map"], 1))
def test_other_batches_and_workers_go_on_at_the_same_number_of_images(tmp_path, shards, kind):
    train(tmp_path, shards, kind=kind, max_steps=3)
    options = {"kind": kind, "dataloader_num_workers": 2, "per_device_train_batch_size": 2}
    with pytest.raises(ValueError, match="other settings of the data.*allow_data_mismatch"):
        train(tmp_path, shards, resume=True, **options)
    train(tmp_path, shards, resume=True, max_steps=6, allow_data_mismatch=True, **options)
    assert result(tmp_path)["images_seen"] == 24 + 3 * 4
    train(tmp_path, shards, resume=True, max_steps=8, **options)  # and from then on exactly
    assert result(tmp_path)["images_seen"] == 24 + 5 * 4


def test_workers_do_not_matter_to_a_data_set_in_memory(tmp_path, shards):
    train(tmp_path, shards, kind="map", dataloader_num_workers=2)
    whole = result(tmp_path)
    train(tmp_path, shards, kind="map", resume=str(tmp_path / "checkpoint-4"))
    assert result(tmp_path) == whole


def test_other_data_is_refused(tmp_path, shards):
    train(tmp_path, shards, max_steps=2)
    with pytest.raises(ValueError, match="images 28 to 19"):
        train(tmp_path, shards[:2], resume=True)


def test_epochs_of_a_stream_evaluate_save_and_log_and_callbacks_hear_of_them(tmp_path, shards):
    options = {"max_steps": -1, "num_train_epochs": 3, "eval_strategy": "epoch", "save_strategy": "epoch"}
    options |= {"logging_strategy": "epoch", "mixup_alpha": 0.0, "cutmix_alpha": 0.0}
    trainer = trainer_for(tmp_path, shards, **options)
    trainer.train()
    assert trainer.state.global_step == 11 and trainer.state.num_train_epochs == 3  # 84 images by eights
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["images_seen"] for entry in logged] == [32, 56, 88]
    assert [entry["epoch"] for entry in logged] == pytest.approx([32 / ROWS, 56 / ROWS, 88 / ROWS])
    assert sum("eval_top1" in entry for entry in trainer.state.log_history) == 3
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-11",
        "checkpoint-4",
        "checkpoint-7",
    ]


def test_the_log_tells_the_share_of_the_time_spent_waiting_for_images(tmp_path, shards):
    trainer = trainer_for(tmp_path, shards, save_strategy="no", logging_steps=2)
    slow = trainer.train_dataset.preparation.transform
    trainer.train_dataset.preparation.transform = lambda image: time.sleep(0.05) or slow(image)
    trainer.train()
    shares = [entry["data_wait"] for entry in trainer.state.log_history if "data_wait" in entry]
    assert len(shares) == 4 and all(0.3 < share < 1 for share in shares)


@pytest.mark.slow
def test_epochs_are_counted_on_after_another_batch_and_another_stop(tmp_path, shards):
    options = {"max_steps": -1, "num_train_epochs": 4, "save_strategy": "no"}
    train_until = {"how": signal.SIGTERM, **options}
    outcome = in_child(tmp_path, lambda: train(tmp_path / "run", shards, at=("step", 3), **train_until))
    assert outcome.status == 75, outcome.text[-3000:]
    options |= {"per_device_train_batch_size": 2, "allow_data_mismatch": True}
    train_until |= {"at": ("step", 6), **options}
    outcome = in_child(tmp_path, lambda: train(tmp_path / "run", shards, resume=True, **train_until))
    assert outcome.status == 75, outcome.text[-3000:]
    train(tmp_path / "run", shards, resume=True, **options)
    found = result(tmp_path / "run")
    assert (found["step"], found["images_seen"]) == (4 + (4 * ROWS - 32) // 4, 4 * ROWS)


def replaced_twice(folder, shards):
    """Train, go back from a damaged checkpoint, and die while it is written once more."""
    train(folder, shards, max_steps=3)
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"damaged")
    trainer = trainer_for(folder, shards, max_steps=3)
    rename = Path.rename

    def die(self, target):
        rename(self, target)
        if target.name.startswith("_replaced-"):
            os.kill(os.getpid(), signal.SIGKILL)

    Path.rename = die
    trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_that_is_being_replaced_is_not_lost(tmp_path, shards):
    outcome = in_child(tmp_path, lambda: replaced_twice(tmp_path / "run", shards))
    assert outcome.status == -signal.SIGKILL, outcome.text[-3000:]
    assert not (tmp_path / "run" / "checkpoint-3").exists()
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-3")
    train(tmp_path / "run", shards, resume=True, max_steps=4)
    assert [path.name for path in (tmp_path / "run").glob("_*")] == ["_lock"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_went_back_goes_on_where_it_stood_and_not_at_what_it_left(tmp_path, shards, how):
    train(tmp_path / "run", shards, max_steps=6)
    here, elsewhere = tmp_path / "run" / "checkpoint-2", tmp_path / "checkpoint-2"
    shutil.copytree(here, elsewhere)
    last = 5 if how == signal.SIGTERM else 4
    for start in map(str, (here, elsewhere)):
        outcome = in_child(
            tmp_path,
            lambda: train(tmp_path / "run", shards, resume=start, at=("step", 4), how=how, max_steps=6),  # noqa: B023
        )
        assert outcome.status in (75, -signal.SIGKILL), outcome.text[-3000:]
        assert last_checkpoint(tmp_path / "run").endswith(f"checkpoint-{last}")
        (tmp_path / "run" / "_interrupted.json").unlink(missing_ok=True)
    left = sorted(path.name for path in (tmp_path / "run").glob("_left-*"))
    assert left[:5] == [f"_left-checkpoint-{name}" for name in ("2", "3", "3-2", "4", "4-2")], left
    resumed = trainer_for(tmp_path / "run", shards, max_steps=6)
    steps = []
    resumed.add_callback(Noting(steps))
    resumed.train(resume_from_checkpoint=True)
    assert steps == list(range(last + 1, 7))


class Noting(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(tmp_path, shards):
    def full(folder):
        trainer = trainer_for(folder, shards, max_steps=4)
        trainer.add_callback(Filling())
        try:
            trainer.train()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 200_000))
            with pytest.raises(OSError, match="student cannot be written .* save it once more"):
                trainer.save_model()

    class Filling(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:  # no file may grow beyond this any more
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    outcome = in_child(tmp_path, lambda: full(tmp_path / "run"))
    assert outcome.status == 1 and re.search(r"Writing 'checkpoint-3'.*checkpoint-2.*Make room", outcome.text), outcome
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["_lock", "checkpoint-1", "checkpoint-2"]


def test_settings_may_be_used_for_two_runs(tmp_path, shards):
    args = trainer_for(tmp_path, shards, max_steps=-1, num_train_epochs=2).args
    assert args.max_steps == 7
    data = datasets.load_dataset("parquet", data_files=shards[:2], split="train", streaming=True)
    given = settings(tmp_path, max_steps=-1, num_train_epochs=2)
    steps = [ScaleKDTrainer(small_student(), None, given, data).args.max_steps for _ in range(2)]
    assert steps == [5, 5] and given.max_steps == -1


def test_early_stopping_evaluates_and_saves_an_epoch_once(tmp_path, shards):
    options = {"max_steps": -1, "num_train_epochs": 5, "eval_strategy": "epoch", "save_strategy": "epoch"}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = trainer_for(tmp_path, shards, **options, mixup_alpha=0.0, cutmix_alpha=0.0)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0))
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [4, 7]


def test_the_best_checkpoint_is_not_left_behind(tmp_path):
    for name in ("run/checkpoint-1", "run/checkpoint-2", "run/checkpoint-3", "copy/checkpoint-2"):
        (tmp_path / name).mkdir(parents=True)
    best = TrainerState(best_model_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    best.save_to_json(str(tmp_path / "copy" / "checkpoint-2" / "trainer_state.json"))
    args = SimpleNamespace(output_dir=str(tmp_path / "run"), should_save=True)
    folder = RunFolder(args, {}, SimpleNamespace(wait_for_everyone=lambda: None))
    folder.leave_later(tmp_path / "copy" / "checkpoint-2", 2)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "checkpoint-1",
        "checkpoint-2",
        "_left-checkpoint-3",
    }


def test_a_checkpoint_tells_of_the_images_what_it_is_compared_by_and_no_more(tmp_path, shards):
    train(tmp_path, shards, max_steps=1)
    kept = json.loads((tmp_path / "checkpoint-1" / "scalekd_state.json").read_text())["settings"]
    assert set(kept["student's images"]) == {
        "size",
        "mean",
        "std",
        "interpolation",
        "antialias",
    }  # else those of before are refused
