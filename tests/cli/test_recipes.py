"""The recipes: settings from YAML and the command line, and whole runs in small."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import yaml
from helpers import ROOT, run
from PIL import Image
from processes import run_script
from transformers import AutoModelForImageClassification

from scalekd_hf import ScaleKDConfig
from scalekd_hf.cli import distill
from scalekd_hf.cli.distill import baseline_config
from scalekd_hf.cli.runs import resume_or_refuse
from scalekd_hf.data.loading import load_data
from scalekd_hf.tools.recipe import DistillArguments, TeacherArguments, parse_config, write_config
from scalekd_hf.tools.words import installed


CONFIGS = sorted((ROOT / "recipes" / "configs").glob("**/*.yaml"))
TRANSFERS = {file for file in CONFIGS if file.parent.name == "transfer"}  # see tests/transfer
QUICKSTART = ROOT / "recipes" / "configs" / "quickstart.yaml"
TEACHER_CONFIG = "recipes/configs/quickstart_teacher.yaml"
TEACHER_DATA = ["--train_files", "recipes/data/numbers/train-*.parquet"]  # its own is made by recipes/make_numbers.py


def parse(tmp_path, settings, *words, arguments_class=DistillArguments):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"student": "timm/resnet18", "teacher": "timm/vit_tiny_patch16_224", **settings}))
    return parse_config(arguments_class, [str(file), *words])


def test_the_command_line_wins_over_the_file(tmp_path):
    settings = {"output_dir": str(tmp_path), "max_steps": 5, "spatial_weight": 0.1, "baseline": False}
    arguments, config = parse(tmp_path, settings, "--max_steps", "7", "--baseline", "--hflip=0.25")
    assert (config.max_steps, config.spatial_weight, config.hflip, arguments.baseline) == (7, 0.1, 0.25, True)


def test_values_have_the_kind_of_their_setting(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "student: timm/resnet18\nteacher: t\nlearning_rate: 1e-4\ncrop_scale: [0.5, 1]\nuse_cpu: true\n"
        f"student_args: {{depth: 2, name: x}}\nlast_num_heads: null\noutput_dir: {tmp_path}\nsave_strategy: 'no'\n"
    )
    file.write_text(file.read_text().replace("'no'", "no"))
    arguments, config = parse_config(DistillArguments, [str(file)])
    assert config.save_strategy == "no"
    assert (config.learning_rate, config.crop_scale, config.use_cpu) == (1e-4, [0.5, 1.0], True)
    assert arguments.student_args == {"depth": 2, "name": "x"} and config.last_num_heads is None


@pytest.mark.parametrize(
    ("settings", "words", "message"),
    [
        ({"spatial_wieght": 1}, [], "`spatial_wieght` is not a setting. Did you mean `spatial_weight`"),
        ({}, ["--learning_rte", "1"], "`--learning_rte` is not a setting. Did you mean `learning_rate`"),
        ({"student_args": "{depth"}, [], "`student_args` must be a mapping or JSON, got '{depth'"),
        ({"student": ""}, [], "`student` is missing"),
    ],
)
def test_a_wrong_setting_is_refused_with_the_nearest_name(tmp_path, settings, words, message):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, {"output_dir": str(tmp_path), **settings}, *words)


def test_a_later_file_wins_over_an_earlier_one(tmp_path):
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("student: a\nteacher: b\nhflip: 0.1\ncrop_pct: 0.5\n")
    second.write_text("hflip: 0.2\n")
    words = [str(first), str(second), "--output_dir", str(tmp_path), "--crop_pct", "0.75"]
    arguments, config = parse_config(DistillArguments, words)
    assert (arguments.student, config.hflip, config.crop_pct) == ("a", 0.2, 0.75)
    second.write_text("hflp: 0.2\n")
    with pytest.raises(ValueError, match="2.yaml: `hflp` is not a setting"):
        parse_config(DistillArguments, words)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="missing.yaml' cannot be read"):
        parse_config(DistillArguments, [str(tmp_path / "missing.yaml")])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="must be a mapping of settings"):
        parse_config(DistillArguments, [str(tmp_path / "list.yaml")])


def test_the_resolved_configuration_gives_the_same_run_again(tmp_path):
    first = parse_config(DistillArguments, [str(QUICKSTART), "--output_dir", str(tmp_path), "--use_cpu"])
    write_config(*first, tmp_path / "resolved.yaml")
    second = parse_config(DistillArguments, [str(tmp_path / "resolved.yaml")])
    assert first[0] == second[0]
    left_out = {"logging_dir"}
    for field in dataclasses.fields(ScaleKDConfig):
        if field.init and field.name not in left_out:
            assert getattr(first[1], field.name) == getattr(second[1], field.name), field.name
    assert len(yaml.safe_load((tmp_path / "resolved.yaml").read_text())) > 60


@pytest.mark.parametrize("file", sorted({*CONFIGS} - TRANSFERS), ids=lambda file: file.stem)
def test_every_configuration_can_be_read(file, tmp_path):
    arguments_class = TeacherArguments if "model:" in file.read_text() else DistillArguments
    follows = file.stem == "recommended" or file.parent.name == "compared"  # another
    files = [str(QUICKSTART), str(file)] if follows else [str(file)]
    parse_config(arguments_class, [*files, "--output_dir", str(tmp_path), "--use_cpu"])
    assert len(file.read_text().splitlines()) <= 35


def test_data_is_streamed_from_files_or_loaded_whole(monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments, _ = parse_config(DistillArguments, [str(QUICKSTART), "--use_cpu"])
    train, evaluation = load_data(arguments)
    assert train.num_shards == 4 and evaluation.num_shards == 2
    whole, held_out = load_data(dataclasses.replace(arguments, streaming=False))
    assert (len(whole), len(held_out)) == (300, 1000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_files": None}, "There is no data"),
        ({"train_files": "nowhere/*.parquet"}, "No file matches 'nowhere/"),
        ({"train_files": "pyproject.toml"}, "is not of a known kind; known: .parquet"),
        ({"train_files": None, "dataset": "no-team/no-data"}, "`dataset` 'no-team/no-data'.*cannot be loaded"),
    ],
)
def test_missing_data_is_refused(monkeypatch, changes, message):
    monkeypatch.chdir(ROOT)
    arguments, _ = parse_config(DistillArguments, [str(QUICKSTART), "--use_cpu"])
    with pytest.raises(ValueError, match=message):
        load_data(dataclasses.replace(arguments, **changes))


def test_the_quickstart_in_small(tmp_path):
    words = [
        "--output_dir",
        tmp_path / "run",
        "--max_steps",
        "6",
        "--use_cpu",
        "--save_strategy",
        "steps",
        "--save_steps",
        "3",
    ]
    result = run_script("recipes/distill.py", *words)  # `.ci/run` starts it with `accelerate launch`
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results) == ["teacher", "student alone", "student distilled"]
    assert results["teacher"]["top1"] >= 0.93  # the teacher in the repository
    for name, metrics in results.items():
        assert f"{name:<20}{metrics['top1']:>8.2%}" in result.stdout
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert model.config.num_labels == 100
    resolved = yaml.safe_load((tmp_path / "run" / "config_resolved.yaml").read_text())
    assert (resolved["max_steps"], resolved["crop_pct"]) == (6, 1.0)

    refused = run_script("recipes/distill.py", *words, "--learning_rate", "1")
    assert refused.returncode != 0 and "holds a run already" in refused.stderr
    again = run_script("recipes/distill.py", *words)
    assert again.returncode == 0 and "nothing is trained again" in again.stdout
    assert again.stdout.partition("top-5\n")[2] == result.stdout.partition("top-5\n")[2]
    alone = tmp_path / "run" / "alone"
    shutil.rmtree(alone / "checkpoint-6")  # as after an interruption: the one left is older than the student
    written = (alone / "model.safetensors").stat().st_mtime_ns
    resumed = run_script("recipes/distill.py", *words, "--resume_from_checkpoint", "true")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert (alone / "model.safetensors").stat().st_mtime_ns == written
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    assert again["student distilled"]["top1"] == results["student distilled"]["top1"]


def test_what_is_wrong_with_the_teacher_is_said_before_the_student_is_trained_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [str(QUICKSTART), "--max_steps", "2", "--use_cpu", "--output_dir", "run", "--penultimate_num_heads", "7"]
    with pytest.raises(ValueError, match="7 heads"):
        distill.main([installed(word) for word in words])
    assert not list((tmp_path / "run").glob("alone/*.safetensors"))


def test_the_student_alone_has_settings_of_its_own():
    words = [str(QUICKSTART), "--learning_rate", "0.1", "--baseline_args", '{"learning_rate": "2e-2", "hflip": 0.25}']
    arguments, config = parse_config(DistillArguments, words)
    alone = baseline_config(words, arguments, config)
    assert (config.learning_rate, config.hflip, config.output_dir) == (0.1, 0.0, "outputs/quickstart")
    assert (alone.learning_rate, alone.hflip, alone.output_dir) == (0.02, 0.25, "outputs/quickstart/alone")
    assert alone.max_steps == config.max_steps


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('{"learning_rte": 1}', "`learning_rte` of `baseline_args` is not a setting. Did you mean"),
        ('{"output_dir": "x"}', "`output_dir` of `baseline_args` is not a setting"),
        ('{"push_to_hub": false}', "`push_to_hub` of `baseline_args` is not a setting"),
        ('{"ema_decay": null}', "`ema_decay` of `baseline_args` is null"),
        ("0.1", "`baseline_args` must be a mapping"),
    ],
)
def test_settings_of_the_student_alone_that_are_none_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        parse_config(DistillArguments, [str(QUICKSTART), "--baseline_args", given])


@pytest.mark.parametrize("logit_weight", ["0.5", "0"])
def test_distillation_without_labels_through_the_recipe(tmp_path, logit_weight):
    words = [
        "--label_column",
        "none",
        "--baseline",
        "false",
        "--logit_weight",
        logit_weight,
        "--max_steps",
        "2",
        "--use_cpu",
    ]
    result = run_script("recipes/distill.py", *words, "--output_dir", tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.num_labels == 100


@pytest.mark.slow
def test_the_baseline_is_not_resumed_from_the_distilled_student(tmp_path):
    words = [
        "--output_dir",
        tmp_path,
        "--max_steps",
        "2",
        "--use_cpu",
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
    ]
    assert run_script("recipes/distill.py", *words).returncode == 0
    first = json.loads((tmp_path / "results.json").read_text())
    alone = (tmp_path / "alone" / "model.safetensors").read_bytes()
    resumed = run_script("recipes/distill.py", *words, "--resume_from_checkpoint", tmp_path / "checkpoint-1")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert (tmp_path / "alone" / "model.safetensors").read_bytes() == alone
    again = json.loads((tmp_path / "results.json").read_text())
    assert [run["top1"] for run in again.values()] == [run["top1"] for run in first.values()]


def test_a_teacher_is_trained_on_the_users_labels_and_then_teaches(tmp_path):
    words = [TEACHER_CONFIG, *TEACHER_DATA, "--max_steps", "2", "--use_cpu"]
    words += ["--resume_from_checkpoint", "true", "--output_dir"]  # nothing yet: it starts
    result = run_script("recipes/train_teacher.py", *words, tmp_path / "teacher")
    assert result.returncode == 0, result.stderr[-3000:]
    words = ["--teacher", tmp_path / "teacher", "--max_steps", "1", "--use_cpu", "--baseline", "false"]
    result = run_script("recipes/distill.py", *words, "--output_dir", tmp_path / "student")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "student distilled" in result.stdout and "student alone" not in result.stdout


@pytest.mark.slow
def test_a_teacher_that_was_trained_to_the_end_is_evaluated_and_not_trained_again(tmp_path):
    words = [TEACHER_CONFIG, *TEACHER_DATA, "--max_steps", "30", "--use_cpu", "--output_dir", tmp_path]
    words += ["--save_strategy", "steps", "--save_steps", "20", "--resume_from_checkpoint", "true"]
    first = run_script("recipes/train_teacher.py", *words)
    assert first.returncode == 0, first.stderr[-3000:]
    shutil.rmtree(tmp_path / "checkpoint-30")
    written = (tmp_path / "model.safetensors").stat().st_mtime_ns
    second = run_script("recipes/train_teacher.py", *words)
    assert second.returncode == 0, second.stderr[-3000:]
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == written
    assert second.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]  # the accuracy


def test_the_numbers_in_the_repository_are_those_of_the_script():
    pytest.importorskip("sklearn", reason="scikit-learn has the digits")
    import sys

    import datasets

    sys.path.insert(0, str(ROOT / "recipes"))
    import make_numbers

    parts = make_numbers.parts()
    used = [
        {cells.tobytes() for cells in np.concatenate(list(parts[name].values()))}
        for name in ("train", "validation", "test")
    ]
    assert [len(digits) for digits in used] == [957, 360, 480] and not (
        used[0] & used[1] or used[0] & used[2] or used[1] & used[2]
    )
    for part in ("train", "validation", "test"):
        made = make_numbers.make(parts[part], make_numbers.OF_EACH[part], make_numbers.SEEDS[part])
        kept = datasets.Dataset.from_parquet([str(f) for f in sorted(make_numbers.FOLDER.glob(f"{part}-*.parquet"))])
        assert kept["label"] == made["label"]
        assert [image.tobytes() for image in kept["image"]] == [image.tobytes() for image in made["image"]]


@pytest.mark.slow
def test_a_data_set_that_the_hub_does_not_give_out_says_how_to_get_it():
    missing, gated = run("python", "tests/scripts/closed_hub.py").stdout.strip().splitlines()
    assert "'me/missing'" in missing and "Check the name on http" in missing and "hf auth login" in missing
    assert "'me/gated'" in gated and "Accept its terms on http" in gated and "HF_TOKEN" in gated


def test_a_folder_of_classes_is_read_whole_whatever_its_files_are_called(tmp_path):
    for index, name in enumerate(("a", "train_1", "test_2", "val 3")):
        place = tmp_path / f"class{index % 2}"
        place.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(place / f"{name}.png")
    arguments = DistillArguments(dataset=str(tmp_path), eval_split="none", student="a", teacher="b")
    train, _ = load_data(arguments)
    assert len(train) == 4 and train.features["label"].names == ["class0", "class1"]


def test_a_folder_beside_that_holds_a_run_is_refused_at_once(tmp_path):
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "model.safetensors").touch()
    with pytest.raises(ValueError, match="alone' holds a run already"):
        resume_or_refuse(*(ScaleKDConfig(output_dir=str(f), use_cpu=True) for f in (tmp_path, tmp_path / "alone")))
