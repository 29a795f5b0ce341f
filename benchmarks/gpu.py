"""Everything that only a GPU can show, in one command of at most eight minutes, without a network.

    python benchmarks/gpu.py [--output gpu_results] [--data FOLDER OF CIFAR-10] [--seconds 470]

Parts run one after the other, most valuable first, each in processes of its own and within its own seconds; one that fails or
is cut short is said so, and the next begins:

    correctness   the tests marked `gpu`: the authors' tensors, the plain reference, bf16, compiled steps, resuming to the bit
    step          the floor, the published step and ours: eager, channels-last, compiled, with CUDA graphs (benchmarks/step.py)
    trainer       the Trainer fed with JPEGs, beside the bare step (benchmarks/end_to_end.py)
    plan          what `--plan` estimated for these settings, beside what was measured
    engines       FSDP2 and DeepSpeed through the Trainer, SyncBatchNorm and export on one card
    results       CIFAR-10 at five times the budget, as far as the time goes, where the data is given

gpu.json, gpu.md (a block for benchmarks/README.md) and gpu.log are written after every part. `--rehearse` runs all parts on a CPU
with tiny models, so that no line runs for the first time on the card; in float32, since a CPU without bf16 needs minutes for it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from gpu_report import markdown


ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("scalekd-hf", "torch", "transformers", "timm", "accelerate", "datasets", "evaluate", "deepspeed", "pytest")
ENGINES = "tests/gpu/test_engines.py"
SMALL = (
    "--student",
    "timm/resnet18",
    "--teacher",
    "timm/vit_tiny_patch16_224",
    "--batch",
    2,
    "--backend",
    "aot_eager",
)
SMALL += ("--precision", "float32", "--student_args", '{"layers": [1, 1, 1, 1]}', "--teacher_args", '{"depth": 3}')
SWIN = {"Swin-S": "timm/swin_small_patch4_window7_224", "Swin-L": "timm/swin_large_patch4_window7_224"}
STEPS = (  # what is timed, for which teacher, and in how many seconds
    ("eager", "Swin-S", "--layout contiguous channels-last --compile", 55),
    ("compiled", "Swin-S", "--layout channels-last --compile default reduce-overhead", 140),
    ("eager", "Swin-L", "--layout channels-last --compile", 45),
    ("compiled", "Swin-L", "--layout channels-last --compile default", 100),
)
LANE = ("tests/gpu", "tests/method/test_golden.py", "tests/training/test_step.py")
GOLDEN = Path(os.environ.get("SCALEKD_GOLDEN", ROOT.parent / "shared" / "golden"))


class Session:
    """Runs the parts' commands within their time, and keeps what they found.

    Attributes:
        found: figures by part; a part's "problems" say what failed or was cut short.
    """

    def __init__(self, args: argparse.Namespace, work: Path):
        self.args, self.work, self.rehearse = args, work, args.rehearse
        self.patience = 4 if args.rehearse else 1  # a rehearsal may take longer, on whatever CPU
        self.output = args.output
        self.output.mkdir(parents=True, exist_ok=True)
        self.log = self.output / "gpu.log"
        self.log.write_text("", encoding="utf-8")
        self.end = time.monotonic() + args.seconds
        self.found: dict[str, dict[str, Any]] = {}

    def seconds(self, wanted: float) -> float:
        """As many as are wanted and left."""
        return max(0.0, min(wanted, self.end - time.monotonic()))

    def start(self, *words: object) -> subprocess.Popen:
        """Start a command of this Python in a session of its own."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        if self.rehearse:
            environment |= {"SCALEKD_REHEARSE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *map(str, words)]
        with self.log.open("a", encoding="utf-8") as log:
            print("$", *command, file=log, flush=True)
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def run(self, part: str, what: str, seconds: float, *words: object) -> bool:
        """Run a command, and say in the part's problems what went wrong; returns whether nothing did."""
        limit, begin = self.seconds(seconds), time.monotonic()
        if limit < 15:  # not even the imports
            self.problem(part, f"{what}: no time was left")
            return False
        place = self.log.stat().st_size
        process = self.start(*words)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            stop(process, patience=15)
            self.problem(part, f"{what}: cut short after {limit:.0f} s")
            return False
        self.part(part).setdefault("seconds", {})[what] = round(time.monotonic() - begin, 1)
        if status:
            lines = self.log.read_bytes()[place:].decode(errors="replace").strip().splitlines()
            self.problem(part, f"{what}: exit status {status}: {lines[-1][:300] if lines else ''}")
        return not status

    def part(self, name: str) -> dict[str, Any]:
        return self.found.setdefault(name, {})

    def problem(self, part: str, text: str) -> None:
        self.part(part).setdefault("problems", []).append(text)
        print(f"{part}: {text}", flush=True)

    def write(self) -> None:
        (self.output / "gpu.json").write_text(json.dumps(self.found, indent=2) + "\n", encoding="utf-8")
        try:
            text = markdown(self.found)
        except Exception as error:  # the figures are in gpu.json
            text = f"The report cannot be written: {type(error).__name__}: {error}\n"
        (self.output / "gpu.md").write_text(text, encoding="utf-8")


def stop(process: subprocess.Popen, patience: float = 0) -> None:
    """End a command and all that it started, in whichever session; pytest writes what it has when it is interrupted."""
    started: set[psutil.Process] = set()
    if patience:
        process.send_signal(signal.SIGINT)
    end = time.monotonic() + patience
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            started |= set(psutil.Process(process.pid).children(recursive=True))
        if time.monotonic() >= end:
            process.kill()
        time.sleep(0.05)
    for one in [*started, *(child for above in started for child in children(above))]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(started, timeout=10)


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as work:
        session = Session(args, Path(work))
        machine(session)
        for name, (part, seconds) in PARTS.items():
            if args.parts and name not in args.parts:
                continue
            begin = time.monotonic()
            try:
                part(session, session.seconds(session.patience * seconds))
            except Exception as error:  # the next part may run
                session.problem(name, f"{type(error).__name__}: {error}")
            print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
            session.write()
        print((session.output / "gpu.md").read_text(encoding="utf-8"))


def machine(session: Session) -> None:
    """Card and versions, and which packages are missing."""
    found = session.part("machine")
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            session.problem("machine", f"{name} is not installed: what needs it will fail")
    if not GOLDEN.is_dir():
        session.problem("machine", "the authors' tensors are not here: set SCALEKD_GOLDEN to their folder")
    found |= {"python": sys.version.split()[0], "cores": os.cpu_count()}
    if not session.rehearse:
        import torch

        found["card"] = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else "none: nothing here will be measured"
        )


