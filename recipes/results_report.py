"""The arms that recipes/results.py trains, what their runs left, and the tables, text and curves made of it."""

import argparse
import json
import os
import platform
import shlex
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path


START, END = "<!-- results: written by recipes/results.py -->", "<!-- /results -->"
MISSING = "–"

STUDENTS = {"resnet18": "ResNet-18, narrow", "mixer": "Mixer", "vit": "ViT"}
TEACHERS = {
    "swin_large": "Swin, larger",
    "swin_small": "Swin, smaller",
    "swin_weak": "Swin, smaller, a fifth of the training",
    "vit": "ViT",
}


@dataclass(frozen=True)
class Arm:
    """A student trained in one way, once for each seed: a row or column of a table, with further options of distill.py."""

    student: str
    key: str  # names the runs' folders; the same arm may be in several tables
    label: str
    options: str = ""
    teacher: str = "swin_large"

    @property
    def name(self) -> str:
        return f"{self.student}_{self.key}"


ALONE = {student: Arm(student, "alone", "alone") for student in STUDENTS}  # trained in ScaleKD's run
LOGITS = {s: Arm(s, "logits", "logits only", "--spatial_weight 0 --frequency_weight 0") for s in STUDENTS}
SCALEKD = {student: Arm(student, "scalekd", "ScaleKD", "--baseline true") for student in STUDENTS}
NO_TPP = "--teacher_perception false --logit_weight 0"

# To add an arm is to add a line; a table without arms is left out.
TABLES: dict[int, list[Arm]] = {
    1: [arm[student] for student in STUDENTS for arm in (SCALEKD, LOGITS)],
    2: [
        Arm("resnet18", "projector", "projector alone, spatial view", f"{NO_TPP} --frequency_weight 0"),
        Arm("resnet18", "frequency", "+ frequency view", NO_TPP),
        Arm("resnet18", "perception", "+ teacher parameter perception", "--logit_weight 0"),
        replace(SCALEKD["resnet18"], label="+ logits = ScaleKD"),
        Arm("resnet18", "drop_path", "ScaleKD, teacher with stochastic depth", "--teacher_drop_path 0.1"),
        Arm("resnet18", "direct", "ScaleKD, direct component kept", "--remove_direct_component false"),
    ],
    3: [
        replace(SCALEKD["resnet18"], label=TEACHERS["swin_large"]),
        Arm("resnet18", "from_swin_small", TEACHERS["swin_small"], teacher="swin_small"),
        Arm("resnet18", "from_swin_weak", TEACHERS["swin_weak"], teacher="swin_weak"),
        Arm("resnet18", "from_vit", TEACHERS["vit"], teacher="vit"),
    ],
    4: [
        Arm("resnet18", "shared", "one stem for both views", "--stem shared"),
        Arm("resnet18", "separable", "separable stems", "--stem separable"),
    ],
}


