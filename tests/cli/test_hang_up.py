"""A terminal that closes, with the connection to it or by hand, costs no run anything."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import run
from processes import run_module


WORDS = ["quickstart", "--max_steps", "12", "--logging_steps", "1", "--baseline", "false", "--use_cpu", "true"]
WORDS += ["--dataloader_num_workers", "1", "--output_dir", "run"]
IN_A_TERMINAL = (  # a process of its own session, whose terminal standard input becomes
    "import fcntl, signal, sys, termios\n"
    "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # whatever these tests run under
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "from scalekd_hf.cli.main import main\n"
    "main(sys.argv[1:])"
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no terminals that hang up")
@pytest.mark.parametrize("launcher", [[], ["--num_processes", "2"]], ids=["one process", "two processes"])
def test_a_terminal_that_closes_leaves_a_checkpoint_and_the_same_command_goes_on(tmp_path, monkeypatch, launcher):
    monkeypatch.chdir(tmp_path)
    main, terminal = os.openpty()
    command = [sys.executable, "-u", "-c", IN_A_TERMINAL, *WORDS, *launcher]
    with subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
    ) as started:
        os.close(terminal)
        said = b""
        while b"2/12" not in said:
            said += os.read(main, 10_000)
        os.close(main)
        assert started.wait(120) == 75, said.decode()[-3000:]
    saved = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    assert saved and saved != ["checkpoint-12"]
    again = run_module("scalekd_hf.cli.main", *WORDS, *launcher)
    assert again.returncode == 0 and "it is resumed" in again.stdout, again.stdout[-2000:] + again.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such pipes")
@pytest.mark.parametrize("bar", ["false", "true"])
def test_a_reader_of_the_log_that_ends_costs_no_run_anything(tmp_path, monkeypatch, bar):
    """As `tee` in `... 2>&1 | tee log`, which Ctrl-C ends first."""
    monkeypatch.chdir(tmp_path)
    words = [*(word if word != "12" else "60" for word in WORDS), "--disable_tqdm", bar]
    command = [sys.executable, "-u", "-m", "scalekd_hf.cli.main", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as started:
        said = b""
        while b"2/60" not in said:
            said += os.read(started.stdout.fileno(), 10_000)
        started.stdout.close()
        time.sleep(0.3)
        assert started.poll() is None
        started.send_signal(signal.SIGINT)
        assert started.wait(120) == 130
    assert list((tmp_path / "run").glob("checkpoint-*")) and (tmp_path / "run" / "_interrupted.json").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
@pytest.mark.parametrize(("how", "status"), [("SIG_DFL", 129), ("SIG_IGN", 0)])
def test_a_comparison_stops_its_runs_as_its_terminal_closes_but_not_after_nohup(tmp_path, how, status):
    code = (
        "import os, signal, sys; from pathlib import Path; sys.path.insert(0, 'recipes'); import results\n"
        "class Sleeping(results.Run):\n"
        "    def top1(self): return 0.5 if self.log.exists() and 'ended' in self.log.read_text() else None\n"
        'sleep = \'import time; print("begun", flush=True); time.sleep(2); print("ended")\'\n'
        "run = Sleeping('sleeping', Path(sys.argv[1]) / 'run', (sys.executable, '-c', sleep))\n"
        "start = results.start\n"
        "def hang_up(*words):\n"
        "    started = start(*words)\n"
        "    while 'begun' not in run.log.read_text(): pass\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    return started\n"
        "results.start = hang_up\n"
        "signal.signal(signal.SIGHUP, getattr(signal, sys.argv[2]))\n"  # whatever these tests run under
        "results.leave_on_signals()\n"
        "sys.exit(len(results.train([run], 1)))"
    )
    ended = run(sys.executable, "-c", code, tmp_path, how)
    assert ended.returncode == status, ended.stderr[-2000:]
    assert ("\nended" in (tmp_path / "run.log").read_text()) == (how == "SIG_IGN")
