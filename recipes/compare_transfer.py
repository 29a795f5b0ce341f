"""Compare backbones on a dense task: the same head, data, budget and seeds on random weights and on each student.

    python recipes/compare_transfer.py segment recipes/configs/transfer/scenes.yaml \\
        --student "alone=outputs/students/alone-seed{seed}" --student "distilled=outputs/students/distilled-seed{seed}" \\
        [--seeds 0 1 2] [--jobs 1] [any option of `scalekd transfer`]

`{seed}` in a folder stands for the seed, so that each seed has a student of its own; without it all have the same. Random
weights are those of the first student's network. Each run is `scalekd transfer` in a process of its own, with its
output in `<run folder>.log`. Call it again after an interruption: runs that have ended are kept. What comes of it is
printed and written as `comparison.md` and `comparison.json` into the output folder.
"""

import argparse
import json
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from results import RECIPES, Run, leave_on_signals, refuse_others, train
from results_report import cell, minus, read_json, spread, student_folder, table


RANDOM = "random"  # the arm whose backbone has fresh weights
METRICS = {  # the main one first; those that a run has are compared
    "segment": ("mean_iou", "pixel_accuracy", "mean_accuracy"),
    "detect": ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"),
}


@dataclass(frozen=True)
class TransferRun(Run):
    """One call of `scalekd transfer`."""

    measure: ClassVar[str] = "main metric"

    def top1(self) -> float | None:
        return read_metrics(self.folder).get(METRICS[self.command[2]][0])


def read_metrics(folder: Path) -> dict[str, float]:
    """The metrics of a run, from 0 to 1; none before its end. They may stand under the name of the model."""
    found = read_json(folder / "results.json")
    while found and all(isinstance(value, dict) for value in found.values()):
        found = list(found.values())[-1]
    return found


def students(words: list[str]) -> dict[str, str]:
    """Folders, perhaps with `{seed}` in them, by the names that they were given: `distilled=outputs/student`."""
    named = dict(word.split("=", 1) for word in words if "=" in word)
    if len(named) != len(words) or RANDOM in named or not all((*named, *named.values())):
        raise SystemExit(f"`student` {words}: each is NAME=FOLDER, with a name of its own, other than {RANDOM!r}.")
    return named


def plan_runs(arguments: argparse.Namespace, options: list[str]) -> list[Run]:
    """All runs, seed by seed, in the order in which they are trained."""
    first = next(iter(arguments.students.values()))
    arms = [(RANDOM, first, ["--backbone_pretrained", "false"])]
    arms += [(name, student, []) for name, student in arguments.students.items()]
    runs: list[Run] = []
    for seed in arguments.seeds:
        for name, student, words in arms:
            folder = student_folder(arguments.output_dir, name, seed)
            command = [sys.executable, str(RECIPES / "transfer.py"), arguments.task, str(arguments.config)]
            command += ["--student", student.replace("{seed}", str(seed)), "--seed", str(seed)]
            command += ["--output_dir", str(folder), "--disable_tqdm", "true", "--resume_from_checkpoint", "true"]
            runs.append(TransferRun(f"{name}, seed {seed}", folder, (*command, *words, *options)))
    return runs


def compare(arguments: argparse.Namespace) -> dict[str, dict[str, dict[int, float]]]:
    """What the runs came to, in %: by metric, by arm, and by seed; only what is there."""
    read = {
        name: {seed: read_metrics(student_folder(arguments.output_dir, name, seed)) for seed in arguments.seeds}
        for name in (RANDOM, *arguments.students)
    }
    found = {
        metric: {
            name: {seed: 100 * metrics[metric] for seed, metrics in by_seed.items() if metric in metrics}
            for name, by_seed in read.items()
        }
        for metric in METRICS[arguments.task]
    }
    return {metric: by_arm for metric, by_arm in found.items() if any(by_arm.values())}


def report(found: dict[str, dict[str, dict[int, float]]], arguments: argparse.Namespace) -> str:
    """The table: an arm a column, then each arm's gain over the one before it, seed by seed."""
    names, seeds = [RANDOM, *arguments.students], arguments.seeds
    pairs = list(zip(names[1:], names, strict=False))
    rows = []
    for metric, by_arm in found.items():
        values = [cell(by_arm[name], len(seeds)) for name in names]
        gains = [cell(minus(by_arm[after], by_arm[before]), len(seeds), "+") for after, before in pairs]
        rows.append([metric, *values, *gains])
    header = ["metric, %", *names, *(f"{after} over {before}" for after, before in pairs)]
    return (
        f"Mean ± sample standard deviation over the seeds {', '.join(map(str, seeds))}; gains are taken seed by seed.\n\n"
        f"{table(header, rows)}\n"
    )


def summary(found: dict[str, dict[str, dict[int, float]]]) -> dict:
    """The same for programs: the values, their mean and their spread, by metric and arm."""
    return {
        metric: {
            name: {"by_seed": values, "mean": statistics.mean(values.values()), "spread": spread(values)}
            for name, values in by_arm.items()
            if values
        }
        for metric, by_arm in found.items()
    }


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("task", choices=METRICS)
    parser.add_argument("config", type=Path, help="a YAML file of `scalekd transfer`")
    parser.add_argument("--student", dest="students", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/transfer"), help="holds the runs' folders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; they share the cores")
    parser.add_argument("--report_only", action="store_true", help="train nothing")
    arguments, options = parser.parse_known_args(words)
    arguments.students = students(arguments.students)
    return arguments, options


def main() -> None:
    arguments, options = parse(sys.argv[1:])
    leave_on_signals()
    runs = plan_runs(arguments, options)
    refuse_others(runs, arguments.output_dir)
    failed = [] if arguments.report_only else train(runs, arguments.jobs)
    found = compare(arguments)
    text = report(found, arguments)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "comparison.md").write_text(text, encoding="utf-8")
    said = {"command": shlex.join(sys.argv[1:]), "task": arguments.task, "metrics": summary(found)}
    (arguments.output_dir / "comparison.json").write_text(json.dumps(said, indent=2), encoding="utf-8")
    print(text)
    if failed:
        raise SystemExit(f"{len(failed)} runs failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
