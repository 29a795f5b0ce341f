"""The methods that recipes/compare_methods.py compares, and the tables made of what their runs left."""

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from results_report import (
    MISSING,
    Outcome,
    cell,
    minus,
    read_json,
    read_outcome,
    spread,
    student_folder,
    student_top1,
    table,
    teacher_folder,
    teacher_top1,
)


@dataclass(frozen=True)
class Method:
    """A way to train the same student.

    Attributes:
        file: what is given after the recipe, of recipes/configs/compared.
        options: further options of distill.py.
    """

    key: str
    label: str
    file: str = ""
    options: str = ""


@dataclass(frozen=True)
class TeacherOf:
    """A teacher: its recipe and what replaces settings in it."""

    label: str
    file: str
    options: str = ""


METHODS = {
    method.key: method
    for method in (
        Method("alone", "student alone"),
        Method("logits", "logits, T = 1", options="--spatial_weight 0 --frequency_weight 0"),
        Method("logits_t4", "logits, T = 4", "logits_t4"),
        Method("dist", "DIST", "dist"),
        Method("patient", "logits of mixed images, no labels", "patient"),
        Method("features", "linear feature matching", "features"),
        Method("scalekd", "ScaleKD"),
        Method("scalekd_dist", "ScaleKD with DIST", "scalekd_dist"),
    )
}

BUDGETS = ("images", "time", "long")
SHARE = 25  # % of the training images that the student learns from; those from 80% on are for validation
SHARED = ("alone", "logits_t4", "scalekd")  # on other shares of the images
SWIN = "--train_split train[:80%] --streaming false --bf16 false --eval_strategy no"
TEACHERS = {  # the first is everyone's but in the comparison of teachers
    "coatnet": TeacherOf("CoAtNet, 10 epochs", "teacher_coatnet"),
    "coatnet_3": TeacherOf("CoAtNet, 3 epochs", "teacher_coatnet", "--num_train_epochs 3"),
    "coatnet_1": TeacherOf("CoAtNet, 1 epoch", "teacher_coatnet", "--num_train_epochs 1"),
    "swin_3": TeacherOf("Swin, smaller, 3 epochs", "teacher_swin_small", f"{SWIN} --num_train_epochs 3"),
    "swin_1": TeacherOf("Swin, smaller, 1 epoch", "teacher_swin_small", f"{SWIN} --num_train_epochs 1"),
}

QUANTILES = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
)  # of Student's t, 97.5%, 1 to 9 degrees of freedom


# Reading what the runs left


def outcome(folder: Path) -> Outcome | None:
    """Of a student with a teacher, or of one that learnt alone."""
    top1 = student_top1(folder)
    return read_outcome(folder, teacher_top1(folder) if top1 is None else top1)


def by_seed(name: str, arguments: argparse.Namespace) -> dict[int, Outcome]:
    found = {seed: outcome(student_folder(arguments.output_dir, name, seed)) for seed in arguments.seeds}
    return {seed: one for seed, one in found.items() if one is not None}


def accuracies(name: str, arguments: argparse.Namespace) -> dict[int, float]:
    """Top-1 in %, by seed."""
    return {seed: one.top1 for seed, one in by_seed(name, arguments).items()}


