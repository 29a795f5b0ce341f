"""Evaluate a classifier or a backbone on labelled images, and keep the result in a table and in its card."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..models.students import Student
from ..publishing.model_card import update_evaluation
from ..publishing.provenance import data_source, model_source, versions
from ..texts import code, inline, one_line, redacted
from ..tools.evaluation import EvaluateArguments, evaluate_model, load_data, load_model, measure_model
from ..tools.probing import evaluate_features, features_of, load_known_images
from ..tools.recipe import parse_config
from ..training.config import ScaleKDConfig
from ..training.config_checks import check_processes


__all__ = ["main"]

HEADINGS = ["model", "data", "images", "top-1", "top-5", "NLL", "ECE", "k-NN", "linear probe"]
HEADINGS += ["M params", "GFLOP", "images/s"]
IDENTITY = (
    "model",
    "dataset",
    "source",
    "config",
    "split",
    "features",
    "place",
)  # a row with the same takes the place of another
UNSET = "trainer_output"  # what transformers makes of no `output_dir`


def parse(words: Sequence[str]) -> tuple[EvaluateArguments, ScaleKDConfig]:
    """The arguments and settings; a first word that is no YAML file is the model."""
    named = bool(words) and not words[0].startswith("-") and Path(words[0]).suffix not in (".yaml", ".yml")
    arguments, config = parse_config(EvaluateArguments, ["--model", *words] if named else words)
    if config.output_dir in (None, UNSET):
        local = Path(arguments.model.removeprefix("local-dir:"))
        name = local.resolve().name if local.is_dir() else arguments.model.rstrip("/").split("/")[-1].split(":")[-1]
        config.output_dir = str(Path("evaluation", name))
    return arguments, config


def command(words: Sequence[str], processes: int) -> str:
    """The command line of this run, without tokens."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    nodes = ["--nnodes", str(processes // here)] if processes > here else []
    launcher = ["python"] if processes == 1 else ["torchrun", *nodes, "--nproc_per_node", str(here)]
    line = shlex.join([*launcher, "recipes/evaluate.py", *words])
    return redacted(re.sub(r"(--[\w-]*token[ =])\S+", r"\1...", line))


def describe(arguments: EvaluateArguments, config: ScaleKDConfig, student: Student, dataset: Any) -> dict[str, Any]:
    """What an evaluation was of, and how: model, data, settings, versions."""
    hub, spec = data_source(dataset), student.spec
    place = Path(arguments.dataset or str(Path(str(arguments.eval_files)).parent))
    local = hub is None and (arguments.dataset is None or place.is_dir())
    source = hub.name if hub else place.resolve().name if local else arguments.dataset
    found = {
        "model": arguments.model,
        "model_revision": model_source(student).revision,
        "dataset": arguments.benchmark or source,
        "source": source,
        "revision": hub.revision if hub else arguments.revision,
        "config": arguments.dataset_config,
        "place": _place(arguments) if local else None,
        "split": arguments.eval_split or Path(str(arguments.eval_files)).name,
        "settings": {
            "image_size": list(spec.size),
            "crop_pct": spec.crop_pct,
            "crop_mode": spec.crop_mode,
            "interpolation": spec.interpolation,
            "antialias": spec.antialias,
            "mean": list(spec.mean),
            "std": list(spec.std),
            "processes": config.world_size,
        },
        "versions": versions(),
    }
    return {key: redacted(value) if isinstance(value, str) else value for key, value in found.items()}


def _place(arguments: EvaluateArguments) -> str:
    """What tells local data of the same name from each other, and names no path."""
    place = str(arguments.dataset or arguments.eval_files)
    place = place if "://" in place else str(Path(place).resolve())
    return hashlib.blake2b(place.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The evaluations in a folder's `evaluation.json`; none without one.

    Raises:
        ValueError: a file that is no list of evaluations.
    """
    file = folder / "evaluation.json"
    if not file.exists():
        return []
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        if not all("dataset" in row for row in rows):
            raise ValueError("it is not a list of evaluations")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(file)!r} cannot be added to: {error}. Move it away, or set `output_dir`.") from error
    return list(rows)


def write_rows(folder: Path, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Add a row to `evaluation.json` and `evaluation.md`, in the place of one of the same model and data.

    Returns:
        All rows.
    """
    rows = {tuple(old.get(key) for key in IDENTITY): old for old in read_rows(folder)}
    rows.pop(tuple(row.get(key) if key != "place" else None for key in IDENTITY), None)  # as versions before wrote it
    rows[tuple(row.get(key) for key in IDENTITY)] = row
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"evaluation.json": json.dumps(list(rows.values()), indent=2) + "\n"}
    texts["evaluation.md"] = _markdown(list(rows.values()))
    for name, text in texts.items():
        unfinished = folder / f"{name}.part"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(folder / name)
    return list(rows.values())


def _cells(row: dict[str, Any]) -> list[str]:
    def shown(key: str, form: str, unit: float = 1) -> str:
        return format(row[key] / unit, form) if row.get(key) is not None else ""

    data = "/".join(str(row[key]) for key in ("dataset", "config", "split") if row.get(key))
    accuracies = [shown(key, ".2%") for key in ("top1", "top5")]
    errors = [shown("nll", ".4f"), shown("ece", ".2%")]
    size = [shown("parameters", ".2f", 1e6), shown("gflops", ".2f"), shown("images_per_second", ",.0f")]
    probes = [shown(key, ".2%") for key in ("knn_top1", "linear_top1")]
    return [row["model"], data, shown("images", ",.0f"), *accuracies, *errors, *probes, *size]


