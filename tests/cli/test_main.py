"""The `scalekd` command: what it says at once, what it hands over, and how it ends."""

import os
import re
import signal
import subprocess
import sys

import psutil
import pytest
import torch
import yaml
from helpers import ROOT
from processes import in_processes, run_module
from transformers import TrainingArguments

from scalekd_hf import ScaleKDConfig
from scalekd_hf.cli.main import COMMANDS, USAGE, main, split_launcher
from scalekd_hf.cli.recipes import published
from scalekd_hf.tools.fields import settings_of
from scalekd_hf.tools.recipe import DistillArguments, TeacherArguments
from scalekd_hf.tools.words import installed, shipped_configs, shipped_folder


HEAVY = ("torch", "transformers", "timm", "datasets", "accelerate")


def scalekd(*words, cwd=None):
    """The command in a process of its own, which then says what it has loaded."""
    code = (
        "import sys\nfrom scalekd_hf.cli.main import main\n"
        f"try:\n    main()\nfinally:\n    print('LOADED', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--help"], 0, "distil a teacher into a student"),
        ([], 2, "scalekd COMMAND"),
        (["--version"], 0, r"^\d+\.\d+"),
        (["recipes"], 0, r"swin_l_to_resnet50 +Swin-L to ResNet-50, 300 epochs +78.64 +82.03"),
        (["recipes", "swin_l_to_vit_s"], 0, "teacher: timm/swin_large"),
        *[([command, "--help"], 0, re.escape(usage)) for command, usage in USAGE.items()],
        (["distil"], 2, "'distil' is not a command. Did you mean `distill`"),
        (["distill", "swin_l_to_resnet5"], 2, "no recipe of that name is shipped. Did you mean `swin_l_to_resnet50`"),
        (["plan", "missing.yaml"], 2, "'missing.yaml' cannot be read"),
        (["distill", "quickstart", "--learning_rte", "1"], 2, "`--learning_rte` is not a setting. Did you mean"),
        (["evaluate", "timm/resnet18", "--datset", "x"], 2, "`--datset` is not a setting. Did you mean `dataset`"),
    ],
)
def test_what_needs_no_model_is_said_without_loading_a_library(words, status, said):
    result = scalekd(*words)
    text, _, loaded = result.stdout.rpartition("LOADED")
    assert result.returncode == status and re.search(said, text + result.stderr, re.MULTILINE), result.stderr
    assert not loaded.split(), loaded
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) <= 1


def test_importing_the_package_loads_nothing_until_something_is_named():
    code = f"import sys, scalekd_hf; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout.strip() == "[]", result.stderr


def test_help_shows_the_projects_own_settings_first_on_two_screens(capsys):
    main(["distill", "--help"])
    short = capsys.readouterr().out
    assert len(short.splitlines()) <= 100 and "--student " in short and "--learning_rate" not in short
    assert short.index("The pair") < short.index("Data") < short.index("Method") < short.index("Images")
    main(["distill", "--help-all"])
    assert "--learning_rate" in capsys.readouterr().out


def test_a_console_that_lacks_a_letter_gets_the_rest():
    command = [sys.executable, "-m", "scalekd_hf.cli.main", "distill", "--help"]
    console = {**os.environ, "PYTHONIOENCODING": "cp1252"}  # as on Windows; λ is not in it
    result = subprocess.run(command, capture_output=True, env=console, timeout=300)
    assert result.returncode == 0 and b"Weight ? of the logit term" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("command", "arguments"), [("distill", DistillArguments), ("train-teacher", TeacherArguments)]
)
def test_settings_read_from_the_source_are_those_of_the_dataclasses(command, arguments):
    own, rest = settings_of(command)
    expected = {name for cls in (arguments, ScaleKDConfig) for name, f in cls.__dataclass_fields__.items() if f.init}
    assert {field.name for field in (*own, *rest)} >= expected
    assert {field.name for field in rest} <= set(TrainingArguments.__dataclass_fields__)
    assert all(field.help for field in own)


def test_paths_in_recipes_are_those_of_the_installation_where_there_are_none_here(tmp_path, monkeypatch):
    shipped = str(shipped_folder() / "accelerate" / "zero2.json")
    monkeypatch.chdir(tmp_path)
    assert installed("recipes/accelerate/zero2.json") == shipped
    assert installed("--deepspeed=recipes/accelerate/zero2.json") == f"--deepspeed={shipped}"
    assert installed("--cpu") == "--cpu" and installed("photos/a=b") == "photos/a=b"
    (tmp_path / "recipes" / "accelerate").mkdir(parents=True)
    (tmp_path / "recipes" / "accelerate" / "zero2.json").touch()
    assert installed("recipes/accelerate/zero2.json") == "recipes/accelerate/zero2.json"


