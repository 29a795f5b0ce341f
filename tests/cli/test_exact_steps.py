"""One optimiser step of every recipe, in small, against the plain transcription in `reference.py`."""

import copy
import dataclasses

import pytest
import reference
import torch
from authors import AS_RUN
from test_fidelity import read
from test_wiring import STUDENTS as TAPS
from test_wiring import is_decayed

from scalekd_hf import ScaleKDTrainer, load_student, load_teacher


CLASSES = 6
SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 48, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2)}
EVA = {"img_size": 56, "embed_dim": 64, "depth": 3, "num_heads": 4}
SMALL_BODIES = {
    "timm/resnet50": ("timm/resnet50", {"layers": (1, 1, 1, 1), "channels": (8, 8, 12, 16)}),
    "timm/mobilenetv1_100": ("timm/mobilenetv1_100", {}),
    "timm/convnext_tiny": ("timm/convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}),
    "timm/swin_tiny_patch4_window7_224": ("timm/swin_tiny_patch4_window7_224", {**SWIN, "embed_dim": 8}),
    "timm/mixer": ("timm/mixer_b14_224", {"num_blocks": 4, "embed_dim": 24, "patch_size": 8}),
    "timm/vit": ("timm/vit_base_patch16_224", {"depth": 4, "embed_dim": 24, "num_heads": 2}),
    "timm/eva02": ("timm/eva02_small_patch14_336", {"depth": 4, "embed_dim": 24, "num_heads": 2}),
}


def small_pair(arguments):
    """The recipe's models with few and narrow blocks, without stochastic depth, whose draws nobody could repeat."""
    torch.manual_seed(0)
    is_eva = "eva_l" in arguments.teacher
    options = {**(EVA if is_eva else SWIN), **arguments.teacher_args}
    teacher = load_teacher(arguments.teacher, pretrained=False, num_classes=CLASSES, **options)
    name, options = next(value for key, value in SMALL_BODIES.items() if arguments.student.startswith(key))
    options = {**arguments.student_args, **options, "num_classes": CLASSES, "drop_path_rate": 0}
    student = load_student(name, image_size=56 if is_eva else 64, **options)
    for parameter in (*student.parameters(), *teacher.parameters()):
        if parameter.std() < 1e-3:  # zeros, ones and what begins near them: not what a trained model has
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.1)
    return student.double(), teacher.double()


def last_module(model, name):
    """What stands for the last tap in a body of other depth."""
    return model.blocks[-1] if name.startswith("blocks") else model.get_submodule(name)


