"""The method on the card: exact in float64 and float32, and what autocast to bf16 leaves in float32."""

import copy

import pytest
import reference
import torch
from helpers import images, settings, small_student, timm_swin

from scalekd_hf import MimickingHeads, load_teacher
from scalekd_hf.training.model import build_model


pytestmark = pytest.mark.gpu


def difference(found, exact):
    """Relative to the largest magnitude."""
    exact = exact.detach().double().cpu()
    return ((found.detach().double().cpu() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_feature_losses_equal_the_plain_version(device, dtype, tolerance, record_property):
    teacher, pixels = load_teacher(timm_swin()).double(), images().double()
    heads = MimickingHeads((6, 8), ((5, 3), (3, 2)), (24, 48), (teacher.penultimate_grid, teacher.grid), (3, 4))
    heads.double().train()
    maps = [torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 5, 3), (8, 3, 2))]
    last_map, _ = teacher(pixels)
    weights = {name: dict(head.named_parameters()) for name, head in heads.projectors()}
    exact = reference.feature_losses(weights, *maps, last_map, teacher.last_stage, (3, 4), 5.0)
    exact_gradients = torch.autograd.grad(sum(exact.values()), maps)

    there = {"device": device, "dtype": dtype}
    heads_there, teacher_there = copy.deepcopy(heads).to(**there), load_teacher(timm_swin()).to(**there)
    teacher_there.load_state_dict(teacher.state_dict())
    maps_there = [x.detach().to(**there).requires_grad_() for x in maps]
    losses = heads_there(*maps_there, teacher_there(pixels.to(**there))[0], teacher_there.last_stage)
    gradients = torch.autograd.grad(sum(losses.values()), maps_there)
    errors = [difference(losses[name], exact[name]) for name in exact]
    errors += [difference(found, other) for found, other in zip(gradients, exact_gradients, strict=True)]
    record_property(f"from the plain version, {dtype}", f"{max(errors):.1e}")
    assert max(errors) < tolerance


def test_a_step_in_bf16_is_the_float32_one_but_for_rounding(device, record_property):
    model = build_model(small_student(), timm_swin(), settings("unused", use_cpu=device.type == "cpu"))
    model.to(device).train()
    pixels, labels = images(8).to(device), torch.arange(8, device=device)
    outputs, gradients = [], []
    for enabled in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            outputs.append(model(pixels, labels))
        outputs[-1].loss.backward()
        found = [p.grad.flatten() for p in model.student.parameters() if p.grad is not None]
        gradients.append(torch.cat(found))
        model.zero_grad()
    exact, rounded = outputs
    assert rounded.logits.dtype == torch.bfloat16
    for name, value in rounded.losses.items():
        assert value.dtype == torch.float32 and difference(value, exact.losses[name]) < 0.02, name
    cosine = torch.cosine_similarity(*gradients, dim=0).item()
    record_property("cosine of the student's gradients in bf16 and float32", f"{cosine:.4f}")
    assert cosine > 0.8  # an untrained network: rounding moves its gradients by a third


def test_channels_last_reaches_the_projectors_and_their_gradients(device):
    args = settings("unused", use_cpu=device.type == "cpu", channels_last=True, stem_norm="batch")
    model = build_model(small_student(), timm_swin(), args).to(device).train()
    seen = {}

    def keep(name):
        def hook(module, args, output):
            seen[name] = args[0]
            args[0].register_hook(lambda gradient: seen.__setitem__(f"{name}, gradient", gradient))

        return hook

    for name, head in model.heads.projectors():
        head.stem.conv.register_forward_hook(keep(name))
    pixels = images(4).to(device, memory_format=torch.channels_last)
    model(pixels, torch.arange(4, device=device)).loss.backward()
    assert len(seen) == 8
    for name, value in seen.items():
        assert value.is_contiguous(memory_format=torch.channels_last), name
