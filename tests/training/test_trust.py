"""Damage is found before anything of it is loaded, and what a run lacks when it is stopped is there when it has gone on."""

import os
import resource
import shutil
import signal
import time

import pytest
import torch
from accelerate import Accelerator
from helpers import settings, small_student, some_slow
from processes import in_child, in_processes, run_script
from stopped_runs import EVALUATING, Trainer, result, train, trainer_for
from transformers import EarlyStoppingCallback, TrainerCallback

from scalekd_hf import ScaleKDTrainer, load_student
from scalekd_hf.cli.runs import train_and_save
from scalekd_hf.manifest import MANIFEST_FILE, damage
from scalekd_hf.models.saving import save_student
from scalekd_hf.tools.recipe import TeacherArguments
from scalekd_hf.training.loss_log import LossLog


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shards):
    """A run of nine steps with a checkpoint after each, and its history."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_for(folder, shards)
    output = trainer.train()
    trainer.save_state()
    return folder, trainer.state.log_history, output


def damaged(file, how):
    content = file.read_bytes()
    middle = len(content) // 2
    file.unlink()
    if how == "bit":
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "end":
        file.write_bytes(content[:-1])
    return content


def test_a_bit_that_has_changed_in_any_file_of_a_checkpoint_is_found_before_it_is_loaded(whole, shards):
    folder, _, _ = whole
    checkpoint, trainer = folder / "checkpoint-9", trainer_for(folder, shards)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    files = sorted(file.name for file in checkpoint.iterdir())
    assert {"model.safetensors", "mimicking_heads.safetensors", "optimizer.pt", "rng_state.pth", MANIFEST_FILE} < {
        *files
    }
    for name in files:
        for how in ("bit", "end", "missing")[: 1 if name == MANIFEST_FILE else 3]:
            content = damaged(checkpoint / name, how)
            with pytest.raises(ValueError, match=f"checkpoint-9' cannot be used: {name}.*checkpoint-8"):
                trainer.train(resume_from_checkpoint=str(checkpoint))
            (checkpoint / name).write_bytes(content)
    assert damage(checkpoint) == ""
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(before[name], tensor), name
    content = damaged(checkpoint / "model.safetensors", "bit")
    with pytest.raises(ValueError, match="model.safetensors' holds other bytes than were written"):
        load_student(str(checkpoint), pretrained=True)
    with pytest.raises(ValueError, match="holds other bytes"):
        load_student(f"local-dir:{checkpoint}", pretrained=True)
    trainer.state.best_model_checkpoint = str(checkpoint)
    with pytest.raises(ValueError, match="checkpoint-9' cannot be used: model.safetensors"):
        trainer._load_best_model()
    (checkpoint / "model.safetensors").write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_for_the_last_whole_one_and_that_is_said(tmp_path, whole, shards, caplog):
    for step in (1, 2, 3):
        shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    damaged(tmp_path / "checkpoint-3" / "optimizer.pt", "bit")
    damaged(tmp_path / "checkpoint-2" / "scheduler.pt", "missing")
    train(tmp_path, shards, resume=True)
    assert result(tmp_path)["step"] == 9 and "passed over" in caplog.text
    assert "optimizer.pt holds other bytes" in caplog.text and "scheduler.pt is missing" in caplog.text
    heads = [folder / "checkpoint-9" / "mimicking_heads.safetensors" for folder in (tmp_path, whole[0])]
    assert heads[0].read_bytes() == heads[1].read_bytes()
    for checkpoint in tmp_path.glob("checkpoint-*"):
        damaged(checkpoint / "model.safetensors", "end")
    with pytest.raises(ValueError, match="There is no whole checkpoint"):
        train(tmp_path, shards, resume=True)


def test_a_checkpoint_without_a_manifest_is_one_of_before_but_its_random_state_is_needed(tmp_path, whole, shards):
    shutil.copytree(whole[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / MANIFEST_FILE).unlink()
    state = tmp_path / "checkpoint-2" / "rng_state.pth"
    state.write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match="rng_state.pth is missing or damaged"):
        train(tmp_path, shards, resume=True, max_steps=3)
    state.unlink()
    with pytest.raises(ValueError, match="rng_state.pth is missing"):
        train(tmp_path, shards, resume=True, max_steps=3)


def test_the_log_of_a_resumed_run_is_that_of_the_whole_one(tmp_path, whole, shards):
    folder, history, output = whole  # logs every third step
    trainer = trainer_for(folder, shards)
    resumed = trainer.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    spent = {"images_per_second", "data_wait", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
    told = [
        [{k: v for k, v in entry.items() if k not in spent} for entry in log]
        for log in (history, trainer.state.log_history)
    ]
    assert len(told[0]) == 4 and told[0][1]["loss"] > 0
    assert told[0] == told[1] and output.training_loss == resumed.training_loss == history[-1]["train_loss"]
    trainer.log({"train_loss": 123.0})  # a user's
    assert trainer.state.log_history[-1]["train_loss"] == 123.0
    assert output.training_loss == pytest.approx(sum(entry["loss"] for entry in history[:3]) / 3, rel=1e-6)


def test_a_clock_that_was_set_back_does_not_have_the_newest_checkpoint_removed(tmp_path, whole, shards):
    shutil.copytree(whole[0] / "checkpoint-8", before := tmp_path / "checkpoint-8")
    os.utime(before, (time.time() + 1e5,) * 2)
    train(tmp_path, shards, resume=True, save_total_limit=1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-9"]


@pytest.mark.parametrize("folder", ["a file", "a file/run", "n" * 300, "zero\0"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path, shards, folder):
    (tmp_path / "a file").touch()
    with pytest.raises(ValueError, match="`output_dir` .* cannot be written"):
        trainer_for(tmp_path / folder, shards)


def test_a_student_that_takes_the_place_of_a_checkpoints_is_not_held_for_damage(tmp_path, whole):
    shutil.copytree(whole[0] / "checkpoint-9", folder := tmp_path / "student")
    save_student(small_student(), folder)
    assert load_student(str(folder), pretrained=True).num_labels == 10


def test_averages_are_over_images_where_the_micro_batch_has_changed():
    kept = {
        "sums": {"loss": 8.0, "task": 4.0},
        "micro_steps": 2,
        "logged": 0.0,
        "logged_micro_steps": 0,
        "micro_batch": 8,
    }
    accelerator, log = Accelerator(cpu=True), LossLog()
    log.reset(16, kept, micro_batch=4)  # four micro-steps' worth of a mean of 4
    log.add(3, torch.tensor(9.0), {"task": torch.tensor(7.0)})
    assert log.averages(accelerator)["loss"] == pytest.approx((4 * 4 + 9) / 5)
    assert log.mean_loss(accelerator) == pytest.approx((4 * 4 + 9) / 5)
    log.reset(16, kept, micro_batch=8)
    log.add(3, torch.tensor(9.0), {"task": torch.tensor(7.0), "logit": torch.tensor(1.0)})  # a term that was not there
    assert log.averages(accelerator)["logit"] == 1.0


@pytest.mark.slow
def test_a_run_that_saves_only_models_can_still_go_on_from_an_evaluation_that_was_made_up_for(tmp_path, shards):
    options = {**EVALUATING, "save_strategy": "steps", "save_steps": 5, "save_only_model": True}
    for point, step, how in (("evaluation", 3, signal.SIGTERM), ("step", 3, signal.SIGKILL)):
        outcome = in_child(tmp_path, lambda: train(tmp_path, shards, at=(point, step), how=how, **options))  # noqa: B023
        assert outcome.status in (75, -signal.SIGKILL) and outcome.text.count("struck") == 1, outcome.text[-3000:]
    train(tmp_path, shards, resume=True, **options)
    assert result(tmp_path)["step"] == 9


def evaluations(trainer):
    kept = ("step", "eval_loss", "eval_top1", "eval_top5")
    return [{key: entry[key] for key in kept} for entry in trainer.state.log_history if "eval_loss" in entry]


@pytest.mark.parametrize("kind", some_slow(["stream", "map"], 1))
def test_an_evaluation_that_a_signal_cut_short_is_made_up_for_and_may_be_the_best(tmp_path, shards, kind):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    options = {**EVALUATING, **best, "kind": kind, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3}
    trainer = trainer_for(tmp_path / "whole", shards, **options)
    trainer.train()
    strike = {"how": signal.SIGTERM, **options}
    # Struck in one, once more while it is made up for, and in the last, which no step follows.
    for step in (3, 3, 9):
        outcome = in_child(tmp_path, lambda: train(tmp_path / "run", shards, at=("evaluation", step), **strike))  # noqa: B023
        assert outcome.status == 75 and outcome.text.count("struck") == 1, outcome.text[-3000:]
        assert (tmp_path / "run" / f"checkpoint-{step}").exists()
    resumed = trainer_for(tmp_path / "run", shards, **options)
    resumed.train()
    assert evaluations(resumed) == evaluations(trainer) and [e["step"] for e in evaluations(trainer)] == [3, 6, 9]
    for name in ("best_metric", "best_global_step", "global_step"):
        assert getattr(resumed.state, name) == getattr(trainer.state, name), name
    for ended, module in (
        (trainer.model, resumed.model),
        (trainer.averaged.average, resumed.averaged.average),
    ):  # the best
        for name, tensor in ended.state_dict().items():
            assert torch.equal(module.state_dict()[name], tensor), name


class InTheSecondSet(Trainer):
    """Gets SIGTERM in the second of two evaluation sets."""

    told = None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        if self.at == (metric_key_prefix, self.state.global_step):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)


class Counting(TrainerCallback):
    def __init__(self):
        self.evaluated = []

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated.append(state.global_step)


def test_an_evaluation_that_is_made_up_for_counts_once(tmp_path, shards):
    options = {**EVALUATING, "save_strategy": "steps", "save_steps": 3, "eval_on_start": True, "learning_rate": 1e-3}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_a_loss", "greater_is_better": False}
    options |= {"restore_callback_states_from_checkpoint": True}

    def trained(folder, at=("", 0)):
        trainer = trainer_for(folder, shards, **options)
        trainer.__class__, trainer.at = InTheSecondSet, at
        trainer.eval_dataset = {name: trainer.eval_dataset for name in "ab"}
        counting = Counting()
        trainer.add_callback(EarlyStoppingCallback(10, 100.0))  # nothing is that much better
        trainer.add_callback(counting)
        trainer.train()
        history = [(e["step"], *[key for key in e if key.endswith("_loss")]) for e in trainer.state.log_history]
        (stopping,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
        return stopping.early_stopping_patience_counter, counting.evaluated, [entry for entry in history if entry[1:]]

    whole = trained(tmp_path / "whole")
    assert whole[0] == 2 and whole[1] == [0, 0, 3, 3, 6, 6, 9, 9]
    outcome = in_child(tmp_path, lambda: trained(tmp_path / "run", at=("eval_b", 6)))
    assert outcome.status == 75, outcome.text[-3000:]
    counter, evaluated, history = trained(tmp_path / "run")
    assert counter == 2 and evaluated == [6, 6, 9, 9] and history == whole[2]


def test_a_process_that_cannot_write_stops_all_with_the_cause(tmp_path, shards):
    class Filling(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2 and args.process_index == 1:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, -1))

    def filled():
        trainer = trainer_for(tmp_path / "run", shards, max_steps=4, disable_tqdm=True)
        trainer.add_callback(Filling())
        try:
            trainer.train()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))  # what is told is longer

    started = time.monotonic()
    outcomes = in_processes(tmp_path, filled, processes=2)
    assert [outcome.status for outcome in outcomes] == [1, 1] and time.monotonic() - started < 50
    assert "failed (process 1: " in outcomes[0].text, outcomes[0].text[-3000:]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["_lock", "checkpoint-1"]


def test_a_run_that_died_before_it_wrote_its_card_gets_it_when_it_is_resumed(tmp_path, digits):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "logging_steps": 1}

    def trained(folder):
        config = settings(folder, resume_from_checkpoint=True, **options)
        trainer = ScaleKDTrainer(small_student(), None, config, digits, digits.select(range(8)))
        train_and_save(trainer, TeacherArguments(model="small", eval_split=None), config)
        return trainer

    trainer = trained(tmp_path / "run")
    assert trainer.publisher.is_described() is False  # it died here
    trained(tmp_path / "run").create_model_card()
    told = {
        file: (tmp_path / "run" / file).read_text() for file in ("README.md", "training_config.yaml", "results.json")
    }
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000
    assert told["training_config.yaml"].startswith("# model.safetensors: sha256 ")
    assert all(f"| {row} |" in told["README.md"] for row in ("images seen", "steps", "hours", "hardware"))
    trainer.create_model_card()  # as it would have, had it lived
    for file, text in told.items():
        lines = zip(text.splitlines(), (tmp_path / "run" / file).read_text().splitlines(), strict=True)
        assert all(one == other or "| hours |" in one for one, other in lines), file
    assert trainer.publisher.is_described() is True
    damaged(tmp_path / "run" / "model.safetensors", "bit")  # another student
    assert trainer.publisher.is_described() is False


@pytest.mark.slow
def test_runs_that_are_killed_at_random_times_end_as_if_they_had_not_been():
    outcome = run_script("benchmarks/faults.py", "--kills", "4")
    assert outcome.returncode == 0 and "0 lost; 0 of " in outcome.stdout, outcome.stdout + outcome.stderr
