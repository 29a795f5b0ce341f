"""A run that is stopped, at any step and in any way, goes on as if it had not been."""

import hashlib
import json
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import RangeServer, run, settings, small_student, some_slow, timm_swin
from PIL import Image
from processes import Started, in_child, in_processes
from transformers import EarlyStoppingCallback, TrainerCallback

from scalekd_hf import ScaleKDTrainer
from scalekd_hf.data import sources
from scalekd_hf.training.run_folder import RunFolder, last_checkpoint


ROWS = 28  # of three shards; 3.5 steps of 8 a pass


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    generator = np.random.default_rng(0)
    for shard, rows in enumerate((6, 13, 9)):
        images = [Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(rows)]
        data = {"image": images, "label": [row % 10 for row in range(rows)]}
        datasets.Dataset.from_dict(data, features=features).to_parquet(folder / f"{shard}.parquet", batch_size=4)
    return sorted(str(file) for file in folder.iterdir())


ALL_AT_ONCE = {
    "max_steps": 9,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "shuffle_buffer_size": 5,
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "ema_decay": 0.9,
    "rand_augment": 9,
    "random_erasing": 0.25,
    "hflip": 0.5,
    "teacher_drop_path": 0.3,
    "logging_steps": 3,
}


class Trainer(ScaleKDTrainer):
    """Can be told to die, or to be told to end, at a point of a step."""

    at = ("", 0)
    how = signal.SIGKILL
    rank = 0
    group = False

    def strike(self, point):
        if self.at == (point, self.state.global_step) and self.args.process_index == self.rank:
            sys.stdout.write("struck\n")
            os.kill(0 if self.group else os.getpid(), self.how)
            time.sleep(0.5 * self.group)  # for the workers, too, to hear of it

    def training_step(self, *args, **kwargs):
        result = super().training_step(*args, **kwargs)
        self.strike("step")
        return result

    def prediction_step(self, *args, **kwargs):
        result = super().prediction_step(*args, **kwargs)
        self.strike("evaluation")
        return result

    def _save_rng_state(self, output_dir):
        self.strike("saving")
        return super()._save_rng_state(output_dir)

    def put_in_place(self, *folders):
        self.strike("moving")
        RunFolder.put_in_place(self.run_folder, *folders)


def trainer_for(folder, shards, kind="stream", at=("", 0), how=signal.SIGKILL, rank=0, group=False, **changes):
    torch.manual_seed(0)
    data = datasets.load_dataset("parquet", data_files=shards, split="train", streaming=kind == "stream")
    student, options = small_student(drop_path_rate=0.2), {**ALL_AT_ONCE, **changes}
    evaluation = data if "eval_strategy" in options else None
    trainer = Trainer(student, timm_swin(), settings(folder, **options), data, evaluation)
    trainer.at, trainer.how, trainer.rank, trainer.group = at, how, rank, group
    trainer.run_folder.put_in_place = trainer.put_in_place
    return trainer


