"""The command that evaluates: its table, its files and the card."""

import json
import os
import shutil

import pytest
from helpers import DIGITS, ROOT, TEACHER, run
from processes import run_script

from scalekd_hf.cli.evaluate import card_of, parse


RECIPE = str(ROOT / "recipes" / "evaluate.py")


def test_names_of_models_become_folders_and_cards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for model, name in (
        ("team/model", "model"),
        ("timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
        (f"{TEACHER}/", TEACHER.name),
        (f"local-dir:{TEACHER}", TEACHER.name),
        (".", tmp_path.name),
        (os.path.join("..", tmp_path.name, ""), tmp_path.name),
    ):
        given, config = parse([model, "--dataset", "x", "--use_cpu"])
        assert (given.model, config.output_dir) == (model, f"evaluation/{name}")
    (tmp_path / "settings.yaml").write_text(f"model: team/model\ndataset: x\noutput_dir: {tmp_path}\n")
    given, config = parse([str(tmp_path / "settings.yaml"), "--use_cpu"])
    assert (given.model, config.output_dir) == ("team/model", str(tmp_path))
    assert [card_of(name) for name in ("team/model", "hf-hub:team/model")] == ["team/model"] * 2
    for name in ("timm/resnet18", "team/model@v1", "resnet18"):
        with pytest.raises(ValueError, match="has no card of yours"):
            card_of(name)


def test_recipe_writes_merges_and_updates_the_card(tmp_path):
    model, out = tmp_path / "teacher", tmp_path / "out"
    shutil.copytree(TEACHER, model)
    (model / "README.md").write_text("---\nlicense: mit\n---\n# A teacher\n\nMy own words.\n")
    options = ["--output_dir", out, "--use_cpu", "--disable_tqdm", "true", "--per_device_eval_batch_size", 64]
    for part, card in ((0, []), (1, ["--update_card", "--hub_token", "hf_secret"]), (0, [])):
        files = DIGITS / f"test-0000{part}-of-00002.parquet"
        finished = run_script(RECIPE, model, "--eval_files", files, *options, *card)
        assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = json.loads((out / "evaluation.json").read_text())
    assert [row["split"] for row in rows] == [f"test-0000{part}-of-00002.parquet" for part in (0, 1)]
    assert sum(row["images"] for row in rows) == 360
    assert rows[1]["command"].endswith("--update_card --hub_token ...") and rows[1]["versions"]["torch"]
    text = (out / "evaluation.md").read_text()
    assert text.count("| digits/") == 2 and rows[0]["command"] in text
    top1 = f"{rows[1]['top1']:.2%}"
    table = [line for line in finished.stdout.splitlines() if "digits/" in line]
    assert len(table) == 2 and f"{rows[0]['top1']:.2%}" in table[0] and top1 in table[1]
    card = (model / "README.md").read_text()
    assert "My own words." in card and top1 in card and "license: mit" in card


@pytest.mark.parametrize(
    "words, message",
    [
        (["timm/resnet18", "--update_card", "--dataset", "x"], "has no card of yours"),
        (
            [TEACHER, "--benchmark", "imagenet-v2", "--dataset", DIGITS, "--eval_split", "test"],
            "needs ImageNet's 1000",
        ),
        ([TEACHER, "--update_card", "--dataset", "x"], "has no README.md"),
    ],
)
def test_recipe_refuses_before_it_works(words, message, tmp_path):
    if message == "has no README.md":
        shutil.copytree(TEACHER, tmp_path / "model")
        (tmp_path / "model" / "README.md").unlink(missing_ok=True)
        words = [tmp_path / "model", *words[1:]]
    finished = run_script(RECIPE, *words, "--use_cpu", "--output_dir", tmp_path / "out")
    assert finished.returncode != 0 and message in finished.stdout + finished.stderr
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_what_cannot_be_added_to_is_not_written_over(tmp_path):
    (tmp_path / "evaluation.json").write_text("mine")
    finished = run_script(RECIPE, TEACHER, "--dataset", DIGITS, "--use_cpu", "--output_dir", tmp_path)
    assert finished.returncode != 0 and "cannot be added to" in finished.stdout + finished.stderr
    assert (tmp_path / "evaluation.json").read_text() == "mine"


@pytest.mark.slow
def test_recipe_as_a_command_of_two_processes(tmp_path):
    """The file is called as the package `evaluate` is, which it hides from scripts beside it."""
    words = [TEACHER, "--eval_files", DIGITS / "test-*.parquet", "--use_cpu", "--output_dir"]
    launch = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, RECIPE]
    for name in ("one", "two"):
        finished = (
            run(*launch, *words, tmp_path / name) if name == "two" else run_script(RECIPE, *words, tmp_path / name)
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert finished.stdout.count("images/s of the forward pass alone") == 1
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text())[0] for name in ("one", "two"))
    for key in ("images", "top1", "top5", "nll", "ece"):
        assert one[key] == pytest.approx(two[key], rel=1e-5)
    assert two["command"].startswith("torchrun --nproc_per_node 2 recipes/evaluate.py ")
    assert (one["settings"]["processes"], two["settings"]["processes"]) == (1, 2)
    other = run("python", "-c", "import sys; sys.path.insert(0, 'recipes'); import evaluate; evaluate.Metric")
    assert other.returncode == 0, other.stderr
