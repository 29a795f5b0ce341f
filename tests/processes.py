"""Functions run in forked processes, one or several in a group of torch.distributed, without importing all anew."""

import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from deprecations import HEARD
from helpers import ROOT


@dataclass
class Outcome:
    """How a process ended: its exit status, minus the signal's number if one ended it, and what it printed."""

    status: int
    text: str


class Started:
    """Processes that run `function(*arguments)`; with more than one, or if `group`, as ranks of a group."""

    def __init__(self, folder, function, *arguments, processes=1, group=False):
        self.files = [Path(folder) / f"output_{time.monotonic_ns()}_{rank}.txt" for rank in range(processes)]
        for file in self.files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        port = free_port()
        sys.stdout.flush()
        self.pids = []
        for rank, file in enumerate(self.files):
            pid = os.fork()
            if pid == 0:
                _child(rank, processes if processes > 1 or group else 0, port, file, function, arguments)
            self.pids.append(pid)

    def wait(self):
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]
        return [Outcome(status, file.read_text()) for status, file in zip(statuses, self.files, strict=True)]


def in_processes(folder, function, *arguments, processes=1, group=False):
    """Run a function in other processes and wait for them."""
    return Started(folder, function, *arguments, processes=processes, group=group).wait()


def in_child(folder, function, *arguments):
    """Run a function in one other process and wait for it."""
    return in_processes(folder, function, *arguments)[0]


def run_script(script, *words):
    """Run a script of the repository as a command would, in this folder; returns the finished process with its text."""
    return _finished(as_main, script, *words)


def run_module(name, *words):
    """Run a module as `python -m` would, in this folder; returns the finished process with its text."""
    return _finished(_as_module, name, *words)


def _finished(function, *words):
    words = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder, "errors.txt")
        (outcome,) = in_processes(folder, _with_errors_apart, errors, function, *words)
        return subprocess.CompletedProcess(words, outcome.status, outcome.text, errors.read_text())


def _with_errors_apart(file, function, *words):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), 2)
    function(*words)


def as_main(script, *words):
    """Be a script of the repository with these words, in a process of its own."""
    sys.argv = [script, *map(str, words)]
    sys.path.insert(0, str((ROOT / script).parent))
    runpy.run_path(str(ROOT / script), run_name="__main__")


def _as_module(name, *words):
    sys.argv = [name, *words]
    sys.modules.pop(name, None)  # of which runpy would warn
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _child(rank, processes, port, file, function, arguments):
    status = 1
    try:
        output = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        if processes:
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in group.items()})
            AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(0)
        function(*arguments)
        HEARD.check()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]
