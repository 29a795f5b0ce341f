"""What ScaleKD is compared with: the relations of DIST, and plain feature matching; each against plain loops."""

import math

import pytest
import torch
from helpers import images, settings, small_student, timm_swin, timm_vit

from scalekd_hf.images import IGNORED_LABEL
from scalekd_hf.method.heads import LINEAR_TERM, LinearHeads
from scalekd_hf.method.losses import logit_distillation_loss, relational_logit_loss
from scalekd_hf.method.projector import LinearProjector
from scalekd_hf.training.model import build_model


def softmax(row, temperature):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def pearson(first, second):
    means = sum(first) / len(first), sum(second) / len(second)
    pairs = [(a - means[0], b - means[1]) for a, b in zip(first, second, strict=True)]
    lengths = math.sqrt(sum(a * a for a, _ in pairs)) * math.sqrt(sum(b * b for _, b in pairs))
    return sum(a * b for a, b in pairs) / lengths


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_relations_are_those_of_the_equation(temperature):
    student = [[1.0, -2.0, 0.5, 0.0], [0.3, 0.2, -1.0, 2.0], [-0.5, 1.5, 1.0, 0.1]]
    teacher = [[2.0, -1.0, 0.0, 0.5], [0.0, 3.0, -1.5, 1.0], [-2.0, 2.5, 0.5, 0.0]]
    of_student, of_teacher = ([softmax(row, temperature) for row in logits] for logits in (student, teacher))
    within_images = [1 - pearson(s, t) for s, t in zip(of_student, of_teacher, strict=True)]
    columns = zip(zip(*of_student, strict=True), zip(*of_teacher, strict=True), strict=True)
    within_classes = [1 - pearson(s, t) for s, t in columns]
    expected = temperature**2 * (sum(within_images) / 3 + sum(within_classes) / 4)
    loss = relational_logit_loss(
        *(torch.tensor(logits, dtype=torch.float64) for logits in (student, teacher)), temperature
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_relations_see_neither_a_shift_nor_half_precision_and_are_nothing_at_equality():
    student, teacher = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = relational_logit_loss(student, teacher)
    assert loss.dtype == torch.float32 and loss > 0.5
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(relational_logit_loss(student, teacher), loss)
    torch.testing.assert_close(relational_logit_loss(student.double() + 3, teacher.double()).float(), loss)
    assert relational_logit_loss(teacher.float(), teacher.float()).abs() < 1e-5


def test_what_does_not_vary_has_no_relation_and_a_finite_gradient():
    student = torch.zeros(4, 5, requires_grad=True)  # of a classifier that begins at zero
    loss = relational_logit_loss(student, torch.randn(4, 5))
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss == 2 and gradient.isfinite().all()
    one = torch.randn(1, 5, requires_grad=True)
    loss = relational_logit_loss(one, torch.randn(1, 5))
    assert 1 <= loss <= 3 and torch.autograd.grad(loss, one)[0].isfinite().all()


def test_logits_of_other_classes_are_refused():
    with pytest.raises(ValueError, match="same classes"):
        relational_logit_loss(torch.randn(2, 5), torch.randn(2, 6))


def test_a_temperature_multiplies_the_logit_term_by_its_square():
    student, teacher = torch.randn(2, 3, 4, dtype=torch.float64)
    entropies = -(teacher / 4).softmax(1) * (student / 4).log_softmax(1)
    torch.testing.assert_close(logit_distillation_loss(student, teacher, 4.0), 16 * entropies.sum(1).mean())


def model_of(tmp_path, teacher=timm_swin, **changes):
    torch.manual_seed(0)
    return build_model(small_student(), teacher(), settings(tmp_path, **changes)).train()


@pytest.mark.parametrize("logit_loss", ["kl", "dist"])
def test_an_image_without_a_label_still_learns_from_the_teachers_logits(tmp_path, logit_loss):
    model = model_of(tmp_path, logit_loss=logit_loss, spatial_weight=0.0, frequency_weight=0.0)
    labels = torch.tensor([1, 2, 3, 4])
    known = model(images(4), labels).losses
    some = model(images(4), labels.where(labels > 2, IGNORED_LABEL)).losses
    assert torch.equal(known["logit"], some["logit"]) and known["task"] != some["task"]
    logits = model.student.classify(images(4))
    teacher_logits = model.teacher(model.normaliser.for_teacher(images(4)))[1]
    function = {"kl": logit_distillation_loss, "dist": relational_logit_loss}[logit_loss]
    torch.testing.assert_close(known["logit"], function(logits, teacher_logits))


@pytest.mark.parametrize("grid", [(2, 3), (4, 4), (8, 6)])
def test_a_linear_projection_is_a_convolution_and_a_resizing_in_either_order(grid):
    projector = LinearProjector(6, 10, grid).double()
    student = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    weight = projector.linear.weight[..., None, None]
    wide = torch.nn.functional.conv2d(student, weight, projector.linear.bias)
    expected = torch.nn.functional.interpolate(wide, grid, mode="bilinear", align_corners=False)
    torch.testing.assert_close(projector(student), expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("teacher", [timm_swin, timm_vit])
def test_plain_feature_matching_has_one_term_of_its_own(tmp_path, teacher):
    model = model_of(tmp_path, teacher, projector="linear", spatial_weight=0.3)
    assert isinstance(model.heads, LinearHeads)
    output = model(images(), torch.tensor([1, 2]))
    assert list(output.losses) == ["task", "logit", LINEAR_TERM]
    weighted = 0.5 * output.losses["task"] + 0.5 * output.losses["logit"] + 0.3 * output.losses[LINEAR_TERM]
    torch.testing.assert_close(output.loss, weighted)
    _, last, _ = model.student(images())
    teacher_last, _ = model.teacher(model.normaliser.for_teacher(images()))
    tokens = model.heads.last_linear(last)
    expected = 0.0
    for image, cells in zip(tokens, teacher_last.flatten(2).transpose(1, 2), strict=True):
        for token, cell in zip(image, cells, strict=True):
            expected += (token / token.norm() - cell / cell.norm()).square().sum() / 2
    torch.testing.assert_close(output.losses[LINEAR_TERM], expected)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_loss_that_nobody_knows_is_refused(tmp_path):
    model = model_of(tmp_path)
    with pytest.raises(ValueError, match="`logit_loss` must be one of .*'kd'"):
        type(model)(model.student, model.teacher, model.heads, logit_loss="kd")
    with pytest.raises(ValueError, match="'last_linear'.*terms="):
        type(model)(model.student, model.teacher, model.heads, projector="linear")
