"""Accelerate's launcher for `scalekd`: the number of processes that was asked for, and no more words than the processes' own."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..tools.words import installed


KINDS = ("cpu", "multi_gpu", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm", "config_file")
TOLD = (2, 75, 130)  # what a process has said all about itself


def main() -> None:
    """Launch as the words of this process say.

    Raises:
        SystemExit: with the status of the process that failed first.
    """
    args = launch_command_parser().parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torch's launcher would set it, with a warning
    if args.config_file is None and not os.path.isfile(default_config_file):
        complete(args)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as folder:
            if args.config_file is not None:
                args.config_file = with_installed_files(args.config_file, folder)
            launch_command(args)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode not in TOLD:
            print(f"scalekd: process {rank} {ended(first.exitcode)}.", file=sys.stderr)
        raise SystemExit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode) from None


def with_installed_files(config_file: str, folder: str) -> str:
    """A launch file whose engine's file is found from anywhere: a copy in `folder` where it names one of the installation."""
    settings = yaml.safe_load(Path(config_file).read_text())
    engine = settings.get("deepspeed_config") or {}
    named = engine.get("deepspeed_config_file")
    if not isinstance(named, str) or installed(named) == named:
        return config_file
    engine["deepspeed_config_file"] = installed(named)
    copy = Path(folder, Path(config_file).name)
    copy.write_text(yaml.safe_dump(settings))
    return str(copy)


def complete(args: object) -> None:
    """Have several processes started also on CPUs, where Accelerate would start one without a word; set what it would ask for."""
    options = vars(args)
    several = (options["num_processes"] or 1) > 1 or (options["num_machines"] or 1) > 1
    if several and not any(options[kind] for kind in KINDS if kind != "cpu"):
        if options["cpu"] or not torch.accelerator.is_available():
            options["training_script_args"] += ["--use_cpu", "true"]
        options |= {"cpu": False, "multi_gpu": True}
    for name, default in (("num_machines", 1), ("mixed_precision", "no"), ("dynamo_backend", "no")):
        if options[name] is None:
            options[name] = default


def ended(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"ended with status {status}"
    killed = " (the machine's memory may have been full)" if status == -9 else ""
    return f"was ended by {signal.Signals(-status).name}{killed}"


if __name__ == "__main__":
    main()
