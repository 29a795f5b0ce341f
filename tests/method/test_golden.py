"""Equality with tensors that the authors' code produced, on the CPU and on the card."""

import pytest
import timm
import torch
from helpers import DEVICES, assert_close, assert_gradients, golden, projector_weights

from scalekd_hf import (
    CrossAttentionProjector,
    MimickingHeads,
    ScaleKDModel,
    frequency_mimicking_loss,
    load_teacher,
    logit_distillation_loss,
    spatial_mimicking_loss,
)
from scalekd_hf.images import ImageSpec


pytestmark = pytest.mark.parametrize("device", DEVICES, indirect=True)


@pytest.mark.parametrize("name", ["cap_cnn_penultimate", "cap_cnn_last_tpp"])
def test_projector_equals_the_authors(name, device):
    values, config = golden(name, device)
    learned = config.pop("queries") == "learned"
    projector = CrossAttentionProjector(**config, learned_queries=learned).to(device).train()
    projector.load_state_dict(projector_weights(values, "param."))
    student = values["in.student"].requires_grad_()
    queries = None if learned else values["in.queries"].requires_grad_()
    tokens = projector(student, queries)
    assert_close(tokens, values["out.tokens"], "tokens")
    tokens.backward(values["cotangent"])
    assert_close(student.grad, values["grad.student"], "student")
    if queries is not None:
        assert_close(queries.grad, values["grad.queries"], "queries")
    assert_gradients(projector, projector_weights(values, "grad.param."))
    assert_close(projector.eval()(student, queries), values["out.tokens_eval"], "tokens in eval mode")


@pytest.mark.parametrize(
    ("view", "loss"), [("spatial", spatial_mimicking_loss), ("frequency", frequency_mimicking_loss)]
)
def test_view_losses_equal_the_authors(view, loss, device):
    values, _ = golden("losses", device)
    tokens = values["in.student_tokens"].requires_grad_()
    value = loss(tokens, values["in.teacher_map"])
    value.backward()
    assert_close(value, values[f"{view}.loss"], "loss")
    assert_close(tokens.grad, values[f"{view}.grad"], "gradient")


@pytest.mark.parametrize(("temperature", "weight", "key"), [(1.0, 0.5, "T1.alpha0.5"), (4.0, 0.9, "T4.alpha0.9")])
def test_logit_loss_equals_the_authors(temperature, weight, key, device):
    values, _ = golden("losses", device)
    logits = values["in.student_logits"].requires_grad_()
    value = weight * logit_distillation_loss(logits, values["in.teacher_logits"], temperature)
    value.backward()
    assert_close(value, values[f"logit_kd.{key}.loss"], "loss")
    assert_close(logits.grad, values[f"logit_kd.{key}.grad"], "gradient")


class GivenFeatures(torch.nn.Module):
    """Stands where the student stands in the golden step, whose features are given."""

    def __init__(self, penultimate, last, logits, spec):
        super().__init__()
        self.outputs = [torch.nn.Parameter(value) for value in (penultimate, last, logits)]
        self.spec, self.num_labels, self.labels, self.taps = spec, logits.shape[1], None, ()

    def forward(self, pixel_values):
        return self.outputs


def test_whole_step_equals_the_authors(device):
    values, config = golden("step", device)
    teacher_model = timm.create_model(config["timm_teacher"], **config["teacher_args"])
    weights = projector_weights(values, "teacher.param.")
    missing, unexpected = teacher_model.load_state_dict(weights, strict=False)
    assert not unexpected and all("index" in name or "mask" in name for name in missing)
    teacher = load_teacher(teacher_model.to(device))
    features = [values[f"in.student_{name}"] for name in ("penultimate", "last", "logits")]
    spec = ImageSpec((64, 64), teacher.spec.mean, teacher.spec.std)
    student = GivenFeatures(*features, spec)
    heads = MimickingHeads(
        (features[0].shape[1], features[1].shape[1]),
        (features[0].shape[2:], features[1].shape[2:]),
        (teacher.penultimate_dim, teacher.dim),
        (teacher.penultimate_grid, teacher.grid),
        config["cap_heads"],
        config["softmax_scale"],
    )
    model = ScaleKDModel(
        student,
        teacher,
        heads,
        spatial_weight=config["spatial_weight"],
        frequency_weight=config["frequency_weight"],
        logit_weight=config["kd_alpha"],
        temperature=config["kd_temperature"],
    )
    model.to(device).train()
    for name, head in heads.projectors():
        head.load_state_dict(projector_weights(values, f"cap.{name.replace('_', '.')}."))

    last_map, logits = teacher(values["in.pixel_values"])
    assert_close(last_map, values["teacher.last_map"], "last map")
    assert_close(logits, values["teacher.logits"], "teacher's logits")

    output = model(values["in.pixel_values"], values["in.labels"])
    output.loss.backward()
    # Stored terms are as the authors' code returns them: weighted.
    stored = {"task": "task", "logit": "logit_kd", **{name: name.replace("_", ".") for name in heads.terms}}
    for name, key in stored.items():
        assert_close(model.weights[name] * output.losses[name], values[f"loss.{key}"], name)
    assert_close(output.loss, values["loss.total"], "total")
    for name, parameter in zip(("penultimate", "last", "logits"), student.outputs, strict=True):
        assert_close(parameter.grad, values[f"grad.student_{name}"], f"student's {name}")
    for name, head in heads.projectors():
        assert_gradients(head, projector_weights(values, f"grad.cap.{name.replace('_', '.')}."))
    assert all(parameter.grad is None for parameter in teacher.parameters())