def test_bf16_without_a_gpu_names_the_settings(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(SystemExit):
        main(["quickstart", "--bf16", "true", "--output_dir", str(tmp_path)])
    assert "Set `bf16` to false, or `use_cpu` to true" in capsys.readouterr().err


def test_options_of_the_launcher_are_told_apart():
    known = {"learning_rate", "crop_scale", "use_cpu", "gradient_accumulation_steps"}
    words = ["--num_processes", "2", "--learning_rate", "1", "--crop_scale", "0.1", "1", "--multi_gpu", "--use_cpu"]
    words += ["--config_file=a.yaml", "--gradient_accumulation_steps", "2"]
    assert split_launcher(words, known) == (
        ["--num_processes", "2", "--multi_gpu", "--config_file=a.yaml"],
        ["--learning_rate", "1", "--crop_scale", "0.1", "1", "--use_cpu", "--gradient_accumulation_steps", "2"],
    )


def test_an_error_of_the_users_is_one_line_and_the_traceback_is_there_for_who_asks(tmp_path, capsys):
    words = ["distill", "quickstart", "--output_dir", str(tmp_path), "--train_files", "nowhere/*.parquet", "--use_cpu"]
    with pytest.raises(SystemExit, match="2"):
        main(words)
    told = capsys.readouterr().err
    assert told.startswith("scalekd: No file matches 'nowhere/*.parquet'") and told.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--traceback"])
    assert "Traceback" in capsys.readouterr().err


def test_no_process_fails_without_a_word_and_a_late_error_shows_where(tmp_path, capsys, monkeypatch):
    words = ["distill", str(tmp_path / "missing.yaml")]
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert capsys.readouterr().err.startswith("scalekd, process 3: The configuration")
    monkeypatch.setattr("scalekd_hf.cli.main.AT_ONCE", -1)
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "Traceback" in capsys.readouterr().err


def test_versions_are_told_where_torch_cannot_be_loaded(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="2"):
        main(["env"])
    told = capsys.readouterr()
    assert re.search(r"^timm +\d", told.out, re.MULTILINE) and "torch" in told.err


def test_a_recipe_is_printed_and_copied(tmp_path, capsys):
    main(["recipes", "swin_l_to_resnet50"])
    text = (ROOT / "recipes" / "configs" / "swin_l_to_resnet50.yaml").read_text()
    assert capsys.readouterr().out == text
    main(["recipes", "swin_l_to_resnet50", "--copy", str(tmp_path)])
    assert (tmp_path / "swin_l_to_resnet50.yaml").read_text() == text
    with pytest.raises(SystemExit):
        main(["recipes", "swin_l_to_resnet50", "--copy", str(tmp_path)])
    assert "exists already" in capsys.readouterr().err


def test_the_papers_numbers_are_those_of_the_documents():
    page = (ROOT / "docs" / "recipes.md").read_text()
    lines = [line for line in page.splitlines() if re.match(r"\| `\w+_to_\w+` \| (Swin|EVA)", line)]
    rows = {
        cells[1].strip(" `"): tuple(cell.strip() for cell in cells[5:7]) for cells in (x.split("|") for x in lines)
    }
    found = {name: published(file) for name, file in shipped_configs().items()}
    assert rows == {name: row[1:] for name, row in found.items() if row} and len(rows) == 17


def test_all_packages_and_files_are_in_the_wheel():
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.findall(r'^    "(scalekd_hf[\w.]*)",$', text, re.MULTILINE))
    folders = {path.parent.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("__init__.py")}
    assert listed == {".".join(folder.parts) for folder in folders} | {"scalekd_hf.recipes"}
    assert shipped_folder().samefile(ROOT / "recipes")


