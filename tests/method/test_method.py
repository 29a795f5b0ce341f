"""The method against the plain version in `reference.py`, and its invariants; needs no golden files."""

import pytest
import reference
import torch
from helpers import assert_close, assert_gradients, images, small_student, timm_swin

from scalekd_hf import (
    CrossAttentionProjector,
    MimickingHeads,
    ScaleKDModel,
    frequency_mimicking_loss,
    load_teacher,
    logit_distillation_loss,
    spatial_mimicking_loss,
)
from scalekd_hf.method.distiller import feature_weights
from scalekd_hf.method.heads import FEATURE_TERMS
from scalekd_hf.method.losses import task_loss
from scalekd_hf.method.projector import CrossAttention


GRIDS = {"student_grid": (3, 5), "teacher_grid": (4, 2)}


def double(module):
    return module.double().train()


def weights_of(module):
    return {name: parameter.detach().clone().requires_grad_() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("stem_norm", ["batch", "layer"])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("softmax_scale", [5.0, 0.2])
def test_projector_equals_the_plain_version(stem_norm, learned, softmax_scale):
    options = {"num_heads": 3, "softmax_scale": softmax_scale}
    projector = double(
        CrossAttentionProjector(6, 12, **GRIDS, **options, learned_queries=learned, stem_norm=stem_norm)
    )
    student = torch.randn(2, 6, 3, 5, dtype=torch.float64, requires_grad=True)
    queries = None if learned else torch.randn(2, 8, 12, dtype=torch.float64, requires_grad=True)
    inputs = [tensor for tensor in (student, queries) if tensor is not None]
    weights = weights_of(projector)
    tokens = projector(student, queries)
    expected = reference.project(weights, student, queries=queries, stem_norm=stem_norm, **options)
    assert_close(tokens, expected, "tokens")
    cotangent = torch.randn_like(tokens)
    gradients = torch.autograd.grad(tokens, [*inputs, *projector.parameters()], cotangent)
    expected_gradients = torch.autograd.grad(expected, [*inputs, *weights.values()], cotangent)
    for parameter, gradient in zip(projector.parameters(), gradients[len(inputs) :], strict=True):
        parameter.grad = gradient
    for actual, gradient in zip(gradients, expected_gradients[: len(inputs)], strict=False):
        assert_close(actual, gradient, "input")
    assert_gradients(projector, dict(zip(weights, expected_gradients[len(inputs) :], strict=True)))


@pytest.mark.parametrize("view", ["spatial", "frequency"])
def test_view_loss_equals_the_plain_version(view):
    ours = {"spatial": spatial_mimicking_loss, "frequency": frequency_mimicking_loss}[view]
    plain = {"spatial": reference.spatial_loss, "frequency": reference.frequency_loss}[view]
    tokens, teacher_map = torch.randn(3, 12, 8, requires_grad=True), torch.randn(3, 8, 3, 4)
    value, expected = ours(tokens, teacher_map), plain(tokens, teacher_map)
    assert_close(value, expected, "loss")
    (gradient,) = torch.autograd.grad(value, tokens)
    (expected_gradient,) = torch.autograd.grad(expected, tokens)
    assert_close(gradient, expected_gradient, "gradient")


@pytest.mark.parametrize("images_of_queries", [1, 8])
def test_attention_in_bf16_is_the_float32_one_but_for_rounding(images_of_queries):
    torch.manual_seed(0)
    attention = CrossAttention(16, 12, num_heads=4, softmax_scale=5.0)
    queries, context = torch.randn(images_of_queries, 9, 16), torch.randn(8, 20, 12)
    weights = [weight for name, weight in attention.named_parameters() if name != "k.bias"]  # it has no gradient
    leaves = [queries.requires_grad_(), context.requires_grad_(), *weights]
    cotangent, found = torch.randn(8, 9, 16), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            tokens = attention(queries, context)
        found.append([tokens, *torch.autograd.grad(tokens, leaves, cotangent.to(tokens.dtype))])
    for exact, rounded in zip(*found, strict=True):
        assert (rounded.float() - exact).norm() < 0.03 * exact.norm()


def test_a_frequency_view_that_keeps_the_direct_component_is_a_second_spatial_view():
    model = distiller(remove_direct_component=False)
    penultimate, last, _ = model.student(images())
    last_map, _ = model.teacher(images())
    losses = model.heads(penultimate, last, last_map, model.teacher.last_stage)
    perceived = model.teacher.last_stage(model.heads.penultimate_frequency(penultimate))
    assert_close(losses["penultimate_frequency"], spatial_mimicking_loss(perceived, last_map))


def test_shared_stems_are_one_stem_for_both_views_of_a_stage():
    model = distiller(stem="shared")
    stems = [name for name, module in model.heads.named_modules() if name.endswith("conv")]
    assert stems == ["stems.penultimate.conv", "stems.last.conv"]
    penultimate, last, _ = model.student(images())
    last_map, _ = model.teacher(images())
    losses = model.heads(penultimate, last, last_map, model.teacher.last_stage)
    stem = model.heads.stems["penultimate"](penultimate)
    perceived = model.teacher.last_stage(model.heads.penultimate_frequency(stem))
    assert_close(losses["penultimate_frequency"], frequency_mimicking_loss(perceived, last_map))


def test_a_separable_stem_costs_a_ninth():
    full, separable = (
        CrossAttentionProjector(64, 12, **GRIDS, num_heads=3, stem=stem).stem.conv for stem in ("full", "separable")
    )
    count = [sum(p.numel() for p in module.parameters()) for module in (full, separable)]
    assert count == [64 * 64 * 9 + 64, 64 * 9 + 64 * 64 + 64]


def test_both_views_pass_through_the_teachers_last_stage_as_one_batch():
    model, batches = distiller(), []
    penultimate, last, _ = model.student(images())
    last_map, _ = model.teacher(images())

    def last_stage(tokens):
        batches.append(len(tokens))
        return model.teacher.last_stage(tokens)

    model.heads(penultimate, last, last_map, last_stage)
    assert batches == [2 * len(last_map)]


def test_the_teachers_last_stage_is_done_with_before_the_gradients_of_the_last_stems_are_computed():
    model, order = distiller(), []
    penultimate, last, _ = model.student(images())
    last_map, _ = model.teacher(images())

    def last_stage(tokens):
        tokens.register_hook(lambda _: order.append("last stage"))
        return model.teacher.last_stage(tokens)

    for name, projector in model.heads.projectors():
        projector.stem.conv.weight.register_hook(lambda _, name=name: order.append(name))
    sum(model.heads(penultimate, last, last_map, last_stage).values()).backward()
    assert order[0] == "last stage" and set(order[1:]) == set(FEATURE_TERMS)


@pytest.mark.parametrize("grid", [(7, 7), (4, 6), (1, 5)])
def test_removing_the_direct_component_is_subtracting_the_mean(grid):
    maps = torch.randn(2, 5, *grid)
    expected = torch.from_numpy(reference.remove_direct_component(maps.numpy()))
    assert torch.allclose(maps - maps.mean((2, 3), keepdim=True), expected, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_logit_and_task_losses_equal_the_plain_version(temperature):
    student, teacher, labels = torch.randn(4, 7), torch.randn(4, 7), torch.tensor([0, 3, 6, 1])
    assert_close(
        logit_distillation_loss(student, teacher, temperature), reference.logit_loss(student, teacher, temperature)
    )
    assert_close(task_loss(student, labels), reference.task_loss(student, labels))


def test_losses_are_a_sum_over_tokens_and_a_mean_over_images():
    teacher_map = torch.randn(2, 4, 2, 3)
    tokens = -teacher_map.flatten(2).transpose(1, 2)  # opposite unit vectors: distance 4 for each of 6 tokens
    assert spatial_mimicking_loss(tokens, teacher_map).item() == pytest.approx(24, rel=1e-6)
    assert spatial_mimicking_loss(-tokens, teacher_map).item() == pytest.approx(0, abs=1e-10)
    assert frequency_mimicking_loss(-tokens + 3.0, teacher_map).item() == pytest.approx(0, abs=1e-6)


def test_losses_are_float32_under_autocast():
    teacher_map, tokens = torch.randn(2, 8, 4, 4), torch.randn(2, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        for loss in (spatial_mimicking_loss, frequency_mimicking_loss):
            value = loss(tokens.bfloat16(), teacher_map.bfloat16())
            assert value.dtype == torch.float32
            assert torch.equal(value, loss(tokens.bfloat16().float(), teacher_map.bfloat16().float()))
        logits = torch.randn(4, 10)
        assert logit_distillation_loss(logits, logits).dtype == torch.float32
        assert task_loss(logits.bfloat16(), torch.zeros(4, dtype=torch.long)).dtype == torch.float32


def test_binary_cross_entropy_of_hard_and_soft_labels():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    soft = torch.nn.functional.one_hot(labels, 4).float()
    expected = -(soft * logits.sigmoid().log() + (1 - soft) * (1 - logits.sigmoid()).log()).sum(1).mean()
    for target in (labels, soft):
        assert_close(task_loss(logits, target, "binary_cross_entropy"), expected)
    smoothed = task_loss(logits, labels, "binary_cross_entropy", label_smoothing=0.1)
    assert_close(smoothed, task_loss(logits, soft * 0.9 + 0.025, "binary_cross_entropy"))


def test_the_losses_of_the_heads_equal_the_plain_version_through_a_real_teacher():
    teacher = load_teacher(timm_swin())
    heads = MimickingHeads(
        (6, 8), ((5, 3), (3, 2)), (24, 48), (teacher.penultimate_grid, teacher.grid), (3, 4)
    ).train()
    penultimate, last = torch.randn(2, 6, 5, 3, requires_grad=True), torch.randn(2, 8, 3, 2, requires_grad=True)
    last_map, _ = teacher(images())
    weights = {name: weights_of(head) for name, head in heads.projectors()}
    losses = heads(penultimate, last, last_map, teacher.last_stage)
    expected = reference.feature_losses(weights, penultimate, last, last_map, teacher.last_stage, (3, 4), 5.0)
    assert set(losses) == set(FEATURE_TERMS)
    for name in losses:
        assert_close(losses[name], expected[name], name)
    gradients = torch.autograd.grad(sum(losses.values()), (penultimate, last))
    for actual, other in zip(gradients, torch.autograd.grad(sum(expected.values()), (penultimate, last)), strict=True):
        assert_close(actual, other, "student's map")


def distiller(**changes):
    torch.manual_seed(0)
    student, teacher = small_student(), load_teacher(timm_swin())
    names = ("spatial_weight", "frequency_weight", "last_frequency_weight", "teacher_perception")
    weights = {key: changes[key] for key in names if key in changes}
    terms = tuple(feature_weights(**{"spatial_weight": 0.08, "frequency_weight": 0.06, **weights}))
    heads = MimickingHeads(
        student.dims,
        student.grids,
        (teacher.penultimate_dim, teacher.dim),
        (teacher.penultimate_grid, teacher.grid),
        (4, 8),
        **{
            key: changes.pop(key)
            for key in ("learned_last_queries", "remove_direct_component", "stem")
            if key in changes
        },
        terms=terms,
    )
    return ScaleKDModel(student, teacher, heads if terms else None, **changes).train()


def test_gradients_reach_the_penultimate_stage_along_both_paths_and_no_teacher_parameter():
    model = distiller()
    penultimate, last, _ = model.student(images())
    last_map, _ = model.teacher(images())
    losses = model.heads(penultimate, last, last_map, model.teacher.last_stage)
    for name in FEATURE_TERMS:  # the last stage's losses reach it through their queries
        (gradient,) = torch.autograd.grad(losses[name], penultimate, retain_graph=True)
        assert gradient.abs().sum() > 0, name
    model(images(), torch.tensor([1, 2])).loss.backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    trained = [*model.student.named_parameters(), *model.heads.named_parameters()]
    assert trained and all(parameter.grad is not None for _, parameter in trained)


def test_one_step_is_one_forward_of_the_student_and_one_of_the_teacher():
    model = distiller()
    calls = []
    model.student.model.register_forward_hook(lambda *_: calls.append("student"))
    model.teacher.model.patch_embed.proj.register_forward_hook(lambda *_: calls.append("teacher"))
    model.teacher.model.head.register_forward_hook(lambda *_: calls.append("teacher's head"))
    model(images(), torch.tensor([1, 2]))
    assert sorted(calls) == ["student", "teacher", "teacher's head"]


def test_the_loss_is_the_weighted_sum_of_its_terms():
    model = distiller(logit_weight=0.3, temperature=2.0, label_smoothing=0.1)
    output = model(images(), torch.tensor([1, 2]))
    losses = output.losses
    weights = {"task": 0.7, "logit": 0.3, **dict(zip(FEATURE_TERMS, (0.08, 0.06, 0.08, 0.06), strict=True))}
    assert set(losses) == set(weights)
    assert_close(output.loss, sum(weights[name] * losses[name] for name in losses))
    expected = torch.nn.functional.cross_entropy(output.logits, torch.tensor([1, 2]), label_smoothing=0.1)
    assert_close(losses["task"], expected)


VARIANTS = {
    "published 100 epochs of Swin-S": (
        {"learned_last_queries": True, "last_frequency_weight": 0.0, "logit_weight": 0.0},
        {"task", "penultimate_spatial", "penultimate_frequency", "last_spatial"},
    ),
    "spatial view alone": ({"frequency_weight": 0.0}, {"task", "logit", "penultimate_spatial", "last_spatial"}),
    "frequency view alone": ({"spatial_weight": 0.0}, {"task", "logit", "penultimate_frequency", "last_frequency"}),
    "no teacher parameter perception": (
        {"teacher_perception": False, "learned_last_queries": True},
        {"task", "logit", "last_spatial", "last_frequency"},
    ),
    "shared stems": ({"stem": "shared"}, {"task", "logit", *FEATURE_TERMS}),
    "shared stems, spatial view alone": (
        {"stem": "shared", "frequency_weight": 0.0},
        {"task", "logit", "penultimate_spatial", "last_spatial"},
    ),
    "separable stems": ({"stem": "separable"}, {"task", "logit", *FEATURE_TERMS}),
    "logits alone": ({"spatial_weight": 0.0, "frequency_weight": 0.0}, {"task", "logit"}),
    "no logits": ({"logit_weight": 0.0}, {"task", *FEATURE_TERMS}),
    "binary cross-entropy": ({"task_loss": "binary_cross_entropy"}, {"task", "logit", *FEATURE_TERMS}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_published_variant_is_a_setting_in_which_all_that_trains_has_a_gradient(variant):
    changes, terms = VARIANTS[variant]
    model = distiller(**changes)
    output = model(images(), torch.tensor([1, 2]))
    assert set(output.losses) == terms
    output.loss.backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert not without


def test_without_labels_the_task_term_is_absent():
    output = distiller()(images())
    assert "task" not in output.losses and torch.isfinite(output.loss)
    only_features = distiller(logit_weight=0.0)
    only_features(images()).loss.backward()
    assert all(p.grad is not None for p in only_features.parameters() if p.requires_grad)


def test_the_teacher_stays_in_eval_mode_and_evaluation_runs_the_student_alone():
    model = distiller()
    assert model.student.training and model.heads.training
    assert not any(module.training for module in model.teacher.modules())
    model.teacher.forward = None  # would fail if called
    with torch.no_grad():
        output = model.eval()(images(), torch.tensor([1, 2]))
        assert torch.equal(output.logits, model.student.model(images()))
    assert output.losses is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: CrossAttentionProjector(6, 12, **GRIDS, num_heads=5),
            r"5 heads for 12 channels.*\[1, 2, 3, 4, 6, 12\]",
        ),
        (lambda: CrossAttentionProjector(6, 12, **GRIDS, num_heads=3, stem_norm="group"), "'group'"),
        (lambda: CrossAttentionProjector(6, 12, **GRIDS, num_heads=3, softmax_scale=0), "positive, got 0"),
        (lambda: CrossAttentionProjector(6, 12, **GRIDS, num_heads=3)(torch.randn(1, 6, 4, 4)), r"grid \(4, 4\)"),
        (lambda: spatial_mimicking_loss(torch.randn(1, 5, 8), torch.randn(1, 8, 2, 3)), r"\(1, 6, 8\)"),
        (lambda: logit_distillation_loss(torch.randn(1, 5), torch.randn(1, 6)), "same classes"),
        (lambda: task_loss(torch.randn(1, 5), torch.tensor([0]), "hinge"), "'hinge'"),
    ],
)
def test_wrong_arguments_are_refused_with_their_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
