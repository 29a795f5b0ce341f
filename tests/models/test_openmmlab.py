"""OpenMMLab's weights and timm's: the same network under both names, with what lies differently in it."""

import copy
import itertools
from functools import partial

import pytest
import timm
import torch
from torch import nn

from scalekd_hf.cli.main import main
from scalekd_hf.models.openmmlab import (
    classes_in,
    family_of,
    from_openmmlab,
    is_openmmlab,
    to_openmmlab,
)
from scalekd_hf.models.students import load_student


WITHOUT_TOKEN = {"class_token": False, "global_pool": "avg", "fc_norm": False}


def norm(name):
    return {f"{name}.weight", f"{name}.bias"}


linear = norm


def batchnorm(name):
    return {f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}


def resnet(deep):
    names = (
        set().union(*(batchnorm(f"stem.{i}.bn") | {f"stem.{i}.conv.weight"} for i in range(3)))
        if deep
        else batchnorm("bn1") | {"conv1.weight"}
    )
    for stage in range(1, 5):
        block = f"layer{stage}.0"
        names |= set().union(*(batchnorm(f"{block}.bn{i}") | {f"{block}.conv{i}.weight"} for i in (1, 2, 3)))
        first = int(deep and stage > 1)  # after the pooling
        names |= {f"{block}.downsample.{first}.weight"} | batchnorm(f"{block}.downsample.{first + 1}")
    return names


def swin():
    names = linear("patch_embed.projection") | norm("patch_embed.norm") | norm("norm3")
    for stage in range(4):
        block = f"stages.{stage}.blocks.0"
        names |= norm(f"{block}.norm1") | norm(f"{block}.norm2") | linear(f"{block}.attn.w_msa.qkv")
        names |= linear(f"{block}.attn.w_msa.proj") | {f"{block}.attn.w_msa.relative_position_bias_table"}
        names |= linear(f"{block}.ffn.layers.0.0") | linear(f"{block}.ffn.layers.1")
        if stage < 3:
            names |= norm(f"stages.{stage}.downsample.norm") | {f"stages.{stage}.downsample.reduction.weight"}
    return names


def convnext():
    names = norm("downsample_layers.0.0") | norm("downsample_layers.0.1") | norm("norm3")
    for stage in range(4):
        block = f"stages.{stage}.0"
        names |= {f"{block}.gamma"} | linear(f"{block}.depthwise_conv") | norm(f"{block}.norm")
        names |= linear(f"{block}.pointwise_conv1") | linear(f"{block}.pointwise_conv2")
        if stage:
            names |= norm(f"downsample_layers.{stage}.0") | linear(f"downsample_layers.{stage}.1")
    return names


def vit(twice=False):
    layer = "layers.0"
    names = (
        {"pos_embed"} | linear("patch_embed.projection") | norm("ln1") | norm(f"{layer}.ln1") | norm(f"{layer}.ln2")
    )
    names |= linear(f"{layer}.attn.qkv") | linear(f"{layer}.attn.proj") | (norm("ln2") if twice else set())
    return names | linear(f"{layer}.ffn.layers.0.0") | linear(f"{layer}.ffn.layers.1")


def mixer():
    layer = "layers.0"
    names = linear("patch_embed.projection") | norm("ln1") | norm(f"{layer}.ln1") | norm(f"{layer}.ln2")
    mixes = (f"{layer}.{kind}_mix.layers" for kind in ("token", "channel"))
    return names.union(*(linear(f"{mix}.0.0") | linear(f"{mix}.1") for mix in mixes))


def eva02():
    layer = "layers.0"
    names = {"pos_embed", "cls_token"} | linear("patch_embed.projection") | norm("ln2")
    for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.w12", "mlp.norm", "mlp.w3"):
        names |= linear(f"{layer}.{part}")
    return names


