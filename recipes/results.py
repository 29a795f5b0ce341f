"""Train every teacher and student that docs/results.md compares, and write its tables and curves.

    python recipes/results.py --dataset uoft-cs/cifar10 --image_column img [--seeds 0 1 2] [--jobs 2]

Each run is one of the recipes, in a process of its own, with its output in `<run folder>.log`. Call it again after an
interruption: runs that have ended are kept, one that was stopped goes on. Seed 0 of all runs comes first, then seed 1,
and so on, so that the tables are whole early. `--report_only` writes what is there, without training.

A GPU is used where there is one. There, all images and more epochs are `--train_split train --scale 5`.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import yaml
from results_report import (
    SCALEKD,
    STUDENTS,
    TABLES,
    TEACHERS,
    Arm,
    draw,
    read_outcomes,
    report_block,
    shown_command,
    student_folder,
    student_top1,
    teacher_folder,
    teacher_top1,
    threads,
    write_report,
)


RECIPES = Path(__file__).resolve().parent
CONFIGS = RECIPES / "configs" / "cifar10"
ON_GPU = " --use_cpu false"
PATIENCE = 120  # seconds for a run to save a checkpoint when it is told to stop


@dataclass(frozen=True)
class Run:
    """One call of a recipe."""

    title: str
    folder: Path
    command: tuple[str, ...]
    teacher: Path | None = None  # the folder of the teacher that must be there first
    measure: ClassVar[str] = "top-1"

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")

    def top1(self) -> float | None:
        """Its result; None before its end."""
        return teacher_top1(self.folder) if self.teacher is None else student_top1(self.folder)

    def is_ready(self) -> bool:
        """Whether what it needs is there."""
        return self.teacher is None or teacher_top1(self.teacher) is not None

    def is_another(self) -> bool:
        """Whether its log says that it was made with other options. Where files lie does not count, their names do."""
        lines = self.log.read_text(errors="replace", encoding="utf-8").splitlines() if self.log.exists() else []
        made_by = next((shlex.split(line[2:]) for line in reversed(lines) if line.startswith("$ ")), self.command)
        said, wanted = (shlex.join(Path(word).name for word in words[1:]) for words in (made_by, self.command))
        return said.replace(ON_GPU, "") != wanted.replace(ON_GPU, "")


def plan_runs(arms: Iterable[Arm], arguments: argparse.Namespace) -> list[Run]:
    """The teachers of these arms, then the arms, seed by seed, in the order in which they are trained."""
    arms = list({arm.name: arm for arm in arms}.values())
    runs = [teacher_run(name, arguments) for name in TEACHERS if any(arm.teacher == name for arm in arms)]
    return runs + [student_run(arm, seed, arguments) for seed in arguments.seeds for arm in arms]


def teacher_run(name: str, arguments: argparse.Namespace) -> Run:
    folder = teacher_folder(arguments.output_dir, name)
    return Run(f"teacher {name}", folder, recipe("train_teacher.py", f"teacher_{name}", folder, arguments))


def student_run(arm: Arm, seed: int, arguments: argparse.Namespace) -> Run:
    folder = student_folder(arguments.output_dir, arm.name, seed)
    teacher = teacher_folder(arguments.output_dir, arm.teacher)
    options = ["--teacher", str(teacher), "--seed", str(seed), *shlex.split(arm.options)]
    if arguments.train_split:
        options += ["--train_split", arguments.train_split]
    words = (*recipe("distill.py", arm.student, folder, arguments), *options)
    return Run(f"{arm.name}, seed {seed}", folder, words, teacher)


def recipe(script: str, config: str, folder: Path, arguments: argparse.Namespace) -> tuple[str, ...]:
    file = CONFIGS / f"{config}.yaml"
    words = [sys.executable, str(RECIPES / script), str(file), "--dataset", arguments.dataset]
    # Resumed also where a run was killed without a word: what it has of a checkpoint or a finished baseline is kept.
    words += ["--output_dir", str(folder), "--disable_tqdm", "true", "--resume_from_checkpoint", "true"]
    if torch.cuda.is_available():
        words += shlex.split(ON_GPU)
    if arguments.image_column:
        words += ["--image_column", arguments.image_column]
    if arguments.scale != 1:  # the recipes round up to a whole step
        epochs = yaml.safe_load(file.read_text(encoding="utf-8"))["num_train_epochs"]
        words += ["--num_train_epochs", str(epochs * arguments.scale)]
    return tuple(words)


def refuse_others(runs: list[Run], output_dir: Path) -> None:
    """End here if the folder holds runs of these names that were made with other options."""
    if others := [run.title for run in runs if run.folder.exists() and run.is_another()]:
        raise SystemExit(
            f"`output_dir` {str(output_dir)!r} holds runs that were made with other options "
            f"({'; '.join(others)}): they are kept. Take another `output_dir`, or remove those runs' folders."
        )


def train(runs: list[Run], jobs: int) -> list[str]:
    """Train what has no result yet, so many at once; returns the titles of the runs that failed."""
    waiting = [run for run in runs if run.top1() is None]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them there already.", flush=True)
    running: list[tuple[Run, subprocess.Popen, float]] = []
    failed: list[str] = []
    try:
        while waiting or running:
            for entry in [entry for entry in running if entry[1].poll() is not None]:
                running.remove(entry)
                failed += finish(*entry)
            under_way = {run.folder for run in (*waiting, *(run for run, *_ in running))}
            for run in list(waiting):
                ready = run.is_ready()
                if ready and len(running) < jobs:
                    waiting.remove(run)
                    running.append((run, start(run, jobs), time.monotonic()))
                elif not ready and run.teacher not in under_way:
                    waiting.remove(run)
                    failed.append(run.title)
                    print(f"left out: {run.title}, its teacher is not there", flush=True)
            time.sleep(0.2)
    finally:
        stop([process for _, process, _ in running])
    return failed


def start(run: Run, jobs: int) -> subprocess.Popen:
    print(f"started: {run.title}", flush=True)
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads(jobs))}
    with run.log.open("a", encoding="utf-8") as log:
        print("$", shlex.join(run.command), file=log, flush=True)
        # A session of its own: Ctrl-C reaches this process alone, which then asks each run for a checkpoint.
        return subprocess.Popen(
            run.command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def finish(run: Run, process: subprocess.Popen, started: float) -> list[str]:
    """Say how a run ended; returns its title if it failed."""
    top1, minutes = run.top1(), (time.monotonic() - started) / 60
    if process.returncode == 0 and top1 is not None:
        print(f"ended: {run.title}, {run.measure} {top1:.2%}, {minutes:.1f} minutes", flush=True)
        return []
    lines = run.log.read_text(errors="replace", encoding="utf-8").splitlines()[-15:]
    print(f"FAILED: {run.title}, status {process.returncode}; the end of {run.log}:", *lines, sep="\n    ", flush=True)
    return [run.title]


def leave_on_signals() -> None:
    """Let SIGTERM and a closed terminal end this command as Ctrl-C does, which stops its runs; `nohup` keeps it going."""
    for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):  # Windows has no SIGHUP
        number = getattr(signal, name)
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))


def stop(processes: list[subprocess.Popen]) -> None:
    """SIGTERM, on which a run saves a checkpoint and ends."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a folder, or a data set on the Hub")
    parser.add_argument("--image_column", help="column of the images, if not `image`")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/cifar10"), help="holds the runs' folders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at once; they share the cores")
    parser.add_argument("--report", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--tables", type=int, nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--train_split", help="of the students, if not the quarter that their configurations name")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiplies every budget; take another output_dir with it"
    )
    parser.add_argument("--report_only", action="store_true", help="train nothing")
    return parser.parse_args(words)


def chosen(arguments: argparse.Namespace) -> dict[int, list[Arm]]:
    """The tables that were asked for and have arms."""
    tables = {
        n: [arm for arm in TABLES[n] if arm.student in arguments.students] for n in sorted(set(arguments.tables))
    }
    return {number: arms for number, arms in tables.items() if arms}


def main() -> None:
    arguments = parse(sys.argv[1:])
    tables = chosen(arguments)
    arms = [arm for in_table in tables.values() for arm in in_table]
    leave_on_signals()
    runs = plan_runs(arms, arguments)
    refuse_others(runs, arguments.output_dir)
    failed = [] if arguments.report_only else train(runs, arguments.jobs)
    # The student alone and full ScaleKD are in more tables than those that train them.
    outcomes = read_outcomes([*arms, *(SCALEKD[arm.student] for arm in arms)], arguments.output_dir, arguments.seeds)
    write_report(arguments.report, report_block(tables, outcomes, arguments, shown_command(sys.argv[1:])))
    if 1 in tables:
        draw(dict.fromkeys(arm.student for arm in tables[1]), outcomes, arguments.report.with_suffix(".png"))
    print(f"The report is in {arguments.report}.")
    if failed:
        raise SystemExit(f"{len(failed)} runs failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
