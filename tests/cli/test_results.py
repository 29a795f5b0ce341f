"""recipes/results.py: its tables from what runs leave, and the whole command in small."""

import json
import shlex
import sys
from contextlib import nullcontext

import datasets
import pytest
from helpers import DIGITS, ROOT
from processes import run_script


sys.path.insert(0, str(ROOT / "recipes"))
import results
import results_report
from results_report import Outcome


def leave(folder, name, curve, alone=None, images=100):
    """What a run of 4 evaluations leaves: top-1 by share of the budget."""
    rows = {"student distilled": {"top1": curve[-1]}} | ({"student alone": {"top1": alone[-1]}} if alone else {})
    for place, values in ((folder / name, curve), (folder / name / "alone", alone)):
        if values:
            place.mkdir(parents=True)
            log = [{"step": step, "eval_top1": v, "eval_runtime": 1.0} for step, v in enumerate(values, 1)]
            log.append({"step": 4, "loss": 1.0, "images_seen": 4 * images, "images_per_second": images})
            state = {"global_step": 4, "train_batch_size": images, "epoch": 2.0, "log_history": log}
            (place / "trainer_state.json").write_text(json.dumps(state))
    (folder / name / "results.json").write_text(json.dumps(rows))


def leave_teacher(folder, name, top1):
    (folder / f"teacher_{name}").mkdir()
    (folder / f"teacher_{name}" / "eval_results.json").write_text(json.dumps({"eval_top1": top1}))


def written(tmp_path, *words):
    """The arguments, the outcomes and the block of a report about `tmp_path`."""
    arguments = results.parse(["--dataset", "d", "--output_dir", str(tmp_path), *words])
    tables = results.chosen(arguments)
    arms = [arm for arms in tables.values() for arm in arms]
    outcomes = results_report.read_outcomes(arms, tmp_path, arguments.seeds)
    return arguments, outcomes, results_report.report_block(tables, outcomes, arguments, "python")


def test_the_first_table_has_means_gains_and_images_until_the_baseline(tmp_path):
    leave(tmp_path, "mixer_scalekd_seed0", [0.4, 0.6, 0.7, 0.8], alone=[0.2, 0.3, 0.4, 0.5])
    leave(tmp_path, "mixer_scalekd_seed1", [0.4, 0.6, 0.7, 0.9], alone=[0.2, 0.3, 0.4, 0.5])
    leave(tmp_path, "mixer_logits_seed0", [0.2, 0.3, 0.4, 0.45])
    _, outcomes, block = written(tmp_path, "--tables", "1", "--students", "mixer", "--seeds", "0", "1")
    gains = "+35.00 ± 7.07 | +35.00 (1 of 2 seeds)"
    assert f"| Mixer | 50.00 ± 0.00 | 45.00 (1 of 2 seeds) | 85.00 ± 7.07 | {gains} |" in block
    assert "| Mixer | 400 (100%) | not reached | 150 (38%) |" in block
    assert "each student: 400 images seen, from 200 training images" in block
    assert outcomes["mixer_alone"][0].seconds == 4.0  # 4 of training, 4 of evaluating


def test_the_minutes_of_a_run_stand_beside_those_of_the_student_alone(tmp_path):
    leave(tmp_path, "vit_scalekd_seed0", [0.4, 0.6], alone=[0.2, 0.3])
    state = tmp_path / "vit_scalekd_seed0" / "trainer_state.json"
    state.write_text(state.read_text().replace('"images_per_second": 100', '"images_per_second": 2'))
    _, _, block = written(tmp_path, "--tables", "1", "--students", "vit")
    assert "| ViT | 0.1 (1.0x) | – | 3.3 (50.0x) |" in block  # 4 and 200 s


def test_what_was_not_logged_took_as_long_as_what_was(tmp_path):
    leave(tmp_path, "vit_logits_seed0", [0.4, 0.6])
    file = tmp_path / "vit_logits_seed0" / "trainer_state.json"
    state = json.loads(file.read_text())
    state["log_history"][-1:] = [{"images_seen": seen, "images_per_second": seen} for seen in (100, 300)]
    file.write_text(json.dumps(state))
    outcome = results_report.read_outcome(file.parent, 0.6)
    assert (outcome.seconds, outcome.evaluation_seconds) == (2.0, 2.0)  # 100 at 100/s, 300 at 300/s; two evaluations


