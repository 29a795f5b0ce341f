"""What the recipes add to `TrainingArguments`: augmentation, soft labels, optimisers, rates, averaging."""

import dataclasses
import math

import datasets
import pytest
import timm
import torch
from helpers import SMALL_SWIN, settings, small_student, timm_swin
from PIL import Image
from timm.layers import convert_sync_batchnorm
from transformers import TrainingArguments

from scalekd_hf import ScaleKDTrainer, load_student, load_teacher
from scalekd_hf.data.preparation import Preparation
from scalekd_hf.images import ImageSpec
from scalekd_hf.training.model import build_model
from scalekd_hf.training.optimization import decayed_parameters


def trainer_for(folder, train=None, evaluation=None, **changes):
    torch.manual_seed(0)
    return ScaleKDTrainer(small_student(), timm_swin(), settings(folder, **changes), train, evaluation)


def rates(trainer):
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def test_one_process_uses_one_gpu_and_says_how_to_use_all(tmp_path, monkeypatch, caplog):
    prepare = TrainingArguments.__post_init__

    def prepare_where_two_gpus_are_visible(args):
        prepare(args)
        args._n_gpu = 2

    monkeypatch.setattr(TrainingArguments, "__post_init__", prepare_where_two_gpus_are_visible)
    config = settings(tmp_path, per_device_train_batch_size=4)
    assert (config.n_gpu, config.train_batch_size, dataclasses.replace(config).n_gpu) == (1, 4, 1)
    assert "accelerate launch" in caplog.text


def test_random_erasing_puts_noise_in():
    plain = Preparation(ImageSpec((32, 32)), training=True, crop_scale=(1.0, 1.0), hflip=0.0)
    erasing = Preparation(ImageSpec((32, 32)), training=True, crop_scale=(1.0, 1.0), hflip=0.0, random_erasing=1.0)
    row = {"image": Image.new("RGB", (32, 32), (120, 120, 120))}
    changed = (plain(row, 0, 0)["pixel_values"] != erasing(row, 0, 0)["pixel_values"]).float().mean()
    assert 0.01 < changed < 0.4
    assert torch.equal(erasing(row, 0, 0)["pixel_values"], erasing(row, 0, 0)["pixel_values"])


@pytest.mark.parametrize("task_loss", ["cross_entropy", "binary_cross_entropy"])
def test_mixup_and_cutmix_give_soft_labels_to_the_task_loss_and_mixed_images_to_both_models(
    tmp_path, digits, task_loss
):
    options = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "task_loss": task_loss, "label_smoothing_factor": 0.1}
    trainer = trainer_for(tmp_path, digits, max_steps=2, **options)
    seen = []
    trainer.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    trainer.train()
    labels = seen[0]["labels"]
    assert labels.shape == (8, 10) and torch.allclose(labels.sum(1), torch.ones(8))
    assert ((labels > 0).sum(1) > 1).any()


def test_images_without_a_label_may_be_mixed_and_do_not_count(tmp_path):
    pixels, labels = torch.randn(5, 3, 32, 32), [3, -100, 5, 7, -100]
    data = datasets.Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": labels})
    trainer = trainer_for(tmp_path, data, max_steps=2, mixup_alpha=0.8, per_device_train_batch_size=4)
    seen = []
    trainer.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["labels"]), with_kwargs=True)
    trainer.train()
    rows = torch.cat(seen)
    without = (rows == -100).all(1)
    assert (
        len(rows) == 5
        and torch.allclose(rows[~without].sum(1), torch.ones(5)[~without])
        and (rows[~without] >= 0).all()
    )
    assert 2 <= without.sum() <= 4  # each, and what it was mixed with
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])


