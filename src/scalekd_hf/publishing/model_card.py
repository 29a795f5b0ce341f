"""The model card of a student: what is known of a run, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import timm
import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from ..texts import code, inline, one_line
from .provenance import Source, citations


__all__ = ["MARK", "CardFacts", "make_card", "table", "update_evaluation"]

MARK = "<!-- Made by scalekd_hf."  # a card without it was changed by somebody, and is theirs
EVALUATION = re.compile(r"(<!-- evaluation -->\n).*?(<!-- /evaluation -->)", re.DOTALL)
DISTILLED, ALONE = "student distilled", "student alone"  # rows of results
HEADERS = {"top1": "top-1", "top5": "top-5", "nll": "NLL", "ece": "ECE", "loss": "loss"}
HEADERS |= {"neighbours_top1": "neighbours' top-1", "knn_top1": "k-NN top-1", "linear_top1": "linear probe top-1"}
ACCURACIES = ("top1", "top5", "neighbours_top1", "knn_top1", "linear_top1")
MEASURES = ("top1", "top5", "nll", "ece", "knn_top1", "linear_top1")  # that an evaluation adds to a card

LOAD = {
    "timm": """import timm

model = timm.create_model("{timm}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
# or, with transformers: pipeline("image-classification", model="{repo}")""",
    "transformers": """from transformers import pipeline

classify = pipeline("image-classification", model="{repo}")
classify("image.jpg")""",
}
LOAD_BACKBONE = {
    "timm": """import timm
from scalekd_hf import load_student

backbone = timm.create_model("{timm}", pretrained=True).eval()
stages = timm.create_model("{timm}", pretrained=True, features_only=True).eval()  # a map of each
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(backbone))
features = load_student("{timm}", pretrained=True).features  # the mean of the last map, which was evaluated
# or, with transformers: AutoModel.from_pretrained("{repo}")""",
    "transformers": """from transformers import AutoImageProcessor, AutoModel
from scalekd_hf import load_student

backbone = AutoModel.from_pretrained("{repo}").eval()
processor = AutoImageProcessor.from_pretrained("{repo}")
features = load_student("{repo}", pretrained=True).features  # the mean of the last map, which was evaluated""",
}


@dataclass
class CardFacts:
    """What a card says; what is None or empty is left out.

    Attributes:
        repo: the repository, or the name of the folder.
        num_labels: K; 0 of a backbone.
        library: "timm" or "transformers".
        student, teacher, data: origins; `data` was trained on.
        evaluated: what the results were measured on; without it no metadata tells them.
        student_pretrained: the student began with the weights of `student`.
        results: metrics by the name of a row, such as "student distilled".
        facts: name and value of what the run was.
        settings: those of method and training that differ from the defaults.
        configuration: all that differ and are not about where and how the run reports.
        curves: whether there is a picture.
        baseline_args: settings that the student alone had of its own.
        converted: the checkpoint of others that the student was converted from; nothing was trained here then.
        paper: of a converted student, top-1 in per cent as its paper has it: "distilled", and "alone" without a teacher.
    """

    repo: str
    library: str
    student: Source
    parameters: int
    num_labels: int
    teacher: Source | None = None
    data: Source | None = None
    evaluated: Source | None = None
    student_pretrained: bool = False
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    configuration: dict[str, Any] = field(default_factory=dict)
    curves: bool = False
    baseline_args: dict[str, Any] = field(default_factory=dict)
    converted: str | None = None
    paper: dict[str, str] = field(default_factory=dict)
    license: str | None = None
    language: str | list[str] | None = None
    tags: list[str] = field(default_factory=list)


