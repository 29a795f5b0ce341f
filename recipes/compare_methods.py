"""Compare ScaleKD with what else one would choose: the same student, teacher and data, for equal images and for equal time.

    python recipes/compare_methods.py --dataset uoft-cs/cifar10 --image_column img [--parts tune methods] [--jobs 2]

Parts, in their order:

- `tune`: each method has four trials of a quarter of the budget, measured on a part of the training images that nothing
  else is trained on: three learning rates, then a larger weight decay at the best of them. What is best goes to
  `tuned.json`.
- `methods`: each method with each seed, for equal images, then for the time that ScaleKD takes for them; with
  `--budgets long` for as many images as the student alone sees in that time.
- `teachers`: ScaleKD from other teachers.
- `shares`: three methods on other shares of the training images, for equal images seen and for equal time; after
  `methods`.
- `features`: ScaleKD without labels and logits, and the student alone, by k-NN and a linear probe.
- `pretrained`: the student alone on many images, then fine-tuned on few, beside `shares`, distilled on these few.

Each run is a recipe in a process of its own, with its output in `<run folder>.log`. Call it again after an
interruption: runs that have ended are kept. A GPU is used where there is one. The tables are printed and written as `comparison.md` and
`comparison.json` into the output folder, with the picture `comparison.png`.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from methods_report import BUDGETS, METHODS, SHARE, SHARED, TEACHERS, Method, by_seed, draw, report, share_name
from results import CONFIGS, ON_GPU, RECIPES, Run, leave_on_signals, refuse_others, train
from results_report import read_json, student_folder, student_top1, teacher_folder, teacher_top1


STUDENT = "resnet10"
EPOCHS, FEW = 4.0, 5  # passes of that share; % of the training images that are few
RATES, DECAYS = ("3e-3", "1e-2", "3e-2"), ("0.05", "0.5")
TUNING_SEED = 100
PARTS = ("tune", "methods", "teachers", "shares", "features", "pretrained")


@dataclass(frozen=True)
class MethodRun(Run):
    """A student by one method; the one that learns alone needs no teacher, and leaves what a teacher leaves."""

    alone: bool = False

    def top1(self) -> float | None:
        return teacher_top1(self.folder) if self.alone or self.teacher is None else student_top1(self.folder)


@dataclass(frozen=True)
class FeaturesRun(Run):
    """A student without a classifier; its measure is how many images have neighbours of their class."""

    measure = "neighbours' top-1"

    def top1(self) -> float | None:
        found = read_json(self.folder / "results.json").get("student distilled", {}).get("neighbours_top1")
        return None if found is None else float(found)


@dataclass(frozen=True)
class ProbeRun(Run):
    """The features of a student that was trained before, by k-NN and a linear probe."""

    measure = "linear probe"

    def is_ready(self) -> bool:
        return self.teacher is not None and (self.teacher / "model.safetensors").exists()

    def top1(self) -> float | None:
        return next((row["linear_top1"] for row in read_rows(self.folder)), None)


def read_rows(folder: Path) -> list[dict]:
    rows = read_json(folder / "evaluation.json")
    return [row for row in rows if "linear_top1" in row] if isinstance(rows, list) else []


def common(arguments: argparse.Namespace) -> list[str]:
    words = ["--dataset", arguments.dataset, "--disable_tqdm", "true"]
    words += ["--image_column", arguments.image_column] if arguments.image_column else []
    return words + (shlex.split(ON_GPU) if torch.cuda.is_available() else [])


def teacher_run(name: str, arguments: argparse.Namespace) -> Run:
    folder = teacher_folder(arguments.output_dir, name)
    words = [sys.executable, str(RECIPES / "train_teacher.py"), str(CONFIGS / f"{TEACHERS[name].file}.yaml")]
    words += ["--output_dir", str(folder), *common(arguments), "--resume_from_checkpoint", "true"]
    return Run(f"teacher {name}", folder, (*words, *shlex.split(TEACHERS[name].options)))


def student_run(method: Method, name: str, seed: int, arguments: argparse.Namespace, **options: str) -> Run:
    """One call of a recipe; further options replace those of the method."""
    folder = student_folder(arguments.output_dir, name, seed)
    words = ["--output_dir", str(folder), *common(arguments), "--seed", str(seed), "--resume_from_checkpoint", "true"]
    teacher = teacher_folder(arguments.output_dir, options.pop("teacher", next(iter(TEACHERS))))
    alone = method.key == "alone"
    if alone:
        script, files = "train_teacher.py", [f"{STUDENT}_alone"]
    else:
        script, files = "distill.py", [STUDENT, *([f"../compared/{method.file}"] if method.file else [])]
        words += ["--teacher", str(teacher), "--evaluate_teacher", "false"]
    words += shlex.split(method.options) + [word for key, value in options.items() for word in (f"--{key}", value)]
    start = [sys.executable, str(RECIPES / script), *(str(CONFIGS / f"{file}.yaml") for file in files)]
    return MethodRun(f"{name}, seed {seed}", folder, (*start, *words), None if alone else teacher, alone=alone)


# Tuning


def trial(method: Method, rate: str, decay: str, arguments: argparse.Namespace) -> Run:
    settings = {"learning_rate": rate, "weight_decay": decay, "num_train_epochs": f"{arguments.epochs / 4:g}"}
    name = f"tune_{method.key}_{rate}_{decay}"
    return student_run(method, name, TUNING_SEED, arguments, **settings, eval_split="train[80%:]")


def train_these(runs: list[Run], arguments: argparse.Namespace) -> list[str]:
    """Train what has no result yet, unless it was made with other options; returns what failed."""
    refuse_others(runs, arguments.output_dir)
    return train(runs, arguments.jobs)


def tune(methods: list[Method], arguments: argparse.Namespace) -> list[str]:
    """Train the trials and keep what came of them; returns what failed."""
    first = {method: [trial(method, rate, DECAYS[0], arguments) for rate in RATES] for method in methods}
    failed = train_these([run for runs in first.values() for run in runs], arguments)
    if failed:
        return failed
    best = {method: RATES[best_of(runs)] for method, runs in first.items()}
    second = {method: trial(method, best[method], DECAYS[1], arguments) for method in methods}
    failed = train_these(list(second.values()), arguments)
    if failed:
        return failed
    tuned = read_json(arguments.output_dir / "tuned.json")  # of other methods, from another call
    for method, runs in first.items():
        trials = [*((rate, DECAYS[0]) for rate in RATES), (best[method], DECAYS[1])]
        runs = [*runs, second[method]]
        rate, decay = trials[best_of(runs)]
        tuned[method.key] = tuned.get(method.key, {}) | {
            "learning_rate": rate,
            "weight_decay": decay,
            "trials": {" ".join(words): run.top1() for words, run in zip(trials, runs, strict=True)},
        }
    write_tuned(tuned, arguments)
    return []


def write_tuned(tuned: dict[str, dict], arguments: argparse.Namespace) -> None:
    (arguments.output_dir / "tuned.json").write_text(json.dumps(tuned, indent=2), encoding="utf-8")


def best_of(runs: list[Run]) -> int:
    return max(range(len(runs)), key=lambda number: runs[number].top1() or 0.0)


def read_tuned(arguments: argparse.Namespace) -> dict[str, dict]:
    tuned = read_json(arguments.output_dir / "tuned.json")
    if not tuned:
        raise SystemExit(f"`output_dir` {str(arguments.output_dir)!r} has no tuned.json: take the part `tune` first.")
    return tuned


def settings_of(method: Method, tuned: dict[str, dict]) -> dict[str, str]:
    return {name: tuned[method.key][name] for name in ("learning_rate", "weight_decay")}


# The parts


def method_runs(budget: str, arguments: argparse.Namespace, tuned: dict[str, dict]) -> list[Run]:
    """All methods with all seeds, for equal images, for equal time, or for many images."""
    runs, epochs = [], {key: arguments.epochs for key in arguments.methods}
    if budget != "images":
        seconds = image_times(arguments.methods, arguments, tuned)
        longer = {key: arguments.epochs * seconds["scalekd"] / seconds[key] for key in seconds}
        known = "scalekd" if budget == "time" else "alone"  # whose runs of another budget are these, too
        epochs = {key: longer["alone" if budget == "long" else key] for key in arguments.methods if key != known}
    for seed in arguments.seeds:
        for key in epochs:
            options = settings_of(METHODS[key], tuned) | {"num_train_epochs": f"{epochs[key]:.2f}"}
            runs.append(student_run(METHODS[key], f"{key}_{budget}", seed, arguments, **options))
    return runs


def image_times(keys: Iterable[str], arguments: argparse.Namespace, tuned: dict[str, dict]) -> dict[str, float]:
    """Seconds of an image by method, as the runs for equal images took; kept, so that further seeds have the same budget."""
    for key in {*keys, "alone", "scalekd"}:
        found = tuned[key]
        if "seconds_per_image" not in found:
            outcomes = by_seed(f"{key}_images", arguments).values()
            if not outcomes:
                raise SystemExit(f"How long {key} takes is not known: take `--parts methods --budgets images` first.")
            found["seconds_per_image"] = statistics.median(one.seconds / one.images for one in outcomes)
    write_tuned(tuned, arguments)
    return {key: found["seconds_per_image"] for key, found in tuned.items() if "seconds_per_image" in found}


def teacher_runs(arguments: argparse.Namespace, tuned: dict[str, dict]) -> list[Run]:
    method, runs = METHODS["scalekd"], []
    for seed in arguments.seeds:
        for name in list(TEACHERS)[1:]:
            options = settings_of(method, tuned) | {"num_train_epochs": f"{arguments.epochs:g}", "teacher": name}
            runs.append(student_run(method, f"scalekd_from_{name}", seed, arguments, **options))
    return runs


def share_runs(arguments: argparse.Namespace, tuned: dict[str, dict]) -> list[Run]:
    """Three methods on each share of the images, for equal images; then two for the time that ScaleKD takes."""
    seconds = image_times(SHARED, arguments, tuned)
    longer = {key: seconds["scalekd"] / seconds[key] for key in SHARED[:2]}
    runs = []
    for seed in arguments.seeds:
        for share in arguments.shares:
            epochs = arguments.epochs * SHARE / share
            those = [(key, "images", epochs) for key in SHARED]
            those += [(key, "time", epochs * longer[key]) for key in longer]
            for key, budget, passes in those:
                name = share_name(key, share, budget)
                options = settings_of(METHODS[key], tuned) | {"train_split": f"train[:{share}%]"}
                runs.append(
                    student_run(METHODS[key], name, seed, arguments, **options, num_train_epochs=f"{passes:.3f}")
                )
    return runs


def feature_runs(arguments: argparse.Namespace, tuned: dict[str, dict]) -> list[Run]:
    """Labels are read of the evaluated images alone."""
    method = Method("features_only", "features only", options="--logit_weight 0 --num_classes 0")
    settings = settings_of(METHODS["scalekd"], tuned) | {"num_train_epochs": f"{arguments.epochs:g}"}
    runs = [student_run(method, method.key, seed, arguments, **settings) for seed in arguments.seeds]
    return [FeaturesRun(run.title, run.folder, run.command, run.teacher) for run in runs]


def pretrained_runs(arguments: argparse.Namespace, tuned: dict[str, dict]) -> list[list[Run]]:
    """The student alone on what the teacher has seen but for the few images, for four times the budget; then on these."""
    many, few = f"train[{FEW}%:80%]", f"train[:{FEW}%]"
    alone, groups = settings_of(METHODS["alone"], tuned), ([], [])
    for seed in arguments.seeds:
        epochs = f"{4 * arguments.epochs * SHARE / (80 - FEW):.3f}"
        options = alone | {"train_split": many, "num_train_epochs": epochs}
        first = student_run(METHODS["alone"], "alone_pretrained", seed, arguments, **options)
        options = alone | {"train_split": few, "num_train_epochs": f"{arguments.epochs * SHARE / FEW:.3f}"}
        options |= {"model": str(first.folder), "pretrained": "true", "model_args": "{}"}
        groups[0].append(first)
        groups[1].append(student_run(METHODS["alone"], "alone_fine_tuned", seed, arguments, **options))
    return list(groups)


def probe_runs(arguments: argparse.Namespace) -> list[Run]:
    runs = []
    for seed in arguments.seeds:
        for key in ("features_only", "alone_images", "scalekd_images"):
            student = student_folder(arguments.output_dir, key, seed)
            folder = student.with_name(f"probe_{student.name}")
            words = [sys.executable, str(RECIPES / "evaluate.py"), str(student), *common(arguments), "--probe", "true"]
            words += ["--train_split", f"train[:{SHARE}%]", "--eval_split", "test", "--streaming", "false"]
            runs.append(ProbeRun(folder.name, folder, (*words, "--output_dir", str(folder)), student))
    return runs


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a folder, or a data set on the Hub")
    parser.add_argument("--image_column", help="column of the images, if not `image`")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/methods"), help="holds the runs' folders")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["tune", "methods"])
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=["images", "time"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="of `tune` and `methods`")
    parser.add_argument("--shares", type=int, nargs="+", default=[80, 10, 5, 1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="runs at once; they share the cores")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the budget")
    parser.add_argument("--report_only", action="store_true", help="train nothing")
    arguments = parser.parse_args(words)
    arguments.epochs = EPOCHS * arguments.scale
    return arguments


def plan_part(part: str, arguments: argparse.Namespace) -> Iterator[list[Run]]:
    """The runs of a part, in groups of which each needs the one before."""
    tuned = read_tuned(arguments)
    if part == "methods":
        for budget in arguments.budgets:
            yield method_runs(budget, arguments, tuned)
    elif part == "teachers":
        others = [teacher_run(name, arguments) for name in list(TEACHERS)[1:]]
        yield others + teacher_runs(arguments, tuned)
    elif part == "shares":
        yield share_runs(arguments, tuned)
    elif part == "pretrained":
        yield from pretrained_runs(arguments, tuned)
    else:
        yield feature_runs(arguments, tuned)
        yield probe_runs(arguments)


def main() -> None:
    arguments = parse(sys.argv[1:])
    leave_on_signals()
    failed: list[str] = []
    if not arguments.report_only:
        failed = train_these([teacher_run(next(iter(TEACHERS)), arguments)], arguments)
        if "tune" in arguments.parts and not failed:
            failed = tune([METHODS[key] for key in arguments.methods], arguments)
        for part in [part for part in arguments.parts if part != "tune" and not failed]:
            for runs in plan_part(part, arguments):
                failed += train_these(runs, arguments)
    text, found = report(arguments, read_tuned(arguments))
    (arguments.output_dir / "comparison.md").write_text(text, encoding="utf-8")
    found = {"command": shlex.join(sys.argv[1:]), **found}
    (arguments.output_dir / "comparison.json").write_text(json.dumps(found, indent=2), encoding="utf-8")
    draw(arguments, read_tuned(arguments), arguments.output_dir / "comparison.png")
    print(text)
    if failed:
        raise SystemExit(f"{len(failed)} runs failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
