"""Plans of every recipe, on the meta device, and of runs that would fail."""

import json
import re

import pytest
import torch
import yaml
from helpers import ROOT, some_slow
from processes import run_script

import scalekd_hf
from scalekd_hf.tools.plan import _SavedBytes
from scalekd_hf.tools.scaling import communication, memory_by_launcher, scaling


RECIPES = {file.stem: file for file in sorted((ROOT / "recipes" / "configs").glob("*_to_*.yaml"))}
SWIN_L, SWIN_B, SWIN_S, EVA_L = 196.53, 87.77, 49.61, 304.14
# Parameters in millions of teacher and student, from the paper's tables; timm's names were counted alike.
PARAMETERS = {
    "swin_l_to_mobilenetv1": (SWIN_L, 4.23),
    "swin_l_to_resnet50": (SWIN_L, 25.56),
    "swin_l_to_resnet50_600_epochs": (SWIN_L, 25.56),
    "swin_l_to_convnext_t": (SWIN_L, 28.59),
    "swin_l_to_swin_t": (SWIN_L, 28.29),
    "swin_l_to_mixer_s": (SWIN_L, 18.53),
    "swin_l_to_mixer_b": (SWIN_L, 59.88),
    "swin_l_to_vit_s": (SWIN_L, 22.05),
    "swin_l_to_vit_b": (SWIN_L, 86.57),
    "eva_l_to_resnet50": (EVA_L, 25.56),
    "eva_l_to_mixer_b14": (EVA_L, 59.88),
    "eva_l_to_vit_b14": (EVA_L, 86.57),
    "eva_l_to_eva02_s": (304.53, 22.15),
    "swin_s_to_resnet50_traditional": (SWIN_S, 25.56),
    "swin_b_to_resnet50_traditional": (SWIN_B, 25.56),
    "swin_l_to_resnet50_traditional": (SWIN_L, 25.56),
    "swin_l_to_mobilenetv1_traditional": (SWIN_L, 4.23),
}
# The tables count EVA-L at 196 px and the 14 px students with 16 px patches. What the run has more, in parameters:
# 16x16 instead of 14x14 position embeddings, smaller patches, larger token mixing (12 blocks, 384 hidden units).
EVA_L_AT_224 = (256 - 196) * 1024
VIT_B_14 = (256 - 196) * 768 - (16**2 - 14**2) * 3 * 768
MIXER_B_14 = 12 * ((256 - 196) * 2 * 384 + (256 - 196)) - (16**2 - 14**2) * 3 * 768
MORE = {
    "eva_l_to_resnet50": (EVA_L_AT_224, 0),
    "eva_l_to_mixer_b14": (EVA_L_AT_224, MIXER_B_14),
    "eva_l_to_vit_b14": (EVA_L_AT_224, VIT_B_14),
}