def test_runs_that_are_missing_leave_dashes(tmp_path):
    _, _, block = written(tmp_path)
    assert "| ViT | – | – | – | – | – |" in block and "| Swin, larger | – | – | – |" in block
    assert "Fewer than two teachers have results" in block and "Table 3" in block


def test_the_second_table_compares_with_the_student_alone_and_with_scalekd(tmp_path):
    leave(tmp_path, "resnet18_scalekd_seed0", [0.8], alone=[0.5])
    leave(tmp_path, "resnet18_direct_seed0", [0.75])
    _, _, block = written(tmp_path, "--tables", "2", "--seeds", "0")
    assert "| alone |  | 50.00 |  | -30.00 |" in block and "| + logits = ScaleKD |" in block
    assert "| `--remove_direct_component false` | 75.00 | +25.00 | -5.00 |" in block


def test_the_curve_of_a_teacher_is_read_from_its_last_checkpoint(tmp_path):
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        log = [{"step": 5, "eval_top1": 0.2}, {"step": step, "eval_top1": 0.4}]
        state = {"global_step": step, "train_batch_size": 10, "epoch": 2.0, "log_history": log}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    assert results_report.read_outcome(tmp_path, 0.5) == Outcome(50.0, {50: 20.0, 100: 40.0}, 100, 50)
    assert results_report.read_outcome(tmp_path, None) is None


@pytest.mark.parametrize(("gain", "verdict"), [(0.9, "rises: +20.00, +40.00."), (0.6, "falls: +20.00, +10.00.")])
def test_whether_the_gain_follows_the_teachers_is_computed(tmp_path, gain, verdict):
    leave(tmp_path, "resnet18_scalekd_seed0", [gain], alone=[0.5])
    leave(tmp_path, "resnet18_from_vit_seed0", [0.7])
    leave_teacher(tmp_path, "swin_large", 0.9)
    leave_teacher(tmp_path, "vit", 0.8)
    _, _, block = written(tmp_path, "--tables", "3", "--seeds", "0")
    assert f"(80.00, 90.00) the gain {verdict} That is one seed" in block
    assert block.index("| ViT | 80.00 | 70.00 | +20.00 |") < block.index("| Swin, larger | 90.00 |")


@pytest.mark.parametrize(
    ("strong", "ending"),
    [({0: 3.0, 1: 5.0}, "+4.00."), ({0: 1.5, 1: 2.2}, "varies with the seed."), ({1: 5.0}, "and no finding.")],
)
def test_a_trend_within_the_spread_of_the_seeds_is_named_so(strong, ending):
    text = results_report.trend([(50.0, {0: 1.0, 1: 3.0}), (60.0, strong)])
    assert "the gain" in text and text.endswith(ending)


@pytest.mark.parametrize(("target", "images"), [(30, 150.0), (20, 100.0), (10, 100.0), (40, 200.0), (41, None)])
def test_images_until_an_accuracy_are_interpolated(target, images):
    assert results_report.images_until({100: 20.0, 200: 40.0, 300: 35.0}, target) == images


def test_the_mean_curve_takes_the_evaluations_that_all_seeds_have():
    assert results_report.mean_curve([Outcome(0, {1: 2.0, 2: 4.0}), Outcome(0, {2: 6.0, 3: 9.0})]) == {2: 5.0}


def test_what_stands_around_the_markers_is_kept(tmp_path):
    file = tmp_path / "docs" / "report.md"
    results_report.write_report(file, "one")
    file.write_text("Before.\n" + file.read_text() + "After.\n")
    results_report.write_report(file, "two")
    text = file.read_text()
    assert text.startswith("Before.\n# Results") and text.endswith(f"two\n\n{results_report.END}\nAfter.\n")
    assert "one" not in text and text.count(results_report.START) == 1
    file.write_text(f"Alone. {results_report.START}")
    with pytest.raises(ValueError, match="put it back"):
        results_report.write_report(file, "three")