WIDTHS = {"channels": (8, 8, 8, 8), "stem_width": 8, "layers": (1, 1, 1, 1)}
NARROW = {"embed_dim": 16, "img_size": 64}
ISOTROPIC = NARROW | {"patch_size": 16, "depth": 1, "num_heads": 2}
SMALL = {
    "resnet50": ("resnet50", WIDTHS, resnet(deep=False)),
    "resnet50d": ("resnet50d", WIDTHS, resnet(deep=True)),
    "swin": (
        "swin_tiny_patch4_window7_224",
        NARROW | {"depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2},
        swin(),
    ),
    "convnext": ("convnext_tiny", {"depths": (1,) * 4, "dims": (8, 8, 16, 16), "head_norm_first": True}, convnext()),
    "convnext, normed after pooling": ("convnext_tiny", {"depths": (1,) * 4, "dims": (8, 8, 16, 16)}, convnext()),
    "vit": ("vit_small_patch16_224", ISOTROPIC | WITHOUT_TOKEN, vit()),
    "vit, normed twice": ("vit_base_patch14_224_openmmlab", ISOTROPIC, vit(twice=True)),
    "mixer": ("mixer_b14_224", NARROW | {"patch_size": 16, "num_blocks": 1}, mixer()),
    "eva02": ("eva02_small_patch14_336_openmmlab", ISOTROPIC, eva02()),
}


def small(kind):
    """A small network of timm, in evaluation mode, in which no weight or statistic is what it was made with; and its family."""
    torch.manual_seed(0)
    name, options, _ = SMALL[kind]
    model = timm.create_model(name, num_classes=5, **options).eval()
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            value.add_(0.3 * torch.rand_like(value))
            assert not key.endswith("running_var") or value.min() > 0
    return model, type(model).__name__


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", SMALL)
def test_names_are_openmmlabs_and_the_way_back_is_exact(kind):
    model, family = small(kind)
    state = model.state_dict()
    written = to_openmmlab(family, state)
    assert family_of(model) == family
    assert set(written) == {f"backbone.{name}" for name in SMALL[kind][2]} | linear("head.fc")
    assert is_openmmlab(written) and not is_openmmlab(state)
    written["backbone.norm1.weight"] = torch.ones(8)  # of maps that only distillation looks at, and what is computed
    written["backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"] = torch.ones(4, 4).long()
    written["backbone.layers.0.attn.rope.freqs_cos"] = torch.ones(4, 4)
    read = from_openmmlab(family, shapes(model), written)
    assert set(read) == set(state)
    assert all(torch.allclose(value, state[name], rtol=1e-6, atol=0) for name, value in read.items())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mobilenetv1_100", {}),  # with ReLU6
        ("seresnet50", {}),
        ("resnet50_gn", {}),
        ("resnet50", {"act_layer": "silu"}),
        ("convnextv2_atto", {}),
        ("resmlp_12_224", {}),
        ("vit_small_patch14_dinov2", {}),
        ("vit_base_patch16_clip_224", {}),
        ("eva02_small_patch14_336", {}),
        ("efficientnet_b0", {}),
        ("swinv2_tiny_window8_256", {}),
        ("resnetaa50", {}),
        ("resnetblur18", {}),
        ("resnet18", {"replace_stem_pool": True}),
        ("resnet18", {"global_pool": "max"}),
        ("convnext_nano_ols", {}),
        ("convnext_atto_rms", {}),
        ("flexivit_small", {}),
        ("vit_small_patch16_224", {"no_embed_class": True}),
        ("vit_small_patch16_224", {"act_layer": "quick_gelu"}),
        ("vit_small_patch16_224", {"act_layer": "gelu_tanh"}),
        ("vit_small_patch16_224", {"act_layer": partial(nn.GELU, approximate="tanh")}),
        ("vit_base_patch16_rpn_224", {}),
    ],
)
def test_networks_with_other_parts_or_activations_are_of_no_family(name, options):
    with torch.device("meta"):
        assert family_of(timm.create_model(name, **options)) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("backbone.layers.0.ln1.bias"), "1 missing (backbone.layers.0.ln1.bias)"),
        (lambda state: state.update({"backbone.extra": torch.ones(1)}), "1 left over (backbone.extra)"),
        (lambda state: state.update({"neck.fc.weight": torch.ones(1)}), "1 left over (neck.fc.weight)"),
        (
            lambda state: state.update({"head.fc.weight": torch.ones(5, 3)}),
            "1 of another shape (head.fc.weight (5, 3) instead of (5, 16))",
        ),
        (lambda state: state.update({"head.weight": state.pop("head.fc.weight")}), "1 missing (head.fc"),
        (lambda state: state.update({"head.layers.pre_logits.bias": torch.ones(1)}), "1 left over (head.layers.pre"),
    ],
)
def test_what_is_missing_left_over_or_of_another_shape_is_an_error_that_names_it(change, said):
    model, family = small("vit")
    state = to_openmmlab(family, model.state_dict())
    change(state)
    with pytest.raises(ValueError) as error:
        from_openmmlab(family, shapes(model), state)
    assert said in str(error.value)


