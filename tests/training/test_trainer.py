"""Training: what changes, what is logged, what is equal to what, and what is refused."""

import json
import math

import datasets
import pytest
import torch
from helpers import RECOMPUTE, SMALL_SWIN, build, settings, small_student, timm_swin, timm_vit, transformers_vit
from processes import in_processes
from trainers import trainer_for
from transformers import Dinov2Config
from two_steps import main as two_steps

from scalekd_hf import NonFiniteLossError, ScaleKDTrainer, load_student, load_teacher
from scalekd_hf.data.preparation import collate
from scalekd_hf.images import Normaliser
from scalekd_hf.method.distiller import LOSS_TERMS


def weights(trainer):
    return {name: tensor.detach().clone() for name, tensor in trainer.student.state_dict().items()}


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name].float() - second[name].float()).abs().max().item() for name in first)


@pytest.mark.parametrize("teacher", ["swin", "vit"])
def test_training_changes_all_of_student_and_heads_and_nothing_of_the_teacher(tmp_path, digits, teacher):
    trainer = trainer_for(tmp_path, digits, teacher=teacher)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    taught = {name: tensor.clone() for name, tensor in trainer.model.teacher.state_dict().items()}
    trainer.train()
    assert not any(name.startswith("teacher.") for name in before)
    for name, tensor in trainer.model.state_dict().items():
        assert "relative_position_index" in name or not torch.equal(tensor, before[name]), name
    for name, tensor in trainer.model.teacher.state_dict().items():
        assert torch.equal(tensor, taught[name]), name
    optimised = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert not optimised & {id(parameter) for parameter in trainer.model.teacher.parameters()}