def _lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Headings and cells, without columns that have nothing in any row."""
    cells = [_cells(row) for row in rows]
    kept = [column for column in range(len(HEADINGS)) if any(line[column] for line in cells)]
    return [[line[column] for column in kept] for line in (HEADINGS, *cells)]


def _legend(rows: list[dict[str, Any]]) -> str:
    """What columns mean that are there."""
    parts = ["NLL in nats; ECE over 15 bins"] if any("nll" in row for row in rows) else []
    if any("features" in row for row in rows):
        parts.append("k-NN (k = 20, weights exp(cosine / 0.07)) and linear probe of features on labelled images")
    return "; ".join([*parts, "images/s of the forward pass alone"])


def table_of(rows: list[dict[str, Any]]) -> str:
    """Evaluations as a table for the screen; NLL in nats, images per second of the forward pass alone."""
    lines = _lines(rows)
    lines = [[one_line(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def _markdown(rows: list[dict[str, Any]]) -> str:
    headings, *cells = _lines(rows)
    cells = [[inline(cell) for cell in line] for line in cells]
    lines = ["| " + " | ".join(line) + " |" for line in (headings, ["---"] * len(headings), *cells)]
    lines.insert(0, "# Evaluation\n")
    lines.append(f"\n{_legend(rows)}.\n")
    for row in rows:
        settings = row["settings"]
        height, width = settings["image_size"]
        lines.append(
            f"- {inline(row['model'])} on {inline(row['dataset'])} (from {inline(row['source'])}, revision "
            f"{inline(row['revision'] or 'unknown')}): {height}x{width} "
            f"px, crop {settings['crop_pct']:g}, {row['dtype']}, {settings['processes']} process(es); speed with batches of "
            f"{row['batch_size']} on {row['device']}; {_probed(row)}"
            f"{', '.join(f'{name} {version}' for name, version in row['versions'].items())}.\n  {code(row['command'])}"
        )
    return "\n".join(lines) + "\n"


def _probed(row: dict[str, Any]) -> str:
    if "features" not in row:
        return ""
    return (
        f"features: {row['features']}, {row['train_images']:,} labelled images known ({inline(row['known'])}), weight decay "
        f"{row['weight_decay']:g}; "
    )


def card_of(model: str) -> str:
    """The folder, or the Hub id, whose card belongs to a model.

    Raises:
        ValueError: a model without one, such as an architecture of timm.
    """
    name = model.removeprefix("local-dir:").removeprefix("hf-hub:")
    if Path(name).is_dir():
        if not Path(name, "README.md").is_file():
            raise ValueError(f"`update_card` is on, but `model` {model!r} has no README.md. Write a card first.")
        return name
    if model.startswith("timm/") or name.count("/") != 1 or "@" in name:
        raise ValueError(
            f"`update_card` is on, but `model` {model!r} has no card of yours: it must be a folder with a README.md, or the "
            "id of a repository on the Hub (`team/model`)."
        )
    return name


def measure_features(
    arguments: EvaluateArguments, config: ScaleKDConfig, student: Student, dataset: Any
) -> dict[str, Any]:
    """k-NN and linear probe of a network's features.

    Raises:
        ValueError: no images are named whose labels may be known, or a benchmark, which says which classes a classifier has.
    """
    if arguments.benchmark is not None:
        raise ValueError(
            f"`benchmark` {arguments.benchmark!r} is for classifiers, and features are measured. Set `dataset` and `eval_split` "
            "instead, and `train_split`."
        )
    known = load_known_images(arguments)
    found = evaluate_features(features_of(student, arguments.pooling), known, dataset, config)
    return found | {"known": Path(arguments.train_files).name if arguments.train_files else arguments.train_split}


def main(words: Sequence[str] | None = None) -> None:
    """Evaluate as the words say; those of this process by default."""
    words = list(sys.argv[1:] if words is None else words)
    arguments, config = parse(words)
    check_processes(config)
    folder = Path(str(config.output_dir))
    read_rows(folder)  # what cannot be added to is refused now
    card = card_of(arguments.model) if arguments.update_card else None
    dataset = load_data(arguments, None if config.process_index else config.output_dir)
    student = load_model(arguments, config)
    if arguments.probe or not student.num_labels:
        metrics = measure_features(arguments, config, student, dataset)
    else:
        metrics = evaluate_model(student, dataset, config, arguments.benchmark, arguments.real_labels)
    if config.process_index:
        return
    row = describe(arguments, config, student, dataset) | metrics | measure_model(student, config)
    rows = write_rows(folder, row | {"command": command(words, config.world_size)})
    print(f"\n{table_of(rows)}\n\n{_legend(rows)}, in batches of {row['batch_size']},")
    print(f"{row['dtype']}, on {row['device']}. All of it is in {folder}/evaluation.json and evaluation.md.")
    if card is not None:
        print(f"The card of {update_evaluation(card, [row], token=config.hub_token)} has it, too.")
