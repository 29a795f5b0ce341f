"""Which weights of a checkpoint of OpenMMLab or timm are taken."""

import pytest
import torch

from scalekd_hf.models.openmmlab import find_weights


def state(value, prefix=""):
    names = ("backbone.conv1.weight", "backbone.bn1.running_mean", "head.fc.bias")
    return {f"{prefix}{name}": torch.full((2,), float(value)) for name in names}


AVERAGE, LAST, TEACHERS = 1, 2, 3
FILES = {
    "bare": (state(AVERAGE), "only ones"),
    "mmengine": ({"meta": {"epoch": 3}, "state_dict": state(AVERAGE)}, "only ones"),
    "several processes": ({"state_dict": state(AVERAGE, "module.")}, "only ones"),
    "distillation": (
        {
            "state_dict": {
                **state(AVERAGE, "student."),
                **state(TEACHERS, "teacher."),
                "distill_losses.x": torch.ones(1),
            }
        },
        "only ones",
    ),
    "mmengine's average": (
        {
            "state_dict": state(AVERAGE, "student.") | state(TEACHERS, "teacher."),
            "ema_state_dict": {
                **state(LAST, "module.student."),
                **state(TEACHERS, "module.teacher."),
                "steps": torch.ones(1),
            },
        },
        "moving average",
    ),
    "mmcv's average": (
        {"state_dict": state(AVERAGE) | {f"ema_{n.replace('.', '_')}": v for n, v in state(LAST).items()}},
        "moving average",
    ),
    "timm's average": ({"state_dict": state(LAST), "state_dict_ema": state(AVERAGE), "epoch": 3}, "moving average"),
}


@pytest.mark.parametrize("kind", FILES)
def test_the_students_average_is_taken_and_the_last_step_on_request(kind):
    content, which = FILES[kind]
    weights, told = find_weights(content)
    assert (
        told == which and set(weights) == set(state(0)) and all((value == AVERAGE).all() for value in weights.values())
    )
    if which == "only ones":
        with pytest.raises(ValueError, match="`raw` is on, but the checkpoint has one set of weights"):
            find_weights(content, raw=True)
    else:
        weights, told = find_weights(content, raw=True)
        assert told == "last step" and set(weights) == set(state(0))
        assert all((value == LAST).all() for value in weights.values())


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"state_dict": [1]}, 3, {"meta": {}}, torch.ones(1)])
def test_a_file_without_weights_is_refused(content):
    with pytest.raises(ValueError, match="has no weights"):
        find_weights(content)
