"""Images without a label do not count in the task's loss, whichever loss it is and however labels are written."""

import torch
import torch.nn.functional as F
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st

from scalekd_hf.images import IGNORED_LABEL
from scalekd_hf.method.losses import TASK_LOSSES, counted_in_loss, task_loss


@examples(60)
@given(
    st.lists(st.booleans(), min_size=1, max_size=6),
    st.integers(2, 5),
    st.sampled_from(TASK_LOSSES),
    st.booleans(),
    st.sampled_from((0.0, 0.1)),
    st.integers(0, 2**32 - 1),
)
def test_a_loss_is_that_of_the_images_with_a_label(counts, classes, kind, soft, smoothing, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(counts), classes, generator=generator, requires_grad=True)
    labels = torch.randint(classes, (len(counts),), generator=generator)
    if soft:
        labels = torch.rand(len(counts), classes, generator=generator).softmax(1)
    counted = torch.tensor(counts)
    blanked = labels.clone()
    blanked[~counted] = IGNORED_LABEL
    loss = task_loss(logits, blanked, kind, smoothing)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(counted_in_loss(blanked, kind), counted) and not gradient[~counted].any()
    if not counted.any():
        assert loss == 0
        return
    alone = task_loss(logits[counted], labels[counted], kind, smoothing)
    (expected,) = torch.autograd.grad(alone, logits)
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close(gradient, expected)
    if kind == "cross_entropy" and soft and counted.all():  # to the bit what torch makes of it
        assert loss == F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum") / len(counts)