def test_teachers_come_first_then_seed_by_seed_and_each_run_once(tmp_path):
    arguments = results.parse(["--dataset", "d", "--output_dir", str(tmp_path), "--scale", "0.5"])
    runs = results.plan_runs([arm for arms in results.TABLES.values() for arm in arms], arguments)
    titles = [run.title for run in runs]
    teachers = len(results.TEACHERS)
    assert titles[:teachers] == [f"teacher {name}" for name in results.TEACHERS]
    assert titles[teachers] == "resnet18_scalekd, seed 0"
    seeds = [title[-1] for title in titles[teachers:]]
    assert seeds == sorted(seeds) and len({run.folder for run in runs}) == len(runs)
    assert "--num_train_epochs 2.0" in " ".join(runs[teachers].command)


def test_with_a_gpu_the_runs_use_it_and_all_images_may_be_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    arguments = results.parse(
        ["--dataset", "d", "--output_dir", str(tmp_path), "--train_split", "train", "--seeds", "0"]
    )
    teacher, student = results.plan_runs([results.TABLES[1][0]], arguments)
    for run_ in (teacher, student):
        assert "--use_cpu false" in " ".join(run_.command)
    assert "--train_split train" in " ".join(student.command) and "--train_split" not in teacher.command


def test_results_made_with_other_options_are_not_taken_for_these(tmp_path, monkeypatch):
    words = ["--dataset", "d", "--report", str(tmp_path / "report.md"), "--report_only", "--tables", "1"]
    arguments = results.parse([*words, "--output_dir", str(tmp_path)])
    leave(tmp_path, "vit_logits_seed0", [0.5])
    done = next(run for run in results.plan_runs(results.TABLES[1], arguments) if run.top1() is not None)
    elsewhere = [word.replace(str(results.RECIPES), "/elsewhere") for word in done.command]
    done.log.write_text(f"$ python other.py --scale 9\n$ {shlex.join(elsewhere)} --use_cpu false\nsome output\n")
    for extra, refused in [([], False), (["--scale", "0.5"], True), (["--train_split", "train"], True)]:
        monkeypatch.setattr(sys, "argv", ["results.py", *words, "--output_dir", str(tmp_path), *extra])
        with pytest.raises(SystemExit, match="vit_logits, seed 0") if refused else nullcontext():
            results.main()


def test_the_command_in_the_report_names_no_place_of_this_machine():
    words = ["--dataset", "../data/cifar10", "--output_dir", "/tmp/x/runs", "--report", "docs/r.md", "--report_only"]
    shown = "python recipes/results.py --dataset cifar10 --output_dir runs --report docs/r.md"
    assert results_report.shown_command(words) == shown


@pytest.mark.slow
def test_the_whole_command_in_small_trains_nothing_twice(tmp_path):
    output, report, data = tmp_path / "runs", tmp_path / "report.md", tmp_path / "digits"
    data.mkdir()
    for file in DIGITS.glob("train-*.parquet"):
        (data / file.name).symlink_to(file)
    test = datasets.Dataset.from_parquet(str(next(DIGITS.glob("test-00000-*.parquet"))))
    test.select(range(60)).to_parquet(data / "test-00000-of-00001.parquet")  # which each run has to see often
    words = ["recipes/results.py", "--dataset", data, "--output_dir", output]
    words += ["--report", report, "--tables", 1, "--students", "mixer", "--seeds", 0, "--scale", 0.03]
    first = run_script(*words)
    assert first.returncode == 0, first.stdout + first.stderr[-3000:]
    text = report.read_text()
    assert "| Mixer | " in text and report.with_suffix(".png").exists()
    assert (
        text.count(results_report.MISSING + " |") == text.count("| Mixer | – | – | – |") * 3 == 3
    )  # too short to time
    assert "each student: 64 images seen, from 359 training images" in text
    logs = {file: file.read_text() for file in output.glob("*.log")}
    assert len(logs) == 3

    second = run_script(*words)
    assert second.returncode == 0 and "3 runs, 3 of them there already." in second.stdout
    assert {file: file.read_text() for file in output.glob("*.log")} == logs and report.read_text() == text

    (output / "mixer_logits_seed0" / "results.json").unlink()
    (output / "mixer_logits_seed0" / "model.safetensors").write_text("damaged")
    third = run_script(*words)
    assert third.returncode == 1 and "FAILED: mixer_logits, seed 0" in third.stdout
    assert "| – |" in report.read_text()