def threads(jobs: int) -> int:
    return max(1, (os.cpu_count() or 1) // jobs)


# Reading what the runs left


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        top1: of the saved model, in %.
        curve: top-1 in % of the evaluations on the way, by images seen.
        images, data_images: images seen, and images in the training data.
        seconds: of training.
        evaluation_seconds: of the evaluations on the way.
    """

    top1: float
    curve: dict[int, float]
    images: int = 0
    data_images: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0


def teacher_folder(output_dir: Path, name: str) -> Path:
    return output_dir / f"teacher_{name}"


def student_folder(output_dir: Path, name: str, seed: int) -> Path:
    return output_dir / f"{name}_seed{seed}"


def read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def teacher_top1(folder: Path) -> float | None:
    return read_json(folder / "eval_results.json").get("eval_top1")


def student_top1(folder: Path, row: str = "student distilled") -> float | None:
    return read_json(folder / "results.json").get(row, {}).get("top1")


def read_outcome(folder: Path, top1: float | None) -> Outcome | None:
    """The outcome of a run that has ended, from the trainer's state in its folder or in its last checkpoint."""
    if top1 is None:
        return None
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    states = [read_json(place / "trainer_state.json") for place in (folder, *reversed(checkpoints))]
    state = next(filter(None, states), None)
    if state is None:
        return Outcome(100 * top1, {})
    images, history = state["global_step"] * state["train_batch_size"], state["log_history"]
    curve = {e["step"] * state["train_batch_size"]: 100 * e["eval_top1"] for e in history if "eval_top1" in e}
    # A run that was resumed knows the time since then only, but its log has all; what came after the last log ran like it.
    logged = [(entry["images_seen"], entry["images_per_second"]) for entry in history if "images_per_second" in entry]
    ends = [seen for seen, _ in logged[:-1]] + [images]
    seconds = sum((end - start) / rate for start, end, (_, rate) in zip([0, *ends], ends, logged, strict=False))
    evaluation_seconds = sum(entry.get("eval_runtime", 0.0) for entry in history)
    data_images = round(images / state["epoch"]) if state.get("epoch") else 0
    return Outcome(100 * top1, curve, images, data_images, seconds, evaluation_seconds)


def read_outcomes(arms: Iterable[Arm], output_dir: Path, seeds: list[int]) -> dict[str, dict[int, Outcome]]:
    """By the name of an arm, `teacher_...` for teachers, and by seed (0 for teachers); only what is there."""
    arms, found = list(arms), {}
    for teacher in {arm.teacher for arm in arms}:
        folder = teacher_folder(output_dir, teacher)
        found[f"teacher_{teacher}"] = {0: read_outcome(folder, teacher_top1(folder))}
    for arm in arms:
        folders = {seed: student_folder(output_dir, arm.name, seed) for seed in seeds}
        found[arm.name] = {seed: read_outcome(folder, student_top1(folder)) for seed, folder in folders.items()}
        if "--baseline true" in arm.options:
            found[ALONE[arm.student].name] = {
                seed: read_outcome(folder / "alone", student_top1(folder, "student alone"))
                for seed, folder in folders.items()
            }
    return {name: {seed: o for seed, o in by_seed.items() if o is not None} for name, by_seed in found.items()}


# Numbers


def accuracies(outcomes: dict[str, dict[int, Outcome]], arm: Arm) -> dict[int, float]:
    return {seed: outcome.top1 for seed, outcome in outcomes.get(arm.name, {}).items()}


def minus(first: dict[int, float], second: dict[int, float]) -> dict[int, float]:
    """Seed by seed, where both are there."""
    return {seed: first[seed] - second[seed] for seed in first if seed in second}


def spread(values: dict[int, float]) -> float:
    return statistics.stdev(values.values()) if len(values) > 1 else 0.0


def cell(values: dict[int, float], seeds: int, sign: str = "") -> str:
    """Mean ± sample standard deviation, and of how many seeds where some are missing."""
    if not values:
        return MISSING
    text = f"{statistics.mean(values.values()):{sign}.2f}"
    text += f" ± {spread(values):.2f}" if len(values) > 1 else ""
    return text + (f" ({len(values)} of {seeds} seeds)" if len(values) < seeds else "")


def mean_curve(outcomes: Iterable[Outcome]) -> dict[int, float]:
    """Mean over seeds at the images seen where all were evaluated."""
    curves = [outcome.curve for outcome in outcomes]
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    return {images: statistics.mean(curve[images] for curve in curves) for images in shared}


def images_until(curve: dict[int, float], target: float) -> float | None:
    """Images seen when a curve first reaches a value, linear between evaluations; None if it never does."""
    before: tuple[int, float] | None = None
    for images, value in sorted(curve.items()):
        if value >= target:
            if before is None:
                return float(images)
            return before[0] + (images - before[0]) * (target - before[1]) / (value - before[1])
        before = (images, value)
    return None


def efficiency(outcomes: dict[str, dict[int, Outcome]], arm: Arm) -> str:
    """Images until the student alone's final accuracy is reached, and their share of the budget."""
    of_arm, of_alone = outcomes.get(arm.name, {}), outcomes.get(ALONE[arm.student].name, {})
    both = [seed for seed in of_arm if seed in of_alone]
    curve, target = mean_curve(of_arm[s] for s in both), mean_curve(of_alone[s] for s in both)
    if not curve or not target:
        return MISSING
    images = images_until(curve, target[max(target)])
    if images is None:
        return "not reached"
    sooner = "≤ " if images == min(curve) else ""  # nothing is known before the first evaluation
    return f"{sooner}{images:,.0f} ({images / max(curve):.0%})"


def minutes(outcomes: dict[str, dict[int, Outcome]], arm: Arm) -> str:
    """Mean minutes of a run, beside those of the student alone with the same seeds."""
    of_arm, of_alone = outcomes.get(arm.name, {}), outcomes.get(ALONE[arm.student].name, {})
    both = [seed for seed in of_arm if seed in of_alone and of_arm[seed].seconds and of_alone[seed].seconds]
    if not both:
        return MISSING
    seconds, alone = (statistics.mean(runs[seed].seconds for seed in both) for runs in (of_arm, of_alone))
    return f"{seconds / 60:.1f} ({seconds / alone:.1f}x)"


# The report


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def students_table(arms: list[Arm], outcomes: dict, seeds: int) -> str:
    """Table 1: each student alone, with the teacher's logits only, and with ScaleKD."""
    header = ["student", "alone", "logits only", "ScaleKD", "ScaleKD over alone", "ScaleKD over logits"]
    rows, sooner, times = [], [], []
    for student in dict.fromkeys(arm.student for arm in arms):
        three = [ALONE[student], LOGITS[student], SCALEKD[student]]
        values = [accuracies(outcomes, arm) for arm in three]
        gains = [cell(minus(values[2], other), seeds, "+") for other in values[:2]]
        rows.append([STUDENTS[student], *(cell(value, seeds) for value in values), *gains])
        sooner.append([STUDENTS[student], *(efficiency(outcomes, arm) for arm in three)])
        times.append([STUDENTS[student], *(minutes(outcomes, arm) for arm in three)])
    ways = ["student", "alone", "logits only", "ScaleKD"]
    return (
        f"{table(header, rows)}\n\nImages seen until the student alone's final accuracy is first reached (mean over "
        "seeds, linear between evaluations), and their share of the budget:\n\n"
        f"{table(ways, sooner)}\n\nMinutes of training, without evaluations (mean over seeds; runs shared the machine), and how "
        f"many times the student alone's:\n\n{table(ways, times)}"
    )


def arms_table(arms: list[Arm], outcomes: dict, seeds: int) -> str:
    """Tables 2 and 4: one arm a row, beside the student alone and full ScaleKD."""
    rows = []
    for arm in [ALONE[arms[0].student], *arms]:
        values = accuracies(outcomes, arm)
        others = [accuracies(outcomes, other[arm.student]) for other in (ALONE, SCALEKD)]
        gains = [cell(minus(values, other), seeds, "+") for other in others]
        if arm.key in ("alone", "scalekd"):
            gains[("alone", "scalekd").index(arm.key)] = ""
        rows.append([arm.label, f"`{arm.options}`" if arm.options else "", cell(values, seeds), *gains])
    return table(["arm", "options", "top-1", "over alone", "over ScaleKD"], rows)


def teachers_table(arms: list[Arm], outcomes: dict, seeds: int) -> str:
    """Table 3: the same student from several teachers, weakest first, and whether the gain follows their accuracy."""
    found = []
    for arm in arms:
        teacher = {seed: outcome.top1 for seed, outcome in outcomes[f"teacher_{arm.teacher}"].items()}
        values = accuracies(outcomes, arm)
        gains = minus(values, accuracies(outcomes, ALONE[arm.student]))
        row = [arm.label, cell(teacher, 1), cell(values, seeds), cell(gains, seeds, "+")]
        found.append((teacher.get(0, 101.0), gains, row))  # a teacher that is not there comes last
    found.sort(key=lambda entry: entry[0])
    rows = [row for _, _, row in found]
    known = [(top1, gains) for top1, gains, _ in found if top1 <= 100 and gains]
    return f"{table(['teacher', 'its top-1', 'ScaleKD', 'over alone'], rows)}\n\n{trend(known)}"


def trend(known: list[tuple[float, dict[int, float]]]) -> str:
    """Whether the gain rises with the teacher's accuracy; teachers come weakest first."""
    if len(known) < 2:
        return "Fewer than two teachers have results: nothing can be said about how the gain follows them."
    pairs = [minus(after, before) for (_, before), (_, after) in zip(known, known[1:], strict=False)]
    if not all(pairs):
        return "No seed has results of all teachers: nothing can be said about how the gain follows them."
    means = [statistics.mean(gains.values()) for _, gains in known]
    steps = [statistics.mean(pair.values()) for pair in pairs]
    verdict = "rises" if min(steps) > 0 else "falls" if max(steps) < 0 else "neither rises nor falls throughout"
    text = (
        f"From the weakest teacher to the strongest ({', '.join(f'{top1:.2f}' for top1, _ in known)}) the gain "
        f"{verdict}: {', '.join(f'{mean:+.2f}' for mean in means)}."
    )
    if min(map(len, pairs)) < 2:
        return text + " That is one seed, and no finding."
    if any(abs(step) <= spread(pair) for step, pair in zip(steps, pairs, strict=True)):
        text += " Some neighbours differ by less than this difference varies with the seed."
    return text


SECTIONS = {
    1: (f"three students. Teacher {TEACHERS['swin_large']}", students_table),
    2: (f"what each part adds. {STUDENTS['resnet18']}, teacher {TEACHERS['swin_large']}", arms_table),
    3: (f"stronger and weaker teachers. {STUDENTS['resnet18']}", teachers_table),
    4: (
        f"lighter stems, which are not the paper's. {STUDENTS['resnet18']}, teacher {TEACHERS['swin_large']}",
        arms_table,
    ),
}


def report_block(tables: dict[int, list[Arm]], outcomes: dict, arguments: argparse.Namespace, command: str) -> str:
    """All that the report says, without its markers."""
    seeds = len(arguments.seeds)
    parts = [
        f"Top-1 in %, mean ± sample standard deviation over the seeds {', '.join(map(str, arguments.seeds))}; gains are "
        f"taken seed by seed. {MISSING} is a run that is not there.",
        f"```\n{command}\n```",
        facts(outcomes, arguments.jobs),
    ]
    for number, arms in tables.items():
        title, write = SECTIONS[number]
        parts += [f"**Table {number}**: {title}.", write(arms, outcomes, seeds)]
    if 1 in tables:
        picture = arguments.report.with_suffix(".png").name
        parts.append(f"![Top-1 of each student against images seen, one line for each arm.]({picture})")
        parts.append("Evaluations on the way: the line is the mean over seeds, the band their range.")
    return "\n\n".join(parts)


def facts(outcomes: dict[str, dict[int, Outcome]], jobs: int) -> str:
    """Budget, hours, hardware and versions, as a list."""
    import torch

    from scalekd_hf.publishing.provenance import hardware, versions

    def budget(of_teachers: bool) -> str:
        runs = [o for name, by in outcomes.items() if name.startswith("teacher_") == of_teachers for o in by.values()]
        known = sorted({(o.images, o.data_images) for o in runs if o.images})
        return ", ".join(f"{seen:,} images seen, from {data:,} training images" for seen, data in known) or MISSING

    machine = f"{os.cpu_count()} {platform.machine()} CPU cores"
    if torch.cuda.is_available():
        machine = hardware(torch.cuda.device_count(), torch.device("cuda"))
    hours = sum(o.seconds + o.evaluation_seconds for by_seed in outcomes.values() for o in by_seed.values()) / 3600
    software = {"python": platform.python_version(), **versions()}
    return "\n".join(
        (
            f"- each student: {budget(False)}",
            f"- each teacher: {budget(True)}",
            f"- {hours:.1f} hours of training in all, with the evaluations on the way, summed over the runs",
            f"- {jobs} at once, each with OMP_NUM_THREADS={threads(jobs)}, on {machine}",
            f"- {', '.join(f'{name} {version}' for name, version in software.items())}",
        )
    )


def shown_command(words: list[str]) -> str:
    """The command without places of this machine: of a path that leads out of the working directory, its last part."""
    kept = [word for word in words if word != "--report_only"]
    outside = [Path(word).is_absolute() or ".." in Path(word).parts for word in kept]
    kept = [Path(word).resolve().name if out else word for word, out in zip(kept, outside, strict=True)]
    return shlex.join(["python", "recipes/results.py", *kept])


def write_report(file: Path, block: str) -> None:
    """Put the block between the markers; what stands around them in the file is kept."""
    text = file.read_text(encoding="utf-8") if file.exists() else f"# Results\n\n{START}\n{END}\n"
    if START not in text:
        text = f"{text.rstrip()}\n\n{START}\n{END}\n"
    before, rest = text.split(START, 1)
    if END not in rest:
        raise ValueError(f"`report` {str(file)!r} has {START!r} without {END!r} after it: put it back.")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{before}{START}\n\n{block}\n\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def draw(students: Iterable[str], outcomes: dict[str, dict[int, Outcome]], file: Path) -> None:
    """Top-1 against images seen: a panel for each student, a line for each arm of table 1."""
    from matplotlib.figure import Figure

    students = list(students)
    figure = Figure(figsize=(4.2 * len(students), 3.6), layout="constrained")
    for axis, student in zip(figure.subplots(1, len(students), squeeze=False)[0], students, strict=True):
        for arm in (ALONE[student], LOGITS[student], SCALEKD[student]):
            runs = list(outcomes.get(arm.name, {}).values())
            curve = mean_curve(runs)
            if curve:
                seen = [images / 1000 for images in curve]
                (line,) = axis.plot(seen, list(curve.values()), marker="o", markersize=3, label=arm.label)
                low, high = ([pick(run.curve[images] for run in runs) for images in curve] for pick in (min, max))
                axis.fill_between(seen, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set(title=STUDENTS[student], xlabel="thousand images seen", ylabel="top-1, %")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="small", loc="lower right")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