class Plain:
    """Student, teacher and heads of a recipe, computed from their bodies and the equations."""

    def __init__(self, model, name):
        self.model, self.facts, self.tapped = copy.deepcopy(model), AS_RUN[name], {}
        body = self.model.student.model
        penultimate, last, _ = TAPS[name]
        blocks = getattr(body, "blocks", ())
        if (
            penultimate[0].startswith("blocks") and len(blocks) == 4
        ):  # the third of four, the second from the end but one
            first = (
                blocks[2] if hasattr(blocks[0], "attn") and "eva" not in name + self.facts["student"] else blocks[1]
            )
        else:
            first = body.get_submodule(penultimate[0])
        if "vit" in name:
            first = blocks[2]
        for key, module in (("penultimate", first), ("last", last_module(body, last[0]))):
            module.register_forward_hook(lambda _, __, output, key=key: self.tapped.__setitem__(key, output))
        self.parameters = {**dict(self.model.student.named_parameters(prefix="student"))}
        self.parameters |= dict(self.model.heads.named_parameters(prefix="heads"))

    def as_map(self, x):
        if x.ndim == 4:
            return x.permute(0, 3, 1, 2) if "swin_t" in self.facts["student"] else x
        side = int(x.shape[1] ** 0.5)
        return x[:, x.shape[1] - side**2 :].transpose(1, 2).unflatten(2, (side, side))

    def last_stage(self, tokens):
        body = self.model.teacher.model
        if "swin" in self.facts["teacher"]:
            side = int(tokens.shape[1] ** 0.5)
            return body.norm(body.layers[-1](tokens.unflatten(1, (side, side)))).flatten(1, 2)
        for block in body.blocks[-2:]:
            tokens = block(tokens)
        return tokens

    def losses(self, images, labels):
        facts, heads = self.facts, self.model.heads
        body = self.model.teacher.model
        with torch.no_grad():
            features = body.forward_features(images)
            teacher_logits = body.forward_head(features)
        tokens = features.flatten(1, 2) if "swin" in facts["teacher"] else features[:, 1:]
        side = int(tokens.shape[1] ** 0.5)
        teacher_last = tokens.transpose(1, 2).unflatten(2, (side, side))
        logits = self.model.student.model(images)
        penultimate, last = self.as_map(self.tapped["penultimate"]), self.as_map(self.tapped["last"])
        if facts["penultimate_norm"]:
            penultimate = reference.channel_norm(dict(heads.penultimate_norm.named_parameters()), penultimate)
        weights = {name: dict(projector.named_parameters()) for name, projector in heads.projectors()}
        if "last_frequency" not in weights:
            weights["last_frequency"] = weights["last_spatial"]  # computed, and weighted with 0
        losses = reference.feature_losses(
            *(weights, penultimate, last, teacher_last, self.last_stage, facts["heads"], facts["softmax_scale"]),
            stem_norm=facts["stem_norm"],
        )
        if facts["task_loss"] == "binary_cross_entropy":
            losses["task"] = reference.binary_task_loss(logits, labels)
        else:
            losses["task"] = reference.task_loss(logits, labels, facts["label_smoothing_factor"])
        losses["logit"] = reference.logit_loss(logits, teacher_logits, 1.0)
        return losses

    def total(self, losses):
        facts, share = self.facts, self.facts["logit_weight"]
        spatial, frequency, last = facts["spatial_weight"], facts["frequency_weight"], facts["last_frequency_weight"]
        return (
            (1 - share) * losses["task"]
            + share * losses["logit"]
            + spatial * (losses["penultimate_spatial"] + losses["last_spatial"])
            + frequency * losses["penultimate_frequency"]
            + (frequency if last is None else last) * losses["last_frequency"]
        )

    def step(self, images, labels, recipe):
        names, parameters = zip(*self.parameters.items(), strict=True)
        total = self.total(self.losses(images, labels))
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
        decayed = [is_decayed(name, parameter, recipe) for name, parameter in self.parameters.items()]
        facts = self.facts
        with torch.no_grad():
            reference.first_step(
                *(facts["optimizer"], parameters, gradients, facts["learning_rate"], facts["weight_decay"], decayed),
                *(facts["max_grad_norm"], facts["optimizer's epsilon"]),
            )


# MobileNet-V1, which cannot be made small, and pairs that differ from another in numbers alone take their time.
LATER = ("mobilenetv1", "swin_b_to", "600_epochs", "mixer_b", "vit_b")
NAMES = [pytest.param(n, marks=pytest.mark.slow) if any(part in n for part in LATER) else n for n in AS_RUN]


@pytest.mark.parametrize("name", NAMES)
def test_one_step_is_that_of_the_plain_transcription(name, tmp_path):
    arguments, config = read(name, tmp_path)
    student, teacher = small_pair(arguments)
    # At the recipe's full rate: no warm-up, no milestone, and the batch that the rate is for.
    whole = {
        "max_steps": 1,
        "warmup_steps": 0,
        "lr_milestones": None,
        "base_batch_size": 4,
        "per_device_train_batch_size": 4,
    }
    small = {"image_size": None, "teacher_image_size": None, "images_per_epoch": 4, "sync_batchnorm": "none"}
    small |= {"save_strategy": "no", "report_to": "none", "teacher_drop_path": 0, "ema_decay": 0}
    config = dataclasses.replace(config, **whole, **small)
    torch.manual_seed(1)
    images = torch.randn(4, 3, *student.spec.size).double()
    labels = torch.tensor([0, 3, 5, 3])
    data = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    trainer = ScaleKDTrainer(student, teacher, config, data)
    trainer.model.double()
    plain = Plain(trainer.model, name)

    def compare():
        trainer.model.train()
        expected = plain.losses(images, labels)
        found = trainer.model(images, labels)
        assert found.loss.item() == pytest.approx(plain.total(expected).item(), rel=1e-8)
        for term, value in found.losses.items():
            assert value.item() == pytest.approx(expected[term].item(), rel=1e-8), term
        return {term: value.item() for term, value in found.losses.items()}

    before = compare()
    trainer.train()
    plain.step(images, labels, name)
    after = compare()
    assert all(after[term] != pytest.approx(before[term], rel=1e-4) for term in before)
