"""recipes/compare_transfer.py: its runs, and its table from what runs leave."""

import json
import subprocess
import sys

import pytest
from helpers import ROOT


sys.path.insert(0, str(ROOT / "recipes"))
import compare_transfer


STUDENTS = ["--student", "alone=students/alone-seed{seed}", "--student", "distilled=students/distilled"]


def leave(folder, arm, seed, **metrics):
    (folder / f"{arm}_seed{seed}").mkdir(parents=True)
    content = json.dumps({"student": {**metrics, "runtime": 3.5, "loss": 0.5}})
    (folder / f"{arm}_seed{seed}" / "results.json").write_text(content, encoding="utf-8")


def parse(*words):
    return compare_transfer.parse(["segment", "scenes.yaml", *STUDENTS, *words])


def test_random_and_students_get_the_same_options_and_seeds():
    arguments, options = parse("--seeds", "0", "3", "--output_dir", "out", "--max_steps", "7")
    runs = compare_transfer.plan_runs(arguments, options)
    assert [run.folder.name for run in runs[3:]] == ["random_seed3", "alone_seed3", "distilled_seed3"]
    commands = [list(run.command) for run in runs]
    assert all(words[-2:] == ["--max_steps", "7"] and words[2:4] == ["segment", "scenes.yaml"] for words in commands)
    said = [{name: words[words.index(name) + 1] for name in ("--student", "--seed")} for words in commands]
    assert said[3] == said[4] == {"--student": "students/alone-seed3", "--seed": "3"}
    assert said[5] == {"--student": "students/distilled", "--seed": "3"} and said[0]["--seed"] == "0"
    assert [words[words.index("--output_dir") + 1] for words in commands] == [str(run.folder) for run in runs]
    fresh = [words for words in commands if "--backbone_pretrained" in words]
    assert fresh == commands[::3] and all(words[-4:-2] == ["--backbone_pretrained", "false"] for words in fresh)


def test_the_table_has_means_and_gains_over_the_arm_before(tmp_path):
    for seed, (random, alone, distilled) in enumerate([(0.1, 0.2, 0.4), (0.1, 0.3, 0.6)]):
        leave(tmp_path, "random", seed, mean_iou=random, pixel_accuracy=0.5)
        leave(tmp_path, "alone", seed, mean_iou=alone)
        leave(tmp_path, "distilled", seed, mean_iou=distilled)
    script = [sys.executable, str(ROOT / "recipes" / "compare_transfer.py"), "segment", "scenes.yaml", *STUDENTS]
    script += ["--output_dir", str(tmp_path), "--seeds", "0", "1", "--report_only"]
    finished = subprocess.run(script, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert finished.returncode == 0, finished.stderr[-2000:]
    gains = "+15.00 ± 7.07 | +25.00 ± 7.07"
    assert f"| mean_iou | 10.00 ± 0.00 | 25.00 ± 7.07 | 50.00 ± 14.14 | {gains} |" in finished.stdout
    assert "| pixel_accuracy | 50.00 ± 0.00 | – | – | – | – |" in finished.stdout
    assert "loss" not in finished.stdout and "alone over random | distilled over alone |" in finished.stdout
    assert (tmp_path / "comparison.md").read_text(encoding="utf-8").strip() in finished.stdout
    metrics = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["mean_iou"]["distilled"]["mean"] == pytest.approx(50)
    assert metrics["mean_iou"]["distilled"]["by_seed"] == pytest.approx({"0": 40, "1": 60})
    assert metrics["pixel_accuracy"].keys() == {"random"}


def test_runs_of_another_budget_are_kept(tmp_path):
    leave(tmp_path, "alone", 0, mean_iou=0.5)
    arguments, options = parse("--seeds", "0", "--output_dir", str(tmp_path), "--max_steps", "7")
    run = compare_transfer.plan_runs(arguments, options)[1]
    run.log.write_text("$ python transfer.py segment scenes.yaml --max_steps 8\n", encoding="utf-8")
    assert run.top1() == 0.5 and run.is_another()


@pytest.mark.parametrize("words", [["plain/folder"], ["random=a"], ["a=1", "a=2"], ["=folder"], ["a="]])
def test_students_need_names_of_their_own(words):
    with pytest.raises(SystemExit, match="NAME=FOLDER"):
        compare_transfer.students(words)
