"""The command `scalekd transfer`, and its recipes in small."""

import json
import re
import shlex

import pytest
import yaml
from helpers import ROOT, some_slow
from processes import run_script
from scenes import NAMES, dense_data
from transformers import UperNetForSemanticSegmentation

from scalekd_hf import load_student
from scalekd_hf.cli import transfer
from scalekd_hf.cli.main import main, settings_help
from scalekd_hf.tools.recipe import parse_config
from scalekd_hf.transfer.building import build_model
from scalekd_hf.transfer.config import TransferArguments, TransferConfig
from scalekd_hf.transfer.tasks import backbone_of
from scalekd_hf.transfer.trainer import TransferTrainer


FOLDER = ROOT / "recipes" / "configs" / "transfer"
RECIPES = {file.stem: file for file in sorted(FOLDER.glob("*_*_*.yaml"))}
SMALL_MODELS = {
    "resnet50": ("timm/resnet50", {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]}),
    "swin_t": (
        "timm/swin_tiny_patch4_window7_224",
        {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]},
    ),
    "convnext_t": ("timm/convnext_tiny", {"depths": [1, 1, 2, 1], "dims": [8, 12, 16, 24]}),
    "vit_b": ("timm/vit_base_patch16_224", {"embed_dim": 48, "depth": 4, "num_heads": 2}),
}
SMALL = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--disable_tqdm", "true", "--max_steps", "2"]
SMALL += ["--logging_steps", "1", "--eval_strategy", "no", "--save_strategy", "no", "--warmup_steps", "0"]


def words(scenes, folder, *more):
    data = ["--dataset", str(scenes), "--train_split", "training", "--eval_split", "validation"]
    return [*data, "--output_dir", str(folder), "--image_size", "64", *SMALL, *more]


@pytest.mark.parametrize("name", some_slow(RECIPES, 3))
def test_two_steps_of_every_recipe_with_small_models(tmp_path, scenes, name):
    task = "segment" if "upernet" in name else "detect"
    architecture, changes = next(value for key, value in SMALL_MODELS.items() if name.startswith(key))
    arguments, config = parse_config(TransferArguments, [str(RECIPES[name]), *words(scenes, tmp_path)], TransferConfig)
    assert bool(arguments.drop_path_rate) != name.startswith("resnet")
    data = dense_data(scenes, task, masks=True)
    arguments.student = load_student(architecture, labels=["a", "b"], image_size=64, **changes)
    arguments.head_args = {"hidden_size": 8}
    trainer = TransferTrainer(build_model(task, arguments, config, data.class_names), config, data)
    before = [p.clone() for p in backbone_of(trainer.trained).parameters() if p.requires_grad]
    trainer.train()
    after = [p for p in backbone_of(trainer.trained).parameters() if p.requires_grad]
    assert trainer.state.global_step == 2
    assert sum(not one.equal(other) for one, other in zip(before, after, strict=True)) > len(before) / 2


def test_recipes_name_what_their_students_are_called():
    made = {yaml.safe_load(file.read_text())["output_dir"] for file in (ROOT / "recipes/configs").glob("*_to_*.yaml")}
    for name, file in RECIPES.items():
        settings = yaml.safe_load(file.read_text())
        assert settings["student"] in made and settings["output_dir"] == f"outputs/transfer/{name}"


def test_the_command_trains_evaluates_and_ends_once(tmp_path, scenes):
    given = words(scenes, tmp_path / "run", "--student", str(scenes / "student"), "--head_args", '{"hidden_size": 8}')
    given += ["--class_names", str(scenes / "classes.txt")]
    outcome = run_script("recipes/transfer.py", "segment", *given)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert "this model: mean IoU" in outcome.stdout
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 0 <= results["this model"]["mean_iou"] <= 1
    UperNetForSemanticSegmentation.from_pretrained(tmp_path / "run")
    kept = yaml.safe_load((tmp_path / "run" / "training_config.yaml").read_text())
    assert kept["student"] == str(scenes / "student") and "teacher" not in kept
    again = run_script("recipes/transfer.py", "segment", *given)
    assert again.returncode == 0 and "has come to its end" in again.stdout and "step 1" not in again.stdout


