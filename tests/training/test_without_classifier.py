"""Students without a classifier: trained by the teacher's features alone, evaluated and resumed."""

import json
import os

import datasets
import numpy as np
import pytest
import timm
import torch
from helpers import images, settings, small_student, timm_swin, timm_vit, transformers_vit
from PIL import Image
from processes import in_processes
from safetensors.torch import load_file
from trainers import trainer_for
from transformers import AutoModel

from scalekd_hf import ScaleKDModel, ScaleKDTrainer, load_student
from scalekd_hf.method.heads import FEATURE_TERMS


def backbone(**changes):
    return small_student(num_classes=0, output_stride=16, **changes)


def backbone_trainer(folder, train=None, evaluation=None, **changes):
    torch.manual_seed(0)
    return trainer_for(folder, train, evaluation, student=backbone(), **changes)


def state(folder):
    return load_file(folder / "model.safetensors")


def equal(one, other):
    return set(one) == set(other) and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_labels_that_are_names_are_refused_before_any_work(tmp_path, digits):
    named = digits.cast_column("label", datasets.Value("string"))
    with pytest.raises(ValueError, match="`eval_dataset` has names as labels .*dataset.class_encode_column"):
        backbone_trainer(tmp_path, digits, named)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [backbone, lambda: AutoModel.from_config(transformers_vit().config)])
def test_the_loss_is_the_sum_of_the_feature_terms(tmp_path, digits, make):
    trainer = ScaleKDTrainer(make(), timm_swin(), settings(tmp_path), digits)
    model = trainer.distiller.train()
    assert model.weights == {"task": 0.0, "logit": 0.0} | dict(zip(FEATURE_TERMS, (0.08, 0.06) * 2, strict=True))
    output = model(images(), labels=torch.tensor([1, 2]))
    assert set(output.losses) == set(FEATURE_TERMS)
    expected = sum(model.weights[term] * value for term, value in output.losses.items())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    output.loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing  # DDP waits for all


def test_labels_have_no_part_in_training(tmp_path, digits, digits_stream):
    shuffled = digits.remove_columns("label").add_column("label", list(np.random.default_rng(0).permutation(96) % 7))
    data = {"labelled": digits, "others": shuffled, "none": digits.remove_columns("label")}
    found = {}
    for name, rows in data.items():
        trainer = backbone_trainer(tmp_path / name, rows, max_steps=2)
        trainer.train()
        trainer.save_model()
        found[name] = state(tmp_path / name)
    assert equal(found["labelled"], found["none"]) and equal(found["labelled"], found["others"])
    stream = digits_stream.remove_columns("label")
    assert backbone_trainer(tmp_path / "stream", stream, max_steps=1, label_column="none").train().global_step == 1


def test_finished_samples_need_no_labels(tmp_path):
    rows = [{"pixel_values": image, "labels": 3} for image in images(8)]
    found = []
    for name, samples in (("with", rows), ("without", [{"pixel_values": row["pixel_values"]} for row in rows])):
        trainer = backbone_trainer(tmp_path / name, samples, max_steps=1)
        trainer.train()
        trainer.save_model()
        found.append(state(tmp_path / name))
    assert equal(*found)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"logit_weight": 0.3}, "`logit_weight` is 0.3, but the student has no classifier.*Set it to 0"),
        ({"logit_weight": 1.0}, "`logit_weight` is 1, but the student has no classifier"),
        ({"spatial_weight": 0, "frequency_weight": 0}, "the feature terms are all that it can learn from"),
        ({"mixup_alpha": 0.8}, "`mixup_alpha` is 0.8, but the student has no classifier"),
        ({"teacher": None}, "has no classifier, and `teacher` is None"),
    ],
)
def test_what_a_backbone_cannot_learn_from_is_refused(tmp_path, digits, changes, message):
    with pytest.raises(ValueError, match=message):
        backbone_trainer(tmp_path, digits, **changes)


def test_a_last_stage_that_would_learn_nothing_is_refused(tmp_path, digits):
    with pytest.raises(ValueError, match="single cell at 32x32 px.*its last stage would learn nothing.*image_size"):
        ScaleKDTrainer(small_student(num_classes=0), timm_swin(), settings(tmp_path), digits)


def test_a_model_of_its_own_loop_refuses_as_well(tmp_path, digits):
    trainer = backbone_trainer(tmp_path, digits)
    student, teacher, heads = trainer.student, trainer.distiller.teacher, trainer.distiller.heads
    with pytest.raises(ValueError, match="`logit_weight` is 0.5, but the student has no classifier"):
        ScaleKDModel(student, teacher, heads)
    assert ScaleKDModel(student, teacher, heads, logit_weight=0).weights["task"] == 0
    with pytest.raises(ValueError, match="`teacher` is None"):
        ScaleKDModel(student).train()(images())


