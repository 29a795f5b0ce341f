"""What a run would do, computed on the meta device: no weights, no data, no GPU."""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, get_scheduler

from ..data.dataset import check_dataset, dataset_labels, shown_labels
from ..data.holdout import held_out_share, refuse_stream
from ..data.labels import class_order
from ..data.loading import count_images, load_data
from ..data.preparation import Preparation
from ..method.heads import MimickingHeads
from ..models.saving import check_rebuildable
from ..models.students import Student, load_student
from ..models.teachers import Teacher, load_teacher
from ..training.backbones import FEATURES_ALONE, check_backbone_run
from ..training.config import ScaleKDConfig
from ..training.config_checks import departures
from ..training.model import ScaleKDModel, attention_heads, build_model, class_names
from ..training.optimization import scaled_learning_rate, timm_optimizer
from ..training.run_folder import check_output_dir
from .flops import flops_of
from .plan_text import plan_text, shown
from .recipe import DistillArguments, as_words, parse_config, student_options
from .scaling import communication, memory_by_launcher, scaling


__all__ = ["Plan", "classes_of", "gflops_of", "plan", "plan_run", "plan_words"]

IMAGES = 2  # in the dry run: BatchNorm refuses one image


@dataclass
class Plan:
    """What a run would do; `error` says why it would fail, if it would.

    Parameters are counts, FLOPs are per image, memory in GiB per process.
    """

    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    projectors: dict[str, dict[str, Any]] = field(default_factory=dict)
    gflops_per_image: dict[str, float] = field(default_factory=dict)
    memory_gib: dict[str, float] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    communication_gb: dict[str, float] = field(default_factory=dict)
    launcher_gib: dict[str, float] = field(default_factory=dict)
    scaling: dict[str, dict[str, Any]] = field(default_factory=dict)
    precision: str = "float32"
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def to_text(self) -> str:
        """A table for people."""
        return plan_text(self)


def plan_run(arguments: DistillArguments, config: ScaleKDConfig, processes: int | None = None) -> Plan:
    """Plan a run.

    Args:
        arguments, config: as `parse_config` reads them.
        processes: to plan for; by default those of this launch.
    """
    result = Plan()
    try:
        if not config.resume_from_checkpoint:
            check_output_dir(str(config.output_dir), config.overwrite_output_dir)
        data = _local_data(arguments)
        train = data.get("train_dataset")
        images = getattr(train, "num_rows", None) or count_images(arguments) if data else None
        with torch.device("meta"):
            model = _build(arguments, config, train)
            _describe_models(result, model)
            _count(result, model, config)
        _check_data(data, config, model.student)
        _schedule(result, arguments, config, processes or config.world_size, images)
        _estimate_scaling(result, model, config, processes or config.world_size)
        _remember_warnings(result, model, config)
        _note_hours(result, arguments, processes or config.world_size)
    except Exception as error:  # whatever would stop the run is the answer
        result.error = str(error) or repr(error)
    return result


def _local_data(arguments: DistillArguments) -> dict[str, Any]:
    """Training and evaluation data by the name that errors give them, where they are here; refuses what the run would refuse."""
    if arguments.dataset is not None and not Path(arguments.dataset).is_dir():
        share = held_out_share(arguments.eval_split)
        if share is not None and arguments.streaming:
            refuse_stream(share)
        return {}
    return dict(zip(("train_dataset", "eval_dataset"), load_data(arguments), strict=True))


def _check_data(data: dict[str, Any], config: ScaleKDConfig, student: Student) -> None:
    """Refuse columns and labels that do not fit the student."""
    for name, dataset in data.items():
        if dataset is not None:
            column = config.label_column if config.has_labels and student.num_labels else None
            if column is not None:
                class_order(name, dataset_labels(dataset, column), student.labels, student.num_labels)
            preparation = Preparation(
                student.spec,
                name == "train_dataset",
                config.image_column,
                column,
                num_labels=student.num_labels or None,
                names=student.labels,
            )
            check_dataset(dataset, name, preparation)


