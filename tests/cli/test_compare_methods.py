"""recipes/compare_methods.py: what it trains, how it chooses, and its tables, from what runs leave."""

import json
import shutil
import sys

import pytest
import yaml
from helpers import ROOT


sys.path.insert(0, str(ROOT / "recipes"))
import compare_methods
import methods_report
from methods_report import METHODS

from scalekd_hf.tools.evaluation import EvaluateArguments
from scalekd_hf.tools.recipe import DistillArguments, TeacherArguments, parse_config


SECONDS = {"scalekd": 40.0, "scalekd_dist": 40.0, "features": 20.0}  # of a run for equal images, others 10
TOP1 = {"alone": 0.4, "logits_t4": 0.45, "scalekd": 0.5}


def option(run, name):
    return run.command[len(run.command) - 1 - run.command[::-1].index(f"--{name}") + 1]


def leave(run, top1):
    """What a run leaves that saw 100 images in each epoch."""
    run.folder.mkdir(parents=True)
    epochs, kind = float(option(run, "num_train_epochs")), run.folder.name.split("_images")[0].split("_time")[0]
    seconds, images = SECONDS.get(kind, 10.0) * epochs / 4, round(100 * epochs)
    log = [{"step": images, "loss": 1.0, "images_seen": images, "images_per_second": images / seconds}]
    state = {"global_step": images, "train_batch_size": 1, "epoch": epochs, "log_history": log}
    (run.folder / "trainer_state.json").write_text(json.dumps(state))
    (run.folder / "model.safetensors").touch()
    if "--num_classes" in run.command:  # a backbone has no top-1
        results = {"student distilled": {"neighbours_top1": top1}}
        (run.folder / "results.json").write_text(json.dumps(results))
    elif run.alone:
        (run.folder / "eval_results.json").write_text(json.dumps({"eval_top1": top1}))
    else:
        (run.folder / "results.json").write_text(json.dumps({"student distilled": {"top1": top1}}))


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The command with a folder of its own, and the runs that it trained; a rate of 3e-3 and the larger decay are best."""
    runs = []

    def train(asked, jobs):
        for run in asked:
            if run.top1() is None:
                runs.append(run)
                assert run.is_ready(), run.title
                if "probe_" in run.title:
                    run.folder.mkdir()
                    row = {"dataset": "d", "knn_top1": 0.25, "linear_top1": 0.75}
                    (run.folder / "evaluation.json").write_text(json.dumps([row]))
                elif run.title.startswith("teacher"):
                    run.folder.mkdir(parents=True)
                    (run.folder / "eval_results.json").write_text(json.dumps({"eval_top1": 0.7}))
                else:
                    key = next((key for key in TOP1 if run.folder.name.startswith((f"{key}_i", f"{key}_t"))), None)
                    best = (option(run, "learning_rate") == "3e-3") + (option(run, "weight_decay") == "0.5")
                    seed = int(option(run, "seed"))
                    leave(run, TOP1.get(key, 0.42) + 0.01 * best + 0.002 * (seed % 2) * (key == "scalekd"))
                assert run.top1() is not None, run.title
        return []

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["compare", "--dataset", "d", "--output_dir", str(tmp_path / "runs"), *words])
        compare_methods.main()
        return (tmp_path / "runs" / "comparison.md").read_text()

    monkeypatch.setattr(compare_methods, "train", train)
    return call, runs


def test_each_method_is_tuned_alike_on_images_that_nothing_is_trained_on(trained):
    call, runs = trained
    text = call("--parts", "tune")
    trials = [run for run in runs if run.folder.name.startswith("tune_")]
    assert len(trials) == 4 * len(METHODS)
    assert {option(run, "eval_split") for run in trials} == {"train[80%:]"}
    split = yaml.safe_load((compare_methods.CONFIGS / "resnet10.yaml").read_text())["train_split"]
    assert split == "train[:25%]" == f"train[:{compare_methods.SHARE}%]"
    assert "| ScaleKD | 3e-3 | 0.5 | 3e-3 0.05" in text
    (teacher,) = [run for run in runs if run.title.startswith("teacher")]
    config = yaml.safe_load((compare_methods.CONFIGS / "teacher_coatnet.yaml").read_text())
    assert (
        config["train_split"] == "train[:80%]"
        and str(compare_methods.CONFIGS / "teacher_coatnet.yaml") in teacher.command
    )


def test_the_student_alone_has_the_recipe_of_the_others():
    with_teacher, alone = (
        yaml.safe_load((compare_methods.CONFIGS / f"resnet10{name}.yaml").read_text()) for name in ("", "_alone")
    )
    renamed = {"student": "model", "student_args": "model_args"}
    shared = {
        renamed.get(key, key): value for key, value in with_teacher.items() if key not in ("teacher", "output_dir")
    }
    assert shared == {key: value for key, value in alone.items() if key not in ("pretrained", "output_dir")}


def test_equal_time_is_what_the_runs_for_equal_images_took(trained):
    call, runs = trained
    text = call("--seeds", "0", "1")
    epochs = {run.folder.name: option(run, "num_train_epochs") for run in runs if "--num_train_epochs" in run.command}
    assert epochs["scalekd_images_seed0"] == epochs["alone_images_seed1"] == "4.00"
    assert (epochs["alone_time_seed0"], epochs["features_time_seed1"]) == ("16.00", "8.00")
    assert "scalekd_time_seed0" not in epochs
    assert "| ScaleKD | 400 | 0.7 | 52.10 ± 0.14 | +10.10 [+8.83, +11.37] | +909 |  |" in text
    assert "| student alone | 1,600 | 0.7 | 42.00 ± 0.00 |" in text.partition("**Equal time**")[2]
    again = len(runs)
    call("--seeds", "0", "1", "2")  # a further seed has the same budgets
    assert len(runs) == again + len(METHODS) * 2 - 1
    found = json.loads((runs[0].folder.parent / "comparison.json").read_text())
    assert found["runs"]["scalekd_images"]["1"]["images"] == 400


def test_many_images_are_those_of_the_student_alone_in_that_time(trained):
    call, runs = trained
    text = call("--budgets", "images", "time", "long", "--seeds", "0", "--methods", "alone", "features", "scalekd")
    epochs = {run.folder.name: option(run, "num_train_epochs") for run in runs if "_long_" in run.folder.name}
    assert epochs == {"features_long_seed0": "16.00", "scalekd_long_seed0": "16.00"}
    long = text.partition("**Many images**")[2]
    assert "| student alone | 1,600 | 0.7 |" in long and "| ScaleKD | 1,600 | 2.7 |" in long


def test_every_command_is_one_that_its_recipe_takes(trained, monkeypatch):
    call, runs = trained
    text = call("--parts", *compare_methods.PARTS, "--seeds", "0")
    for title in (
        "Settings",
        "Equal images",
        "Equal time",
        "Teachers",
        "Training images, equal images seen",
        "Training images, equal time",
        "Features",
        "Pre-trained or distilled",
    ):
        assert f"**{title}**" in text
    assert "| ScaleKD's features alone, no labels | 25.00 | 75.00 |" in text
    epochs = {run.folder.name: float(option(run, "num_train_epochs")) for run in runs if "_share5" in run.folder.name}
    assert epochs["alone_share5_time_seed0"] == pytest.approx(4 * epochs["alone_share5_seed0"])
    assert epochs["logits_t4_share5_seed0"] == epochs["scalekd_share5_seed0"] == 20
    kinds = {"distill.py": DistillArguments, "train_teacher.py": TeacherArguments, "evaluate.py": EvaluateArguments}
    tuned = [run for run in runs if run.folder.name == "alone_fine_tuned_seed0"]
    assert option(tuned[0], "model") == str(tuned[0].folder.with_name("alone_pretrained_seed0"))
    assert (tuned[0].folder.parent / "comparison.png").stat().st_size > 10_000
    for run in runs:
        script, *words = run.command[1:]
        kind = kinds[script.rsplit("/", 1)[1]]
        arguments, config = parse_config(kind, ["--model", *words] if kind is EvaluateArguments else words)
        assert str(config.output_dir) == str(run.folder)
        if kind is DistillArguments:
            assert arguments.evaluate_teacher is False and config.use_cpu


def test_what_was_made_otherwise_is_refused(trained, tmp_path):
    call, runs = trained
    call("--seeds", "0", "--budgets", "images")
    run = next(run for run in runs if run.folder.name == "dist_images_seed0")
    run.log.write_text("$ python distill.py --learning_rate 7\n")
    with pytest.raises(SystemExit, match="dist_images, seed 0"):
        call("--seeds", "0", "--budgets", "images")
    run = next(run for run in runs if run.folder.name.startswith("tune_dist"))
    run.log.write_text("$ python distill.py --num_train_epochs 7\n")
    with pytest.raises(SystemExit, match="tune_dist"):  # before anything is chosen by it
        call("--parts", "tune")
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(SystemExit, match=r"no tuned.json: take the part `tune` first"):
        call("--parts", "shares")
    call("--parts", "tune")
    with pytest.raises(SystemExit, match="take `--parts methods --budgets images` first"):
        call("--parts", "shares")


def test_intervals_are_those_of_students_t():
    from scipy import stats

    gains = {0: 1.0, 1: 2.0, 2: 4.0, 3: 3.5, 4: 2.5}
    low, high = stats.t.interval(0.95, 4, loc=2.6, scale=stats.sem(list(gains.values())))
    assert methods_report.interval(gains) == f"+2.60 [{low:+.2f}, {high:+.2f}]"
    for freedom, quantile in enumerate(methods_report.QUANTILES, 1):
        assert quantile == pytest.approx(stats.t.ppf(0.975, freedom), abs=5e-4)
    assert 1.96 + 2.4 / 10 == pytest.approx(stats.t.ppf(0.975, 10), abs=0.03)