def make_card(facts: CardFacts) -> ModelCard:
    """Render the card, with metadata as the Hub reads it."""
    own = facts.results.get(DISTILLED if facts.teacher else ALONE, {})
    alone = facts.results.get(ALONE, {})
    gain = f"{100 * (own['top1'] - alone['top1']):+.2f}" if facts.teacher and own and "top1" in alone else None
    repo = json.dumps(one_line(facts.repo), ensure_ascii=False)[1:-1].replace(
        "<", r"\u003c"
    )  # in the quotes of Python
    restriction = facts.teacher.restriction if facts.teacher else None
    return ModelCard.from_template(
        _metadata(facts, own),
        template_str=(files("scalekd_hf.publishing") / "templates" / "model_card.md").read_text(encoding="utf-8"),
        model_name=inline(facts.repo.split("/")[-1]),
        student_name=code(facts.student.name),
        parameters=f"{facts.parameters / 1e6:.3g} M",
        num_labels=facts.num_labels,
        teacher=facts.teacher,
        teacher_name=code(facts.teacher.name) if facts.teacher else None,
        load_example=_load_example(facts, repo),
        rows=table("", {name: row for name, row in facts.results.items() if set(ACCURACIES) & set(row)}),
        gain=gain,
        baseline_args=" and ".join(f"{code(name)} {inline(value)}" for name, value in facts.baseline_args.items()),
        curves=facts.curves,
        converted=code(facts.converted) if facts.converted else None,
        paper=facts.paper,
        facts=[(inline(name), inline(value)) for name, value in facts.facts.items() if value not in (None, "")],
        settings=[(code(name), code(value)) for name, value in facts.settings.items()],
        method=_method(facts.settings),
        lighter_stems="stem" in facts.settings and "projector" not in facts.settings,
        relations=facts.settings.get("logit_loss") == "dist",
        restriction=inline(restriction) if restriction else None,
        citations=citations(facts.teacher.architecture if facts.teacher else None),
    )


def _method(settings: dict[str, Any]) -> str:
    """What the student was distilled with, by the settings that differ from the defaults."""
    if "projector" in settings:
        return "plain feature matching, not with ScaleKD,"
    usual = {
        "spatial_weight": True,
        "frequency_weight": True,
        "last_frequency_weight": False,
    }  # the last, where it is not given
    if not any(settings.get(name, has_one) for name, has_one in usual.items()):
        return "logits alone, not with ScaleKD,"
    return "[ScaleKD](https://arxiv.org/abs/2411.06786)"


def _load_example(facts: CardFacts, repo: str) -> str:
    """Lines that load the student; those of a network that timm lacks begin with its import."""
    example = (LOAD if facts.num_labels else LOAD_BACKBONE)[facts.library]
    text = example.format(repo=repo, timm=f"{'hf-hub' if '/' in facts.repo else 'local-dir'}:{repo}")
    name = facts.student.architecture
    is_own = timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith("scalekd_hf.")
    return f"from scalekd_hf import {name}  # a network that timm lacks\n{text}" if is_own else text


def _metadata(facts: CardFacts, own: dict[str, float]) -> ModelCardData:
    sources = [facts.student if facts.student_pretrained else None, facts.teacher]
    bases = [source.hub_id for source in sources if source is not None and source.hub_id]
    known: dict[str, Any] = {
        "language": facts.language,
        "license": facts.license,
        "datasets": facts.data.hub_id if facts.data else None,
        "base_model": bases[0] if len(bases) == 1 else bases,
        "base_model_relation": "finetune" if bases else None,  # of the Hub's four, the one that means trained on
        "metrics": ["accuracy"] if set(ACCURACIES) & set(own) else None,
    }
    if facts.evaluated is not None and "top1" in own:
        data = facts.evaluated
        known["model_name"] = facts.repo.split("/")[-1]
        known["eval_results"] = _eval_results(
            {
                "dataset": data.hub_id or data.name,
                "revision": data.revision,
                "split": data.split,
                "config": data.config,
            }
            | own
        )
    task = "image-classification" if facts.num_labels else "image-feature-extraction"
    return ModelCardData(
        library_name=facts.library,
        pipeline_tag=task,
        tags=[task, "knowledge-distillation", "scalekd", *_plain(facts.tags)],
        **{name: _plain(value) for name, value in known.items() if value},
    )


