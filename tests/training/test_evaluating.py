"""Evaluations and predictions: of whom, on what, and how often."""

import time

import datasets
import pytest
import torch
from helpers import settings
from processes import in_child
from trainers import trainer_for

from scalekd_hf import ScaleKDTrainer


def test_evaluation_reports_top1_and_top5_of_the_student_alone(tmp_path, digits):
    trainer = trainer_for(tmp_path, evaluation=digits)
    trainer.model.teacher.forward = None  # would fail if called
    metrics = trainer.evaluate()
    batch = trainer.data_collator([trainer.eval_dataset[row] for row in range(len(digits))])
    with torch.no_grad():
        images = trainer.feed.evaluation_inputs(dict(batch))["pixel_values"]
        ranked = trainer.student.model.eval()(images).topk(5).indices
    hits = ranked == batch["labels"][:, None]
    assert metrics["eval_top1"] == pytest.approx(hits[:, 0].float().mean().item())
    assert metrics["eval_top5"] == pytest.approx(hits.any(1).float().mean().item())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_evaluated_on_every_image_once(tmp_path, digits_stream, workers):
    trainer = trainer_for(tmp_path, dataloader_num_workers=workers, per_device_eval_batch_size=100)
    prediction = trainer.predict(digits_stream)
    expected = [row["label"] for row in digits_stream.remove_columns("image")]
    assert prediction.label_ids.tolist() == expected and len(expected) == 1437


def test_several_data_sets_are_evaluated_each_on_its_own_images(tmp_path, digits):
    def evaluate():
        data = {"a": digits, "b": digits.select(range(10))}
        options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
        trainer = trainer_for(tmp_path, evaluation=data, **options)
        metrics = trainer.evaluate()
        assert metrics["eval_a_loss"] != metrics["eval_b_loss"]
        assert len(trainer.predict(data["b"]).label_ids) == 10

    outcome = in_child(tmp_path, evaluate)  # its workers end with it
    assert outcome.status == 0, outcome.text[-3000:]


@pytest.mark.slow
def test_evaluating_does_not_slow_the_images_per_second_down(tmp_path, digits):
    trainer = trainer_for(tmp_path, digits, digits, eval_strategy="steps", eval_steps=1, logging_steps=4)
    slow = trainer.compute_metrics

    def metrics(prediction):
        time.sleep(1.0)
        return slow(prediction)

    trainer.compute_metrics = metrics
    trainer.train()
    rate = next(entry["images_per_second"] for entry in trainer.state.log_history if "loss" in entry)
    assert rate > 16  # 32 images in far less than the three seconds of evaluation before the log


def test_evaluation_in_bfloat16_runs(tmp_path, digits):
    assert "eval_top1" in trainer_for(tmp_path, evaluation=digits, bf16_full_eval=True).evaluate()


def test_prediction_needs_no_labels(tmp_path, digits):
    prediction = trainer_for(tmp_path).predict(digits.remove_columns("label"))
    assert prediction.predictions.shape == (96, 5) and prediction.label_ids is None


def test_soft_labels_are_evaluated_by_their_largest(tmp_path):
    images = torch.randn(8, 3, 32, 32)
    soft = torch.nn.functional.one_hot(torch.arange(8), 10).float() * 0.9 + 0.01
    data = datasets.Dataset.from_dict({"pixel_values": images.tolist(), "labels": soft.tolist()})
    hard = data.remove_columns("labels").add_column("labels", list(range(8)))
    trainer = trainer_for(tmp_path)
    assert trainer.evaluate(data)["eval_top1"] == trainer.evaluate(hard)["eval_top1"]


def test_the_best_model_is_loaded_at_the_end(tmp_path, digits):
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 0.05}
    trainer = trainer_for(tmp_path, digits, digits, **options)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses.index(min(losses)) + 1 == int(trainer.state.best_model_checkpoint.rsplit("-", 1)[1])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_an_evaluation_set_in_a_dict_tells_a_student_its_classes(tmp_path, digits):
    options = {"image_size": 32, "max_steps": 1}
    trainer = ScaleKDTrainer("timm/resnet10t", None, settings(tmp_path, **options), eval_dataset={"digits": digits})
    assert trainer.student.labels == list("0123456789") and trainer.student.num_labels == 10


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kind", ["map", "stream"])
def test_workers_of_an_evaluation_stay_where_they_are_asked_to(tmp_path, digits, digits_stream, several, kind):
    def evaluate():
        data = digits if kind == "map" else digits_stream.take(96)
        options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
        evaluation = {"a": data, "b": data.take(40)} if several else data
        trainer = trainer_for(tmp_path, evaluation=evaluation, **options)
        loaders, loop = [], trainer.evaluation_loop
        trainer.evaluation_loop = lambda loader, *args, **kwargs: (
            loaders.append(loader) or loop(loader, *args, **kwargs)
        )
        first, second = trainer.evaluate(), trainer.evaluate()
        half = len(loaders) // 2
        assert half == 1 + several and [id(loader) for loader in loaders[:half]] == [id(x) for x in loaders[half:]]
        assert len({id(loader) for loader in loaders}) == half
        accuracies = [name for name in first if name.endswith("top1")]
        assert len(accuracies) == half and all(first[name] == second[name] for name in accuracies)
        assert trainer.predict(data.take(10)).label_ids.shape == (10,)

    outcome = in_child(tmp_path, evaluate)  # its workers end with it
    assert outcome.status == 0, outcome.text[-3000:]


def test_persistent_workers_without_any_are_none(tmp_path, digits_stream):
    trainer = trainer_for(tmp_path, evaluation={"a": digits_stream.take(9)}, dataloader_persistent_workers=True)
    assert "eval_a_top1" in trainer.evaluate()


def test_data_to_evaluate_on_may_be_given_later(tmp_path, digits):
    trainer = trainer_for(tmp_path)
    trainer.eval_dataset = {"b": digits.select(range(9))}
    assert "eval_b_top1" in trainer.evaluate()
    trainer.eval_dataset = digits.select(range(9))
    assert "eval_top1" in trainer.evaluate()