def classes_of(
    arguments: DistillArguments, config: ScaleKDConfig, train: Any, teacher: Teacher | None
) -> list[str] | None:
    """Names of the student's classes: those that are stated or the data set's, else the teacher's, else what the labels show.

    None of a backbone.
    """
    if arguments.num_classes == 0:
        return None
    if arguments.num_classes is None and arguments.class_names is None:
        named = dataset_labels(train, config.label_column) or class_names(teacher)
        return named or shown_labels(train, config.label_column)
    stated: Any = arguments.class_names
    return shown_labels(train, config.label_column, arguments.num_classes, stated)


def _build(arguments: DistillArguments, config: ScaleKDConfig, train: Any) -> ScaleKDModel:
    teacher = load_teacher(
        arguments.teacher,
        pretrained=False,
        last_blocks=config.teacher_last_blocks,
        drop_path=config.teacher_drop_path,
        image_size=config.teacher_image_size,
        taps=config.teacher_taps,
        **dict(arguments.teacher_args or {}),  # type: ignore[arg-type]
    )
    student = load_student(
        arguments.student,
        labels=classes_of(arguments, config, train, teacher),
        image_size=config.image_size,
        **student_options(arguments),
    )
    check_rebuildable(student)
    if not student.num_labels:
        check_backbone_run(student, teacher, config)
    return build_model(student, teacher, config).train()


def _describe_models(result: Plan, model: ScaleKDModel) -> None:
    student, teacher = model.student, model.teacher
    assert teacher is not None
    (first, second), dims, grids = student.taps, student.dims, student.grids
    result.models["teacher"] = {
        "name": teacher.name,
        "parameters": _parameters(teacher),
        "image_size": teacher.spec.size,
        "penultimate_grid": teacher.penultimate_grid,
        "penultimate_dim": teacher.penultimate_dim,
        "last_grid": teacher.grid,
        "last_dim": teacher.dim,
    }
    result.models["student"] = {
        "name": student.name,
        "parameters": _parameters(student),
        "image_size": student.spec.size,
        "penultimate_tap": first.module,
        "penultimate_grid": grids[0],
        "penultimate_dim": dims[0],
        "last_tap": second.module,
        "last_grid": grids[1],
        "last_dim": dims[1],
    }
    result.warnings += student.tap_remarks


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def gflops_of(work: Callable[[], Any]) -> float:
    """GFLOP per image of `work` on `IMAGES` images."""
    return flops_of(work) / IMAGES / 1e9


def _count(result: Plan, model: ScaleKDModel, config: ScaleKDConfig) -> None:
    student, teacher, heads = model.student, model.teacher, model.heads
    assert teacher is not None
    pixel_values = torch.zeros(IMAGES, 3, *student.spec.size)
    teacher_pixels = model.normaliser.for_teacher(pixel_values)
    parts = {"teacher forward": gflops_of(lambda: teacher(teacher_pixels))}
    result.models["teacher"]["gflops"] = parts["teacher forward"]
    with torch.no_grad():
        result.models["student"]["gflops"] = gflops_of(lambda: student(pixel_values))
    parts["student"] = gflops_of(lambda: student(pixel_values)[2].sum().backward())
    if heads is not None:
        last_map, _ = teacher(teacher_pixels)
        maps = [_map(dim, grid) for dim, grid in zip(student.dims, student.grids, strict=True)]
        whole = gflops_of(lambda: torch.stack([*heads(*maps, last_map, teacher.last_stage).values()]).sum().backward())
        views = sum(hasattr(heads, f"penultimate_{view}") for view in ("spatial", "frequency"))
        count = teacher.penultimate_grid[0] * teacher.penultimate_grid[1]
        tokens = torch.zeros(IMAGES, count, teacher.penultimate_dim, requires_grad=True)
        stage = views * gflops_of(lambda: teacher.last_stage(tokens).sum().backward())
        parts |= {"projectors": whole - stage, "teacher's last stage, twice": stage}
        _describe_projectors(result, model, config, maps)
    result.gflops_per_image = {**parts, "total": sum(parts.values())}
    labels = torch.zeros(IMAGES, dtype=torch.long) if config.has_labels else None
    kept = _SavedBytes(model)
    with kept:
        model(pixel_values, labels)
    _memory(result, model, config, kept.total / IMAGES)