def _plain(value: Any) -> Any:
    """A value of the metadata, its texts in one line each."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return one_line(value) if isinstance(value, str) else value


def _eval_results(row: dict[str, Any]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=_plain(row["dataset"]),
            dataset_name=_plain(row["dataset"]),
            dataset_config=_plain(_which(row)),
            dataset_split=_plain(row.get("split")),
            dataset_revision=_plain(row.get("revision")),
            metric_type="accuracy" if key in ACCURACIES else key,
            metric_name=HEADERS[key],
            metric_value=round(row[key], 6),
        )
        for key in MEASURES
        if row.get(key) is not None
    ]


def table(corner: str, rows: dict[str, dict[str, Any]]) -> str:
    """Metrics by row as Markdown; accuracies and calibration error in per cent. Empty without rows."""
    columns = [key for key in HEADERS if any(row.get(key) is not None for row in rows.values())]
    if not columns:
        return ""
    lines = [f"| {corner} | {' | '.join(HEADERS[key] for key in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {inline(name)} | {' | '.join(_cell(key, row.get(key)) for key in columns)} |")
    return "\n".join(lines)


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2%}" if key in (*ACCURACIES, "ece") else f"{value:.4f}"


def update_evaluation(model: str, rows: Iterable[dict[str, Any]], token: str | None = None) -> str:
    """Put evaluations into a card, in its table and in its metadata; those of other data sets stay.

    Args:
        model: a local folder with a README.md, or a Hub id, whose card is committed.
        rows: each with `dataset`, and as far as known `split`, `revision`, `images`, and what is in `MEASURES`.
        token: for the Hub.

    Returns:
        The file, or the repository.

    Raises:
        ValueError: a folder without a card, or a card that cannot be read.
    """
    file = Path(model, "README.md")
    local = Path(model).is_dir()
    if local and not file.is_file():
        raise ValueError(
            f"`model` {model!r} has no README.md to put an evaluation in. Publish it first, or write one."
        )
    try:
        card = ModelCard.load(file if local else model, token=token)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"The card of `model` {model!r} cannot be read: {error}. Mend the metadata at its beginning."
        ) from error
    name = card.data.get("model_name") or (Path(model).resolve().name if local else model.split("/")[-1])
    kept = {_key(result): result for result in card.data.eval_results or []}
    kept |= {_key(result): result for row in rows for result in _eval_results(row)}
    card.data.model_name, card.data.eval_results = name, list(kept.values())
    section = "<!-- evaluation -->\n" + _evaluation(kept.values()) + "\n<!-- /evaluation -->"
    text = card.text
    card.text = (
        EVALUATION.sub(lambda _: section, text) if EVALUATION.search(text) else f"{text.rstrip()}\n\n{section}\n"
    )
    if local:
        unfinished = file.with_suffix(".part")
        card.save(unfinished)
        unfinished.replace(file)
        return str(file)
    # `card.push_to_hub` of huggingface-hub 1 would have it checked at another place than `HF_ENDPOINT`.
    HfApi(token=token).upload_file(
        path_or_fileobj=str(card).encode(), path_in_repo=file.name, repo_id=model, commit_message="Evaluation"
    )
    return model


def _key(result: EvalResult) -> tuple:
    return result.dataset_type, result.dataset_config, result.dataset_split, result.metric_name or result.metric_type


def _which(row: dict[str, Any]) -> str | None:
    """What else tells an evaluation from others of its data set and split: configuration, where a benchmark lies, features."""
    source, features = row.get("source"), row.get("features")
    parts = [row.get("config"), source if source != row["dataset"] else None, features]
    return ", ".join(str(part) for part in parts if part) or None  # by it the Hub keeps results apart


def _evaluation(results: Iterable[EvalResult]) -> str:
    names = {header: key for key, header in HEADERS.items()}
    rows: dict[str, dict[str, Any]] = {}
    for result in results:
        if result.metric_name in names:
            parts = [result.dataset_name, result.dataset_config, result.dataset_split]
            rows.setdefault(", ".join(part for part in parts if part), {})[names[result.metric_name]] = (
                result.metric_value
            )
    return f"\nAll evaluations, that of the run included:\n\n{table('data', rows)}\n"
