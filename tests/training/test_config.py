"""Settings: each documented, shown in --help, and refused where they are wrong."""

import dataclasses

import pytest
import torch
from processes import in_child
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils.import_utils import enable_tf32

from scalekd_hf import ScaleKDConfig
from scalekd_hf.training.precision import say_tf32_in_both_ways
from scalekd_hf.training.run_config import RunConfig


OWN = set(ScaleKDConfig.__dataclass_fields__) - set(TrainingArguments.__dataclass_fields__)


def test_every_setting_is_documented_and_has_help():
    documentation = ScaleKDConfig.__doc__ + RunConfig.__doc__
    for name in OWN:
        field = ScaleKDConfig.__dataclass_fields__[name]
        assert f"\n        {name} (`" in documentation, name
        assert field.metadata["help"], name
        if field.default not in (None, dataclasses.MISSING):
            assert f"*optional*, defaults to `{field.default!r}`".replace("'", '"') in documentation, name
    assert {"spatial_weight", "stem_norm", "crop_scale"} <= OWN


def test_help_renders(capsys):
    with pytest.raises(SystemExit) as stop:
        HfArgumentParser(ScaleKDConfig).parse_args_into_dataclasses(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in OWN)


def test_the_defaults_are_those_published_for_swin_teachers(tmp_path):
    config = ScaleKDConfig(output_dir=str(tmp_path))
    assert (config.spatial_weight, config.frequency_weight, config.last_frequency_weight) == (0.08, 0.06, None)
    assert (config.logit_weight, config.temperature, config.softmax_scale) == (None, 1.0, 5.0)
    assert (config.stem_norm, config.task_loss, config.teacher_last_blocks) == ("batch", "cross_entropy", 2)
    assert not (config.remove_unused_columns or config.ddp_find_unused_parameters or config.logging_nan_inf_filter)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("spatial_weight", -0.1),
        ("frequency_weight", float("inf")),
        ("image_size", 32.5),
        ("ema_decay", 1.0),
        ("rand_augment", 11),
        ("lr_milestones", [0.6, 0.3]),
        ("timm_optim", "lam"),
        ("student_taps", ["one"]),
        ("frequency_weight", -1),
        ("last_frequency_weight", -1),
        ("logit_weight", 1.5),
        ("temperature", 0),
        ("softmax_scale", -5),
        ("penultimate_num_heads", 0),
        ("last_num_heads", -2),
        ("teacher_last_blocks", 0),
        ("stem_norm", "group"),
        ("task_loss", "hinge"),
        ("image_size", 0),
        ("crop_scale", [0.5]),
        ("crop_scale", [0.9, 0.5]),
        ("hflip", 2),
        ("crop_pct", 1.2),
        ("label_smoothing_factor", 1.2),
        ("learning_rate", "1e-4"),
        ("spatial_weight", "0.08"),
        ("remove_unused_columns", True),
        ("logging_nan_inf_filter", True),
    ],
)
def test_an_invalid_value_is_refused_with_the_value(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}`.*{str(value)[:3]}".replace("[", r"\[")):
        ScaleKDConfig(output_dir=str(tmp_path), **{name: value})


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_are_refused_where_their_gradients_would_be_overwritten(tmp_path, mode):
    options = {"output_dir": str(tmp_path), "torch_compile_mode": mode}
    assert ScaleKDConfig(**options).torch_compile
    with pytest.raises(ValueError, match="`gradient_accumulation_steps` must be 1 with it, got 4"):
        ScaleKDConfig(**options, gradient_accumulation_steps=4)
    ScaleKDConfig(**{**options, "torch_compile_mode": "max-autotune-no-cudagraphs"}, gradient_accumulation_steps=4)


@pytest.mark.parametrize("enabled", [True, False])
def test_tf32_reads_the_same_by_both_of_torchs_names(tmp_path, enabled):
    outcome = in_child(tmp_path, _set_and_read, enabled)
    assert outcome.status == 0, outcome.text[-3000:]


def _set_and_read(enabled):
    enable_tf32(enabled)  # as the parent does where it compiles for a GPU
    say_tf32_in_both_ways()
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is enabled
    assert (
        torch.backends.cuda.matmul.fp32_precision == torch.backends.fp32_precision == ("tf32" if enabled else "ieee")
    )
    assert torch.get_float32_matmul_precision() == ("high" if enabled else "highest")
