"""Teachers of each family and library."""

import pytest
import timm
import torch
from helpers import TEACHERS, images, timm_swin, timm_vit, transformers_swin, transformers_vit

from scalekd_hf import load_teacher


@pytest.mark.parametrize("family", TEACHERS)
def test_the_last_stage_applied_to_its_own_tokens_gives_the_last_map(family):
    model = TEACHERS[family]().eval()
    teacher = load_teacher(model)
    entering = []
    hook = teacher.entry().register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    last_map, logits = teacher(images())
    hook.remove()
    assert last_map.shape == (2, teacher.dim, *teacher.grid)
    outputs = model(images())
    assert torch.allclose(logits, getattr(outputs, "logits", outputs), atol=1e-6)

    tokens = entering[0].reshape(2, -1, teacher.penultimate_dim)
    prefix = tokens.shape[1] - teacher.penultimate_grid[0] * teacher.penultimate_grid[1]
    expected = last_map.flatten(2).transpose(1, 2)
    assert torch.allclose(teacher.last_stage(tokens)[:, prefix:], expected, atol=1e-5)
    if prefix:  # the published method runs the last stage on patch tokens alone
        assert teacher.last_stage(tokens[:, prefix:]).shape == expected.shape


@pytest.mark.parametrize("family", TEACHERS)
def test_gradients_pass_through_the_last_stage_and_leave_none_in_it(family):
    teacher = load_teacher(TEACHERS[family]())
    count = teacher.penultimate_grid[0] * teacher.penultimate_grid[1]
    tokens = torch.randn(2, count, teacher.penultimate_dim, requires_grad=True)
    teacher.last_stage(tokens).square().sum().backward()
    assert tokens.grad.abs().sum() > 0
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    teacher.train()
    assert not any(module.training for module in teacher.modules())


@pytest.mark.parametrize("family", ["timm_swin", "transformers_swin"])
def test_swin_grids_and_widths_are_those_before_and_after_the_merging(family):
    teacher = load_teacher(TEACHERS[family]())
    assert (teacher.penultimate_grid, teacher.penultimate_dim) == ((8, 8), 24)
    assert (teacher.grid, teacher.dim) == ((4, 4), 48)


@pytest.mark.parametrize(
    ("model", "grids"),
    [
        (lambda: timm_swin(img_size=64), ((16, 16), (8, 8))),
        (lambda: transformers_swin(image_size=64), ((16, 16), (8, 8))),
        (lambda: timm_vit(img_size=48), ((6, 6), (6, 6))),
        (lambda: transformers_vit(image_size=(48, 32)), ((6, 4), (6, 4))),
    ],
)
def test_grids_at_other_sizes_come_from_the_model(model, grids):
    teacher = load_teacher(model())
    assert (teacher.penultimate_grid, teacher.grid) == grids
    assert teacher(torch.randn(1, 3, *teacher.spec.size))[0].shape[2:] == grids[1]


def test_full_size_teachers_have_the_published_widths_and_grids():
    with torch.device("meta"):
        swin = timm.create_model("swin_large_patch4_window7_224", num_classes=0)
        vit = timm.create_model("vit_large_patch16_224", num_classes=0)
    swin, vit = load_teacher(swin), load_teacher(vit)
    assert (swin.penultimate_dim, swin.penultimate_grid, swin.dim, swin.grid) == (768, (14, 14), 1536, (7, 7))
    assert (vit.penultimate_dim, vit.penultimate_grid, vit.dim, vit.grid) == (1024, (14, 14), 1024, (14, 14))
    assert swin.num_labels == 0


def test_a_teacher_without_head_gives_no_logits():
    assert load_teacher(timm_swin(num_classes=0))(images())[1] is None


def test_last_blocks_is_a_setting_of_plain_teachers():
    teacher = load_teacher(timm_vit(), last_blocks=3)
    assert teacher.entry() is teacher.model.blocks[1]
    with pytest.raises(ValueError, match="`teacher_last_blocks` must be between 1 and the 4 blocks.*got 5"):
        load_teacher(timm_vit(), last_blocks=5)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("timm/swin_tiny_patch4_window8_224", "swin_tiny_patch4_window7_224"),
        ("no-such-team/no-such-model", "neither a local folder"),
        (torch.nn.Linear(2, 2), "image classifier of timm or transformers"),
        (timm.create_model("resnet18", num_classes=10), "no transformer last stage.*SwinTransformer"),
        (lambda: transformers_swin(image_size=33), "patches of 2x2 px.*33x33"),
        (lambda: transformers_swin(image_size=48), "windows of 4x4.*grid 6x6 at image size 48x48"),
        (lambda: timm_vit(img_size=36), "patches of 8x8 px.*36x36"),
    ],
)
def test_unsuitable_teachers_are_refused_with_the_reason(teacher, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(
            teacher() if callable(teacher) and not isinstance(teacher, torch.nn.Module) else teacher, pretrained=False
        )
