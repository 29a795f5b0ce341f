"""A run that is told to stop, or whose images end, saves a checkpoint on all processes, and the same call goes on."""

import os
import signal
import sys
import time

import datasets
import pytest
import torch
from helpers import RangeServer, settings, small_student, some_slow
from processes import Started, as_main, in_child, in_processes
from stopped_runs import EVALUATING, Trainer, result, train, trainer_for
from transformers import TrainerCallback

from scalekd_hf.data import sources
from scalekd_hf.training.stopping import RunCancelled, Stopping


def wait_for_steps(started):
    """Until a run has logged its first steps."""
    while "images/s" not in started.files[0].read_text():
        time.sleep(0.1)


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


@pytest.mark.parametrize("place", some_slow(["step", "evaluation"], 1))
def test_ctrl_c_saves_a_checkpoint_and_the_same_call_resumes(tmp_path, shards, place):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = {**EVALUATING, "dataloader_num_workers": 2}
    train(whole, shards, **options)

    def cancelled():
        with pytest.raises(RunCancelled):
            train(stopped, shards, at=(place, 3), how=signal.SIGINT, **options)

    outcome = in_child(tmp_path, cancelled)
    assert outcome.status == 0, outcome.text[-3000:]
    assert list(stopped.glob("checkpoint-*"))
    train(stopped, shards, **options)
    assert result(stopped) == result(whole)


def test_a_second_ctrl_c_ends_at_once_and_one_that_a_launcher_repeats_does_not(monkeypatch, caplog):
    stopping, now = Stopping(lambda: False), [0.0]
    monkeypatch.setattr("scalekd_hf.training.stopping.time.monotonic", lambda: now[0])
    stopping._cancel()
    assert stopping.terminated and "Once more ends it at once" in caplog.text
    now[0] = 0.5
    stopping._cancel()
    now[0] = 2.0
    with pytest.raises(KeyboardInterrupt):
        stopping._cancel()


def test_ctrl_c_on_another_machine_does_not_count_as_the_first_here(monkeypatch):
    stopping = Stopping(lambda: False)
    monkeypatch.setattr("scalekd_hf.training.stopping.time.monotonic", lambda: 100.0)
    stopping.terminated = stopping.cancelled = True  # by a process of another one
    try:
        stopping._cancel()
    except KeyboardInterrupt:  # which would end pytest
        pytest.fail("the first Ctrl-C here counts as the second")
    monkeypatch.setattr("scalekd_hf.training.stopping.time.monotonic", lambda: 102.0)
    with pytest.raises(KeyboardInterrupt):
        stopping._cancel()


def test_a_run_that_is_stopped_keeps_its_checkpoint_beside_the_best(tmp_path, shards):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_total_limit": 1}
    options = {**EVALUATING, **best, "save_strategy": "steps", "save_steps": 3}
    strike = {"at": ("step", 4), "how": signal.SIGTERM, **options}
    outcome = in_child(tmp_path, lambda: train(tmp_path / "run", shards, **strike))
    assert outcome.status == 75, outcome.text[-3000:]
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-5"}
    train(tmp_path / "whole", shards, **options)
    train(tmp_path / "run", shards, **options)
    assert result(tmp_path / "run") == result(tmp_path / "whole")


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
    resumed = in_processes(tmp_path, as_main, *words[words.index("recipes/distill.py") :], processes=2)
    assert [outcome.status for outcome in resumed] == [0, 0], resumed[0].text[-3000:]
    assert "it is resumed" in resumed[0].text
    assert (tmp_path / "run" / "model.safetensors").exists()