def digest(trainer):
    """What a run has come to: weights, average, heads and optimiser, to the bit."""
    found = hashlib.sha256()
    parts = {**trainer.model.student.state_dict(), **trainer.model.heads.state_dict()}
    parts |= {f"average.{name}": value for name, value in trainer.averaged.average.module.state_dict().items()}
    for name, tensor in sorted(parts.items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    for state in trainer.optimizer.state_dict()["state"].values():
        found.update(state["exp_avg_sq"].contiguous().numpy().tobytes())
    return found.hexdigest()


def train(folder, shards, resume=None, **options):
    """A run; its result is in result.json of the folder."""
    trainer = trainer_for(folder, shards, **options)
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        result = {"digest": digest(trainer), "step": trainer.state.global_step}
        result |= {"world_size": trainer.args.world_size, "kind": str(trainer.accelerator.distributed_type)}
        result |= {"images_seen": trainer.loss_log.images_seen, "epoch": trainer.state.epoch}
        (trainer_folder := trainer.args.output_dir) and open(f"{trainer_folder}/result.json", "w").write(
            json.dumps(result)
        )


def wait_for_steps(started):
    """Until a run has logged its first steps."""
    while "images/s" not in started.files[0].read_text():
        time.sleep(0.1)


def result(folder):
    return json.loads((folder / "result.json").read_text())


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


@pytest.mark.parametrize("step", some_slow([3, 4], 1))  # the first stops where an epoch ends
def test_sigterm_saves_a_checkpoint_and_the_same_call_resumes(tmp_path, shards, step):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = {"save_strategy": "no", "dataloader_num_workers": 2}
    train(whole, shards, **options)
    outcome = in_child(tmp_path, lambda: train(stopped, shards, at=("step", step), how=signal.SIGTERM, **options))
    assert outcome.status == 75, outcome.text[-3000:]
    assert [path.name for path in stopped.glob("checkpoint-*")] == [f"checkpoint-{step + 1}"]
    with pytest.raises(ValueError, match="holds a run already"):  # other settings are another run
        train(stopped, shards, **options, learning_rate=0.5)
    train(stopped, shards, **options)
    assert result(stopped) == result(whole)
    assert not (stopped / "_interrupted.json").exists()


EVALUATING = {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4}


def test_sigterm_in_an_evaluation_is_answered_before_its_next_batch(tmp_path, shards):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    trainer = trainer_for(whole, shards, **EVALUATING)
    trainer.train()
    strike = {"how": signal.SIGTERM, **EVALUATING}
    for step in (3, 9):  # the second call resumes, and is struck in the last evaluation, which no step follows
        outcome = in_child(tmp_path, lambda: train(stopped, shards, at=("evaluation", step), **strike))  # noqa: B023
        assert outcome.status == 75 and outcome.text.count("struck") == 1, outcome.text[-3000:]
        assert (stopped / f"checkpoint-{step}").exists()
    resumed = trainer_for(stopped, shards, **EVALUATING)
    resumed.train()
    assert resumed.state.global_step == 9
    for ended, module in ((trainer.model, resumed.model), (trainer.averaged.average, resumed.averaged.average)):
        for name, tensor in ended.state_dict().items():
            assert torch.equal(module.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", ["stream", "map"])
def test_evaluating_does_not_change_what_is_trained(tmp_path, shards, kind):
    train(tmp_path / "with", shards, kind=kind, **EVALUATING)
    train(tmp_path / "without", shards, kind=kind, save_strategy="no")
    assert result(tmp_path / "with") == result(tmp_path / "without")


@pytest.mark.parametrize("stopped_before", some_slow([4, 0], 1))
def test_sigterm_in_the_evaluation_before_the_first_step_keeps_the_checkpoint(tmp_path, shards, stopped_before):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = {"save_strategy": "no", "eval_on_start": True, "per_device_eval_batch_size": 4}
    train(whole, shards, **options, eval_strategy="no")
    for point, step in [("step", 3)] * bool(stopped_before) + [("evaluation", stopped_before)]:
        strike = {"at": (point, step), "how": signal.SIGTERM, **options}  # noqa: B023
        outcome = in_child(tmp_path, lambda: train(stopped, shards, eval_strategy="no", **strike))  # noqa: B023
        assert outcome.status == 75, outcome.text[-3000:]
    assert outcome.text.count("struck") == 1
    train(stopped, shards, **options, eval_strategy="no")
    assert result(stopped) == result(whole)


def test_sigterm_to_one_process_in_an_evaluation_stops_all_in_it(tmp_path, shards):
    strike = {"at": ("evaluation", 3), "how": signal.SIGTERM, "rank": 1}
    outcomes = in_processes(tmp_path, lambda: train(tmp_path / "run", shards, **strike, **EVALUATING), processes=2)
    assert [outcome.status for outcome in outcomes] == [75, 75], outcomes[0].text[-3000:] + outcomes[1].text[-3000:]
    assert outcomes[1].text.count("struck") == 1
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-3")
    assert (checkpoint / "rng_state_0.pth").exists() and (checkpoint / "rng_state_1.pth").exists()


def test_sigterm_to_one_process_stops_all_where_their_loader_waits_for_each(tmp_path):
    def samples():
        for number in range(10_000):
            yield {"pixel_values": torch.full((3, 32, 32), number / 10_000), "labels": number % 10}

    def stopped():
        torch.manual_seed(0)
        args = settings(tmp_path / "run", max_steps=8, per_device_train_batch_size=2)
        trainer = Trainer(small_student(), None, args, datasets.IterableDataset.from_generator(samples))
        trainer.at, trainer.how, trainer.rank = ("step", 2), signal.SIGTERM, 1
        trainer.train()

    outcomes = in_processes(tmp_path, stopped, processes=2)
    assert [outcome.status for outcome in outcomes] == [75, 75], outcomes[0].text[-3000:] + outcomes[1].text[-3000:]
    assert (tmp_path / "run" / "checkpoint-3").exists() and (tmp_path / "run" / "_interrupted.json").exists()


class Evaluating(TrainerCallback):
    """Evaluates at an event, as users' callbacks do."""

    def __init__(self, trainer, event):
        self.metrics = []
        setattr(self, event, lambda args, state, control, **kwargs: self.metrics.append(trainer.evaluate()))


@pytest.mark.parametrize("event", some_slow(["on_epoch_end", "on_train_end", "on_save"], 1))
def test_a_callback_that_evaluates_where_the_run_stops_loses_nothing(tmp_path, shards, event):
    def stopped():
        options = {"at": ("step", 2), "how": signal.SIGTERM, "save_strategy": "no", "eval_strategy": "steps"}
        trainer = trainer_for(tmp_path / "run", shards, eval_steps=100, **options)
        trainer.add_callback(evaluating := Evaluating(trainer, event))
        try:
            trainer.train()
        finally:
            assert "eval_top1" in evaluating.metrics[-1]

    outcome = in_child(tmp_path, stopped)
    assert outcome.status == 75, outcome.text[-3000:]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]


def test_sigterm_to_one_process_stops_all_at_the_same_step(tmp_path, shards):
    options = {"save_strategy": "no", "dataloader_num_workers": 1, "max_steps": 10_000}
    started = Started(tmp_path, lambda: train(tmp_path / "run", shards, **options), processes=2)
    wait_for_steps(started)
    os.kill(started.pids[1], signal.SIGTERM)
    outcomes = started.wait()
    assert [outcome.status for outcome in outcomes] == [75, 75], outcomes[0].text[-3000:] + outcomes[1].text[-3000:]
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")  # of one and the same step
    assert (checkpoint / "rng_state_0.pth").exists() and (checkpoint / "rng_state_1.pth").exists()


def test_workers_live_on_when_a_whole_group_of_processes_gets_sigterm(tmp_path, shards):
    def grouped():
        os.setpgid(0, 0)
        train(tmp_path / "run", shards, dataloader_num_workers=2, save_strategy="no", max_steps=10_000)

    started = Started(tmp_path, grouped)
    wait_for_steps(started)
    os.killpg(started.pids[0], signal.SIGTERM)
    (outcome,) = started.wait()
    assert outcome.status == 75, outcome.text[-3000:]
    assert list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("kind", ["stream", "map"])
def test_workers_of_an_evaluation_live_on_when_a_whole_group_gets_sigterm(tmp_path, shards, kind):
    def grouped():
        os.setpgid(0, 0)
        strike = {"at": ("evaluation", 3), "how": signal.SIGTERM, "group": True, "kind": kind}
        train(tmp_path / "run", shards, dataloader_num_workers=2, **strike, **EVALUATING)

    outcome = in_child(tmp_path, grouped)
    assert outcome.status == 75 and outcome.text.count("struck") == 1, outcome.text[-3000:]
    assert (tmp_path / "run" / "checkpoint-3").exists()


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


def replaced_twice(folder, shards):
    """Train, go back a step, and die while the last checkpoint is written once more."""
    train(folder, shards, max_steps=3)
    trainer = trainer_for(folder, shards, max_steps=3)
    rename = Path.rename

    def die(self, target):
        rename(self, target)
        if target.name.startswith("_replaced-"):
            os.kill(os.getpid(), signal.SIGKILL)

    Path.rename = die
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_a_checkpoint_that_is_being_replaced_is_not_lost(tmp_path, shards):
    outcome = in_child(tmp_path, lambda: replaced_twice(tmp_path / "run", shards))
    assert outcome.status == -signal.SIGKILL, outcome.text[-3000:]
    assert not (tmp_path / "run" / "checkpoint-3").exists()
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-3")
    train(tmp_path / "run", shards, resume=True, max_steps=4)
    assert [path.name for path in (tmp_path / "run").glob("_*")] == ["_lock"]


def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(tmp_path, shards):
    def full(folder):
        trainer = trainer_for(folder, shards, max_steps=4)
        trainer.add_callback(Filling())
        trainer.train()

    class Filling(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:  # no file may grow beyond this any more
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    outcome = in_child(tmp_path, lambda: full(tmp_path / "run"))
    assert outcome.status == 1 and re.search(r"Writing 'checkpoint-3'.*checkpoint-2.*Make room", outcome.text), outcome
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["_lock", "checkpoint-1", "checkpoint-2"]


def test_another_run_in_the_folder_is_not_taken_for_the_interrupted_one(tmp_path, shards):
    run, options = tmp_path / "run", {"save_strategy": "no", "max_steps": 4}
    outcome = in_child(tmp_path, lambda: train(run, shards, at=("step", 2), how=signal.SIGTERM, **options))
    assert outcome.status == 75, outcome.text[-3000:]
    train(run, shards, **{**options, "save_strategy": "steps"}, learning_rate=0.5, overwrite_output_dir=True)
    with pytest.raises(ValueError, match="holds a run already"):
        train(run, shards, **options)
    (run / "_interrupted.json").write_text('{"st')
    with pytest.raises(ValueError, match="holds a run already"):
        train(run, shards, **options)


def test_sigterm_saves_all_that_resuming_needs_even_if_only_the_model_was_asked_for(tmp_path, shards):
    run, options = tmp_path / "run", {"save_only_model": True, "max_steps": 4}
    outcome = in_child(tmp_path, lambda: train(run, shards, at=("step", 2), how=signal.SIGTERM, **options))
    assert outcome.status == 75 and not (run / "checkpoint-2" / "optimizer.pt").exists(), outcome.text[-3000:]
    train(run, shards, **options)
    assert result(run)["step"] == 4


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


@pytest.mark.parametrize("processes", some_slow([1, 2], 1))
def test_a_network_that_stays_away_ends_the_run_with_a_checkpoint_and_the_same_call_resumes(
    tmp_path, shards, monkeypatch, processes
):
    monkeypatch.setattr(sources, "RETRY_DELAYS", (0.01,))
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 1)
    for name in ("STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL", "STREAMING_READ_RETRY_INTERVAL"):
        monkeypatch.setattr(datasets.config, name, 0.01)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = {"save_strategy": "no", "per_device_train_batch_size": 4 // processes}
    with RangeServer({f"/{number}.parquet": open(file, "rb").read() for number, file in enumerate(shards)}) as server:
        urls = [f"{server.url}/{number}.parquet" for number in range(3)]
        for outcome in in_processes(tmp_path, lambda: train(whole, urls, **options), processes=processes):
            assert outcome.status == 0, outcome.text[-3000:]
        server.fail_after(server.requests * 2 // 3)  # of those that a whole run took
        outcomes = in_processes(tmp_path, lambda: train(stopped, urls, **options), processes=processes)
        assert any("StreamReadError" in outcome.text for outcome in outcomes), outcomes[0].text[-3000:]
        assert all(outcome.status in (1, 75) for outcome in outcomes)
        (checkpoint,) = stopped.glob("checkpoint-*")
        assert 0 < int(checkpoint.name.rsplit("-", 1)[1]) < 9
        server.fail_after(None)
        for outcome in in_processes(tmp_path, lambda: train(stopped, urls, **options), processes=processes):
            assert outcome.status == 0, outcome.text[-3000:]
    assert result(stopped) == result(whole)


@pytest.mark.slow
def test_torchrun_passes_sigterm_on_and_the_same_command_resumes(tmp_path):
    words = [
        "python",
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_port=29573",
        "recipes/distill.py",
    ]
    words += ["recipes/configs/quickstart.yaml", "--baseline", "false", "--output_dir", tmp_path / "run", "--use_cpu"]
    words += ["--max_steps", "30", "--disable_tqdm", "true", "--eval_strategy", "no", "--logging_steps", "1"]
    import subprocess
    import sys

    from helpers import ROOT

    words = [sys.executable, *map(str, words[1:])]
    started = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in started.stdout:
        if "images/s" in line:
            break
    started.terminate()
    text = started.stdout.read()
    assert started.wait() != 0 and list((tmp_path / "run").glob("checkpoint-*")), text[-3000:]
    assert (tmp_path / "run" / "_interrupted.json").exists()
    finished = run(*words)
    assert finished.returncode == 0 and "it is resumed" in finished.stdout, finished.stderr[-3000:]
    assert (tmp_path / "run" / "model.safetensors").exists()