def test_a_plan_trains_nothing(tmp_path, scenes, capsys):
    given = words(scenes, tmp_path / "run", "--student", str(scenes / "student"), "--head", "d_fine")
    given += ["--head_args", '{"num_queries": 12}']
    with pytest.raises(SystemExit) as stop:
        transfer.main(["detect", *given, "--plan", "json"])
    plan = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0 and plan["error"] is None and not (tmp_path / "run").exists()
    assert plan["data"]["training images"] == 14 and plan["schedule"]["steps"] == 2
    assert plan["work"]["GFLOP forward, backbone"] > 0 and plan["data"]["classes"].startswith(f"{len(NAMES)}: ")
    with pytest.raises(SystemExit) as stop:
        transfer.main(["detect", *given, "--dataset", str(tmp_path / "none"), "--plan"])
    assert stop.value.code == 1 and "This run would fail" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["transfer"], "A task is missing: `scalekd transfer segment"),
        (["transfer", "classify"], "'classify' is no task"),
        (["transfer", "segment", "--imagesize", "3"], "`--imagesize` is not a setting. Did you mean `image_size`"),
        (["transfer", "segment", "--output_dir", "x"], "`student` is missing"),
        (["transfer", "segment", "--student", "x", "--head", "mask_rcnn"], "heads that segment are upernet"),
    ],
)
def test_what_cannot_be_transferred_is_said_at_once(tmp_path, monkeypatch, capsys, given, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(given)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_help_lists_the_settings_by_groups():
    text = settings_help("transfer", everything=False)
    for title in ("The student and its head", "Annotations", "Transfer", "Optimisation", "Run"):
        assert f"\n{title}\n" in text
    assert "--layer_decay" in text and "--box_format" in text and "--spatial_weight" not in text


@pytest.mark.slow
def test_two_steps_of_a_recipe_at_full_size(tmp_path, scenes):
    given = ["--dataset", str(scenes), "--train_split", "training", "--output_dir", str(tmp_path), *SMALL]
    arguments, config = parse_config(
        TransferArguments, [str(RECIPES["resnet50_upernet_ade20k"]), *given], TransferConfig
    )
    data = dense_data(scenes, "segment")
    arguments.student = load_student("timm/resnet50", labels=["a", "b"])
    trainer = TransferTrainer(build_model("segment", arguments, config, data.class_names), config, data)
    assert type(backbone_of(trainer.trained)).__name__ == "TimmBackbone" and config.image_size == 512
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)


@pytest.mark.slow
def test_the_page_is_run_as_it_stands(tmp_path, scenes, monkeypatch):
    page = (ROOT / "docs" / "transfer.md").read_text(encoding="utf-8")
    lines = re.findall(r"^scalekd (transfer .+)$", page, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        command, task, recipe, *given = shlex.split(line)
        folders = {"--student": str(scenes / "student"), "--dataset": str(scenes)}
        given = [folders.get(before, word) for before, word in zip(["", *given], given, strict=False)]
        names = ["--class_names", str(scenes / "classes.txt")] if task == "segment" else []
        more = [*words(scenes, tmp_path / task), *names, "--head_args", '{"hidden_size": 8}', "--max_steps", "1"]
        main([command, task, recipe, *given, *more])
        assert (tmp_path / task / "model.safetensors").exists()
    code = next(
        block for block in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if "TransferTrainer" in block
    )
    changes = {
        'dataset="data/ADEChallengeData2016"': f"dataset={str(scenes)!r}, class_names={str(scenes / 'classes.txt')!r}",
        '"outputs/swin_l_to_resnet50"': repr(str(scenes / "student")),
        "image_size=512)": "image_size=64, hidden_size=8)",
        "image_size=512,": "image_size=64, use_cpu=True, report_to='none',",
        "max_steps=160_000": "max_steps=1",
    }
    for given, instead in changes.items():
        assert given in code
        code = code.replace(given, instead)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/transfer.md", "exec"), {})
    assert (tmp_path / "segmenter" / "model.safetensors").exists()
