"""Images without a label do not count in the task's loss, whichever loss it is and however labels are written."""

import torch
import torch.nn.functional as F
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st

from scalekd_hf.images import IGNORED_LABEL
from scalekd_hf.method.losses import TASK_LOSSES, counted_in_loss, logit_distillation_loss, task_loss


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
    target = labels if soft else F.one_hot(labels, classes).float()
    target = (target * (1 - smoothing) + smoothing / classes)[counted]
    own = logits[counted].sigmoid() if kind == "binary_cross_entropy" else logits[counted].softmax(1)
    terms = target * own.log()
    if kind == "binary_cross_entropy":
        terms = terms + (1 - target) * (1 - own).log()
    torch.testing.assert_close(alone, -terms.sum(1).mean())
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close(gradient, expected)
    if kind == "cross_entropy" and soft and counted.all():  # to the bit what torch makes of it
        assert loss == F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum") / len(counts)


def test_soft_labels_of_no_class_count_over_sigmoids_alone():
    labels = torch.tensor([[0.0, 0.0], [0.5, 0.5], [IGNORED_LABEL, IGNORED_LABEL]])
    assert counted_in_loss(labels, "cross_entropy").tolist() == [False, True, False]
    assert counted_in_loss(labels, "binary_cross_entropy").tolist() == [True, True, False]


def test_a_temperature_that_is_not_given_is_one():
    student, teacher = torch.randn(2, 3, 4)
    expected = F.cross_entropy(student, teacher.softmax(1))
    torch.testing.assert_close(logit_distillation_loss(student, teacher), expected)
