"""The model card of a segmenter or a detector: what is known of a run, and nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..publishing.provenance import Source, citations
from ..texts import code, inline, one_line
from ..training.facts import changed, come_to, own_results, run_facts
from ..training.settings import rebuilding_settings, told_settings
from .tasks import backbone_of


__all__ = ["TransferFacts", "describe_transfer", "make_transfer_card"]

METRICS = {"mean_iou": "mean IoU", "pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean class accuracy"}
METRICS |= {
    f"{kind}_{key}": f"{kind} {name}"
    for kind in ("box", "mask")
    for key, name in {"ap": "AP", "ap50": "AP50", "ap75": "AP75"}.items()
}
LOAD = """from transformers import pipeline
import scalekd_hf.transfer  # knows the classes that are not transformers' own

find = pipeline("{pipeline}", model="{repo}")
find("image.jpg")"""
LOAD_MASKS = """import torch
from transformers import AutoModelForObjectDetection
import scalekd_hf.transfer  # knows Mask R-CNN
from scalekd_hf.transfer.detector import detect

model = AutoModelForObjectDetection.from_pretrained("{repo}").eval()
# pixel_values: normalised images, (B, 3, H, W); sizes: their original heights and widths, (B, 2)
# detect(model, {{"pixel_values": pixel_values}}, sizes)"""


@dataclass
class TransferFacts:
    """What a card says; what is None or empty is left out.

    Attributes:
        repo: the repository, or the name of the folder.
        head: the class of the model.
        pipeline: the task's name on the Hub.
        student, data: origins; `data` was trained on.
        evaluated: what the results were measured on; without it no metadata tells them.
        backbone: class, and whether it began with the student's weights.
        results: metrics by the name of a row.
        facts: name and value of what the run was.
        settings, configuration, curves, license, language, tags: see `publishing.model_card.CardFacts`.
    """

    repo: str
    head: str
    pipeline: str
    student: Source
    parameters: int
    class_names: list[str]
    data: Source | None = None
    evaluated: Source | None = None
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    configuration: dict[str, Any] = field(default_factory=dict)
    curves: bool = False
    license: str | None = None
    language: str | list[str] | None = None
    tags: list[str] = field(default_factory=list)
    teacher: None = None


def describe_transfer(
    trainer: Any,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    dataset: str | None = None,
) -> None:
    """Write the card and what belongs to it.

    Args:
        trainer: a `TransferTrainer`.
        language, license, tags: for the card's metadata.
        model_name: instead of the name of the repository.
        dataset: id or name of the data set, where the data itself does not tell.
    """
    args, publisher, model = trainer.args, trainer.publisher, trainer.trained
    state, origin = come_to(trainer)[0], backbone_of(model).origin
    total = len(backbone_of(model).state_dict())
    student = publisher.student_source
    facts = {
        "backbone": f"{student.name}{' (not published)' if student.is_local else ''}, as `{type(backbone_of(model)).__name__}`",
        "its weights": f"{total - len(origin.new)} of {total} tensors are the student's at the beginning of this run",
        "head": f"`{type(model).__name__}`",
        "images": f"{args.image_size} px",
    }
    own = own_results(trainer, state, tuple(METRICS), always=trainer.task.best)
    card = TransferFacts(
        repo=model_name or publisher.name,
        head=type(model).__name__,
        pipeline=trainer.task.pipeline,
        student=student,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        class_names=list(trainer.task.data.class_names),
        data=trainer.data or (Source(dataset) if dataset else None),
        evaluated=trainer.evaluated or (Source(dataset) if dataset else None),
        results=({"this model": own} if own else {}) | trainer.results,
        facts=facts | run_facts(trainer, dataset),
        settings=changed(told_settings(args), type(args)),
        configuration=changed(rebuilding_settings(args), type(args)),
        license=license or publisher.arguments.get("license"),
        language=language,
        tags=[tags] if isinstance(tags, str) else list(tags or []),
    )
    publisher.describe(card, state.log_history, make_transfer_card)


def make_transfer_card(facts: TransferFacts) -> ModelCard:
    """Render the card, with metadata as the Hub reads it."""
    repo = json.dumps(one_line(facts.repo), ensure_ascii=False)[1:-1].replace(
        "<", r"\u003c"
    )  # in the quotes of Python
    load = LOAD_MASKS if "mask_ap" in next(iter(facts.results.values()), {}) or "Mask" in facts.head else LOAD
    columns = [key for key in METRICS if any(key in row for row in facts.results.values())]
    restriction = facts.student.restriction
    return ModelCard.from_template(
        _metadata(facts),
        template_str=(files("scalekd_hf.transfer") / "templates" / "transfer_card.md").read_text(encoding="utf-8"),
        model_name=inline(facts.repo.split("/")[-1]),
        head=code(facts.head),
        task="gives each pixel one of" if facts.pipeline == "image-segmentation" else "finds objects of",
        num_labels=len(facts.class_names),
        student_name=code(facts.student.name),
        is_local=facts.student.is_local,
        parameters=f"{facts.parameters / 1e6:.3g} M",
        load_example=load.format(repo=repo, pipeline=facts.pipeline),
        columns=[METRICS[key] for key in columns],
        rows=[
            (inline(name), [f"{row[key]:.2%}" if key in row else "" for key in columns])
            for name, row in facts.results.items()
        ],
        curves=facts.curves,
        facts=[(inline(name), inline(value)) for name, value in facts.facts.items() if value not in (None, "")],
        settings=[(code(name), code(value)) for name, value in facts.settings.items()],
        restriction=inline(restriction) if restriction else None,
        citations=citations(None),
    )


def _metadata(facts: TransferFacts) -> ModelCardData:
    own = next(iter(facts.results.values()), {})
    known: dict[str, Any] = {
        "language": facts.language,
        "license": one_line(facts.license) if facts.license else None,
        "datasets": facts.data.hub_id if facts.data else None,
        "base_model": facts.student.hub_id,
        "base_model_relation": "finetune" if facts.student.hub_id else None,
    }
    if facts.evaluated is not None and own:
        data = facts.evaluated
        name = one_line(data.hub_id or data.name)
        known["model_name"] = one_line(facts.repo.split("/")[-1])
        known["eval_results"] = [
            EvalResult(
                task_type=facts.pipeline,
                dataset_type=name,
                dataset_name=name,
                dataset_split=one_line(data.split) if data.split else None,
                dataset_revision=data.revision,
                metric_type=key,
                metric_name=METRICS[key],
                metric_value=round(own[key], 6),
            )
            for key in METRICS
            if key in own
        ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=facts.pipeline,
        tags=[facts.pipeline, "scalekd", *map(one_line, facts.tags)],
        **{name: value for name, value in known.items() if value},
    )
