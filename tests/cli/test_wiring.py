"""The published pairs as real models: what is tapped, which norm it has passed, what decays, and the rate of each step.

Everything expected is derived by hand from the authors' configurations and code, see `authors.py`; the models are at full
size, without their weights.
"""

import math

import pytest
import torch
from authors import AS_RUN
from helpers import some_slow
from test_fidelity import read, teacher_of
from torch import nn

from scalekd_hf import load_student
from scalekd_hf.training.model import build_model
from scalekd_hf.training.optimization import decayed_parameters, own_schedule


# `out_indices` of each body, and what its forward does before it puts a map out: modules, channels and grids.
RESNET50 = (("layer3", 1024, 14), ("layer4", 2048, 7), None)
MOBILENET = (("blocks.3", 512, 14), ("bn2", 1024, 7), None)  # an identity behind blocks.4
CONVNEXT = (("stages.2", 384, 14), ("norm_pre", 768, 7), "norm_pre")  # gap_before_final_norm=False
SWIN_T = (("layers.2", 384, 14), ("norm", 768, 7), "norm")
VIT_S = (("blocks.8", 384, 14), ("norm", 384, 14), "norm")  # index 8 and 11, the last one after norm1
VIT_B = (("blocks.8", 768, 14), ("norm", 768, 14), "norm")
VIT_B14 = (("blocks.8", 768, 16), ("norm", 768, 16), "norm")
MIXER_S = (("blocks.5", 512, 14), ("blocks.7", 512, 14), None)  # out_indices -3 and -1, the latter before norm1
MIXER_B = (("blocks.9", 768, 14), ("blocks.11", 768, 14), None)
MIXER_B14 = (("blocks.9", 768, 16), ("blocks.11", 768, 16), None)
EVA02 = (("blocks.9", 384, 24), ("norm", 384, 24), None)  # final_norm=False: an identity behind blocks.11
STUDENTS = {
    "swin_l_to_convnext_t": CONVNEXT,
    "swin_l_to_swin_t": SWIN_T,
    "swin_l_to_vit_s": VIT_S,
    "swin_l_to_vit_b": VIT_B,
    "eva_l_to_vit_b14": VIT_B14,
    "swin_l_to_mixer_s": MIXER_S,
    "swin_l_to_mixer_b": MIXER_B,
    "eva_l_to_mixer_b14": MIXER_B14,
    "eva_l_to_eva02_s": EVA02,
} | {name: MOBILENET if "mobilenet" in name else RESNET50 for name in AS_RUN if "_to_mob" in name or "_to_res" in name}
PREFIX = {"eva_l_to_eva02_s": 1}  # a class token, left out by `x[:, 1:]`
# The module before the last stage, widths and grids before and after that, and the norm that the last map has passed.
TEACHERS = {
    "swin_s": ("layers.2", (384, 14), (768, 7), nn.LayerNorm),
    "swin_b": ("layers.2", (512, 14), (1024, 7), nn.LayerNorm),
    "swin_l": ("layers.2", (768, 14), (1536, 7), nn.LayerNorm),
    "eva_l": ("blocks.21", (1024, 16), (1024, 16), nn.Identity),  # layers 22 and 23; norm2 comes after pooling
}


def models(name, tmp_path):
    """Student, teacher and settings of a recipe, on no device."""
    arguments, config = read(name, tmp_path)
    classes = [str(label) for label in range(1000)]
    with torch.device("meta"):
        student = load_student(
            arguments.student, labels=classes, image_size=config.image_size, **arguments.student_args
        )
        return build_model(student, teacher_of(arguments, config), config), config


def dimensions(tap):
    return tap.module, tap.dim, tap.grid[0]


@pytest.mark.parametrize("name", some_slow(AS_RUN, 6))
def test_what_is_tapped_which_norm_it_has_passed_and_what_decays(name, tmp_path):
    model, config = models(name, tmp_path)
    check_taps(name, model)
    check_decay(name, model, config)