def _map(dim: int, grid: tuple[int, int]) -> Tensor:
    return torch.zeros(IMAGES, dim, *grid, requires_grad=True)


def _describe_projectors(result: Plan, model: ScaleKDModel, config: ScaleKDConfig, maps: list[Tensor]) -> None:
    teacher, heads = model.teacher, model.heads
    assert teacher is not None and heads is not None
    per_stage = dict(zip(("penultimate", "last"), attention_heads(teacher, config), strict=True))
    projector: Any
    for name, projector in heads.projectors():
        stage = name.split("_")[0]
        inputs = [maps[stage == "last"]]
        if getattr(projector, "queries", inputs) is None:
            inputs.append(torch.zeros(IMAGES, math.prod(projector.teacher_grid), teacher.dim))
        before, after = inputs[0].shape[1:], (*projector.teacher_grid, projector(*inputs).shape[-1])
        result.projectors[name] = {
            "heads": per_stage[stage] if config.projector == "cross_attention" else None,
            "parameters": _parameters(projector),
            "gflops": gflops_of(partial(projector, *inputs)),
            "maps": f"{before[1]}x{before[2]}, {before[0]} to {after[0]}x{after[1]}, {after[2]}",
        }


class _SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps for the backward pass, each storage once, weights not counted."""

    def __init__(self, model: nn.Module):
        self.total = 0.0
        self._storages = [parameter.untyped_storage() for parameter in model.parameters()]  # kept, so that ids last
        self._seen = set(map(id, self._storages))
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in self._seen and not isinstance(tensor, nn.Parameter):
            self._seen.add(id(storage))
            self._storages.append(storage)
            self.total += storage.nbytes()
        return tensor


def _memory(result: Plan, model: ScaleKDModel, config: ScaleKDConfig, bytes_per_image: float) -> None:
    gib = 2**30
    trained = sum(_parameters(module) for _, module in model.trained_modules())
    optimizer = str(config.timm_optim or getattr(config.optim, "value", config.optim))
    states = 4 if any(name in optimizer for name in ("sgd", "momentum")) else 8
    half = 0.5 if config.bf16 or config.fp16 else 1.0
    parts = {
        "teacher": 4 * _parameters(model.teacher) / gib if model.teacher is not None else 0.0,
        "student and projectors": 4 * trained / gib,
        "gradients": 4 * trained / gib,
        "optimiser": states * trained / gib,
        "moving average": 4 * _parameters(model.student) / gib if config.ema_decay else 0.0,
        "weights in bf16": 2 * trained / gib if config.bf16 else 0.0,  # autocast keeps them for the backward pass
        "activations": bytes_per_image * half * config.per_device_train_batch_size / gib,
    }
    result.memory_gib = {**parts, "total": sum(parts.values())}


def _schedule(
    result: Plan, arguments: DistillArguments, config: ScaleKDConfig, processes: int, images: int | None
) -> None:
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    files = sorted(glob.glob(arguments.train_files)) if arguments.train_files else []
    images = config.images_per_epoch or images or 0
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * images / batch)
    _check_optimiser(config, steps or 1000)
    rate = scaled_learning_rate(config, batch)
    result.schedule = {"processes": processes, "global batch": batch, "learning rate": rate}
    if steps:
        result.schedule |= {"steps": steps, "images seen": steps * batch}
    else:
        result.warnings.append(
            "the run counts the images when it starts, which reads a stream whole: set `max_steps`, or `images_per_epoch`."
        )
    if files and arguments.streaming:
        readers = processes * max(1, config.dataloader_num_workers or 0)
        result.schedule["shards / readers"] = f"{len(files)} / {readers}"
        if len(files) < readers:
            result.warnings.append(
                f"{len(files)} shards for {readers} readers (ranks x workers): each reads its part of a shard, and "
                "what stands before it in its piece of the file."
            )
    if rate != config.learning_rate:
        result.warnings.append(
            f"the global batch is {batch}, the learning rate {config.learning_rate:g} is for {config.base_batch_size}: "
            f"it is scaled to {rate:g} ({config.lr_scaling})."
        )


def _estimate_scaling(result: Plan, model: ScaleKDModel, config: ScaleKDConfig, processes: int) -> None:
    trained = sum(_parameters(module) for _, module in model.trained_modules())
    result.communication_gb = communication(trained, processes)
    parts = {name: gib for name, gib in result.memory_gib.items() if name != "total"}
    result.launcher_gib = memory_by_launcher(parts, processes)
    gflops, accumulation = result.gflops_per_image["total"], config.gradient_accumulation_steps
    result.precision = "bf16" if config.bf16 else "fp16" if config.fp16 else "float32"
    half = result.precision != "float32"
    result.scaling = scaling(gflops, config.per_device_train_batch_size, trained, accumulation, half)


def _note_hours(result: Plan, arguments: DistillArguments, processes: int) -> None:
    images, per_gpu = result.schedule.get("images seen"), result.scaling["8"]["images_per_second"] / 8
    if images:
        hours = images / per_gpu / 3600
        result.notes.append(
            f"{shown(hours)} GPU-hours on {processes} H100 ({result.precision}, estimated), without evaluations."
        )
    if arguments.baseline:
        work = result.gflops_per_image
        share = work["student"] / work["total"]
        result.notes.append(
            f"`baseline` first trains the student alone, for as many steps: {share:.0%} of this work more."
        )


def _remember_warnings(result: Plan, model: ScaleKDModel, config: ScaleKDConfig) -> None:
    student, teacher = model.student, model.teacher
    assert teacher is not None
    if not student.num_labels:
        result.notes.append(f"the student has no classifier: {FEATURES_ALONE}.")
    asked = (config.penultimate_num_heads, config.last_num_heads)
    if isinstance(model.heads, MimickingHeads) and None in asked:
        result.notes.append(f"the projectors' heads are chosen: {attention_heads(teacher, config)}.")
    result.warnings += departures(config)
    if teacher.spec.size != student.spec.size:
        result.warnings.append(
            f"images are resized from {student.spec.size} to {teacher.spec.size} for the teacher, on the device."
        )


def _check_optimiser(config: ScaleKDConfig, steps: int) -> None:
    """Build optimiser and schedule for one parameter: what they refuse, the run would."""
    parameter = nn.Parameter(torch.zeros(1))
    if config.timm_optim is not None:
        optimizer_class, options = timm_optimizer(config, config.learning_rate)
    else:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(config)
    optimizer = optimizer_class([parameter], **options)
    if not config.lr_milestones:
        warmup = config.get_warmup_steps(steps)
        get_scheduler(config.lr_scheduler_type, optimizer, warmup, steps, config.lr_scheduler_kwargs)  # type: ignore[arg-type]


def plan(config: str | Path | Mapping[str, Any], processes: int | None = None) -> Plan:
    """Plan the run that a configuration describes.

    Args:
        config: a YAML file, or its settings as a mapping.
        processes: to plan for; by default those of this launch.
    """
    return plan_words(as_words(dict(config)) if isinstance(config, Mapping) else [str(config)], processes=processes)


def plan_words(words: Sequence[str], processes: int | None = None) -> Plan:
    """Plan the run of a command line; settings that are refused are the plan's error."""
    try:
        arguments, config = parse_config(DistillArguments, [*words, *without_gpu()])
    except ValueError as error:
        return Plan(error=str(error))
    return plan_run(arguments, config, processes or arguments.plan_processes)


def without_gpu() -> list[str]:
    """The words that let a plan for GPUs be made without one."""
    return [] if torch.cuda.is_available() else ["--use_cpu", "true"]
