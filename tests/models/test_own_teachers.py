"""Teachers of neither library, and what none may do."""

import pytest
import torch
import torchvision

from scalekd_hf import load_teacher


class Plain(torch.nn.Module):
    """A network that nobody knows: four stages of convolutions, and a head."""

    def __init__(self):
        super().__init__()
        widths = (3, 8, 12, 16, 24)
        stages = [torch.nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(widths, widths[1:], strict=False)]
        self.stages = torch.nn.ModuleList(torch.nn.Sequential(stage, torch.nn.GELU()) for stage in stages)
        self.head = torch.nn.Linear(24, 10)

    def forward(self, pixel_values):
        for stage in self.stages:
            pixel_values = stage(pixel_values)
        return self.head(pixel_values.mean((2, 3)))


class OwnStage(Plain):
    """The same, with a last stage of its own."""

    def forward(self, pixel_values):
        for stage in self.stages[:-1]:
            pixel_values = stage(pixel_values)
        last = self.stages[-1](pixel_values)
        return pixel_values, last, self.head(last.mean((2, 3)))

    def last_stage(self, tokens):
        side = round(tokens.shape[1] ** 0.5)
        return self.stages[-1](tokens.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("module", "taps"),
    [(Plain, None), (Plain, ("stages.3.0", "stages.3")), (OwnStage, None), (torchvision.models.resnet18, None)],
)
def test_a_network_of_neither_library_teaches(module, taps):
    torch.manual_seed(0)
    module = module()
    teacher = load_teacher(module, taps=taps, image_size=64, labels=[str(label) for label in range(10)])
    pixel_values = torch.randn(2, 3, 64, 64)
    last_map, logits = teacher(pixel_values)
    expected = module(pixel_values)
    assert torch.equal(logits, expected[2] if isinstance(module, OwnStage) else expected)
    assert (teacher.num_labels, teacher.spec.size) == (logits.shape[1], (64, 64))
    tokens = torch.randn(2, 16 if isinstance(module, torchvision.models.ResNet) else 64, teacher.penultimate_dim)
    assert teacher.last_stage(tokens).shape == (2, last_map[0, 0].numel(), teacher.dim)


def test_a_last_stage_that_is_not_the_models_own_is_refused_with_both_figures():
    class Wrong(OwnStage):
        def last_stage(self, tokens):
            return super().last_stage(tokens) + 0.1

    with pytest.raises(ValueError, match="applied to its own tokens, gives another map.*differ by 0.1 where"):
        load_teacher(Wrong(), image_size=64)

    class Skipping(Plain):
        """Its last stage gets more than the tokens that enter it."""

        def forward(self, pixel_values):
            first = self.stages[0](pixel_values)
            third = self.stages[2](self.stages[1](first))
            return self.head((self.stages[3](third) + first.mean()).mean((2, 3)))

    with pytest.raises(ValueError, match="`teacher` 'Skipping'.*teacher_taps"):
        load_teacher(Skipping(), image_size=64)
    with pytest.raises(ValueError, match=r"`teacher_taps` names \['no'\]"):
        load_teacher(Plain(), image_size=64, taps=("no", "stages.3"))
    with pytest.raises(ValueError, match="`teacher_taps` are.*stages.3 gets no map|head puts out no map"):
        load_teacher(Plain(), image_size=64, taps=("stages.3", "head"))


class Random(OwnStage):
    def forward(self, pixel_values):
        return super().forward(pixel_values + torch.rand(()))


class Frozen(OwnStage):
    last_stage = torch.no_grad()(OwnStage.last_stage)


class Noisy(Plain):
    def forward(self, pixel_values):
        return super().forward(pixel_values + torch.rand(()))


@pytest.mark.parametrize(
    ("module", "taps", "message"),
    [
        (Noisy, None, "gives another map of the same image each time"),
        (Random, None, "gives another map of the same image each time"),
        (Frozen, None, "no gradient passes through its last stage"),
        (Plain, ("stages.3", "stages.1"), "name one that comes later"),
    ],
)
def test_teachers_that_would_teach_noise_or_nothing_are_refused(module, taps, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(module(), image_size=64, taps=taps)
