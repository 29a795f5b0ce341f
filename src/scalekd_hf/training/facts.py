"""What a card says of a run, gathered from it; and the push of its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from ..publishing.model_card import ALONE, DISTILLED, CardFacts
from ..publishing.provenance import Source, hardware, versions
from ..publishing.publisher import Publisher
from .epochs import images_per_step
from .position import RunPosition
from .run_config import RunConfig
from .settings import rebuilding_settings, told_settings


__all__ = ["PushedCheckpoints", "changed", "come_to", "describe_run", "own_results", "run_facts"]

UNSET_IS_THE_STUDENTS = ("antialias",)  # so that False says something


class PushedCheckpoints(TrainerCallback):
    """Pushes each checkpoint once it is whole, while training goes on, and waits for the last at the end.

    Args:
        publisher: pushes.
        describe: writes the card.
    """

    def __init__(self, publisher: Publisher, describe: Callable[[], None]):
        self.publisher, self.describe = publisher, describe

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not args.push_to_hub or not state.is_world_process_zero or self.publisher.is_busy():
            return
        self.publisher.wait()  # it may be reading the card
        self.describe()
        checkpoint = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        self.publisher.push_checkpoint(checkpoint, f"Training in progress, step {state.global_step}")

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.publisher.wait()


def describe_run(
    trainer: Any,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    dataset: str | None = None,
) -> None:
    """Write the card and what belongs to it: of a trainer's run, or of the one in its folder where it has trained nothing.

    Args:
        trainer: a `ScaleKDTrainer`.
        language, license, tags: for the card's metadata.
        model_name: instead of the name of the repository.
        dataset: id or name of the data set, where the data itself does not tell.
    """
    args, publisher, data = trainer.args, trainer.publisher, trainer.data
    state, student = come_to(trainer)[0], trainer.student
    teacher = publisher.teacher_source
    known = {name: value for name, value in student.classifier.model_args.items() if name != "num_classes"}
    facts: dict[str, Any] = {
        "student": publisher.student_source.name,
        "its classifier": None if student.num_labels else "none: a backbone, taught by the teacher's features alone",
        "its arguments": f"`{json.dumps(known, default=str)}`" if known else None,
        "teacher": described(teacher),
    } | run_facts(trainer, dataset)
    own = own_results(trainer, state, ("top1", "top5", "neighbours_top1", "loss"), always="loss")
    card = CardFacts(
        repo=model_name or publisher.name,
        library=student.classifier.library,
        student=publisher.student_source,
        parameters=sum(getattr(p, "ds_numel", p.numel()) for p in student.parameters()),  # ZeRO-3 empties them
        num_labels=student.num_labels,
        teacher=teacher,
        data=data or (Source(dataset) if dataset else None),
        evaluated=trainer.evaluated or (Source(dataset) if dataset else None),
        student_pretrained=student.pretrained,
        results=({DISTILLED if trainer.distiller.teacher is not None else ALONE: own} if own else {})
        | trainer.results,
        facts=facts,
        settings=changed(told_settings(args), type(args)),
        configuration=changed(rebuilding_settings(args), type(args)),
        baseline_args=publisher.arguments.get("baseline_args", {}),
        license=license,
        language=language,
        tags=[tags] if isinstance(tags, str) else list(tags or []),
    )
    publisher.describe(card, state.log_history)


def run_facts(trainer: Any, dataset: str | None = None) -> dict[str, Any]:
    """What a card tells of any run: its data, length, seed, hardware and versions, by the names of its rows.

    Args:
        trainer: a `RunTrainer`.
        dataset: id or name of the data set, where the data itself does not tell.
    """
    args = trainer.args
    state, images_seen, seconds = come_to(trainer)
    step = state.global_step
    return {
        "data": described(trainer.data) or dataset,
        "images seen": f"{images_seen:,}" if images_seen else None,
        "steps": f"{step:,}" if step else None,
        "global batch": images_per_step(args) if step else None,
        "seed": args.seed,
        "hardware": hardware(args.world_size, args.device) if step else None,
        "hours": f"{seconds / 3600:.3g}" if seconds else None,
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }


def come_to(trainer: Any) -> tuple[TrainerState, int, float]:
    """The state of a run, the images seen and the seconds of training; 0 where that is not known any more."""
    if trainer.state.global_step:
        return trainer.state, trainer.loss_log.images_seen, trainer.stopwatch.seconds
    folder, state = Path(str(trainer.args.output_dir)), trainer.state
    try:
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        position = RunPosition.read(folder / f"checkpoint-{state.global_step}")
    except FileNotFoundError:
        logged = [entry.get("images_seen", 0) for entry in state.log_history]
        return state, max(logged, default=0), 0.0
    return state, position.images_seen, position.seconds


def own_results(trainer: Any, state: TrainerState, names: Sequence[str], always: str) -> dict[str, float]:
    """The metrics of the weights that are saved, if they were evaluated.

    Args:
        trainer, state: of the run.
        names: of the metrics that are wanted.
        always: one that each evaluation has.
    """
    best = state.best_global_step if trainer.args.load_best_model_at_end else None
    step = best if best is not None and not trainer.stopwatch.is_running else state.global_step
    evaluated = [entry for entry in state.log_history if entry["step"] == step and f"eval_{always}" in entry]
    kept = [key for key in names if evaluated and f"eval_{key}" in evaluated[-1]]
    return {key: evaluated[-1][f"eval_{key}"] for key in kept}


def changed(settings: dict[str, Any], kind: type[RunConfig]) -> dict[str, Any]:
    """Settings that are not the defaults of their kind, as YAML holds them."""
    defaults = {f.name: _default(f) for f in fields(kind)}
    return {
        name: getattr(value, "value", value)
        for name, value in settings.items()
        if value not in (None, defaults[name])
        and (value is not False or defaults[name] or name in UNSET_IS_THE_STUDENTS)
    }


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def described(source: Source | None) -> str | None:
    if source is None:
        return None
    known = [
        "not published" if source.is_local else None,
        f"revision `{source.revision}`" if source.revision else None,
        f"license `{source.license}`" if source.license else None,
    ]
    return ", ".join(filter(None, [f"`{source.hub_id}`" if source.hub_id else source.name, *known]))
