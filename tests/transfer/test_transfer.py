"""A transfer keeps its run as a distillation does, measures exactly, and its model loads elsewhere."""

import json
import signal

import pytest
import torch
from helpers import some_slow
from hub_server import WRITE
from processes import in_processes
from safetensors.torch import load_file
from scenes import dense_data, model_for, trainer_for
from transformers import TrainerCallback, UperNetForSemanticSegmentation

from scalekd_hf import load_student
from scalekd_hf.training.stopping import RunInterrupted
from scalekd_hf.transfer.detector import build_detector
from scalekd_hf.transfer.segmenter import build_segmenter
from scalekd_hf.transfer.tasks import backbone_of


TASKS = ["segment", "detect"]


def weights(folder):
    return {name: tensor for name, tensor in load_file(folder / "model.safetensors").items()}


def assert_same(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("task", some_slow(TASKS, 1))
def test_a_run_resumed_equals_the_uninterrupted_one_to_the_bit(tmp_path, scenes, task):
    trainer_for(scenes, tmp_path, task).train()
    whole = tmp_path / "whole"
    (tmp_path / "checkpoint-6").rename(whole)
    for step in (2, 4):
        trainer_for(scenes, tmp_path, task).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(whole, tmp_path / "checkpoint-6")
        kept = [
            json.loads((folder / "trainer_state.json").read_text()) for folder in (whole, tmp_path / "checkpoint-6")
        ]
        losses = [[entry.get("loss") for entry in state["log_history"]] for state in kept]
        assert losses[0] == losses[1] and len(losses[0]) == 2
    trainer_for(scenes, tmp_path / "first", task).save_model()
    first = weights(tmp_path / "first")
    assert sum(not torch.equal(value, first[name]) for name, value in weights(whole).items()) > len(first) / 2


class Terminate(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            signal.raise_signal(signal.SIGTERM)


def test_sigterm_saves_and_the_same_call_goes_on(tmp_path, scenes):
    whole = trainer_for(scenes, tmp_path / "whole", save_strategy="no")
    whole.train()
    whole.save_model()
    stopped = trainer_for(scenes, tmp_path / "run", save_strategy="no", callbacks=[Terminate()])
    with pytest.raises(RunInterrupted):
        stopped.train()
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    again = trainer_for(scenes, tmp_path / "run", save_strategy="no")
    again.train()
    again.save_model()
    assert_same(tmp_path / "run", tmp_path / "whole")


def metrics_of(scenes, folder, task, batch):
    trainer = trainer_for(scenes, folder, task, per_device_eval_batch_size=batch)
    metrics = trainer.evaluate()
    kept = {name: value for name, value in metrics.items() if "_ap" in name or "iou" in name or "accuracy" in name}
    if trainer.is_world_process_zero():
        (folder / "metrics.json").write_text(json.dumps(kept))
    return kept


@pytest.mark.parametrize("task", some_slow(TASKS, 1))
def test_two_processes_measure_what_one_does(tmp_path, scenes, task):
    alone = metrics_of(scenes, tmp_path, task, 2)  # 5 images: the last batch has blanks with two
    for outcome in in_processes(tmp_path, metrics_of, scenes, tmp_path, task, 2, processes=2):
        assert outcome.status == 0, outcome.text[-3000:]
    together = json.loads((tmp_path / "metrics.json").read_text())
    assert together == pytest.approx(alone, abs=1e-6) and len(alone) >= 3


def train_all(scenes, folder, batch):
    trainer = trainer_for(scenes, folder, "segment", per_device_train_batch_size=batch, max_steps=2, optim="sgd")
    for module in trainer.trained.modules():  # whose statistics are each process's own
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True: None
    trainer.train()


def test_two_processes_train_as_one(tmp_path, scenes):
    train_all(scenes, tmp_path / "one", 4)
    for outcome in in_processes(tmp_path, train_all, scenes, tmp_path / "two", 2, processes=2):
        assert outcome.status == 0, outcome.text[-3000:]
    one, two = (weights(tmp_path / name / "checkpoint-2") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_best_model_is_that_of_the_tasks_metric(tmp_path, scenes):
    trainer = trainer_for(
        scenes, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, max_steps=4
    )
    trainer.train()
    found = {entry["step"]: entry["eval_mean_iou"] for entry in trainer.state.log_history if "eval_mean_iou" in entry}
    assert trainer.args.metric_for_best_model == "mean_iou" and len(found) == 2
    assert trainer.state.best_metric == max(found.values())
    assert trainer.evaluate()["eval_mean_iou"] == pytest.approx(max(found.values()), abs=1e-6)


def test_the_model_loads_elsewhere_with_the_same_logits(tmp_path, scenes):
    trainer = trainer_for(scenes, tmp_path, max_steps=2)
    trainer.train()
    with pytest.raises(ValueError, match="does not predict: `evaluate` measures"):
        trainer.predict(None)
    trainer.save_model()
    loaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, trainer.trained.eval()(pixels).logits)
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {
        file.name for file in tmp_path.iterdir()
    }
    assert not list(tmp_path.glob("*.bin"))


def test_the_card_says_what_is_known(tmp_path, scenes):
    trainer = trainer_for(scenes, tmp_path, max_steps=2, save_strategy="no")
    trainer.train()
    trainer.save_model()
    trainer.results = {"this model": {"mean_iou": 0.5, "pixel_accuracy": 0.75}}
    trainer.create_model_card(license="mit")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: image-segmentation" in card and "license: mit" in card
    assert "| this model | 50.00% | 75.00% |" in card and "`UperNetForSemanticSegmentation`" in card
    assert "student (not published)" in card and str(scenes) not in card


def test_a_push_publishes_the_model_alone(tmp_path, scenes, hub):
    trainer = trainer_for(
        scenes, tmp_path, max_steps=2, push_to_hub=True, hub_model_id="somebody/segmenter", hub_token=WRITE
    )
    trainer.train()
    trainer.push_to_hub()
    files = set(hub.files("somebody/segmenter"))
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= files
    assert not [file for file in files if file.endswith((".bin", ".pt", ".pth"))]


def test_rates_of_layers(tmp_path, scenes):
    trainer = trainer_for(scenes, tmp_path, layer_decay=0.5, backbone_lr_scale=0.1, learning_rate=1.0)
    optimizer = trainer.create_optimizer()
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    backbone = backbone_of(trainer.trained)
    own = [rate[id(p)] for p in backbone.parameters() if p.requires_grad]
    assert own == sorted(own) and own[-1] == pytest.approx(0.05) and own[0] < own[-1] / 4
    heads = [p for name, p in trainer.trained.named_parameters() if not name.startswith("backbone")]
    assert {rate[id(p)] for p in heads} == {1.0}
    assert len(rate) == sum(p.requires_grad for p in trainer.trained.parameters()) and set(decay.values()) == {0.0}
    assert optimizer.param_groups[0]["lr"] == 1.0  # which is logged


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 16}, "`image_size` must be.*at least 32 px, got 16"),
        ({"layer_decay": 0.0}, "`layer_decay` must be above 0"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is 0.1"),
    ],
)
def test_settings_that_no_transfer_can_have(tmp_path, scenes, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer_for(scenes, tmp_path, **changes)


def test_models_and_data_that_do_not_fit(tmp_path, scenes):
    data = dense_data(scenes, "segment")
    with pytest.raises(ValueError, match="`model` tells 2 classes apart, and the data have 3"):
        trainer_for(scenes, tmp_path, data=data, model=model_for(scenes, "segment", ["a", "b"]))
    with pytest.raises(ValueError, match="where the model has 'red', the data have 'background'"):
        trainer_for(scenes, tmp_path, data=data, model=model_for(scenes, "segment", ["red", "background", "blue"]))


def test_a_checkpoint_of_other_settings_or_classes_is_refused(tmp_path, scenes):
    trainer_for(scenes, tmp_path, max_steps=2).train()
    with pytest.raises(ValueError, match="layer_decay 1.0 to 0.5"):
        trainer_for(scenes, tmp_path, layer_decay=0.5).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="model UperNetForSemanticSegmentation to StudentDFine"):
        trainer_for(scenes, tmp_path, "detect").train(resume_from_checkpoint=True)


