"""Where each family of timm and transformers is tapped, beside what its library says of its stages.

    python benchmarks/models.py [--role teacher [--steps]] [--only hiera swin]

Of every module of timm the smallest model, of every class of transformers its default configuration, both with fresh weights;
larger ones than --largest are left out. A line says at which modules a student is tapped and with which strides, the last two
stages and strides that the library states, and the verdict:

    agrees      the strides are the same
    differs     they are not; plans and logs say so
    unsaid      the library states nothing
    refused     the student cannot be tapped by itself, and why

"equal" are maps, of the two, that are exactly those which the library gives out itself, "shuffled" those that hold the same cells
in another order: there are none. The others are not given out, or have passed a norm or a convolution more.

Of teachers, a line says between which modules the last stage lies, and how far it is, applied to the teacher's own tokens, from its
own last map, as a share of the map's largest value. With --steps a small student learns from each for two steps, once its BatchNorms have
seen random images, and the line says how many of the loss terms fell.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, PreTrainedModel

from scalekd_hf import ScaleKDConfig, Teacher, load_student, load_teacher
from scalekd_hf.models.stages import stated_stages
from scalekd_hf.models.students import Student
from scalekd_hf.training.model import build_model


SMALLEST = """
beit_base_patch16_224 halonet_h1 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 test_convnext
cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deepseek_vit_412m
deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0
test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0
fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224
sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4
lcnetv2_small levit_128s lowformer_b0 test_mambaout test_coatnet poolformerv2_s12 gmlp_ti16_224
mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge
nest_tiny nextvit_small test_nfnet pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002
repghostnet_050 repvit_m1 res2next50 resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18
sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256
swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny test_vit
vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw
legacy_xception xception41p xcit_nano_12_p8_224
"""
LABELS = ["one", "other"]
SMALL = {  # options of configurations whose own fit no class, or are large
    "PerceiverConfig": {
        "d_latents": 64,
        "num_latents": 16,
        "num_self_attends_per_block": 1,
        "num_cross_attention_heads": 1,
    },
    "TimmWrapperConfig": {"architecture": "resnet18"},
}


def models(only: list[str]) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """One model of each module of timm and each class of transformers: its name, and what builds it."""
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        name = next((name for name in names if name in SMALLEST.split()), None) or smallest(names)
        if not only or any(word in name for word in only):
            yield name, lambda name=name: timm.create_model(name, num_classes=len(LABELS))
    for config_class, found in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.items():
        for model_class in found if isinstance(found, tuple) else (found,):
            if not only or any(word in model_class.__name__.lower() for word in only):
                options = {"num_labels": len(LABELS), **SMALL.get(config_class.__name__, {})}
                yield model_class.__name__, lambda c=config_class, m=model_class, o=options: m(c(**o))


def smallest(names: list[str]) -> str:
    """That of the fewest parameters, for modules that are newer than this file."""
    with torch.device("meta"):
        return min(names, key=lambda name: sum(p.numel() for p in timm.create_model(name).parameters()))


def taught(build: Callable[[], nn.Module], largest: float, steps: bool) -> tuple[str, str, str, str]:
    """Verdict, taps, the loss terms that fell, and the deviation of the last stage, of a teacher."""
    try:
        if (millions := size_of(build)) > largest:
            return "left out", f"{millions:.0f} M parameters", "", ""
        torch.manual_seed(0)
        teacher = load_teacher(build())
        fallen = falling(settled(teacher)) if steps else ""
    except ImportError as error:
        return "left out", str(error).strip().splitlines()[0], "", ""
    except Exception as error:  # the table holds whatever is refused
        return "refused", re.sub(r"`teacher` \S+ (\(\w+\) )?", "", str(error).strip().splitlines()[0]), "", ""
    side = teacher.spec.size[0]
    taps = ", ".join(f"{tap.module} /{side / tap.grid[0]:.3g}" for tap in teacher.taps)
    return "exact", taps, fallen, f"{teacher.deviation:.0e}"


@torch.no_grad()
def settled(teacher: Teacher) -> Teacher:
    """A teacher whose BatchNorms know images, as those of trained ones do: with fresh statistics some give out maps of zeros."""
    norms = [module for module in teacher.model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    if norms:
        teacher(torch.randn(8, 3, *teacher.spec.size))
    teacher.eval()
    return teacher


def falling(teacher: Teacher) -> str:
    """How many loss terms are lower after two steps of a small student, and how many there are."""
    student = load_student(
        "timm/resnet18", labels=LABELS, layers=(1, 1, 1, 1), channels=(8, 16, 24, 32), image_size=64
    )
    student.model.fc.bias.data = torch.tensor([3.0, -3.0])  # it is confident, and wrong
    config = ScaleKDConfig(output_dir="unused", use_cpu=True, report_to="none")
    model = build_model(student, teacher, config).train()
    head = list(student.model.fc.parameters())
    others = [p for p in model.parameters() if p.requires_grad and all(p is not own for own in head)]
    optimizer = torch.optim.AdamW([{"params": head, "lr": 0.1}, {"params": others, "lr": 3e-4}])
    images = torch.randn(4, 3, 64, 64)
    _, logits = teacher(model.normaliser.for_teacher(images))
    labels = torch.zeros(4, dtype=torch.int64) if logits is None else logits.softmax(1)  # task and teacher agree
    history = []
    for _ in range(3):
        output = model(images, labels)
        history.append({name: value.item() for name, value in output.losses.items()})
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    fallen = sum(history[-1][name] < history[0][name] for name in history[0])
    return f"{fallen} of {len(history[0])} fell"


def size_of(build: Callable[[], nn.Module]) -> float:
    """Millions of parameters."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters()) / 1e6


