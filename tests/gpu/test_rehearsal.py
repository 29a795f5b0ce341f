"""benchmarks/gpu.py on a CPU: all parts run, one after the other, and say what they found."""

import json
import subprocess
import sys
import time
import warnings

import psutil
import pytest
from helpers import DIGITS, ROOT, run


def rehearsed(folder, *words):
    """What a rehearsal has found, and its log."""
    words = ["--rehearse", "--seconds", 1700, "--data", DIGITS, "--output", folder, *words]
    finished = run("python", "benchmarks/gpu.py", *words, timeout=1800)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads((folder / "gpu.json").read_text()), (folder / "gpu.log").read_text()


def failures(found):
    """Problems by part; the authors' tensors may be missing, and the results have no time."""
    parts = {name: part.get("problems", ()) for name, part in found.items() if name not in ("machine", "results")}
    serious = {name: [text for text in texts if not text.startswith("skipped")] for name, texts in parts.items()}
    return {name: texts for name, texts in serious.items() if texts}


@pytest.mark.slow
def test_all_parts_run_with_tiny_models_on_a_cpu(tmp_path):
    found, log = rehearsed(tmp_path)
    failed = failures(found)
    if failed:  # processes that other tests of this machine have starved, or taken a port from: once more, alone
        warnings.warn(f"once more: {failed}", stacklevel=1)
        again, _ = rehearsed(tmp_path / "again", "--parts", *failed)
        assert not failures(again), (failed, failures(again))
        found |= {name: again[name] for name in failed}
    assert found["correctness"]["tests"]["passed"] > 10 and found["engines"]["tests"]["passed"] == 3
    assert found["correctness"]["measured"]["tensors that differ after kill -9 and resume"].startswith("0 of")
    ways = ["floor", "published", "ours"]
    compiled = ["floor compiled", "compiled"]
    graphs = [f"{way} reduce-overhead" for way in compiled]
    rows = found["step"]["rows"]
    assert [row["way"] for row in rows] == [*ways, *compiled, *ways, *graphs, *ways]
    assert all(row["peak_gib"] > 0 and row["utilisation"] > 0 for row in rows)
    published, ours = rows[1:3]
    assert 0.9 < ours["gflop_per_image"] / published["gflop_per_image"] <= 1
    assert 0 < found["trainer"]["eager"]["share"] < 2 and found["trainer"]["eager"]["waiting"] < 1
    assert found["plan"]["Swin-L to ResNet-50"]["gflops_per_image"]["total"] == pytest.approx(199.19, abs=0.01)
    assert found["results"]["problems"] == ["CIFAR-10: cut short after 15 s"] and "results.py" in log
    block = (tmp_path / "gpu.md").read_text()
    for line in ("share of the matrix product's rate", "| compiled |", "GiB of a step", "Engines through the Trainer"):
        assert line in block


@pytest.mark.parametrize("seconds", [0, 10])
def test_without_time_each_part_says_so_and_the_report_is_written(tmp_path, seconds):
    finished = run(
        "python", "benchmarks/gpu.py", "--rehearse", "--seconds", seconds, "--output", tmp_path, "--parts", "step"
    )
    assert finished.returncode == 0 and "step: compiled, Swin-S: no time was left" in finished.stdout
    assert "no time was left" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize("patience", [0, 0.5])
def test_a_command_that_is_cut_short_leaves_nothing_behind_in_another_session(tmp_path, monkeypatch, patience):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
        "print(left.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as started:
        left = psutil.Process(int(started.stdout.readline()))
        begin = time.monotonic()
        gpu.stop(started, patience)
        assert started.returncode is not None and not left.is_running() and time.monotonic() - begin < 30


def test_a_part_that_fails_is_said_and_the_next_one_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    def broken(session, seconds):
        raise RuntimeError("the card fell off the bus")

    def fine(session, seconds):
        assert not session.run("second", "a command", 30, "-c", "print('a reason'); raise SystemExit(3)")

    monkeypatch.setattr(gpu, "PARTS", {"first": (broken, 10), "second": (fine, 30)})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", "--output", str(tmp_path)])
    gpu.main()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["first"]["problems"] == ["RuntimeError: the card fell off the bus"]
    assert found["second"]["problems"] == ["a command: exit status 3: a reason"]
