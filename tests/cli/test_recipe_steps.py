"""Two real optimiser steps of every recipe, its models made small; and two recipes at full size, one step each."""

import dataclasses
import math

import datasets
import pytest
import torch
import yaml
from helpers import ROOT, some_slow

from scalekd_hf import ScaleKDTrainer, load_student, load_teacher
from scalekd_hf.tools.recipe import DistillArguments, parse_config


RECIPES = {file.stem: file for file in sorted((ROOT / "recipes" / "configs").glob("*_to_*.yaml"))}
LABELS = list("0123456789")
SMALL_TRANSFORMER = {"embed_dim": 48, "depth": 4, "num_heads": 2}
SMALL = {
    "swin": {"patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]},
    "eva": SMALL_TRANSFORMER,
    "vit": SMALL_TRANSFORMER,
    "resnet50": {"layers": [1, 1, 2, 1], "channels": [8, 16, 24, 32]},
    "convnext": {"depths": [1, 1, 2, 1], "dims": [8, 12, 16, 24]},
    "mixer_b14": {"num_blocks": 4, "embed_dim": 24},
    "mixer": {},
    "mobilenetv1": {},
}


def small(name):
    key = name.removeprefix("timm/")
    return next(changes for prefix, changes in SMALL.items() if key.startswith(prefix))


def parse(name, folder, *words):
    words = ["--output_dir", str(folder), "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", *words]
    return parse_config(DistillArguments, [str(RECIPES[name]), *words])


@pytest.mark.parametrize("name", some_slow(RECIPES, 5))
def test_two_steps_of_every_recipe_with_small_models(name, tmp_path, digits):
    patch14 = "14" in name or "eva" in name
    size = 56 if patch14 else 64
    batch = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--save_strategy", "no"]
    teacher_size = ["--teacher_image_size", str(size)] if "teacher_image_size" in RECIPES[name].read_text() else []
    arguments, config = parse(name, tmp_path, *batch, "--image_size", str(size), *teacher_size)
    settings = yaml.safe_load(RECIPES[name].read_text())
    teacher = load_teacher(
        arguments.teacher,
        pretrained=False,
        drop_path=config.teacher_drop_path,
        image_size=size,
        num_classes=10,
        **{**small(arguments.teacher), **arguments.teacher_args},
    )
    student_args = {**small(arguments.student), **arguments.student_args}
    student_args.pop("num_classes", None)
    student = load_student(arguments.student, labels=LABELS, image_size=size, **student_args)
    torch.manual_seed(0)
    trainer = ScaleKDTrainer(student, teacher, config, digits, digits.select(range(8)))
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()

    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(math.isfinite(entry["loss"]) for entry in logs)
    weights = trainer.model.weights
    assert logs[0]["loss"] == pytest.approx(
        sum(weights[term] * logs[0][term] for term in weights if term in logs[0]), rel=1e-4
    )
    assert ("logit" in logs[0]) == ("logit_weight" not in settings)
    moved = [key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])]
    assert moved and not any(key.startswith("teacher.") for key in moved)
    assert any(key.startswith("student.") for key in moved) and any(key.startswith("heads.") for key in moved)
    optimiser = type(trainer.optimizer.optimizer).__name__
    assert optimiser == {"lamb": "Lamb", "momentum": "SGD", None: "AdamW"}[settings.get("timm_optim")]
    assert "eval_top1" in trainer.evaluate()
    trainer.save_model()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_s_to_resnet50_traditional", "eva_l_to_vit_b14"])
def test_one_step_at_full_size(name, tmp_path, digits):
    words = ["--max_steps", "1", "--per_device_train_batch_size", "1", "--logging_steps", "1", "--save_strategy", "no"]
    arguments, config = parse(name, tmp_path, *words, "--mixup_alpha", "0", "--cutmix_alpha", "0")  # they need pairs
    size = {"image_size": config.teacher_image_size} if config.teacher_image_size else {}
    teacher = load_teacher(arguments.teacher, pretrained=False, drop_path=config.teacher_drop_path, **size)
    labels = [str(index) for index in range(1000)]
    student = load_student(arguments.student, labels=labels, **arguments.student_args)
    data = digits.cast_column("label", datasets.ClassLabel(names=labels))
    trainer = ScaleKDTrainer(student, teacher, dataclasses.replace(config), data)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    assert all(parameter.grad is None for parameter in teacher.parameters())