@pytest.mark.slow  # without an engine: tests/cli/test_pages.py
def test_two_processes_start_by_options_of_the_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    launcher = ["--num_processes", "2", "--config_file", "recipes/accelerate/zero2.yaml"]
    words = ["quickstart", "--max_steps", "2", "--baseline", "false", "--use_cpu"]
    result = scalekd(*words, *launcher, "--output_dir", tmp_path / "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    resolved = yaml.safe_load((tmp_path / "run" / "config_resolved.yaml").read_text())
    assert os.path.isabs(resolved["teacher"]) and resolved["max_steps"] == 2
    assert "student distilled" in result.stdout
    assert "2 CPU processes" in (tmp_path / "run" / "README.md").read_text()
    words += ["--penultimate_num_heads", "7", "--output_dir", str(tmp_path / "other")]
    for refused in in_processes(tmp_path, main, words, processes=2):  # the launcher adds nothing: see below
        said = [line for line in refused.text.splitlines() if line and not line.startswith("The student with its")]
        assert refused.status == 2 and len(said) == 1 and "7 heads" in said[0], refused.text


@pytest.mark.parametrize(
    ("status", "said", "returned"),
    [("sys.exit(2)", "", 2), ("sys.exit(3)", "scalekd: process 1 ended with status 3.\n", 3)]
    + [("os.kill(os.getpid(), 9)", "scalekd: process 1 was ended by SIGKILL (the machine's memory may", 137)],
)
@pytest.mark.slow
def test_the_launcher_says_how_a_process_ended_and_no_more(tmp_path, status, said, returned):
    (tmp_path / "it.py").write_text(f"import os, sys, time\nos.environ['RANK'] == '1' and {status}\ntime.sleep(60)\n")
    ended = run_module("scalekd_hf.cli.launcher", "--num_processes", 2, tmp_path / "it.py")
    assert ended.returncode == returned and ended.stderr.startswith(said) and ended.stderr.count("\n") == bool(said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num_processes", "2", "--config_file", "recipes/accelerate/cpu.yaml"], "is for one process"),
        (["--num_machines", "2", "--cpu"], "`num_machines` needs `num_processes`"),
    ],
)
def test_launches_that_would_not_do_what_was_asked_are_refused(tmp_path, words, said):
    result = scalekd("quickstart", *words, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.startswith("scalekd: ") and said in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_one_process_keeps_its_threads_and_its_status(tmp_path):
    (tmp_path / "it.py").write_text("import os, sys\nprint(os.environ['OMP_NUM_THREADS'])\nsys.exit(75)\n")
    file = shipped_folder() / "accelerate" / "cpu.yaml"
    words = [sys.executable, "-m", "scalekd_hf.cli.launcher", "--config_file", file, tmp_path / "it.py"]
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    ended = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert ended.returncode == 75 and int(ended.stdout) == psutil.cpu_count(logical=False)
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_ctrl_c_while_the_student_is_trained_alone_is_made_up_for_by_the_same_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        sys.executable,
        "-u",
        "-m",
        "scalekd_hf.cli.main",
        "quickstart",
        "--max_steps",
        "30",
        "--logging_steps",
        "1",
    ]
    words += ["--disable_tqdm", "true", "--use_cpu", "true", "--output_dir", "run"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        while not started.stdout.readline().startswith("step 2/30"):
            assert started.poll() is None
        started.send_signal(signal.SIGINT)
        assert "goes on from the checkpoint" in started.communicate(timeout=60)[1] and started.returncode == 130
    again = run_module(*words[words.index("scalekd_hf.cli.main") :])
    assert again.returncode == 0, again.stderr[-3000:]
    steps = re.findall(r"^step (\d+)/30 \| loss", again.stdout, re.MULTILINE)
    assert (
        "it is resumed" in again.stdout and int(steps[0]) > 2 and len(steps) < 60 and "student alone" in again.stdout
    )


@pytest.mark.slow
def test_a_plan_counts_processes_without_starting_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["--num_processes", "8"], ["--config_file=recipes/accelerate/fsdp2.yaml"]):
        with pytest.raises(SystemExit, match="^0$"):
            main(["plan", "quickstart", *words])
        assert re.search(r"processes +8$", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(SystemExit, match="^2$"):
        main(["plan", "quickstart", "--config_file", "nowhere.yaml"])
    assert "`--config_file` is 'nowhere.yaml', which is no file" in capsys.readouterr().err


@pytest.mark.slow
def test_the_training_configuration_gives_the_same_student_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        "--max_steps",
        "4",
        "--use_cpu",
        "--baseline",
        "false",
        "--seed",
        "7",
        "--ema_decay",
        "0.5",
        "--hflip",
        "0.3",
    ]
    words += [
        "--student_args",
        '{"layers": [1, 1, 1, 1], "channels": [8, 12, 16, 24], "output_stride": 8}',
        "--bf16",
        "true",
    ]
    first = run_module("scalekd_hf.cli.main", "quickstart", *words, "--output_dir", "first")
    assert first.returncode == 0, first.stderr[-3000:]
    file = tmp_path / "first" / "training_config.yaml"
    assert "recipes/models/quickstart_teacher" in file.read_text() and str(ROOT) not in file.read_text()
    again = run_module("scalekd_hf.cli.main", "distill", file, "--output_dir", "again")
    assert again.returncode == 0, again.stderr[-3000:]
    students = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again")]
    assert students[0] == students[1]
    assert (tmp_path / "again" / "training_config.yaml").read_text() == file.read_text()


def test_every_command_is_told(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {command} " in out for command in COMMANDS)
