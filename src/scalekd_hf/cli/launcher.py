"""Accelerate's launcher for `scalekd`: the number of processes that was asked for, and no more words than the processes' own."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..tools.words import installed


KINDS = ("multi_gpu", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm")
TOLD = (2, 75, 130)  # what a process has said all about itself


def main() -> None:
    """Launch as the words of this process say.

    Raises:
        SystemExit: with the status of the process that failed first.
    """
    args = launch_command_parser().parse_args()
    has_default = os.path.isfile(default_config_file) and not args.cpu  # as Accelerate has it
    file = args.config_file or (default_config_file if has_default else None)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as folder:
            if file is None:
                complete(args)
            else:
                args.config_file = with_installed_files(file, args.num_processes, folder)
            launch_command(args)
    except ValueError as error:
        print(f"scalekd: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        leave(rank, first.exitcode)
    except subprocess.CalledProcessError as error:
        leave(0, error.returncode)


def leave(rank: int, status: int) -> None:
    """End as the process that failed first, and say how that one ended where it could not."""
    if status not in TOLD:
        print(f"scalekd: process {rank} {ended(status)}.", file=sys.stderr)
    raise SystemExit(status if status > 0 else 128 - status) from None


def with_installed_files(config_file: str, processes: int | None, folder: str) -> str:
    """A launch file whose engine's file is found from anywhere: a copy in `folder` where it names one of the installation.

    Raises:
        ValueError: a file that cannot be read, or one for one process beside a word for several, which Accelerate would not heed.
    """
    try:
        settings: dict[str, Any] = yaml.safe_load(Path(config_file).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"`--config_file` {config_file!r} cannot be read: {error}") from error
    if (processes or 1) > 1 and str(settings.get("distributed_type", "NO")) in ("NO", "False"):
        raise ValueError(
            f"`num_processes` is {processes}, but {config_file!r} is for one process (`distributed_type`: NO). Leave one of "
            "them out."
        )
    engine = settings.get("deepspeed_config") or {}
    named = engine.get("deepspeed_config_file")
    if not isinstance(named, str) or installed(named) == named:
        return config_file
    engine["deepspeed_config_file"] = installed(named)
    copy = Path(folder, "launch.yaml")
    copy.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return str(copy)


def complete(args: Namespace) -> None:
    """Have several processes started also on CPUs, where Accelerate would start one without a word; set what it would ask for.

    Raises:
        ValueError: several machines without a GPU, and no number of processes.
    """
    has_gpu = torch.accelerator.is_available() and not args.cpu
    if (args.num_machines or 1) > 1 and args.num_processes is None and not has_gpu:
        raise ValueError(
            "`num_machines` needs `num_processes`, of all machines together, where there is no GPU to count."
        )
    several = (args.num_processes or 1) > 1 or (args.num_machines or 1) > 1
    if several and not any(getattr(args, kind) for kind in KINDS):
        if not has_gpu:
            args.training_script_args += ["--use_cpu", "true"]
        args.cpu, args.multi_gpu = False, True
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torch's launcher would set it, with a warning
    for name, default in (("num_machines", 1), ("mixed_precision", "no"), ("dynamo_backend", "no")):
        if getattr(args, name) is None:
            setattr(args, name, default)


def ended(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"ended with status {status}"
    killed = " (the machine's memory may have been full)" if status == -9 else ""
    return f"was ended by {signal.Signals(-status).name}{killed}"


if __name__ == "__main__":
    main()
