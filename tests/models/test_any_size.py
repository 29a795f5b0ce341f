"""What holds for a teacher holds at any size of its images and of a batch."""

import timm
import torch
from families import large_weights
from helpers import examples, timm_swin, timm_vit, transformers_swin, transformers_vit
from hypothesis import example, given
from hypothesis import strategies as st
from test_teachers import entering_tokens

from scalekd_hf import load_teacher


def convnext(size):
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 8, 12, 16), num_classes=3)


KINDS = {  # a teacher of images whose sides are so many patches
    "vit": (8, lambda size: timm_vit(img_size=size)),
    "swin": (2, lambda size: timm_swin(img_size=size, window_size=3)),
    "transformers vit": (8, lambda size: transformers_vit(image_size=list(size))),
    "transformers swin": (2, lambda size: transformers_swin(image_size=list(size), window_size=3)),
    "convnext": (8, convnext),
}


@examples(8)
@given(st.sampled_from(sorted(KINDS)), st.integers(5, 14), st.integers(5, 14), st.integers(1, 5))
@example("swin", 13, 9, 1)
@example("vit", 5, 7, 1)
def test_the_last_stage_of_its_own_tokens_is_the_last_map_at_any_size(kind, height, width, batch):
    patch, build = KINDS[kind]
    size = (height * patch, width * patch)
    model = large_weights(build(size)).eval()
    teacher = load_teacher(model)
    pixel_values = torch.randn(batch, 3, *teacher.spec.size)
    tokens, last_map, logits = entering_tokens(teacher, pixel_values)
    assert last_map.shape == (batch, teacher.dim, *teacher.grid) and len(logits) == batch
    prefix = tokens.shape[1] - teacher.penultimate_grid[0] * teacher.penultimate_grid[1]
    expected = last_map.flatten(2).transpose(1, 2)
    found = teacher.last_stage(tokens)[:, prefix:]
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-5 * expected.abs().max()
    first = teacher.last_stage(tokens[:1])[:, prefix:]
    assert (first - expected[:1]).abs().max() < 1e-5 * expected.abs().max()
    assert teacher.last_stage(tokens[:, prefix:]).shape == expected.shape