def probes(name: str, arguments: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Accuracies of features in %, by kind and seed."""
    found: dict[str, dict[int, float]] = {"knn_top1": {}, "linear_top1": {}}
    for seed in arguments.seeds:
        folder = student_folder(arguments.output_dir, f"probe_{name}", seed)
        rows = read_json(folder / "evaluation.json")
        for row in rows if isinstance(rows, list) else []:
            for kind in found:
                if kind in row:
                    found[kind][seed] = 100 * row[kind]
    return found


# Tables


def interval(gains: dict[int, float]) -> str:
    """Mean of paired differences with its 95% confidence interval, by Student's t."""
    count = len(gains)
    if count < 2:
        return cell(gains, count, "+")
    freedom = count - 1
    quantile = QUANTILES[freedom - 1] if freedom <= len(QUANTILES) else 1.96 + 2.4 / freedom
    half, mean = quantile * spread(gains) / math.sqrt(count), statistics.mean(gains.values())
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def name_of(key: str, budget: str) -> str:
    """What the runs of a method are called; where two budgets are the same, they are the same runs."""
    return {("scalekd", "time"): "scalekd_images", ("alone", "long"): "alone_time"}.get(
        (key, budget), f"{key}_{budget}"
    )


def minutes_of(key: str, runs: dict[int, Outcome], tuned: dict[str, dict]) -> float:
    """Minutes of a run. An image takes as long as in the runs for equal images, which shared the machine with each other alone."""
    seconds, images = (statistics.mean(getattr(one, what) for one in runs.values()) for what in ("seconds", "images"))
    return images * tuned.get(key, {}).get("seconds_per_image", seconds / images) / 60


def methods_table(budget: str, arguments: argparse.Namespace, tuned: dict[str, dict]) -> str:
    """One method a row, for one budget."""
    found = {key: by_seed(name_of(key, budget), arguments) for key in METHODS}
    top1 = {key: {seed: one.top1 for seed, one in runs.items()} for key, runs in found.items()}
    rows = []
    for key, runs in found.items():
        if not runs:
            continue
        images, minutes = statistics.mean(one.images for one in runs.values()), minutes_of(key, runs, tuned)
        gains = minus(top1[key], top1["alone"])
        hourly = f"{60 * statistics.mean(gains.values()) / minutes:+.0f}" if gains and key != "alone" else ""
        rows.append(
            [METHODS[key].label, f"{images:,.0f}", f"{minutes:.1f}", cell(top1[key], len(arguments.seeds))]
            + ["" if key == "alone" else interval(gains), hourly]
            + ["" if key == "scalekd" else interval(minus(top1[key], top1["scalekd"]))]
        )
    header = ["method", "images seen", "minutes", "top-1, %", "over alone", "points an hour", "over ScaleKD"]
    return table(header, rows if len(rows) > 1 else [])


def tuning_table(tuned: dict[str, dict]) -> str:
    rows = []
    for key, found in tuned.items():
        trials = ", ".join(f"{words} {top1:.1%}" for words, top1 in found["trials"].items())
        rows.append([METHODS[key].label, found["learning_rate"], found["weight_decay"], trials])
    return table(["method", "rate", "weight decay", "its trials (rate, decay, top-1 on the validation part)"], rows)


def teachers_table(arguments: argparse.Namespace, tuned: dict[str, dict]) -> str:
    alone, rows = accuracies("alone_images", arguments), []
    for number, (name, teacher) in enumerate(TEACHERS.items()):
        own = teacher_top1(teacher_folder(arguments.output_dir, name))
        top1 = accuracies(f"scalekd_from_{name}" if number else "scalekd_images", arguments)
        if own is not None and top1:
            rows.append((own, [teacher.label, f"{own:.2%}", cell(top1, len(top1)), interval(minus(top1, alone))]))
    rows.sort(key=lambda row: row[0])
    return table(["teacher", "its top-1", "ScaleKD, %", "over the student alone"], [row for _, row in rows])


def share_name(key: str, share: int, budget: str) -> str:
    """What the runs of a method on a share of the training images are called; all methods have the usual share."""
    if share == SHARE:
        return name_of(key, budget)
    return f"{key}_share{share}" + ("_time" if budget == "time" and key != "scalekd" else "")


def shares_table(budget: str, arguments: argparse.Namespace) -> str:
    """One share a row, for equal images or for the time that ScaleKD takes for these."""
    rows = []
    for share in sorted({*arguments.shares, SHARE}, reverse=True):
        top1 = {key: accuracies(share_name(key, share, budget), arguments) for key in SHARED}
        if any(values for key, values in top1.items() if key != "scalekd" or budget == "images"):
            gains = [interval(minus(top1["scalekd"], top1[key])) for key in SHARED[:2]]
            rows.append([f"{share}%", *(cell(values, len(values)) for values in top1.values()), *gains])
    labels = [METHODS[key].label for key in SHARED]
    return table(["training images", *labels, "ScaleKD over alone", "over logits"], rows)


def features_table(arguments: argparse.Namespace, tuned: dict[str, dict]) -> str:
    labels = {"features_only": "ScaleKD's features alone, no labels", "alone_images": "student alone, with labels"}
    labels["scalekd_images"] = "ScaleKD, with labels"
    rows = []
    for name, label in labels.items():
        found = probes(name, arguments)
        if any(found.values()):
            rows.append([label, *(cell(values, len(values)) for values in found.values())])
    return table(["student", "k-NN, %", "linear probe, %"], rows)


def pretrained_table(arguments: argparse.Namespace, tuned: dict[str, dict]) -> str:
    names = {
        "alone_share5": "student alone, from scratch",
        "alone_fine_tuned": "student alone, pre-trained on the other images with their labels, then fine-tuned",
        "scalekd_share5": "ScaleKD, from scratch",
    }
    before, rows = by_seed("alone_pretrained", arguments), []
    for name, label in names.items():
        found = by_seed(name, arguments)
        if found and before:
            seen = sum(
                statistics.mean(o.images for o in runs.values())
                for runs in ([found, before] if "fine" in name else [found])
            )
            rows.append([label, f"{seen:,.0f}", cell({seed: o.top1 for seed, o in found.items()}, len(found))])
    return table(["student, on 5% of the training images", "images seen in all", "top-1, %"], rows)


def draw(arguments: argparse.Namespace, tuned: dict[str, dict], file: Path) -> None:
    """Top-1 against minutes of training: each method for equal images, and what the same time as ScaleKD's makes of it."""
    if not any(by_seed(f"{key}_images", arguments) for key in METHODS):
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, (key, method) in enumerate(METHODS.items()):
        points = []
        for budget in ("images", "time"):
            runs = by_seed(f"{key}_{budget}", arguments)
            if runs:
                top1 = {seed: one.top1 for seed, one in runs.items()}
                points.append((minutes_of(key, runs, tuned), statistics.mean(top1.values()), spread(top1)))
        for place, (x, y, error) in enumerate(points):
            style = {
                "markerfacecolor": f"C{number}" if place == 0 else "white",
                "label": "" if place else method.label,
            }
            axis.errorbar(x, y, error, color=f"C{number}", marker="o", capsize=3, **style)
        axis.plot([x for x, *_ in points], [y for _, y, _ in points], color=f"C{number}", linewidth=1, alpha=0.5)
    axis.set(xlabel="minutes of training, one core", ylabel="top-1, %")
    axis.set_title("filled: equal images; open: equal time; bars: standard deviation over the seeds", fontsize="small")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=120)


