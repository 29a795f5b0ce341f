"""What the pages tell a newcomer to type is run: the code as it stands, on small models and made-up photos."""

import json
import re

import numpy as np
import pytest
import yaml
from datasets import load_dataset
from helpers import DIGITS, ROOT
from PIL import Image
from test_main import scalekd
from torch.utils.data import DataLoader

from scalekd_hf import load_student
from scalekd_hf.tools.words import shipped_folder


def blocks(page, kind):
    text = (ROOT / "docs" / page).read_text()
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for language, block in found if language == kind]


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


@pytest.mark.slow
def test_the_page_on_own_photos_from_teacher_to_export(photos):
    small = {"teacher": {"model": "timm/swin_tiny_patch4_window7_224"}, "pair": {"student_pretrained": False}}
    swin = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
    small["teacher"] |= {"model_args": {**swin, "patch_size": 2}, "pretrained": False, "num_train_epochs": 1}
    small["pair"] |= {"student_args": {"channels": [8, 16, 24, 32]}, "num_train_epochs": 1}
    for (name, changes), text in zip(small.items(), blocks("own_photos.md", "yaml"), strict=True):
        settings = (
            yaml.safe_load(text) | changes | {"image_size": 64, "per_device_train_batch_size": 8, "use_cpu": True}
        )
        (photos / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    commands = [
        line for block in blocks("own_photos.md", "") for line in block.splitlines() if line.startswith("scalekd")
    ]
    assert [command.split()[1] for command in commands] == ["train-teacher", "plan", "distill", "evaluate", "export"]
    said = {}
    for command in commands:
        result = scalekd(*command.split()[1:], cwd=photos)
        assert result.returncode == 0, (command, result.stderr[-3000:])
        said[command.split()[1]] = result.stdout
    results = json.loads((photos / "student" / "results.json").read_text())
    assert set(results) == {"teacher", "student alone", "student distilled"}
    evaluated = json.loads((photos / "evaluation" / "student" / "evaluation.json").read_text())[0]
    assert evaluated["top1"] == pytest.approx(results["student distilled"]["top1"])
    assert 8 <= evaluated["images"] <= 30
    assert load_student(str(photos / "student"), pretrained=True).labels == ["Kätzchen", "dog", "great tit"]
    assert "differs by" in said["export"]


def test_models_of_ones_own_on_the_page_train(tmp_path, digits, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("own_photos.md", "python")
    exec(compile(code, "own_photos.md", "exec"), {"photos": digits})
    assert (tmp_path / "own" / "trainer_state.json").exists() or list((tmp_path / "own").glob("*"))


def test_the_loop_on_the_page_trains_and_saves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("own_loop.md", "python")
    names = {
        '"timm/swin_large_patch4_window7_224.ms_in22k_ft_in1k"': repr(
            str(shipped_folder() / "models/quickstart_teacher")
        ),
        '"timm/resnet50"': '"timm/resnet18", num_classes=10, image_size=32, channels=(8, 16, 24, 32)',
    }
    for name, other in names.items():
        assert code.count(name) == 1
        code = code.replace(name, other)
    rows = load_dataset("parquet", data_files=str(DIGITS / "test-00000*.parquet"), split="train[:16]")
    pixels = np.stack([np.asarray(row["image"].convert("RGB")) for row in rows]).transpose(0, 3, 1, 2)
    samples = [(image, row["label"]) for image, row in zip(pixels, rows, strict=True)]
    exec(compile(code, "own_loop.md", "exec"), {"device": "cpu", "loader": DataLoader(samples, batch_size=8)})
    assert load_student(str(tmp_path / "student"), pretrained=True).num_labels == 10