@pytest.fixture(autouse=True)
def _in_a_clean_checkout(tmp_path, monkeypatch):
    """Recipes alone: a plan looks at `output_dir`, which an earlier run in this checkout may have filled."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(checkout)


def test_every_published_pair_has_a_recipe():
    assert set(RECIPES) == set(PARAMETERS)


@pytest.mark.parametrize("name", some_slow(PARAMETERS, 2))
def test_every_recipe_is_planned_with_the_published_sizes(name):
    plan = scalekd_hf.plan(RECIPES[name], processes=32)
    assert plan.error is None
    for role, published, more in zip(("teacher", "student"), PARAMETERS[name], MORE.get(name, (0, 0)), strict=True):
        assert plan.models[role]["parameters"] / 1e6 - more / 1e6 == pytest.approx(published, abs=0.0101), role
    settings = yaml.safe_load(RECIPES[name].read_text())
    batch = 32 * settings["per_device_train_batch_size"]
    assert plan.schedule["global batch"] == batch
    assert plan.schedule["steps"] == -(-settings["num_train_epochs"] * 1281167 // batch)
    rate = float(settings["learning_rate"]) * batch / settings["base_batch_size"]
    assert plan.schedule["learning rate"] == pytest.approx(rate)
    if "traditional" not in name:
        assert batch == settings["base_batch_size"]
    names = {"penultimate_spatial", "penultimate_frequency", "last_spatial", "last_frequency"}
    left_out = {"last_frequency"} if name == "swin_s_to_resnet50_traditional" else set()
    assert set(plan.projectors) == names - left_out
    assert {row["heads"] for row in plan.projectors.values()} == {
        settings["penultimate_num_heads"],
        settings["last_num_heads"],
    }
    parts = dict(plan.gflops_per_image)
    assert parts.pop("total") == pytest.approx(sum(parts.values()))
    if name in ("swin_l_to_mobilenetv1", "swin_l_to_convnext_t", "swin_l_to_resnet50"):
        # Training costs three times the forward, also with depthwise convolutions.
        assert parts["student"] == pytest.approx(3 * plan.models["student"]["gflops"], rel=0.03)
    if name == "swin_s_to_resnet50_traditional":
        assert parts["teacher forward"] == pytest.approx(17.5, abs=0.1)
        assert parts["student"] == pytest.approx(24, abs=0.5)
        assert plan.models["student"]["penultimate_tap"] == "layer3"
        assert plan.memory_gib["total"] > plan.memory_gib["activations"] > 0


def quickstart(**changes):
    settings = yaml.safe_load((ROOT / "recipes" / "configs" / "quickstart.yaml").read_text())
    return {**settings, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"penultimate_num_heads": 7}, "7 heads for 48 channels"),
        ({"image_size": 8}, "8x8 px"),
        ({"student_args": {**quickstart()["student_args"], "num_classes": 7}}, "100 classes and the student 7"),
        ({"teacher": "timm/resnet81"}, "Did you mean"),
        ({"train_files": "nowhere/*.parquet"}, "No file matches"),
        ({"train_files": None, "eval_files": None}, "There is no data"),
        ({"label_column": "digit"}, "no column 'digit'"),
        ({"mixup_alpha": 0.5, "per_device_train_batch_size": 3}, "must be even"),
        ({"lr_scheduler_type": "cosine_warmup_with_min_lr"}, "min_lr"),
        ({"softmax_scale": 0}, "`softmax_scale` must be positive"),
    ],
)
def test_what_would_fail_is_said(changes, message):
    plan = scalekd_hf.plan(quickstart(**changes))
    assert plan.error is not None and re.search(message, plan.error), plan.error


def test_images_that_the_run_will_count_are_no_failure():
    plan = scalekd_hf.plan(quickstart(max_steps=-1, train_files=None, eval_files=None, dataset="team/data"))
    assert plan.error is None and "steps" not in plan.schedule
    assert any("the run counts the images" in warning for warning in plan.warnings)


def test_the_images_of_a_slice_of_a_local_data_set_are_counted():
    settings = quickstart(max_steps=-1, train_files=None, eval_files=None, dataset=str(ROOT / "recipes/data/numbers"))
    settings |= {"streaming": False, "train_split": "train[:50%]", "eval_split": "test", "num_train_epochs": 2}
    assert scalekd_hf.plan(settings).schedule["images seen"] == 10 * 32  # of 150 images, twice, in whole batches


@pytest.mark.parametrize("streaming", [True, False])
def test_steps_of_a_stream_and_of_a_table_are_counted_as_the_run_counts_them(streaming):
    settings = quickstart(max_steps=-1, num_train_epochs=3, per_device_train_batch_size=200, streaming=streaming)
    assert scalekd_hf.plan(settings).schedule["steps"] == 5  # of 300 images, three times


def test_kept_activations_are_counted_once_and_weights_not_at_all():
    layer = torch.nn.Linear(1000, 1000)
    kept = _SavedBytes(layer)
    x = torch.randn(4, 1000, requires_grad=True)
    with kept:
        layer(torch.relu(layer(x)))
    assert kept.total == 2 * 4 * 1000 * 4  # the input and the output of the ReLU


def test_the_command_prints_a_table_or_json(tmp_path):
    words = ["recipes/distill.py", "recipes/configs/quickstart.yaml", "--output_dir", tmp_path / "run", "--plan"]
    table = run_script(*words, "--plan_processes", "3", "--dataloader_num_workers", "2")
    assert table.returncode == 0, table.stderr[-2000:]
    assert "projectors" in table.stdout and "4 shards for 6 readers" in table.stdout
    result = run_script(*words, "json", "--last_num_heads", "7")
    plan = json.loads(result.stdout)
    assert result.returncode == 1 and "7 heads" in plan["error"]
    assert not (tmp_path / "run").exists()


def test_a_share_of_a_stream_is_refused_in_a_plan_as_in_the_run():
    pair = {
        "student": "timm/resnet18",
        "teacher": "timm/vit_tiny_patch16_224",
        "dataset": "team/photos",
        "eval_split": "0.1",
    }
    assert "set `streaming` to false" in str(scalekd_hf.plan({**pair, "use_cpu": True}).error)
    assert scalekd_hf.plan({**pair, "use_cpu": True, "streaming": False, "logit_weight": 0}).error is None


def test_what_is_sent_and_how_it_scales_follows_from_flops_and_parameters():
    sent = communication(1_000_000, 4)
    assert sent == {"DDP": 0.006, "ZeRO-1, ZeRO-2": 0.006, "ZeRO-3, FSDP2": pytest.approx(0.009)}
    assert communication(1_000_000, 1)["DDP"] == 0
    parts = {"teacher": 8.0, "student and projectors": 4.0, "gradients": 4.0, "optimiser": 8.0, "activations": 16.0}
    assert list(memory_by_launcher(parts, 4).values()) == [40.0, 34.0, 31.0, 28.0, 26.0, 22.0]
    rows = scaling(200.0, 64, 200_000_000)
    assert list(rows) == ["8", "32", "256"] and {row["limit"] for row in rows.values()} == {"computing"}
    assert rows["8"]["images_per_second"] == pytest.approx(8 * 4e14 / 200e9) and rows["256"]["efficiency"] == 1
    large = scaling(200.0, 64, 2_000_000_000)
    assert 1 > large["8"]["efficiency"] > large["32"]["efficiency"] > large["256"]["efficiency"] > 0
    assert {row["limit"] for row in large.values()} == {"network"}
    assert scaling(200.0, 64, 200_000_000, half=False)["8"]["images_per_second"] < rows["8"]["images_per_second"] / 10
    small = scaling(10.0, 256, 1_000_000)["8"]
    assert small["limit"] == "data" and small["cores_per_gpu"] > 16
    assert small["images_per_second"] == pytest.approx(8 * 16 * 520)  # what the cores decode
    assert scaling(200.0, 64, 2_000_000_000, accumulation=8)["256"]["efficiency"] > large["256"]["efficiency"]