def test_the_place_of_a_class_token_that_mmcls_takes_out_again_is_left_out():
    model, family = small("vit")
    state = to_openmmlab(family, model.state_dict())
    expected = state["backbone.pos_embed"]
    state["backbone.cls_token"] = torch.randn(1, 1, 16)
    state["backbone.pos_embed"] = torch.cat((torch.randn(1, 1, 16), expected), dim=1)
    with pytest.raises(ValueError, match=r"1 left over \(backbone.cls_token\); 1 of another shape"):
        from_openmmlab(family, shapes(model), state)
    read = from_openmmlab(family, shapes(model), state, without_token=True)
    assert torch.equal(read["pos_embed"], expected) and "cls_token" not in read


def test_a_place_more_in_pos_embed_without_a_class_token_is_an_error():
    model, family = small("vit")
    state = to_openmmlab(family, model.state_dict())
    state["backbone.pos_embed"] = torch.randn(1, 17, 16)
    with pytest.raises(ValueError, match="1 of another shape"):
        from_openmmlab(family, shapes(model), state, without_token=True)


def test_the_head_for_class_tokens_is_a_head():
    model, family = small("vit")
    state = to_openmmlab(family, model.state_dict())
    renamed = {name.replace("head.fc.", "head.layers.head."): value for name, value in state.items()}
    assert classes_in(renamed) == classes_in(state) == classes_in(model.state_dict()) == 5
    read = from_openmmlab(family, shapes(model), renamed)
    assert all(torch.equal(read[f"head.{part}"], state[f"head.fc.{part}"]) for part in ("weight", "bias"))


SHORTCUTS = {  # of the first block, by whether it pools, and the stem
    "resnet50": (0, "conv1.weight"),
    "resnet50c": (0, "stem.0.conv.weight"),
    "resnet50s": (0, "stem.0.conv.weight"),
    "resnet50d": (0, "stem.0.conv.weight"),
    "resnet50 pooling": (0, "conv1.weight"),
}


@pytest.mark.parametrize("kind", SHORTCUTS)
def test_the_first_shortcut_begins_at_0_with_a_deep_stem_and_without(kind):
    place, stem = SHORTCUTS[kind]
    name, _, pools = kind.partition(" ")
    model = timm.create_model(name, num_classes=5, **WIDTHS, **({"avg_down": True} if pools else {}))
    written = to_openmmlab("ResNet", model.state_dict())
    found = {name for name in written if name.startswith("backbone.layer1.0.downsample.")}
    expected = {f"layer1.0.downsample.{place}.weight"} | batchnorm(f"layer1.0.downsample.{place + 1}")
    assert found == {f"backbone.{name}" for name in expected} and f"backbone.{stem}" in written
    assert set(from_openmmlab("ResNet", shapes(model), written)) == set(model.state_dict())


def test_swins_merged_cells_lie_as_an_unfolded_convolution_has_them():
    model, family = small("swin")
    state, merging = to_openmmlab(family, model.state_dict()), model.layers[1].downsample
    image = torch.randn(2, 16, 8, 6)
    cells = nn.functional.unfold(image, kernel_size=2, stride=2).mT  # (B, 12, 64): of each channel four cells
    weight, bias = (state[f"backbone.stages.0.downsample.norm.{part}"] for part in ("weight", "bias"))
    normed = nn.functional.layer_norm(cells, (64,), weight, bias)
    expected = normed @ state["backbone.stages.0.downsample.reduction.weight"].T
    assert torch.allclose(merging(image.permute(0, 2, 3, 1)).flatten(1, 2), expected, atol=1e-5)


def test_mixers_put_out_the_same_with_another_epsilon_in_their_norms():
    theirs, family = small("mixer")
    ours = copy.deepcopy(theirs)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.mul_(0.01 if "stem" in name or "fc2" in name else 1)  # so that the epsilon counts
    state = theirs.state_dict()
    named = dict(zip(to_openmmlab(family, state), state.values(), strict=True))  # their names, and no other numbers
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(images)
        ours.load_state_dict(state)
        assert (ours(images) - expected).abs().max() > 1e-3
        ours.load_state_dict(from_openmmlab(family, shapes(ours), named))
        assert (ours(images) - expected).abs().max() < 1e-5