def test_the_log_holds_each_term_averaged_since_the_last_log(tmp_path, digits):
    every = trainer_for(tmp_path / "1", digits, max_steps=4, logging_steps=1)
    every.train()
    second = trainer_for(tmp_path / "2", digits, max_steps=4, logging_steps=2, gradient_accumulation_steps=1)
    second.train()
    ones = [entry for entry in every.state.log_history if "loss" in entry]
    twos = [entry for entry in second.state.log_history if "loss" in entry]
    assert [entry["images_seen"] for entry in ones] == [8, 16, 24, 32]
    assert [entry["images_seen"] for entry in twos] == [16, 32]
    for name in (*LOSS_TERMS, "loss"):
        assert twos[0][name] == pytest.approx((ones[0][name] + ones[1][name]) / 2, rel=1e-4), name
    weights = every.model.weights
    assert ones[0]["loss"] == pytest.approx(sum(weights[name] * ones[0][name] for name in weights), rel=1e-4)
    assert all(entry["images_per_second"] > 0 for entry in ones)


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_resuming_a_finished_run_trains_nothing_more_and_keeps_the_best(tmp_path, digits, digits_stream, kind):
    data = digits if kind == "map" else digits_stream
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    finished = trainer_for(tmp_path, data, digits, **options)
    finished.train()
    assert not finished.state.best_model_checkpoint.endswith("checkpoint-3")
    again = trainer_for(tmp_path, data, digits, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert largest_difference(weights(finished), weights(again)) == 0


def test_resuming_with_other_data_settings_is_refused_unless_accepted(tmp_path, digits_stream):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer_for(tmp_path, digits_stream, **options).train()
    checkpoint, options["max_steps"] = str(tmp_path / "checkpoint-2"), 4
    for changes, message in (
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size 8 to 4"),
        ({"seed": 7}, "seed 42 to 7"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 1 to 2"),
        ({"dataloader_num_workers": 1}, "dataloader_num_workers 0 to 1"),
    ):
        changed = options | changes
        with pytest.raises(ValueError, match=f"other settings of the data: {message}.*`allow_data_mismatch=True`"):
            trainer_for(tmp_path, digits_stream, **changed).train(resume_from_checkpoint=checkpoint)
        accepted = trainer_for(tmp_path, digits_stream, **changed, allow_data_mismatch=True)
        accepted.train(resume_from_checkpoint=checkpoint)
        assert accepted.state.global_step == 4 and accepted.loss_log.images_seen > 16


def test_the_collator_of_the_user_makes_the_batches_of_a_stream(tmp_path, digits_stream):
    calls = []

    def collator(samples):
        calls.append(len(samples))
        return collate(samples)

    trainer = ScaleKDTrainer(small_student(), None, settings(tmp_path), digits_stream, data_collator=collator)
    trainer.train()
    assert calls[:4] == [8, 8, 8, 8]


def test_transforms_of_the_user_are_kept(tmp_path, digits):
    def transform(batch):
        batch["pixel_values"] = [torch.full((3, 32, 32), 7.0) for _ in batch["image"]]
        return batch

    trainer = trainer_for(tmp_path, digits.with_transform(transform), max_steps=1)
    seen = []
    trainer.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    trainer.train()
    assert (seen[0]["pixel_values"] == 7.0).all() and seen[0]["labels"].shape == (8,)


def test_students_with_parameters_that_nothing_depends_on_have_them_frozen(tmp_path, digits):
    config = Dinov2Config(
        image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, num_labels=10
    )
    trainer = ScaleKDTrainer(build(config), timm_swin(), settings(tmp_path), digits)
    trainer.model.train()(torch.randn(2, 3, 32, 32), torch.tensor([1, 2])).loss.backward()
    without = [name for name, p in trainer.model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert not trainer.student.model.dinov2.embeddings.mask_token.requires_grad


def test_accumulating_two_by_four_equals_one_by_eight(tmp_path, digits):
    results = []
    for batch, accumulation in ((8, 1), (4, 2)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
        trainer = trainer_for(tmp_path / str(batch), digits, max_steps=2, learning_rate=0.1, **options)
        trainer.train()
        results.append((weights(trainer), trainer.state.log_history[0]))
    assert largest_difference(results[0][0], results[1][0]) < 1e-6
    for name in (*LOSS_TERMS, "loss"):
        assert results[0][1][name] == pytest.approx(results[1][1][name], rel=1e-5), name


def test_mixed_precision_clipping_and_label_smoothing_train(tmp_path, digits):
    trainer = trainer_for(tmp_path, digits, bf16=True, max_grad_norm=0.1, label_smoothing_factor=0.1)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    assert trainer.model.label_smoothing == 0.1
    assert all(tensor.dtype == torch.float32 for tensor in trainer.student.parameters())


@pytest.mark.parametrize("student", ["convnext", "transformers"])
def test_recomputed_activations_give_the_same_run(tmp_path, digits, student):
    logs = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = small_student() if student == "convnext" else transformers_vit()
        options = {RECOMPUTE: recompute, "gradient_accumulation_steps": 2, "bf16": True, "max_steps": 3}
        trainer = ScaleKDTrainer(model, timm_swin(), settings(tmp_path / str(recompute), **options), digits)
        calls = []
        trainer.student.model.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        inner = trainer.student.model.stages[2].blocks[0] if student == "convnext" else None
        if inner is not None:
            inner.register_forward_pre_hook(lambda *_: calls.append(2))  # noqa: B023
        trainer.train()
        if inner is not None:
            assert calls.count(2) == calls.count(1) * (2 if recompute else 1)
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


@pytest.mark.slow
def test_torch_compile_gives_the_same_losses(tmp_path, digits):
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        options = {"teacher": timm_vit(depth=3), "teacher_perception": False, "frequency_weight": 0.0, "max_steps": 2}
        options |= {"student": small_student(depths=(1, 1, 1, 1)), "torch_compile": compiled}
        trainer = trainer_for(tmp_path / str(compiled), digits, **options)
        trainer.train()
        trainer.save_model()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_two_processes_take_the_same_step_as_one(tmp_path):
    logs = []
    for processes, batch in ((1, 8), (2, 4)):
        folder = tmp_path / str(processes)
        for outcome in in_processes(folder, two_steps, str(folder), str(batch), processes=processes):
            assert outcome.status == 0, outcome.text[-3000:]
        logs.append(json.loads((folder / "log.json").read_text()))
    one, two = logs
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert two["distributed_type"] == "MULTI_CPU"
    for first, second in zip(one["history"], two["history"], strict=True):
        assert first["images_seen"] == second["images_seen"]
        for name in (*LOSS_TERMS, "loss"):
            assert first[name] == pytest.approx(second[name], rel=1e-5), name
    assert one["weights"] == pytest.approx(two["weights"], rel=1e-5, abs=1e-7)
    assert two["equal_on_all_ranks"] and two["averaged_buffers_equal"]
    assert one["evaluated"] == two["evaluated"] and [len(labels) for labels in one["evaluated"].values()] == [96, 180]


class DivergingTeacher(torch.nn.Module):
    """Replaces a teacher's head: logits that are not a number after some good batches."""

    def __init__(self, head, good_batches):
        super().__init__()
        self.head, self.good_batches = head, good_batches

    def forward(self, x, **options):
        self.good_batches -= 1
        return self.head(x, **options) * (float("nan") if self.good_batches < 0 else 1.0)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, digits):
    teacher = load_teacher(timm_swin())
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "logging_steps": 100}
    trainer = trainer_for(tmp_path, digits, teacher=teacher, **options)
    teacher.model.head = DivergingTeacher(teacher.model.head, good_batches=3)
    with pytest.raises(
        NonFiniteLossError, match=r"step 4: task=[\d.]+, logit=nan, penultimate_spatial=[\d.]+.*checkpoint-2"
    ):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    kept = load_student(str(tmp_path / "checkpoint-2"), pretrained=True)
    assert all(torch.isfinite(tensor).all() for tensor in kept.state_dict().values())


def test_a_student_alone_trains_with_the_task_loss(tmp_path, digits):
    trainer = ScaleKDTrainer(small_student(), None, settings(tmp_path), digits)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["task"] == pytest.approx(entry["loss"], rel=1e-5) and "logit" not in entry


def test_models_may_be_names_and_data_may_be_finished_samples(tmp_path):
    teacher = tmp_path / "teacher"
    from scalekd_hf.models.saving import save_student

    save_student(load_student("timm/swin_tiny_patch4_window7_224", labels=list("ab"), **SMALL_SWIN), teacher)
    images = torch.randn(8, 3, 32, 32)
    data = datasets.Dataset.from_dict({"pixel_values": images.tolist(), "labels": [0, 1] * 4})
    args = settings(tmp_path / "run", image_size=32, max_steps=1)
    model = load_student("timm/vit_tiny_patch16_224", labels=list("ab"), image_size=32, patch_size=8, depth=2)
    trainer = ScaleKDTrainer(model, str(teacher), args, data, data)
    trainer.train()
    assert "eval_top1" in trainer.evaluate()
    assert trainer.model.teacher.labels == ["a", "b"]


def test_a_different_normalisation_and_size_are_converted_on_the_device():
    from scalekd_hf.images import ImageSpec

    student = ImageSpec((32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    images = torch.rand(2, 3, 32, 32)

    def normalised(spec):
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
        return (images - mean) / std

    other = ImageSpec((32, 32), (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert torch.allclose(Normaliser(student, other).for_teacher(normalised(student)), normalised(other), atol=1e-6)
    assert Normaliser(student, student).for_teacher(images) is images
    larger = ImageSpec((48, 64), student.mean, student.std)
    assert Normaliser(student, larger).for_teacher(images).shape == (2, 3, 48, 64)


def test_a_teacher_with_other_labels_teaches_through_features(tmp_path, digits):
    trainer = trainer_for(tmp_path, digits, teacher=timm_swin(num_classes=7), logit_weight=0.0, max_steps=1)
    trainer.train()
    assert "logit" not in trainer.state.log_history[0] and "task" in trainer.state.log_history[0]


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_channels_last_takes_pixels_too(tmp_path, digits, digits_stream, kind):
    data = digits if kind == "map" else digits_stream
    trainer = trainer_for(tmp_path, data, digits, channels_last=True, max_steps=1, mixup_alpha=0.5)
    seen = []
    trainer.student.model.register_forward_pre_hook(lambda _, args: seen.append((trainer.distiller.training, args[0])))
    trainer.train()
    trainer.evaluate()
    assert {training for training, _ in seen} == {True, False}
    assert all(pixels.is_contiguous(memory_format=torch.channels_last) for _, pixels in seen)


def test_a_schedule_that_is_given_late_is_taken(tmp_path, digits):
    trainer = trainer_for(tmp_path, digits, max_steps=2, lr_milestones=[0.5])
    trainer.create_optimizer()
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 0.125)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.000125] * 2)


def test_a_second_training_makes_its_milestones_anew(tmp_path, digits):
    trainer = trainer_for(tmp_path, digits, max_steps=2, lr_milestones=[0.5])
    for _ in range(2):
        trainer.train()
        rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
        assert rates == pytest.approx([1e-3, 1e-4])


class OtherLoss(ScaleKDTrainer):
    """A user's own loss, as for any `Trainer`."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = 2 * outputs.loss
        return (loss, {"loss": loss, "logits": outputs.logits}) if return_outputs else loss


def test_a_loss_of_the_user_counts_images_all_the_same(tmp_path, digits):
    options = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 32}
    options |= {"eval_strategy": "epoch", "save_strategy": "epoch"}
    trainer = OtherLoss(small_student(), timm_swin(), settings(tmp_path, **options), digits, digits.select(range(9)))
    trainer.train()
    assert trainer.loss_log.images_seen == 2 * 96 and trainer.state.epoch == 2
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert json.loads((tmp_path / "checkpoint-3" / "scalekd_state.json").read_text())["images_seen"] == 96
