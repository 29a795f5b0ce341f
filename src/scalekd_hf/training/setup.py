"""What `ScaleKDTrainer` is made of before `Trainer` sees it: models, settings and data sets that fit each other."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers import set_seed

from ..data.dataset import dataset_labels, has_names, shown_labels
from ..data.imagenet import CLASSES, check_usual_order
from ..data.preparation import Collator, collate
from ..data.stream import ImageStream
from ..models.saving import check_rebuildable
from ..models.students import Student
from ..models.teachers import Teacher
from ..publishing.provenance import Source, data_source
from .backbones import check_backbone_run, resolved_logit_weight
from .config import ScaleKDConfig
from .config_checks import check_processes
from .epochs import count_steps
from .feeding import prepare_images
from .metrics import OfCounted, compute_accuracy, compute_neighbours, keep_top5
from .model import ScaleKDModel, build_model
from .optimization import timm_optimizer
from .precision import autocast_under_engines
from .refused import check_arguments
from .run_folder import check_writable


__all__ = ["Setup", "set_up"]


@dataclass
class Setup:
    """The arguments of a trainer, checked and prepared.

    Attributes:
        args: a copy of the caller's.
        model: student, teacher and heads.
        data_sets: `train_dataset` and `eval_dataset`, prepared.
        options: the other arguments of `Trainer`.
        epochs: to train a stream for, where `max_steps` was counted from them.
        data, evaluated: where the images to train on and the evaluated ones come from, if that is known.
    """

    args: ScaleKDConfig
    model: ScaleKDModel
    data_sets: dict[str, Any]
    options: dict[str, Any]
    epochs: float | None
    data: Source | None
    evaluated: Source | None


def set_up(
    model: str | nn.Module | Student,
    teacher: str | nn.Module | Teacher | None,
    args: ScaleKDConfig,
    train_dataset: Any,
    eval_dataset: Any,
    options: dict[str, Any],
) -> Setup:
    """Build the models, and prepare the data sets for them. Arguments are those of `ScaleKDTrainer`.

    Raises:
        ValueError: models, images or labels that do not fit each other.
    """
    if not isinstance(args, ScaleKDConfig):
        raise ValueError(f"`args` must be a `ScaleKDConfig`, got a `{type(args).__name__}`.")
    check_processes(args)
    if args.should_save and train_dataset is not None:
        check_writable(str(args.output_dir))
    # The caller's may be for other runs, too; each needs a DeepSpeed plugin of its own.
    args = copy.copy(args) if args.deepspeed_plugin is None else dataclasses.replace(args)
    args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type != "cpu"
    set_seed(args.seed)
    data = _by_name(train_dataset, eval_dataset)
    labels = (dataset_labels(dataset, args.label_column) for dataset in data.values())
    named = next((names for names in labels if names), None)
    shown = shown_labels(train_dataset, args.label_column) if named is None and isinstance(model, str) else None
    distiller = build_model(model, teacher, args, named, shown)
    distiller.autocast_to = autocast_under_engines(args)
    student = distiller.student
    check_rebuildable(student)
    args.logit_weight = resolved_logit_weight(args, distiller)
    if args.logit_weight and distiller.teacher is not None:
        check_imagenet_order(distiller.teacher, student.labels or named)
    if not student.num_labels and train_dataset is not None:
        check_backbone_run(student, teacher, args)
    for dataset in data.values():
        names = dataset_labels(dataset, args.label_column)
        if dataset is train_dataset and student.labels is None and has_names(dataset, args.label_column):
            names = shown_labels(dataset, args.label_column)  # which it will learn
        if names and student.labels is None and len(names) == student.num_labels:
            student.name_labels(names)
    if args.sync_batchnorm != "none" and args.world_size > 1:
        if args.device.type != "cuda":
            raise ValueError("`sync_batchnorm` needs GPUs: torch has no synchronised BatchNorm on the CPU.")
        distiller.synchronise_batchnorms(args.sync_batchnorm)
    options = _options(args, options, student)
    train_dataset = prepare_images(train_dataset, "train_dataset", student, args)
    epochs, is_stream = None, isinstance(train_dataset, ImageStream)
    args.ignore_data_skip |= is_stream  # it finds its place itself
    if is_stream and args.max_steps <= 0:
        epochs, args.max_steps = args.num_train_epochs, count_steps(train_dataset, args)
    eval_dataset = prepare_images(eval_dataset, "eval_dataset", student, args)
    source = data_source(next((dataset for dataset in data.values() if dataset is not None), None))
    evaluated = data_source(data.get("eval_dataset"))  # of several, no figure is the model's
    data_sets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    return Setup(args, distiller, data_sets, options, epochs, source, evaluated)


def check_imagenet_order(teacher: Teacher, names: list[str] | None) -> None:
    """Refuse names of ImageNet's classes in another order than that of a timm teacher, which names none.

    Raises:
        ValueError: with a class that stands elsewhere.
    """
    tag = str((getattr(teacher.model, "pretrained_cfg", None) or {}).get("tag"))
    usual = teacher.labels is None and teacher.name.startswith("timm/") and "in1k" in tag
    if usual and names is not None and teacher.num_labels == CLASSES == len(names):
        check_usual_order(names, "the data", f"the teacher {teacher.name!r}")


def _by_name(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """The data sets by the argument that errors name, that to train on first."""
    evaluations = {"eval_dataset": eval_dataset}
    if isinstance(eval_dataset, dict):
        evaluations = {f"eval_dataset[{key!r}]": dataset for key, dataset in eval_dataset.items()}
    return {"train_dataset": train_dataset, **evaluations}


def _options(args: ScaleKDConfig, options: dict[str, Any], student: Student) -> dict[str, Any]:
    """Arguments of `Trainer`, with what takes the place of those that were not given."""
    options = dict(options)
    is_ours = options.get("compute_metrics") is None and options.get("preprocess_logits_for_metrics") is None
    check_arguments(options, is_ours, args)
    if is_ours and not student.num_labels:
        options["compute_metrics"] = partial(compute_neighbours, device=args.device)
    elif is_ours:
        options |= {"compute_metrics": compute_accuracy, "preprocess_logits_for_metrics": keep_top5}
    elif options.get("compute_metrics") is not None:
        options["compute_metrics"] = OfCounted(options["compute_metrics"])
    options["data_collator"] = Collator(options.get("data_collator") or collate, student.num_labels or None)
    if args.timm_optim is not None:
        options.setdefault("optimizer_cls_and_kwargs", timm_optimizer(args, args.learning_rate))
    return options