def report(arguments: argparse.Namespace, tuned: dict[str, dict]) -> tuple[str, dict]:
    """All tables that have rows, and the same for programs: by the name of a run, top-1, images and seconds of each seed."""
    sections: dict[str, Callable[[], str]] = {
        "Settings": lambda: tuning_table(tuned),
        "Equal images": lambda: methods_table("images", arguments, tuned),
        "Equal time": lambda: methods_table("time", arguments, tuned),
        "Many images": lambda: methods_table("long", arguments, tuned),
        "Teachers": lambda: teachers_table(arguments, tuned),
        "Training images, equal images seen": lambda: shares_table("images", arguments),
        "Training images, equal time": lambda: shares_table("time", arguments),
        "Features": lambda: features_table(arguments, tuned),
        "Pre-trained or distilled": lambda: pretrained_table(arguments, tuned),
    }
    tables = {title: write() for title, write in sections.items()}
    tables = {title: text for title, text in tables.items() if text.count("\n") > 1}
    seeds = ", ".join(map(str, arguments.seeds))
    head = (
        f"Mean ± sample standard deviation over the seeds {seeds}; differences are taken seed by seed, with their 95% "
        f"confidence interval. {MISSING} is a run that is not there."
    )
    text = "\n\n".join([head, *(f"**{title}**\n\n{block}" for title, block in tables.items())]) + "\n"
    names = {path.name.rsplit("_seed", 1)[0] for path in arguments.output_dir.glob("*_seed*") if path.is_dir()}
    runs = {
        name: {seed: {"top1": o.top1, "images": o.images, "seconds": o.seconds} for seed, o in found.items()}
        for name in sorted(names)
        if (found := by_seed(name, arguments))
    }
    return text, {"tuned": tuned, "runs": runs}