def correctness(session: Session, seconds: float) -> None:
    """The tests marked `gpu`; meanwhile the steps of one pair are compiled, so that their code is on the disk."""
    warming = session.start(*step_words(session, "Swin-S"))
    try:
        tests(session, "correctness", seconds, *LANE, f"--ignore={ENGINES}")
    finally:
        if warming.poll():
            session.problem("correctness", f"compiling ahead ended with status {warming.returncode}, see gpu.log")
        stop(warming)


def tests(session: Session, part: str, seconds: float, *words: str) -> None:
    """Run tests, and take in how many passed, which failed and why, and what they measured."""
    from xml.etree import ElementTree

    report = session.work / f"{part}.xml"
    workers = 0 if session.rehearse else min(8, os.cpu_count() or 1)  # of tiny models: importing takes longer
    pytest = ("-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "-n", workers, f"--junitxml={report}")
    session.run(part, "tests", seconds, *pytest, *words)
    if not report.exists():
        return
    found, cases = session.part(part), ElementTree.parse(report).findall(".//testcase")
    kinds = {kind: [case for case in cases if case.find(kind) is not None] for kind in ("failure", "error", "skipped")}
    unlike = sum(kinds.values(), [])
    found["tests"] = {"passed": sum(case not in unlike for case in cases), **{k: len(v) for k, v in kinds.items()}}
    for kind, those in kinds.items():
        for case in those:
            what = case.find(kind)
            session.problem(
                part, f"{kind}: {case.get('name')}: {what.get('message', '')[:300] if what is not None else ''}"
            )
    properties = [item for case in cases for item in case.findall("properties/property")]
    found["measured"] = {item.get("name"): item.get("value") for item in properties}


def step_words(session: Session, teacher: str, options: str = "", folder: Path | None = None) -> list[object]:
    """A call of benchmarks/step.py; without options, one that compiles what will be timed."""
    modes = "default reduce-overhead" if teacher == "Swin-S" else "default"
    modes *= not session.rehearse  # whose backend keeps no code on the disk
    given = options or f"--layout channels-last --compile {modes}"
    words = [*given.split(), "--output", folder or session.work / f"warm {teacher}"]
    if session.rehearse:
        return ["benchmarks/step.py", *SMALL, "--image_size", 64, *words, "--device", "cpu", "--rounds", 1]
    words += ["--precision", "bf16", "--rounds", 10 if options else 1]
    return ["benchmarks/step.py", "--teacher", SWIN[teacher], "--batch", 128, *words]


def step(session: Session, seconds: float) -> None:
    """Time the ways of doing the step, one after the other."""
    end = time.monotonic() + seconds
    rows = session.part("step").setdefault("rows", [])
    for number, (what, teacher, options, limit) in enumerate(STEPS[1:3] if session.rehearse else STEPS):
        folder = session.work / f"step {number}"
        words = step_words(session, teacher, options, folder)
        session.run("step", f"{what}, {teacher}", min(session.patience * limit, end - time.monotonic()), *words)
        if (folder / "step.json").exists():
            measured = json.loads((folder / "step.json").read_text(encoding="utf-8"))
            rows.extend({"run": what, "pair": f"{teacher} to ResNet-50", **row} for row in measured["rows"])
            session.part("step")["machine"] = measured["machine"]
        session.write()


def trainer(session: Session, seconds: float) -> None:
    """The Trainer on JPEGs beside the bare step, not compiled: that would take minutes for each."""
    file = session.work / "trainer.json"
    words: list[object] = ["--no-compile", "--output", file, "--warm_up", 2 if session.rehearse else 10]
    if session.rehearse:
        words += [*SMALL, "--images", 16, "--steps", 4, "--workers", 1]
    else:
        words += ["--images", 1024, "--steps", 40, "--rounds", 2, "--workers", os.cpu_count() or 1]
    session.run("trainer", "eager", seconds, "benchmarks/end_to_end.py", *words)
    if file.exists():
        session.part("trainer")["eager"] = json.loads(file.read_text(encoding="utf-8"))


def plan(session: Session, seconds: float) -> None:
    """What a plan says of the settings that were measured."""
    from scalekd_hf.tools.plan import plan as plan_run

    settings = {"student": "timm/resnet50", "dataset": "imagenet", "output_dir": str(session.work / "planned")}
    settings |= {"max_steps": 100, "per_device_train_batch_size": 128, "bf16": True, "use_cpu": True}
    for name, teacher in SWIN.items():
        planned = plan_run({**settings, "teacher": teacher})
        if planned.error:
            raise RuntimeError(planned.error)
        session.part("plan")[f"{name} to ResNet-50"] = planned.to_dict()


def engines(session: Session, seconds: float) -> None:
    """FSDP2 and DeepSpeed through the Trainer, SyncBatchNorm, export."""
    tests(session, "engines", seconds, ENGINES)


def results(session: Session, seconds: float) -> None:
    """CIFAR-10, one student, until the time is up."""
    if session.args.data is None:
        session.problem("results", "no data was given (`--data`)")
        return
    folder = session.work / "results"
    words = ["--dataset", session.args.data, "--output_dir", folder, "--report", session.work / "results.md"]
    words += ["--tables", 1, "--students", "resnet18", "--seeds", 0, "--train_split", "train", "--scale", 5]
    session.run("results", "CIFAR-10", 15 if session.rehearse else seconds, "recipes/results.py", *words)
    if (report := session.work / "results.md").exists():
        session.part("results")["report"] = report.read_text(encoding="utf-8")


PARTS: dict[str, tuple[Callable[[Session, float], None], float]] = {
    "correctness": (correctness, 120),
    "step": (step, 195),
    "trainer": (trainer, 50),
    "plan": (plan, 10),
    "engines": (engines, 95),
    "results": (results, 600),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_results"))
    parser.add_argument("--data", type=Path, help="a folder with CIFAR-10's Parquet files")
    parser.add_argument("--seconds", type=float, default=470, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="only these")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny models")
    return parser.parse_args()


if __name__ == "__main__":
    main()