def report(build: Callable[[], nn.Module], largest: float) -> tuple[str, str, str, str]:
    """Verdict, taps, what the library says, and how many of the maps are exactly the library's own."""
    try:
        if (millions := size_of(build)) > largest:
            return "left out", f"{millions:.0f} M parameters", "", ""
        student = load_student(build())
        stated = stated_stages(student.model, student.spec.size)[-2:]
        said = ", ".join(f"{stage.name} /{stage.stride:.3g}" for stage in stated)
        maps = student.taps
    except ImportError as error:
        return "left out", str(error).strip().splitlines()[0], "", ""
    except Exception as error:  # the table holds whatever is refused
        reason = re.sub(r"`student` \S+ (\(\w+\) )?", "", str(error).strip().splitlines()[0])
        return "refused", reason, "", ""
    taps = ", ".join(f"{tap.module} /{student.spec.size[0] / tap.grid[0]:.3g}" for tap in maps)
    verdict = "differs" if student.tap_remarks else "agrees" if stated else "unsaid"
    return verdict, taps, said, compared(student)


@torch.no_grad()
def compared(student: Student) -> str:
    """How many of the two maps the library gives out, too; "shuffled" where the same cells lie in other places."""
    pixels = torch.randn(1, 3, *student.spec.size, generator=torch.Generator().manual_seed(0))
    found = student.eval()(pixels)[:2]
    given = list(own_maps(student.model, pixels))
    equal = sum(any(same(one, other) for other in given) for one in found)
    shuffled = any(
        same(one.flatten(2).sort().values, other.flatten(2).sort().values)
        and not any(same(one, third) for third in given)
        for one in found
        for other in given
    )
    return "shuffled" if shuffled else f"{equal} equal" if equal else ""


def same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, atol=1e-5)


def own_maps(model: Any, pixels: Tensor) -> Iterator[Tensor]:
    """The maps (B, C, h, w) that a library gives out of a model's inside."""
    if isinstance(model, PreTrainedModel):
        with contextlib.suppress(AttributeError, TypeError):
            output = model.base_model(pixels, output_hidden_states=True)
            for given in (*output.get("reshaped_hidden_states", ()), *output.hidden_states):
                side = math.isqrt(given.shape[1])
                if given.ndim == 3:  # tokens, of the image last
                    given = given[:, -(side**2) :].transpose(1, 2).unflatten(2, (side, side))
                yield from (given, given.permute(0, 3, 1, 2))
        return
    for norm in (False, True):
        with contextlib.suppress(AttributeError, AssertionError, TypeError):
            yield from model.forward_intermediates(pixels, norm=norm, intermediates_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--role", choices=["student", "teacher"], default="student")
    parser.add_argument("--steps", action="store_true", help="two steps of a small student with each teacher")
    parser.add_argument("--only", nargs="*", default=[], help="words of names")
    parser.add_argument("--largest", type=float, default=150, help="millions of parameters")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    verdicts: Counter[str] = Counter()
    print(f"{'model':<46}{'verdict':<10}{'maps':<10}taps, and what the library says")
    for name, build in models(options.only):
        if options.role == "student":
            verdict, taps, said, maps = report(build, options.largest)
        else:
            verdict, taps, said, maps = taught(build, options.largest, options.steps)
        verdicts[verdict] += 1
        print(f"{name:<46}{verdict:<10}{maps:<10}{taps}{f' | {said}' if said else ''}", flush=True)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    print(f"{sum(verdicts.values())} models: {counts}; {time.process_time():.0f} s of a core")


if __name__ == "__main__":
    main()