def check_taps(name, model):
    student, teacher, (penultimate, last, norm) = model.student, model.teacher, STUDENTS[name]
    assert tuple(dimensions(tap) for tap in student.taps) == (penultimate, last)
    assert [tap.prefix for tap in student.taps] == [PREFIX.get(name, 0)] * 2
    tapped = student.model.get_submodule(student.taps[1].module)
    assert isinstance(tapped, nn.LayerNorm) == (norm is not None)
    if norm is None:
        assert isinstance(tapped, nn.Identity) or type(tapped).__name__ in ("Sequential", "MixerBlock")
    assert isinstance(model.heads.penultimate_norm, nn.LayerNorm) == (name == "swin_l_to_swin_t")

    kind = name.partition("_to_")[0]
    entering, before, after, norm = TEACHERS[kind]
    if "eva02" in name:
        before = after = (1024, 24)
    assert teacher.taps[0].module == entering
    assert type(teacher.model.get_submodule(teacher.taps[1].module)) is norm
    assert (teacher.penultimate_dim, teacher.penultimate_grid[0]) == before
    assert (teacher.dim, teacher.grid[0]) == after
    rates = [module.drop_prob for module in teacher.model.modules() if type(module).__name__ == "DropPath"]
    assert max(rates, default=0) == pytest.approx(AS_RUN[name]["teacher_drop_path"])
    for stage, heads in zip(("penultimate", "last"), AS_RUN[name]["heads"], strict=True):
        assert getattr(model.heads, f"{stage}_spatial").attn.num_heads == heads


def is_decayed(name, parameter, recipe):
    """By the authors' `paramwise_cfg`: keys that name a parameter, then its kind."""
    keys = [f".{key}" for key in AS_RUN[recipe]["no_weight_decay"] or ()]
    if any(key in name for key in keys):
        return False
    vectors_decay = AS_RUN[recipe]["decay_all"]  # no norm_decay_mult, bias_decay_mult and flat_decay_mult of 0
    return vectors_decay or parameter.ndim > 1


def check_decay(name, model, config):
    decayed = set(decayed_parameters(model, config.decay_all, config.no_weight_decay))
    parameters = dict(model.named_parameters())
    assert decayed == {key for key, parameter in parameters.items() if is_decayed(key, parameter, name)}
    queries = {key for key in parameters if key.endswith(".queries")}
    positions = {key for key in parameters if key.startswith("heads.") and key.endswith(".pos_embed")}
    assert queries and queries <= decayed  # learned ones, everywhere
    spared = any(student in name for student in ("mixer", "vit"))
    assert positions and (positions.isdisjoint(decayed) if spared else positions <= decayed)
    own = {key for key in parameters if key.endswith(("model.pos_embed", "model.cls_token"))}
    assert own.isdisjoint(decayed) if "vit" in name else own <= decayed
    assert not any("relative_position_bias_table" in key for key in decayed)
    norms = {key for key in parameters if "norm" in key and key.endswith(".weight") and parameters[key].ndim == 1}
    assert norms.isdisjoint(decayed) or AS_RUN[name]["decay_all"]


@pytest.mark.parametrize("name", AS_RUN)
def test_the_rate_of_each_step(name, tmp_path):
    _, config = read(name, tmp_path)
    facts = AS_RUN[name]
    epochs, warm_up, base = facts["num_train_epochs"], facts["warm-up epochs"], facts["learning_rate"]
    per_epoch = facts["images_per_epoch"] / facts["base_batch_size"]
    total = math.ceil(epochs * per_epoch)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    (factor,) = own_schedule(optimizer, config, total, per_epoch).lr_lambdas

    def rate(epoch, step=0):
        return base * factor(math.ceil(epoch * per_epoch) + step)

    if facts["lr_milestones"]:
        assert [rate(epoch) for epoch in (0, 29, 31, 61, 91)] == pytest.approx([0.1, 0.1, 0.01, 0.001, 1e-4])
        assert base * factor(total - 1) == pytest.approx(1e-4)
        return
    lowest = facts["lowest rate"]
    if warm_up:
        assert rate(0) == pytest.approx(base * facts["warm-up from"])
        middle = facts["warm-up from"] + (1 - facts["warm-up from"]) / 2
        assert rate(warm_up / 2) == pytest.approx(base * middle, rel=2e-3)
        assert rate(warm_up, -1) == pytest.approx(base, rel=1e-3)
    for epoch in (warm_up, warm_up + 1, epochs // 2, epochs - 1):
        cosine = (1 + math.cos(math.pi * (epoch - warm_up) / (epochs - warm_up))) / 2
        expected = lowest + (base - lowest) * cosine
        assert rate(epoch, 1) == pytest.approx(expected, rel=1e-3, abs=1e-9)
        assert rate(epoch + 1, -1) == rate(epoch, 1)  # the same until the epoch ends
    assert base * factor(total - 1) == rate(epochs - 1, 1)