def test_a_network_of_one_size_segments_squares_and_is_refused_by_mask_rcnn(tmp_path, scenes):
    small = {"img_size": 64, "patch_size": 8, "embed_dim": 16, "num_blocks": 4}
    mixer = load_student("timm/mixer_b14_224", labels=["a", "b"], **small)
    data = dense_data(scenes, "segment")
    model = build_segmenter(mixer, data.class_names, image_size=64, hidden_size=8)
    trainer = trainer_for(scenes, tmp_path, model=model, data=data, max_steps=1, save_strategy="no")
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_mean_iou"] <= 1
    assert dict(trainer.task.processor().size) == {"height": 64, "width": 64}
    boxes = dense_data(scenes, "detect", masks=True)
    with pytest.raises(ValueError, match="takes images of 64 px alone, and Mask R-CNN"):
        trainer_for(scenes, tmp_path, data=boxes, model=build_detector(mixer, boxes.class_names, image_size=64))


def test_evaluating_does_not_change_what_is_trained(tmp_path, scenes):
    for name, options in (("with", {"eval_strategy": "steps", "eval_steps": 1}), ("without", {})):
        trainer = trainer_for(scenes, tmp_path / name, "detect", max_steps=3, save_strategy="no", **options)
        trainer.train()  # D-FINE draws noisy boxes in each step
        trainer.save_model()
    assert_same(tmp_path / "with", tmp_path / "without")