def test_a_vit_normed_twice_has_both_norms():
    model, _ = small("vit, normed twice")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens = model.forward_features(images)
        pooled = nn.functional.layer_norm(tokens.mean(1), (16,), model.fc_norm.weight, model.fc_norm.bias, 1e-6)
        assert torch.allclose(model(images), model.head(pooled), atol=1e-6)
    assert isinstance(model.norm, nn.LayerNorm) and (model.norm.weight != 1).all()


def test_the_rotary_positions_are_those_of_mmpretrain():
    rope = timm.create_model("eva02_small_patch14_336_openmmlab", **ISOTROPIC | {"img_size": (48, 32)}).rope
    sines, cosines = rope.get_embed().chunk(2, dim=-1)
    assert sines.shape == (3 * 2, 8)
    for row, column, channel in itertools.product(range(3), range(2), range(8)):
        position = row / 3 * 4 if channel < 4 else column / 2 * 4
        angle = torch.tensor(position * 10000 ** -(2 * (channel % 2) / 4))
        found = sines[row * 2 + column, channel], cosines[row * 2 + column, channel]
        assert torch.allclose(torch.stack(found), torch.stack((angle.sin(), angle.cos())), atol=1e-6)


def test_eva02s_gate_is_the_first_half_of_what_openmmlab_has_in_one():
    model, family = small("eva02")
    state, inputs = to_openmmlab(family, model.state_dict()), torch.randn(2, 5, 16)

    def by(name, values):
        weight, bias = (state[f"backbone.layers.0.mlp.{name}.{part}"] for part in ("weight", "bias"))
        return values @ weight.T + bias

    gate, values = by("w12", inputs).chunk(2, dim=-1)
    norm = model.blocks[0].mlp.norm
    hidden = nn.functional.layer_norm(
        nn.functional.silu(gate) * values, norm.normalized_shape, norm.weight, norm.bias, 1e-5
    )
    with torch.no_grad():
        assert torch.allclose(model.blocks[0].mlp(inputs), by("w3", hidden), atol=1e-5)


class PlainMobileNet(nn.Module):
    """MobileNet-V1 by table 1 of https://arxiv.org/abs/1704.04861, with the names of the authors' code."""

    WIDTHS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    STRIDES = (2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)

    def __init__(self):
        super().__init__()
        blocks = [nn.Sequential(*self.convolution(3, 32, 2, 3, 1))]
        for before, width, stride in zip(self.WIDTHS, self.WIDTHS[1:], self.STRIDES[1:], strict=False):
            depthwise = self.convolution(before, before, stride, 3, before)
            blocks.append(nn.Sequential(*depthwise, *self.convolution(before, width, 1, 1, 1)))
        self.backbone = nn.Module()
        self.backbone.model, self.backbone.s4 = nn.Sequential(*blocks[:12]), nn.Sequential(*blocks[12:])
        self.head = nn.Module()
        self.head.fc = nn.Linear(1024, 1000)

    @staticmethod
    def convolution(before, width, stride, side, groups):
        convolution = nn.Conv2d(before, width, side, stride, side // 2, groups=groups, bias=False)
        return convolution, nn.BatchNorm2d(width), nn.ReLU()

    def forward(self, images):
        return self.head.fc(self.backbone.s4(self.backbone.model(images)).mean((2, 3)))


def test_mobilenet_puts_out_what_a_plain_one_does(tmp_path):
    torch.manual_seed(0)
    plain = PlainMobileNet().eval()
    for name, value in plain.state_dict().items():
        if value.is_floating_point():
            value.copy_(value + 0.2 * torch.rand_like(value)) if value.ndim < 2 else value.mul_(2)
        assert "running_var" not in name or value.min() > 0
    images = torch.randn(2, 3, 224, 224)
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "mobilenet.pth")
    words = ["--student", "mobilenetv1", "--teacher", "swin_l", "--output_dir", str(tmp_path / "student")]
    main(["convert", str(tmp_path / "mobilenet.pth"), *words])
    student = load_student(str(tmp_path / "student"), pretrained=True).eval()
    with torch.no_grad():
        expected = plain(images)
        assert expected.std(dim=0).max() > 1e-3 and (student.classify(images) - expected).abs().max() < 1e-5
    back = to_openmmlab("EfficientNet", student.model.state_dict())
    assert all(torch.equal(back[name], value) for name, value in plain.state_dict().items())
