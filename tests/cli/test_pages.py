"""What the pages tell a newcomer to type is run: the text as it stands, with small models and photos in place of what has to be fetched."""

import itertools
import json
import re
import shlex
import shutil

import datasets
import numpy as np
import pytest
import timm
import torch
import yaml
from datasets import load_dataset
from helpers import DIGITS, ROOT, TEACHER, small_student
from hub_server import WRITE
from PIL import Image
from processes import run_module
from torch.utils.data import DataLoader

from scalekd_hf import load_student
from scalekd_hf.cli.main import main
from scalekd_hf.models.openmmlab import to_openmmlab
from scalekd_hf.models.saving import save_student
from scalekd_hf.tools.words import shipped_configs, shipped_folder


PAGES = ["README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]
RUN = {  # blocks that are run elsewhere, by page and place in it
    ("README.md", 5): "the installation and the tests: `.ci/run`",
    ("README.md", 6): "BibTeX",
    ("docs/export.md", 1): "tests/tools/test_export.py",
    ("docs/export.md", 2): "tests/tools/test_export.py",
    ("docs/index.md", 1): "what the quickstart prints",
    ("docs/own_photos.md", 0): "the folder that the test makes",
    ("docs/published.md", 3): "tests/models/test_mmpretrain.py",
    ("docs/recipes.md", 2): "tests/cli/test_compare_methods.py",
    ("docs/results.md", 0): "tests/cli/test_compare_methods.py",
    ("docs/results.md", 1): "tests/cli/test_compare_methods.py",
    ("docs/results.md", 2): "tests/cli/test_results.py",
    ("docs/results.md", 3): "tests/cli/test_compare_transfer.py",
    ("docs/transfer.md", 0): "tests/transfer/test_transfer_recipes.py",
    ("docs/transfer.md", 1): "tests/transfer/test_transfer_recipes.py",
    ("docs/transfer.md", 2): "tests/cli/test_scenes.py",
}
SCALEKD = "scalekd_hf.cli.main"
RESNET18 = '"timm/resnet18", num_classes=10, image_size=32, channels=(8, 16, 24, 32)'


def runs(page, *places):
    """Say which blocks of a page a test runs."""
    RUN.update(((page, place), "here") for place in places)
    return lambda test: test


def blocks(page):
    """The fenced blocks of a page."""
    return re.findall(r"^```\w*\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def commands(block):
    """The command lines of a block, as words without `scalekd`."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("scalekd ")]


def code(page, place, **stand_ins):
    """A block of Python, compiled, with other words for some of its own."""
    text = blocks(page)[place]
    for word, other in stand_ins.items():
        assert text.count(word) == 1, word
        text = text.replace(word, other)
    return compile(text, page, "exec")


def replaced(words, stand_ins):
    """Words of a command, with others for some of them."""
    assert set(stand_ins) <= set(words)
    return [stand_ins.get(word, word) for word in words]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with a student and validation images under the names that the pages use."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    save_student(load_student(small_student()), "outputs/my_pair")
    (tmp_path / "outputs/my_pair/README.md").write_text("---\nlibrary_name: timm\n---\n# my_pair\n")
    for part in ("data", "my_images"):
        (tmp_path / part).mkdir()
        for file in DIGITS.glob("test-*.parquet"):
            shutil.copy(file, tmp_path / part / file.name.replace("test", "val" if part == "data" else "test"))
    return tmp_path


@pytest.fixture
def my_pair(tmp_path):
    """`my_pair.yaml` and `my_teacher.yaml`, the quickstart's two in few steps."""
    changes = {"max_steps": 2, "use_cpu": True, "disable_tqdm": True, "baseline": False}
    text = yaml.safe_load(shipped_configs()["quickstart"].read_text())
    pair = text | changes | {"output_dir": "outputs/my_pair", "save_strategy": "steps", "save_steps": 2}
    (tmp_path / "my_pair.yaml").write_text(yaml.safe_dump(pair))
    del changes["baseline"]
    teacher = yaml.safe_load((shipped_folder() / "configs/quickstart_teacher.yaml").read_text()) | changes
    teacher |= {name: text[name] for name in ("train_files", "eval_files")}
    (tmp_path / "my_teacher.yaml").write_text(yaml.safe_dump(teacher | {"output_dir": "my_teacher"}))


@pytest.fixture
def photos(tmp_path):
    """Photos as people have them: sizes, modes and kinds of file, names with spaces and umlauts, and files that are none."""
    generator = np.random.default_rng(0)
    for index in range(90):
        place = tmp_path / "photos" / ("Kätzchen", "great tit", "dog")[index % 3]
        place.mkdir(parents=True, exist_ok=True)
        shape = (int(generator.integers(30, 90)), int(generator.integers(30, 90)))
        pixels = generator.integers(0, 80, (*shape, 4), dtype=np.uint8) + np.uint8(60 * (index % 3))
        mode = ("RGB", "L", "RGBA")[index // 3 % 3]
        image = Image.fromarray(pixels[..., :3]) if mode != "RGBA" else Image.fromarray(pixels, "RGBA")
        image.convert(mode).save(place / f"photo {index}.{'jpg' if index % 2 and mode != 'RGBA' else 'png'}")
    (tmp_path / "photos" / "dog" / "empty.jpg").touch()
    (tmp_path / "photos" / "dog" / "notes.txt").write_text("a dog\n")
    return tmp_path


@runs("README.md", 1, 2)
def test_the_readmes_python_trains_and_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = load_dataset("parquet", data_files=str(DIGITS / "test-00000*.parquet"), split="train", streaming=True)
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *what, **how: asked.append((what, how)) or {"train": rows, "validation": rows}
    )
    teacher = "timm/swin_large_patch4_window7_224.ms_in22k_ft_in1k"
    stand_ins = {teacher: str(TEACHER), '"timm/resnet50"': f"load_student({RESNET18})", "375_000": "2"}
    stand_ins |= {"batch_size=128": "batch_size=8, image_size=32, penultimate_num_heads=4, last_num_heads=8"}
    stand_ins |= {"bf16=True": "use_cpu=True"}
    names = {"load_student": load_student}
    exec(code("README.md", 1, **stand_ins), names)
    assert asked == [(("ILSVRC/imagenet-1k",), {"streaming": True})] and names["trainer"].state.global_step == 2
    exec(code("README.md", 2), names)
    assert names["model"].config.num_labels == 10


@pytest.mark.slow
@runs("README.md", 0, 3)
def test_the_readmes_commands(here, my_pair, capsys):
    install, quickstart = blocks("README.md")[0].strip().split(" && ")
    assert (install, quickstart) == ("pip install -e .", "scalekd quickstart")
    for words in (shlex.split(quickstart)[1:] + ["--max_steps", "2"], *commands(blocks("README.md")[3])):
        main([*words, "--use_cpu", "true", "--overwrite_output_dir", "true"])
    assert capsys.readouterr().out.count("student distilled") == 2
    assert set(json.loads((here / "outputs/my_pair/results.json").read_text())) == {
        "teacher",
        "student alone",
        "student distilled",
    }


@pytest.mark.slow
@runs("README.md", 4)
@runs("docs/index.md", 3)
@runs("docs/recipes.md", 0, 1, 3)
def test_plans_on_the_pages(capsys):
    assert commands(blocks("docs/index.md")[3]) == commands(blocks("README.md")[4])
    words = [*commands(blocks("README.md")[4]), *(w for b in blocks("docs/recipes.md") for w in commands(b))]
    assert [w[0] for w in words] == ["plan", "plan", "distill", "distill", "plan"]
    for command in words:
        with pytest.raises(SystemExit, match="^0$"):
            main(["plan", *command[1:]])
        assert "projectors" in capsys.readouterr().out


@runs("docs/index.md", 0, 2)
def test_first_steps(capsys):
    page = blocks("docs/index.md")
    assert page[0].split("\n")[:2] == blocks("README.md")[0].strip().split(" && ")  # run above
    for words in commands(page[2]):
        main(words)
    assert "swin_l_to_resnet50" in capsys.readouterr().out


@pytest.mark.slow
@runs("docs/own_photos.md", 1, 2, 3, 4, 5, 6)
def test_the_page_on_own_photos_from_teacher_to_export(photos, monkeypatch):
    monkeypatch.chdir(photos)
    small = {"teacher": {"model": "timm/swin_tiny_patch4_window7_224"}, "pair": {"student_pretrained": False}}
    swin = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
    small["teacher"] |= {"model_args": {**swin, "patch_size": 2}, "pretrained": False, "num_train_epochs": 1}
    small["pair"] |= {"student_args": {"channels": [8, 16, 24, 32]}, "num_train_epochs": 1}
    page = blocks("docs/own_photos.md")
    for (name, changes), text in zip(small.items(), (page[1], page[3]), strict=True):
        settings = (
            yaml.safe_load(text) | changes | {"image_size": 64, "per_device_train_batch_size": 8, "use_cpu": True}
        )
        (photos / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    typed = [words for place in (2, 4, 5, 6) for words in commands(page[place])]
    assert [words[0] for words in typed] == ["train-teacher", "plan", "distill", "evaluate", "export"]
    said = {}
    for words in typed:
        result = run_module(SCALEKD, *words)
        assert result.returncode == 0, (words, result.stderr[-3000:])
        said[words[0]] = result.stdout
    results = json.loads((photos / "student" / "results.json").read_text())
    assert set(results) == {"teacher", "student alone", "student distilled"}
    evaluated = json.loads((photos / "evaluation" / "student" / "evaluation.json").read_text())[0]
    assert evaluated["top1"] == pytest.approx(results["student distilled"]["top1"])
    assert 8 <= evaluated["images"] <= 30
    assert load_student(str(photos / "student"), pretrained=True).labels == ["Kätzchen", "dog", "great tit"]
    assert "differs by" in said["export"]
    for place in ("teacher", "student", "evaluation/student"):
        (line,) = (photos / place / "unused_files.jsonl").read_text().splitlines()
        assert json.loads(line) == {"file": "dog/notes.txt", "reason": "files that are no images here (.txt)"}


@runs("docs/own_photos.md", 7)
def test_models_of_ones_own_on_the_page_train(tmp_path, digits, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"photos": digits}
    exec(code("docs/own_photos.md", 7), names)
    assert names["trainer"].state.global_step == 2


@runs("docs/own_loop.md", 0)
def test_the_loop_on_the_page_trains_and_saves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = '"timm/swin_large_patch4_window7_224.ms_in22k_ft_in1k"'
    rows = load_dataset("parquet", data_files=str(DIGITS / "test-00000*.parquet"), split="train[:16]")
    pixels = np.stack([np.asarray(row["image"].convert("RGB")) for row in rows]).transpose(0, 3, 1, 2)
    samples = [(image, row["label"]) for image, row in zip(pixels, rows, strict=True)]
    names = {"device": "cpu", "loader": DataLoader(samples, batch_size=8)}
    exec(code("docs/own_loop.md", 0, **{teacher: repr(str(TEACHER)), '"timm/resnet50"': RESNET18}), names)
    assert load_student(str(tmp_path / "student"), pretrained=True).num_labels == 10


@pytest.mark.slow
@runs("docs/evaluation.md", 0)
@runs("docs/export.md", 0)
def test_evaluations_and_exports_on_the_pages(here, capsys):
    hub, folder, many = commands(blocks("docs/evaluation.md")[0])
    main(replaced(hub, {"my-team/my-student": "outputs/my_pair"}))
    main(folder)
    known = {"timm/resnet50.a1_in1k": "outputs/my_pair", "--benchmark": "--eval_files", "--bf16": "--use_cpu"}
    known |= {"imagenet-1k": "data/val-*.parquet", "8": "2"}
    result = run_module(SCALEKD, *replaced(many, known), "--cpu", "--output_dir", "many")
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads((here / place / "evaluation.json").read_text()) for place in ("evaluation/my_pair", "many")]
    assert [row["images"] for row in rows[0]] == [360, 360] and rows[0][1]["top1"] == rows[1][0]["top1"]
    assert "val-" in (here / "outputs/my_pair/README.md").read_text()
    (export,) = commands(blocks("docs/export.md")[0])
    main(export)
    assert (here / "outputs/my_pair/model.onnx").exists() and (here / "outputs/my_pair/model.pt2").exists()


@runs("docs/teachers.md", 1, 2)
def test_the_own_teachers_on_the_page_teach(capsys):
    exec(code("docs/teachers.md", 1), {})
    assert capsys.readouterr().out.startswith("trunk_output.block3 trunk_output torch.Size([1, 440, 2, 2]) 0.0")
    exec(code("docs/teachers.md", 2), {})
    assert capsys.readouterr().out == "torch.Size([1, 49, 32])\n"


@pytest.mark.slow
@runs("docs/teachers.md", 0)
def test_the_plans_on_the_page_of_teachers_are_made(capsys):
    for words in commands(blocks("docs/teachers.md")[0]):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert not left.value.code and "width 1024" in capsys.readouterr().out


@runs("docs/backbones.md", 0, 1, 2)
@runs("docs/evaluation.md", 1)
def test_the_backbone_on_the_pages_is_trained_loaded_and_measured(here, digits, capsys):
    (words,) = commands(blocks("docs/backbones.md")[0])
    main([*words, "--max_steps", "2", "--use_cpu", "true", "--disable_tqdm", "true"])
    assert "backbone without a classifier, is in backbone" in capsys.readouterr().out
    shutil.rmtree("backbone")
    teacher = '"timm/swin_large_patch4_window7_224.ms_in22k_ft_in1k"'
    small = '"timm/resnet18", num_classes=0, image_size=32, channels=(8, 16, 24, 32), output_stride=8'
    stand_ins = {teacher: repr(str(TEACHER)), '"timm/resnet50", num_classes=0': small, "375_000": "2"}
    stand_ins |= {"size=128": "size=8, use_cpu=True, last_num_heads=8"}
    exec(code("docs/backbones.md", 1, **stand_ins), {"train": digits, "evaluation": digits})
    names = {}
    exec(code("docs/backbones.md", 2), names)
    assert names["model"].num_classes == 0 and len(names["stages"](torch.zeros(1, 3, 32, 32))) == 5
    assert names["features"](torch.zeros(1, 3, 32, 32)).shape == (1, 32)
    for part, place in itertools.product(("train", "test"), ("data", "my_images")):
        file = next(iter(sorted(DIGITS.glob(f"{part}-*.parquet"))))
        shutil.copy(file, here / place / file.name)
    backbone, classifier = commands(blocks("docs/evaluation.md")[1])
    for given in (backbone, classifier):
        main([*given, "--use_cpu", "true", "--disable_tqdm", "true"])
        assert "linear probe" in capsys.readouterr().out


@pytest.mark.slow
@runs("docs/published.md", 0, 1, 2)
def test_the_page_of_published_students_converts_measures_and_writes_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for place, synset in enumerate(("n01440764", "n01443537", "n02129165")):
        (tmp_path / "imagenet/val" / synset).mkdir(parents=True)
        Image.new("RGB", (300, 260), (90 * place, 40, 10)).save(tmp_path / f"imagenet/val/{synset}/{place}.jpg")
    state = timm.create_model("resnet50").state_dict()
    torch.save(
        {"state_dict": {f"student.{n}": v for n, v in to_openmmlab("ResNet", state).items()}}, "resnet50_swin_l.pth"
    )
    for words in commands(blocks("docs/published.md")[0]):
        main([*words, *(["--use_cpu", "true"] if words[0] == "evaluate" else [])])
    assert "imagenet-1k" in capsys.readouterr().out
    card = (tmp_path / "resnet50-scalekd/README.md").read_text(encoding="utf-8")
    assert "reports 82.03% top-1" in card and "All evaluations" in card
    torch.save({"state_dict": timm.create_model("resnet18").state_dict(), "epoch": 3}, "model_best.pth.tar")
    main(commands(blocks("docs/published.md")[1])[0])
    assert load_student("my-resnet18", pretrained=True).labels[1] == "goldfish, Carassius auratus"
    main(commands(blocks("docs/published.md")[2])[0])
    written = torch.load("resnet50-openmmlab/student.pth", weights_only=True)["state_dict"]
    assert torch.equal(written["backbone.conv1.weight"], state["conv1.weight"])


@pytest.mark.slow
@runs("docs/publishing.md", 0, 1, 2)
def test_publishing_as_on_the_page(here, my_pair, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITE)
    push, load, look = blocks("docs/publishing.md")
    shutil.rmtree("outputs")
    main(commands(push)[0])
    assert hub.repos["my-team/my-student"]["private"] and "model.safetensors" in hub.files("my-team/my-student")
    names = {}
    exec(load, names)
    assert len(names["classify"](Image.new("RGB", (40, 32)))) == 5
    main(replaced(commands(look)[0], {"outputs/my_pair/checkpoint-1000": "outputs/my_pair/checkpoint-2"}))
    assert list(here.rglob("*agreement*.png"))


@pytest.mark.slow
@runs("docs/distributed.md", 0)
def test_the_command_for_many_gpus_starts_as_many_processes(here):
    (words,) = commands(blocks("docs/distributed.md")[0])
    place = words.index("--config_file")  # of FSDP2, which the Trainer runs on GPUs alone
    del words[place : place + 2]
    result = run_module(SCALEKD, *replaced(words, {"20": "2", "10": "2"}), "--cpu", "--use_cpu")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "student distilled" in result.stdout
    assert "2 CPU processes" in (here / "outputs/quickstart/README.md").read_text()


def test_no_block_of_the_pages_is_left_out():
    found = {(page, place) for page in PAGES for place in range(len(blocks(page)))}
    assert found == set(RUN)
