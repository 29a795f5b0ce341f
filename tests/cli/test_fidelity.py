"""The recipes against what the authors ran: every difference is one that docs/recipes.md lists."""

import fnmatch
import inspect
import math
import re

import pytest
import timm.optim
import torch
from authors import AS_RUN
from helpers import ROOT, some_slow
from torch import nn

from scalekd_hf import load_student, load_teacher
from scalekd_hf.tools.recipe import DistillArguments, parse_config
from scalekd_hf.training.backbones import logit_weight_of
from scalekd_hf.training.model import asked_images


CONFIGS = ROOT / "recipes" / "configs"
SHALLOW = {  # real widths, few blocks
    "timm/resnet50": {"layers": (1, 1, 1, 1)},
    "timm/convnext_tiny": {"depths": (1, 1, 1, 1)},
    "timm/swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1)},
    "timm/mobilenetv1_100": {},
    "timm/mixer": {},
    "timm/vit": {"depth": 1},
    "timm/eva02": {"depth": 1},
}
OPTIMIZERS = {"momentum": "SGD", "lamb": "Lamb", None: "AdamW"}
TEACHERS = {}


def read(name, tmp_path, *words):
    return parse_config(
        DistillArguments, [str(CONFIGS / f"{name}.yaml"), *words, "--output_dir", str(tmp_path), "--use_cpu"]
    )


def only(values):
    assert len(values) <= 1, values
    return next(iter(values), None)


def body(student):
    """What the authors' facts say of a body, of ours."""
    modules = list(student.model.modules())
    kinds = {type(module).__name__ for module in modules} & {"ReLU", "ReLU6", "GELU", "SiLU"}
    after = [getattr(student.model, "fc_norm", None), getattr(getattr(student.model, "head", None), "norm", None)]
    inner = getattr(getattr(student.model.blocks[0], "mlp", None), "norm", None) if "eva" in student.name else None
    return {
        "drop path": student.classifier.model_args.get("drop_path_rate", 0),
        "activation": only(kinds),
        "norms after pooling": sum(isinstance(module, nn.LayerNorm) for module in after),
        "gated MLP's norm": type(inner).__name__ if inner is not None else None,
        "LayerNorm's epsilon": only({module.eps for module in modules if isinstance(module, nn.LayerNorm)}),
        "classifier's initial std": student.model.get_classifier().weight.std().item(),
    }


def teacher_of(arguments, config):
    """The teacher of a recipe, on no device; one for all recipes that have the same."""
    options = {
        "drop_path": config.teacher_drop_path,
        "image_size": config.teacher_image_size,
        **arguments.teacher_args,
    }
    key = arguments.teacher, str(options)
    if key not in TEACHERS:
        with torch.device("meta"):
            TEACHERS[key] = load_teacher(arguments.teacher, pretrained=False, **options)
    return TEACHERS[key]


def ours(name, tmp_path):
    """What our recipe comes to, by the names of the authors' facts."""
    arguments, config = read(name, tmp_path)
    options = {"image_size": config.image_size, "labels": [str(label) for label in range(1000)]}
    shallow = next(value for key, value in SHALLOW.items() if arguments.student.startswith(key))
    torch.manual_seed(0)
    student = load_student(arguments.student, **{**options, **arguments.student_args, **shallow})
    teacher = teacher_of(arguments, config)
    spec = asked_images(student, config)
    schedule = config.lr_scheduler_kwargs or {}
    optimizer = OPTIMIZERS[config.timm_optim]
    epsilon = {"AdamW": config.adam_epsilon, "SGD": None}
    if optimizer == "Lamb":
        epsilon["Lamb"] = inspect.signature(timm.optim.get_optimizer_class("lamb", False)).parameters["eps"].default
    return {
        **vars(config),
        **body(student),
        "logit_weight": logit_weight_of(config, student, teacher),
        "student": arguments.student,
        "teacher": arguments.teacher,
        "heads": (config.penultimate_num_heads, config.last_num_heads),
        "optimizer": optimizer,
        "optimizer's epsilon": epsilon[optimizer],
        "warm-up epochs": round(config.warmup_steps * config.num_train_epochs, 2),
        "warm-up from": schedule.get("warmup_lr_rate"),
        "lowest rate": schedule.get("min_lr", 0),
        "image size": spec.size[0],
        "teacher image size": teacher.spec.size[0],
        "student's normalisation": {"mean": spec.mean, "std": spec.std},
        "teacher's normalisation": {"mean": teacher.spec.mean, "std": teacher.spec.std},
        "interpolation": spec.interpolation,
        "antialias": spec.antialias,
        "shorter side in evaluation": math.floor(spec.size[0] / spec.crop_pct),
    }


def shown(value):
    return f"{value:.2g}" if isinstance(value, float) and abs(value) < 0.1 else str(value)


def same(first, second):
    if isinstance(first, (int, float)) and isinstance(second, (int, float)):
        return second == pytest.approx(first, rel=1e-4 if first != 0.02 else 0.02)
    return first == second


def listed():
    """The rows of the page: recipes, setting, theirs, ours."""
    text = (ROOT / "docs" / "recipes.md").read_text().partition("### Known differences")[2].partition("\n## ")[0]
    text = text.partition("| recipes |")[2]
    rows = [
        [cell.strip() for cell in line.strip("| \n").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    for recipes, setting, theirs, own, why in rows[1:]:
        patterns = re.findall(r"`([^`]+)`", recipes) or ["*"]
        names = [name for name in AS_RUN if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        assert names and why, recipes
        for name in names:
            yield name, setting.strip("`"), theirs.strip("`"), own.strip("`")


def test_every_pair_of_the_authors_has_a_recipe():
    assert {file.stem for file in CONFIGS.glob("*_to_*.yaml")} == set(AS_RUN)


@pytest.mark.parametrize("name", some_slow(AS_RUN, 9))
def test_every_difference_from_what_the_authors_ran_is_listed(name, tmp_path):
    found = ours(name, tmp_path)
    different = {
        key: (shown(theirs), shown(found[key])) for key, theirs in AS_RUN[name].items() if not same(theirs, found[key])
    }
    on_the_page = {setting: (theirs, own) for row, setting, theirs, own in listed() if row == name}
    assert {key: value for key, value in on_the_page.items() if key in AS_RUN[name]} == different


@pytest.mark.parametrize("name", AS_RUN)
def test_the_batch_is_that_of_the_rate_on_the_authors_machines(name, tmp_path):
    _, config = read(name, tmp_path)
    processes = 8 if name.endswith("traditional") else 32
    assert config.per_device_train_batch_size * processes == config.base_batch_size


def test_first_lines_say_what_a_recipe_is():
    for name in AS_RUN:
        first = (CONFIGS / f"{name}.yaml").read_text().splitlines()[0]
        assert ": as run by the authors (arXiv 2411.06786)" in first


def test_what_we_recommend_is_a_file_of_its_own_and_wins(tmp_path):
    _, theirs = read("swin_l_to_resnet50", tmp_path)
    _, recommended = read("swin_l_to_resnet50", tmp_path, str(CONFIGS / "recommended.yaml"), "--bf16", "false")
    changed = ("teacher_drop_path", "lr_by_epoch")
    assert [getattr(theirs, name) for name in changed] == [0.1, True]
    assert [getattr(recommended, name) for name in changed] == [0, False]
    kept = {name: value for name, value in vars(theirs).items() if name in AS_RUN["swin_l_to_resnet50"]}
    assert all(getattr(recommended, name) == value for name, value in kept.items() if name not in changed)