def test_the_default_of_the_logit_weight_is_said_to_mean_nothing(tmp_path, digits, caplog, capsys):
    trainer = backbone_trainer(tmp_path, digits, max_steps=1)
    trainer.train()
    said = (
        "It has no classifier: its loss is the sum of the feature terms; labels and `logit_weight` have no part in it."
    )
    assert said in capsys.readouterr().out
    assert "class token" not in caplog.text and trainer.args.logit_weight == 0
    ScaleKDTrainer(AutoModel.from_config(transformers_vit().config), timm_swin(), settings(tmp_path), digits)
    assert "1 before them, such as a class token" in caplog.text


def neighbours_by_hand(features, labels):
    """The share of images whose class 20 others vote for, image by image in float64."""
    unit = features.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    right = 0
    for query in range(len(unit)):
        cosines = unit @ unit[query]
        cosines[query] = -np.inf
        votes = np.zeros(10)
        for place in np.argsort(-cosines)[:20]:
            votes[labels[place]] += np.exp(cosines[place] / 0.07)
        right += votes.argmax() == labels[query]
    return right / len(unit)


def test_an_evaluation_reports_the_feature_loss_and_the_neighbours(tmp_path, digits):
    trainer = backbone_trainer(tmp_path, digits, digits, per_device_eval_batch_size=40)
    metrics = trainer.evaluate()
    assert not any("top5" in name or name == "eval_top1" for name in metrics)
    output = trainer.predict(digits)
    assert output.predictions.shape == (96, 24) and output.label_ids.tolist() == digits["label"]
    assert metrics["eval_neighbours_top1"] == pytest.approx(neighbours_by_hand(output.predictions, output.label_ids))
    batch = trainer.data_collator([trainer.eval_dataset[row] for row in range(96)])
    model = trainer.distiller.eval()
    with torch.no_grad():
        pixels = trainer.feed.evaluation_inputs(batch)["pixel_values"]
        assert np.allclose(output.predictions, model.student(pixels)[1].mean((2, 3)), atol=1e-5)
        assert metrics["eval_loss"] == pytest.approx(model(pixels).loss.item(), rel=1e-5)
    unlabelled = trainer.evaluate(digits.remove_columns("label"))
    assert unlabelled["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    assert "eval_neighbours_top1" not in unlabelled


def test_blanks_do_not_count_and_black_photos_do(tmp_path, digits, digits_stream):
    trainer = backbone_trainer(tmp_path, per_device_eval_batch_size=40)
    stream = digits_stream.take(90)  # 30 blanks fill the last batch
    rows = datasets.Dataset.from_list(list(stream), features=digits.features)
    whole, streamed = (trainer.evaluate(data.remove_columns("label")) for data in (rows, stream))
    assert streamed["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-5)
    black = datasets.Dataset.from_dict({"image": [Image.new("RGB", (32, 32))] * 2 + list(rows["image"][:3])})
    black = black.cast_column("image", datasets.Image())
    assert np.abs(trainer.predict(black).predictions).sum(1).min() > 0


def test_the_best_backbone_is_that_with_the_least_feature_loss(tmp_path, digits):
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = backbone_trainer(tmp_path, digits, digits, load_best_model_at_end=True, learning_rate=0.05, **options)
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("loss", False)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses.index(min(losses)) + 1 == int(trainer.state.best_model_checkpoint.rsplit("-", 1)[1])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_the_averaged_backbone_is_evaluated(tmp_path, digits):
    trainer = backbone_trainer(tmp_path, digits, digits, max_steps=2, ema_decay=0.5, learning_rate=0.01)
    trainer.train()
    features = trainer.predict(digits).predictions
    trainer.save_model()
    saved = load_student(str(tmp_path), pretrained=True)
    trained = trainer.student
    batch = trainer.feed.evaluation_inputs(trainer.data_collator([trainer.eval_dataset[row] for row in range(4)]))
    with torch.no_grad():
        expected = saved.eval().features(batch["pixel_values"])
        assert np.allclose(features[:4], expected, atol=1e-5)
        assert not torch.allclose(trained.eval().features(batch["pixel_values"]), expected, atol=1e-5)


def test_the_best_backbone_is_told_without_labels_too(tmp_path, digits):
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    options |= {"load_best_model_at_end": True, "label_column": "none"}
    trainer = backbone_trainer(tmp_path, digits, digits, **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None and trainer.state.best_metric > 0
    with pytest.raises(ValueError, match="`load_best_model_at_end` needs labels to tell the best"):
        trainer_for(tmp_path / "classifier", digits, digits, **options)


def test_a_teacher_without_a_classifier_teaches_a_student_without_one(tmp_path, digits):
    trainer = backbone_trainer(tmp_path, digits, digits, teacher=timm_vit(num_classes=0), max_steps=1)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("changes", [{"bf16_full_eval": True}, {"prediction_loss_only": True}])
def test_evaluations_of_other_kinds_run(tmp_path, digits, changes):
    whole = backbone_trainer(tmp_path, digits, digits).evaluate()["eval_loss"]
    assert backbone_trainer(tmp_path, digits, digits, **changes).evaluate()["eval_loss"] == pytest.approx(
        whole, rel=0.02
    )


def test_labels_may_be_any_numbers(tmp_path, digits):
    numbers = [10**9 + 7 * label for label in digits["label"]]
    renumbered = digits.remove_columns("label").add_column("label", numbers)
    trainer = backbone_trainer(tmp_path, digits)
    found = [trainer.evaluate(data)["eval_neighbours_top1"] for data in (digits, renumbered)]
    assert found[0] == found[1]


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(tmp_path, shards, ema_decay):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"ema_decay": ema_decay, "hflip": 0.5, "per_device_train_batch_size": 4}

    def run(resume):
        data = datasets.load_dataset("parquet", data_files=shards, split="train", streaming=True)
        trainer = backbone_trainer(tmp_path, data, data, **options)
        trainer.train(resume_from_checkpoint=resume)
        return {name: tensor.clone() for name, tensor in trainer.distiller.state_dict().items()}, trainer

    whole, _ = run(None)
    resumed, trainer = run(str(tmp_path / "checkpoint-2"))
    assert equal(whole, resumed)
    kept = json.loads((tmp_path / "checkpoint-2" / "scalekd_state.json").read_text())
    assert kept["settings"]["logit_weight"] == 0 and trainer.state.global_step == 4


def test_a_run_leaves_a_backbone_that_timm_and_transformers_load(tmp_path, digits):
    trainer = backbone_trainer(tmp_path, digits, digits, max_steps=1, eval_strategy="steps", eval_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    own = trainer.student.model.state_dict()
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert equal(loaded.state_dict(), own)
    wrapped = AutoModel.from_pretrained(tmp_path).state_dict()
    assert equal({name.removeprefix("timm_model."): tensor for name, tensor in wrapped.items()}, own)
    card = (tmp_path / "README.md").read_text()
    assert "a backbone without a classifier" in card and "pipeline_tag: image-feature-extraction" in card
    assert "image-classification" not in card and "classes of its training data" not in card
    assert "neighbours' top-1" in card and "The loss is that of the features" in card
    assert "its classifier | none: a backbone" in card and "load_student" in card
    assert "pipeline(" not in card and "AutoModelForImageClassification" not in card


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(tmp_path, digits):
    def train():
        args = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "per_device_eval_batch_size": 20}
        batch = 8 // int(os.environ.get("WORLD_SIZE", 1))
        data = digits.select(range(80))
        trainer = backbone_trainer(tmp_path, digits, data, per_device_train_batch_size=batch, **args)
        trainer.train()
        if trainer.is_world_process_zero():
            kept = ("loss", "eval_loss", "eval_neighbours_top1")
            history = [{name: entry[name] for name in kept if name in entry} for entry in trainer.state.log_history]
            (tmp_path / f"{trainer.args.world_size}.json").write_text(json.dumps(history))

    for processes in (1, 2):
        for outcome in in_processes(tmp_path, train, processes=processes):
            assert outcome.status == 0, outcome.text[-3000:]
    one, two = (json.loads((tmp_path / f"{processes}.json").read_text()) for processes in (1, 2))
    assert len(one) == len(two) == 5 and any("eval_loss" in entry for entry in one)
    for entries in zip(one, two, strict=True):
        assert entries[0] == pytest.approx(entries[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "zero3", "fsdp2"])
def test_engines_train_a_backbone_as_one_process_does(tmp_path, way):
    from launched_runs import result, train  # which needs DeepSpeed

    # At a constant rate no ReLU has its input on the other side of 0 in one of the two.
    options = {"student": backbone, "ema_decay": 0.5, "lr_scheduler_type": "constant"}
    one, two = tmp_path / "one", tmp_path / "two"
    outcomes = in_processes(one, lambda: train(one, "ddp", batch=8, **options), group=True)
    outcomes += in_processes(two, lambda: train(two, way, **options), processes=2)
    for outcome in outcomes:
        assert outcome.status == 0, outcome.text[-3000:]
    losses = [[entry["loss"] for entry in result(folder)["history"]] for folder in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, tensor in state(one).items():
        assert torch.allclose(tensor, state(two)[name], atol=1e-5), name
