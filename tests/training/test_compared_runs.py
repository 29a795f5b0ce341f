"""Runs that ScaleKD is compared with: other losses, plain feature matching, and soft labels alone with mixed images."""

import pytest
import torch
import yaml
from helpers import ROOT, images, settings, small_student, timm_swin
from trainers import trainer_for

import scalekd_hf
from scalekd_hf.method.heads import FEATURE_TERMS, LINEAR_TERM
from scalekd_hf.method.losses import relational_logit_loss
from scalekd_hf.publishing.model_card import CardFacts, make_card
from scalekd_hf.publishing.provenance import Source
from scalekd_hf.tools.visualize import agreement_maps, draw_agreement
from scalekd_hf.tools.words import read_config
from scalekd_hf.training.model import build_model


LINEAR = {"projector": "linear", "spatial_weight": 0.02, "save_strategy": "steps", "save_steps": 2}
PATIENT = {"logit_weight": 1.0, "mixup_alpha": 0.8, "cutmix_alpha": 1.0}


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_loss": "kd"}, "`logit_loss` must be one of .*'kd'"),
        ({"projector": "mlp"}, "`projector` must be one of .*'mlp'"),
        ({"projector": "linear", "spatial_weight": 0.0}, "`spatial_weight` is 0, which leaves its one term out"),
        ({"logit_loss": "dist", "logit_weight": 0.0}, "`logit_weight` is 0: logits teach nothing"),
        ({"logit_loss": "dist", "per_device_train_batch_size": 1}, "must be at least 2, got 1"),
        ({"mixup_alpha": 0.5, "label_column": "none", "logit_weight": 0.9}, "a `logit_weight` of 1, .*got 0.9"),
    ],
)
def test_what_would_have_no_part_in_the_loss_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)


def test_plain_feature_matching_goes_on_to_the_bit_and_with_no_other_projector(tmp_path, digits, caplog):
    whole = trainer_for(tmp_path / "run", digits, **LINEAR)
    whole.train()
    assert "with `projector` 'linear' `stem_norm` have no effect" in caplog.text and "not ScaleKD" in caplog.text
    assert {"task", "logit", LINEAR_TERM} < set(whole.state.log_history[0])
    resumed = trainer_for(tmp_path / "run", digits, **LINEAR)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same(weights(resumed), weights(whole))
    other = trainer_for(
        tmp_path / "run", digits, **{**LINEAR, "projector": "cross_attention"}, allow_settings_mismatch=True
    )
    with pytest.raises(ValueError, match="projector linear to cross_attention"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    relations = trainer_for(tmp_path / "run", digits, **LINEAR, logit_loss="dist")
    with pytest.raises(ValueError, match="logit_loss kl to dist"):
        relations.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_the_maps_of_plain_feature_matching_are_told_and_drawn(tmp_path):
    model = trainer_for(tmp_path, **LINEAR).model
    maps = agreement_maps(model, images())
    assert list(maps) == [LINEAR_TERM] and maps[LINEAR_TERM].shape == (2, *model.teacher.grid)
    draw_agreement(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), maps, maps, tmp_path / "maps.png")
    assert (tmp_path / "maps.png").stat().st_size > 1000


def test_soft_labels_alone_need_no_labels_and_learn_the_same_without(tmp_path, digits):
    students = []
    for column in ("label", "none"):
        trainer = trainer_for(tmp_path / column, digits, **PATIENT, label_column=column)
        begun, seen = weights(trainer), []
        trainer.model.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(kwargs), with_kwargs=True
        )
        trainer.train()
        assert {"task", *(set(seen[0]) - {"pixel_values"})} == ({"task", "labels"} if column == "label" else {"task"})
        assert "task" not in trainer.state.log_history[0] and "logit" in trainer.state.log_history[0]
        assert any(not torch.equal(begun[name], tensor) for name, tensor in weights(trainer).items())
        students.append((weights(trainer), seen[0]["pixel_values"]))
    (first, mixed), (second, mixed_alike) = students
    assert_same(first, second)
    plain = trainer_for(tmp_path / "plain", digits, logit_weight=1.0, label_column="none")
    plain.model.register_forward_pre_hook(lambda _, args, kwargs: students.append(kwargs), with_kwargs=True)
    plain.train()
    assert torch.equal(mixed, mixed_alike) and not torch.equal(mixed, students[2]["pixel_values"])


def quickstart(**changes):
    given = yaml.safe_load((ROOT / "recipes/configs/quickstart.yaml").read_text(encoding="utf-8"))
    return {**given, "use_cpu": True, "baseline": False, **changes}


def test_a_plan_counts_a_linear_projector_and_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    plan = scalekd_hf.plan(quickstart(projector="linear", spatial_weight=0.02, logit_loss="dist"))
    assert plan.error is None and list(plan.projectors) == [LINEAR_TERM]
    row, student, teacher = plan.projectors[LINEAR_TERM], plan.models["student"], plan.models["teacher"]
    inner, outer = student["last_dim"], teacher["last_dim"]
    cells = teacher["last_grid"][0] * teacher["last_grid"][1]
    assert row["parameters"] == inner * outer + outer and row["heads"] is None
    assert row["gflops"] == pytest.approx(2 * cells * inner * outer / 1e9)
    assert plan.gflops_per_image["projectors"] == pytest.approx(3 * row["gflops"])
    assert sum("not ScaleKD" in warning or "another method" in warning for warning in plan.warnings) == 2
    assert not any("heads are chosen" in note for note in plan.notes)
    assert "last_linear" in plan.to_text()


@pytest.mark.parametrize(
    ("changed", "said", "left_out"),
    [
        ({}, "with [ScaleKD]", "not with ScaleKD"),
        ({"projector": "linear"}, "plain feature matching, not with ScaleKD,", "with [ScaleKD]"),
        ({"spatial_weight": 0.0, "frequency_weight": 0.0}, "logits alone, not with ScaleKD,", "with [ScaleKD]"),
        ({"spatial_weight": 0.0}, "with [ScaleKD]", "not with ScaleKD"),
        ({"logit_loss": "dist"}, "that of DIST", "not with ScaleKD"),
    ],
)
def test_a_card_says_what_is_not_scalekd(changed, said, left_out):
    text = make_card(CardFacts("me/small", "timm", Source("s"), 1, 10, teacher=Source("t"), settings=changed)).text
    assert said in text and left_out not in text


@pytest.mark.parametrize(
    ("name", "terms", "weight", "temperature"),
    [
        ("logits_t4", {"logit"}, 0.5, 4),
        ("dist", {"logit"}, 0.5, 1),
        ("patient", {"logit"}, 1, 1),
        ("features", {"logit", LINEAR_TERM}, 0.5, 1),
        ("scalekd_dist", {"logit", *FEATURE_TERMS}, 0.5, 1),
    ],
)
def test_the_files_to_compare_with_are_what_they_say(tmp_path, name, terms, weight, temperature):
    config = settings(tmp_path, **read_config(ROOT / "recipes" / "configs" / "compared" / f"{name}.yaml"))
    model = build_model(small_student(), timm_swin(), config).train()
    assert {*model.weights} == {"task", *terms} and model.temperature == temperature
    assert (model.weights["task"], model.weights["logit"]) == (1 - weight, weight)
    assert (model.logit_loss is relational_logit_loss) == ("dist" in name) and bool(config.mixup_alpha) == (
        weight == 1
    )
    assert {*model(images(4), torch.arange(4)).losses} == terms | ({"task"} if weight < 1 else set())