@pytest.mark.parametrize("rest", [1, 3])
def test_an_odd_batch_at_the_end_of_a_pass_keeps_its_last_image_unmixed(tmp_path, rest):
    pixels, labels = torch.randn(8 + rest, 3, 32, 32), list(range(8 + rest))
    data = datasets.Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": [label % 10 for label in labels]})
    trainer = trainer_for(tmp_path, data, max_steps=4, mixup_alpha=0.8)
    seen = []
    trainer.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    trainer.train()
    assert [len(batch["labels"]) for batch in seen] == [8, rest] * 2
    assert all(batch["labels"][-1].max() == 1 for batch in seen[1::2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixup_alpha": 0.5, "per_device_train_batch_size": 3}, "`per_device_train_batch_size` must be even, got 3"),
        ({"cutmix_alpha": 0.5, "label_column": "none"}, "need a `label_column`"),
        ({"auto_find_batch_size": True}, "`auto_find_batch_size` must be False, got True: the order"),
        ({"lr_by_epoch": True, "lr_scheduler_type": "linear"}, "`lr_by_epoch` is for a cosine, .* is 'linear'"),
        ({"lr_by_epoch": True, "lr_scheduler_type": "cosine", "lr_milestones": [0.5]}, r"`lr_milestones` are \[0.5\]"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)


def test_mixing_needs_class_indices(tmp_path):
    soft = torch.nn.functional.one_hot(torch.arange(8), 10).float()
    data = datasets.Dataset.from_dict({"pixel_values": torch.randn(8, 3, 32, 32).tolist(), "labels": soft.tolist()})
    with pytest.raises(ValueError, match="need class indices"):
        trainer_for(tmp_path, data, mixup_alpha=0.5).train()


def test_a_larger_batch_after_a_resume_trains_the_images_that_are_left(tmp_path, digits):
    stream = digits.to_iterable_dataset()
    options = {
        "max_steps": -1,
        "num_train_epochs": 1,
        "save_strategy": "steps",
        "save_steps": 6,
    }
    trainer_for(tmp_path, stream, **options).train()
    resumed = trainer_for(tmp_path, stream, **options, per_device_train_batch_size=16, allow_data_mismatch=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert (resumed.state.global_step, resumed.loss_log.images_seen) == (6 + 3, 96)


def test_a_checkpoint_with_an_average_is_not_resumed_without(tmp_path, digits):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer_for(tmp_path, digits, ema_decay=0.5, **options).train()
    with pytest.raises(ValueError, match="holds an averaged student: set its `ema_decay` again"):
        trainer_for(tmp_path, digits, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_stochastic_depth_of_the_teacher_is_on_while_the_student_trains(tmp_path):
    teacher = load_teacher(
        "timm/swin_tiny_patch4_window7_224", drop_path=0.5, pretrained=False, num_classes=10, **SMALL_SWIN
    )
    model = ScaleKDTrainer(small_student(), teacher, settings(tmp_path)).model
    assert any(module.training for module in model.train().teacher.modules())
    assert not any(module.training for module in model.eval().teacher.modules())


def test_synchronised_batchnorm_keeps_the_activations_in_norms_of_timm():
    model = timm.create_model("mobilenetv1_100", num_classes=10).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        converted = convert_sync_batchnorm(model)
        assert torch.equal(converted(images), expected)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in converted.modules())


@pytest.mark.parametrize("which", ["student", "all"])
def test_batchnorms_of_the_student_or_of_all_are_synchronised(tmp_path, which):
    student = load_student("timm/resnet18", num_classes=10, channels=(8, 8, 8, 8), image_size=32)
    model = build_model(student, timm_swin(), settings(tmp_path, stem_norm="batch"))
    model.synchronise_batchnorms(which)
    for name, module in model.trained_modules():
        kinds = {type(m) for m in module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
        synchronised = {kind for kind in kinds if issubclass(kind, torch.nn.SyncBatchNorm)}
        assert kinds and synchronised == (kinds if which in (name, "all") else set())


def test_repeated_augmentation_trains(tmp_path, digits):
    trainer = trainer_for(tmp_path, digits, max_steps=2, repeated_augmentation=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_weight_decay_leaves_out_norms_biases_tables_and_queries(tmp_path):
    model = trainer_for(tmp_path).model
    decayed = decayed_parameters(model, decay_all=False)
    left_out = [name for name, _ in model.named_parameters() if name not in decayed]
    for part in ("norm.weight", ".bias", "pos_embed", "queries"):
        assert any(part in name for name in left_out) and not any(name.endswith(part) for name in decayed), part
    assert "heads.last_spatial.attn.q.weight" in decayed
    vit = load_student("timm/vit_tiny_patch16_224", image_size=32, depth=2)
    swin = decayed_parameters(ScaleKDTrainer(timm_swin(), None, settings(tmp_path)).model, decay_all=False)
    assert swin and not any("relative_position_bias_table" in name for name in swin)
    assert {"model.cls_token", "model.pos_embed"}.isdisjoint(decayed_parameters(vit, decay_all=False))
    assert len(decayed_parameters(model, decay_all=True)) == len(list(model.parameters()))


def test_optimisers_of_timm_take_the_betas_and_the_momentum(tmp_path, digits):
    trainer = trainer_for(tmp_path / "1", digits, max_steps=1, timm_optim="lamb", adam_beta2=0.95, weight_decay=0.1)
    trainer.train()
    group = trainer.optimizer.param_groups[0]
    assert type(trainer.optimizer.optimizer).__name__ == "Lamb"
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.95), 0.1)
    trainer = trainer_for(tmp_path / "2", digits, max_steps=1, timm_optim="momentum")
    trainer.train()
    group = trainer.optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.9, False)


@pytest.mark.parametrize(("rule", "expected"), [("linear", 0.01 * 16 / 64), ("sqrt", 0.01 * (16 / 64) ** 0.5)])
def test_the_rate_is_scaled_to_the_global_batch_and_said(tmp_path, digits, caplog, rule, expected):
    options = {"base_batch_size": 64, "lr_scaling": rule, "gradient_accumulation_steps": 2, "learning_rate": 0.01}
    trainer = trainer_for(tmp_path, digits, max_steps=1, lr_scheduler_type="constant", **options)
    trainer.train()
    assert rates(trainer) == pytest.approx([expected])
    assert trainer.args.learning_rate == 0.01
    assert f"The global batch is 16, the learning rate 0.01 is for 64: it is scaled to {expected:g}" in caplog.text


def test_cosine_decay_has_a_floor_and_its_warm_up_a_start(tmp_path, digits):
    options = {"lr_scheduler_type": "cosine_warmup_with_min_lr", "warmup_steps": 3, "learning_rate": 0.1}
    kwargs = {"min_lr": 0.01, "warmup_lr_rate": 0.25}
    trainer = trainer_for(tmp_path, digits, max_steps=10, lr_scheduler_kwargs=kwargs, **options)
    trainer.train()
    assert rates(trainer)[:3] == pytest.approx([0.025, 0.0625, 0.1])
    assert rates(trainer)[-1] == pytest.approx(0.01, abs=1e-3)
    assert rates(trainer)[3:] == sorted(rates(trainer)[3:], reverse=True)


@pytest.mark.parametrize("kind", ["map", "stream", "prepared"])
def test_a_cosine_by_epochs_falls_where_they_begin(tmp_path, digits, kind):
    data = {"map": digits, "stream": digits.to_iterable_dataset()}.get(kind) or [
        {"pixel_values": torch.randn(3, 32, 32), "labels": index % 10} for index in range(96)
    ]
    options = {"lr_scheduler_type": "cosine_warmup_with_min_lr", "lr_by_epoch": True, "learning_rate": 0.1}
    kwargs = {"min_lr": 0.01, "warmup_lr_rate": 0.25}
    length = {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 32, "warmup_steps": 3}
    trainer = trainer_for(tmp_path, data, lr_scheduler_kwargs=kwargs, **options, **length)
    trainer.train()
    half = 0.01 + 0.09 * (1 + math.cos(math.pi / 2)) / 2
    assert rates(trainer) == pytest.approx([0.025, 0.0625, 0.1, 0.1, 0.1, 0.1, half, half, half])


def test_which_names_do_not_decay_can_be_said(tmp_path):
    student = load_student("timm/vit_tiny_patch16_224", image_size=32, depth=4, num_classes=10)
    model = build_model(student, timm_swin(), settings(tmp_path))
    spared = decayed_parameters(model, decay_all=True, no_weight_decay=["pos_embed", "cls_token"])
    names = {name for name, _ in model.named_parameters()}
    assert {name.rpartition(".")[2] for name in names - set(spared)} == {"pos_embed", "cls_token"}
    matrices = decayed_parameters(model, decay_all=False, no_weight_decay=["qkv"])
    assert "heads.penultimate_spatial.queries" in matrices and not any("qkv" in name for name in matrices)


def test_the_rate_falls_to_a_tenth_at_each_milestone(tmp_path, digits):
    trainer = trainer_for(tmp_path, digits, max_steps=10, lr_milestones=[0.3, 0.6, 0.9], learning_rate=0.1)
    trainer.train()
    assert rates(trainer) == pytest.approx([0.1] * 3 + [0.01] * 3 + [0.001] * 3 + [0.0001])


def test_epochs_of_a_stream_are_counted(tmp_path, digits):
    stream = digits.to_iterable_dataset()
    options = {"max_steps": -1, "num_train_epochs": 0.5, "per_device_train_batch_size": 6}
    assert trainer_for(tmp_path, stream, **options).args.max_steps == 8
    assert trainer_for(tmp_path, stream, images_per_epoch=48, **options).args.max_steps == 4


def weights(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def test_the_average_is_evaluated_and_saved_and_resumes_exactly(tmp_path, digits):
    options = {"ema_decay": 0.5, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01}
    whole = trainer_for(tmp_path, digits, digits, **options)
    expected = weights(whole.student.model)

    history = []
    whole.add_callback(
        type(
            "Watch",
            (type(whole.averaged).__mro__[1],),
            {"on_step_end": lambda *_, **__: history.append(weights(whole.student.model))},
        )()
    )
    whole.train()
    for step in history:
        expected = {name: 0.5 * expected[name] + 0.5 * step[name] for name in expected}
    average = weights(whole.averaged.average.module)
    assert all(torch.allclose(average[name], expected[name], atol=1e-6) for name in expected)

    trained = weights(whole.student.model)
    loss = whole.evaluate()["eval_loss"]
    assert all(torch.equal(tensor, trained[name]) for name, tensor in whole.student.model.state_dict().items())
    whole.save_model(str(tmp_path / "final"))
    saved = load_student(str(tmp_path / "final"), pretrained=True)
    assert all(torch.equal(tensor, average[name]) for name, tensor in saved.model.state_dict().items())
    assert ScaleKDTrainer(saved, None, settings(tmp_path / "e"), eval_dataset=digits).evaluate()[
        "eval_loss"
    ] == pytest.approx(loss)

    resumed = trainer_for(tmp_path, digits, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(tensor, trained[name]) for name, tensor in resumed.student.model.state_dict().items())
    again = weights(resumed.averaged.average.module)
    assert all(torch.equal(again[name], average[name]) for name in average)


def test_distillation_without_labels_leaves_the_task_term_out(tmp_path, digits):
    for name, data in (("map", digits), ("stream", digits.to_iterable_dataset())):
        trainer = trainer_for(tmp_path / name, data.remove_columns("label"), label_column="none", max_steps=2)
        trainer.train()
        entry = trainer.state.log_history[0]
        assert "task" not in entry and "logit" in entry and "last_frequency" in entry
    labelled = trainer_for(tmp_path / "labels", digits, label_column="none", max_steps=1)
    labelled.train()
    assert "task" not in labelled.state.log_history[0]


def test_without_labels_and_logits_the_features_teach(tmp_path, digits):
    torch.manual_seed(0)
    args = settings(tmp_path, label_column="none", logit_weight=0.0, max_steps=2)
    trainer = ScaleKDTrainer(small_student(), timm_swin(num_classes=0), args, digits)
    trainer.train()
    assert set(trainer.state.log_history[0]) >= {"penultimate_spatial", "last_frequency"}
    assert not {"task", "logit"} & set(trainer.state.log_history[0])


def test_a_student_by_name_gets_the_classes_of_the_teacher_where_the_data_has_none(tmp_path, digits):
    args = settings(tmp_path, label_column="none", image_size=32, max_steps=1, logit_weight=0.5)
    teacher = load_student(timm_swin())
    from scalekd_hf.models.saving import save_student

    teacher.name_labels(list("abcdefghij"))
    save_student(teacher, tmp_path / "teacher")
    trainer = ScaleKDTrainer("timm/resnet18", str(tmp_path / "teacher"), args, digits)
    assert trainer.student.labels == list("abcdefghij") and trainer.student.num_labels == 10


def test_sync_batchnorm_on_one_process_changes_nothing(tmp_path, digits):
    trainer = trainer_for(tmp_path, digits, sync_batchnorm="all", max_steps=1)
    trainer.train()
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in trainer.model.modules())


def test_taps_may_be_named(tmp_path, digits):
    trainer = trainer_for(tmp_path, digits, student_taps=["stages.1", "stages.2"], max_steps=1)
    trainer.train()
    assert trainer.student.dims == (12, 16)
    with pytest.raises(ValueError, match=r"`student_taps` must name two modules.*\['stages.1', 'nowhere'\].*stages.2"):
        trainer_for(tmp_path / "2", digits, student_taps=["stages.1", "nowhere"])
