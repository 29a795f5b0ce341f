"""The step compiled on the card: one graph, the eager step's losses, and CUDA graphs that outlive evaluations."""

import pytest
import torch
from families import FAMILIES, large_weights
from helpers import images, settings, small_student, timm_swin
from torch._dynamo.utils import counters

from scalekd_hf import ScaleKDTrainer, load_teacher
from scalekd_hf.training.model import build_model


pytestmark = pytest.mark.gpu

# Teachers that keep what entered their last stage, with position terms and without.
KEEPING = ["timm_dinov3", "timm_beit", "timm_vit", "timm_swin"] if torch.cuda.is_available() else ["timm_dinov3"]


def backend(device, on_the_card):
    return on_the_card if device.type == "cuda" else "aot_eager"


def with_graphs(device, family):
    """Options of torch.compile; DINOv3's positions are made on the host, around which inductor alone divides a graph."""
    if device.type == "cuda" and "dinov3" in family:
        return {"mode": "reduce-overhead"}
    return {"backend": backend(device, "cudagraphs")}


def test_the_student_is_evaluated_with_its_average_and_the_step_is_not_compiled_again(tmp_path, digits, device):
    torch.compiler.reset()
    counters.clear()
    options = {"ema_decay": 0.9, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6, "bf16": True}
    options["torch_compile_backend"] = backend(device, "inductor")
    args = settings(tmp_path, use_cpu=device.type == "cpu", torch_compile=True, **options)
    trainer = ScaleKDTrainer(small_student(), timm_swin(), args, digits, digits)
    trainer.train()
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 3
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def steps(model, run, batches, labels):
    """Losses of four steps of plain gradient descent."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.01), []
    for pixels in batches:
        torch.compiler.cudagraph_mark_step_begin()
        loss = run(pixels, labels).loss
        loss.backward()
        losses.append(loss.detach().clone())
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses)


@pytest.mark.parametrize("family", KEEPING)
def test_cuda_graphs_compute_the_eager_steps(device, family):
    """Teachers keep what entered their last stage until the next forward, which a replay writes over."""
    size = 32
    batches = [images(4, size).to(device) + shift for shift in range(4)]
    labels, found = torch.arange(4, device=device), []
    for compiled in (False, True):
        torch.manual_seed(0)
        teacher = load_teacher(large_weights(FAMILIES[family]()))
        model = build_model(small_student(), teacher, settings("unused", use_cpu=device.type == "cpu"))
        model.to(device).train()
        torch.compiler.reset()
        counters.clear()
        run = torch.compile(model, **with_graphs(device, family)) if compiled else model
        found.append(steps(model, run, batches, labels))
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert torch.allclose(*found, rtol=1e-4)
    assert found[0].unique().numel() == 4
