"""`scalekd`: one command for all that the recipes do. What can be said without torch is said at once."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ..tools.fields import Field, launcher_options, settings_of
from ..tools.words import check_known, check_words, installed, nearest, read_config, take_configs


__all__ = ["main"]

COMMANDS = {
    "distill": "distil a teacher into a student",
    "train-teacher": "fine-tune a classifier on your own data, so that it can teach",
    "plan": "say what a distillation would do and cost, or why it would fail",
    "transfer": "teach a student to segment or to detect, as the backbone of a well-known head",
    "evaluate": "evaluate a classifier or a backbone on labelled images",
    "export": "write a student as ONNX and `torch.export`",
    "convert": "make a student of a checkpoint that others have published, or one for OpenMMLab of a student",
    "visualize": "draw where teacher and student agree",
    "recipes": "list the published pairs; print or copy one",
    "quickstart": "distil a small student that reads numbers, in a minute",
    "env": "versions and devices, for a bug report",
}
MODULES = {"train-teacher": "train_teacher", "plan": "distill", "quickstart": "distill", "env": "environment"}
SETTINGS = {"distill": "distill", "plan": "distill", "quickstart": "distill", "train-teacher": "train-teacher"}
SETTINGS |= {"evaluate": "evaluate", "transfer": "transfer"}
TASKS = ("segment", "detect")  # of a transfer
FIXED = "Must stay off"  # begins the help of a setting that is refused at any other value
GROUPS = {
    "DistillArguments": "The pair",
    "TeacherArguments": "The teacher",
    "EvaluateArguments": "The model",
    "TransferArguments": "The student and its head",
    "DenseDataArguments": "Annotations",
    "DataArguments": "Data",
}
USAGE = {
    "distill": "scalekd distill [RECIPE or CONFIG.yaml ...] [--any_setting value ...]",
    "plan": "scalekd plan [json] RECIPE or CONFIG.yaml ... [--any_setting value ...]",
    "quickstart": "scalekd quickstart [--any_setting value ...]",
    "train-teacher": "scalekd train-teacher CONFIG.yaml ... [--any_setting value ...]",
    "transfer": "scalekd transfer segment|detect [RECIPE or CONFIG.yaml ...] [--any_setting value ...]",
    "evaluate": "scalekd evaluate MODEL or CONFIG.yaml [--any_setting value ...]",
}
USER_ERRORS = (ValueError, OSError, ImportError)
AT_ONCE = 60  # seconds, after which an error is no longer of what was typed, and costs too much to be seen again
STATUS = 2
CANCELLED = 130  # as shells have it
TRY_AGAIN_LATER = 75  # as the trainer has it


def main(words: Sequence[str] | None = None) -> None:
    """Run the command that the words name; those of this process by default.

    Raises:
        SystemExit: with 2 after an error of the user's, which is told in one line.
    """
    words = list(sys.argv[1:] if words is None else words)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console may lack a letter, such as one of a class's name
    show_traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    if not words or words[0] in ("--help", "-h", "help"):
        print(overview())
        raise SystemExit(0 if words else STATUS)
    rank, start = int(os.environ.get("RANK", 0)), time.monotonic()
    try:
        run(words[0], words[1:])
    except KeyboardInterrupt as error:
        if rank == 0:
            saved = type(error) is not KeyboardInterrupt
            print(
                f"scalekd: stopped{'; the same command goes on from the checkpoint' if saved else ''}.",
                file=sys.stderr,
            )
        raise SystemExit(CANCELLED) from None
    except USER_ERRORS as error:
        where = f", process {rank}" if rank else ""  # it may have failed alone
        if show_traceback or time.monotonic() - start > AT_ONCE:
            traceback.print_exc()
        else:
            from ..texts import one_line, redacted  # later: it imports the Hub's client

            told = one_line(redacted(" ".join(str(error).split())))
            print(f"scalekd{where}: {told} (`--traceback` shows where.)", file=sys.stderr)
        raise SystemExit(STATUS) from None


def run(command: str, words: list[str]) -> None:
    """Run one command, by Accelerate's launcher where options of it are among the words.

    Raises:
        ValueError: an unknown command, configuration or setting.
    """
    if command == "--version":
        command, words = "env", ["--version"]
    if command not in COMMANDS:
        raise ValueError(f"{command!r} is not a command.{nearest(command, COMMANDS)} `scalekd --help` lists them.")
    if command in SETTINGS:
        if {"--help", "-h", "--help-all"} & set(words):
            print(settings_help(command, everything="--help-all" in words))
            return
        task = [take_task(words)] if command == "transfer" else []
        launcher, words = check(command, words)
        words = task + words
        if launcher:
            raise SystemExit(launch(launcher, command, words))
    if command == "plan":
        kind = [words.pop(0)] if words and words[0] in ("json", "table") else []
        words = [*words, "--plan", *kind]
    if command == "quickstart":
        words = ["quickstart", *words]
    module = import_module(f"scalekd_hf.cli.{MODULES.get(command, command)}")
    module.main(words=words)


def take_task(words: list[str]) -> str:
    """Take the task of a transfer, its first word, out of the words.

    Raises:
        ValueError: it is not there.
    """
    if not words or words[0] not in TASKS:
        what = f"{words[0]!r} is no task" if words else "A task is missing"
        raise ValueError(f"{what}: `scalekd transfer segment ...` or `scalekd transfer detect ...`.")
    return words.pop(0)


def check(command: str, words: list[str]) -> tuple[list[str], list[str]]:
    """Refuse what no run can have, before anything is loaded; returns the launcher's words and the command's.

    Raises:
        ValueError: an unknown setting, or a configuration that cannot be read.
    """
    own, rest = settings_of(SETTINGS[command])
    known = {field.name for field in (*own, *rest)}
    named, words = take_configs(words)
    is_model = command == "evaluate" and named and Path(named[0]).suffix not in (".yaml", ".yml")
    files = named[1:] if is_model or (command == "plan" and named[:1] in (["json"], ["table"])) else named
    for file in files:
        for key in read_config(file):
            check_known(key, known, f"{file}: `{key}`")
    launcher, words = split_launcher([installed(word) for word in words], known | {"plan"})
    check_words(words, known | {"plan"})
    options = _values(launcher)
    launch_file = options.get("config_file")
    if launch_file is not None and not Path(launch_file).is_file():
        raise ValueError(
            f"`--config_file` is {launch_file!r}, which is no file. Those of this package are recipes/accelerate/*.yaml."
        )
    if command == "plan" and launcher:  # which one process makes, for as many
        processes = options.get("num_processes") or (
            read_config(launch_file).get("num_processes") if launch_file else None
        )
        told = any(word.startswith("--plan_processes") for word in words)
        words += ["--plan_processes", str(processes)] if processes and not told else []
        launcher = []
    return launcher, [*named, *words]


def split_launcher(words: list[str], known: set[str]) -> tuple[list[str], list[str]]:
    """The options that are Accelerate's and no settings, with their values, and the rest."""
    options = launcher_options()
    launcher: list[str] = []
    rest: list[str] = []
    target, wants_value = rest, False
    for word in words:
        if word.startswith("--"):
            name = word[2:].split("=")[0].replace("-", "_")
            target = launcher if name in options and name not in known else rest
            wants_value = target is launcher and options[name] and "=" not in word
            target.append(word)
        elif target is launcher and not wants_value:
            rest.append(word)
        else:
            target.append(word)
            wants_value = False
    return launcher, rest


def _values(options: list[str]) -> dict[str, str]:
    """The values of options, by name; those without one are left out."""
    found = {}
    for word, following in itertools.zip_longest(options, options[1:], fillvalue="--"):
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and (equals or not following.startswith("--")):
            found[name.replace("-", "_")] = value if equals else following
    return found


def launch(options: list[str], command: str, words: list[str]) -> int:
    """Start the command by Accelerate's launcher, in processes as its options say; returns the exit status."""
    launcher = [sys.executable, "-m", "scalekd_hf.cli.launcher", *options, "-m", "scalekd_hf.cli.main"]
    # Apart from the terminal, whose Ctrl-C would end the launcher and leave the processes behind it.
    started = subprocess.Popen([*launcher, command, *words], start_new_session=True)
    import psutil  # noqa: F401  # now: while it is imported, the processes would not know of a signal

    passed: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        passed.append(number)
        _send(number, started.pid)

    hang_up = getattr(signal, "SIGHUP", None)  # Windows has none, and `nohup` ignores it
    for number in (signal.SIGINT, signal.SIGTERM, *([hang_up] if hang_up else [])):
        if number != hang_up or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    status = started.wait()
    return CANCELLED if signal.SIGINT in passed else TRY_AGAIN_LATER if passed and status else status


def _send(number: int, launcher: int) -> None:
    """Send a signal to the processes that a launcher has started, not to the launcher, which would leave them behind."""
    import psutil  # which Accelerate needs as well

    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(launcher).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "scalekd_hf.cli.main" in child.cmdline():
                    child.send_signal(number)


def overview() -> str:
    """All commands."""
    lines = ["Distil strong vision transformers into small networks (ScaleKD, NeurIPS 2024).", ""]
    lines += ["  scalekd COMMAND [WORDS ...]", ""]
    lines += [f"  {name:<15}{what}" for name, what in COMMANDS.items()]
    lines += [
        "",
        "`scalekd COMMAND --help` says more. Options of `accelerate launch`, such as `--num_processes 8` or `--config_file`, are",
        "the launcher's, which is then started. `--traceback` shows where an error comes from.",
    ]
    return "\n".join(lines)


def settings_help(command: str, everything: bool) -> str:
    """The settings of a command, this project's first, by groups; `everything` adds those of `TrainingArguments`."""
    own, rest = settings_of(SETTINGS[command])
    width = max(80, min(shutil.get_terminal_size((120, 40)).columns, 160))
    lines = [f"{COMMANDS[command][0].upper()}{COMMANDS[command][1:]}.", "", f"  {USAGE[command]}"]
    group = ""
    for field in own:
        if not everything and field.help.startswith(FIXED):
            continue  # there is nothing to choose
        title = GROUPS.get(field.group, field.group)
        if title != group:
            lines.append(f"\n{title}")
            group = title
        lines.append(_line(field, width))
    if everything:
        lines += ["\nOf transformers' TrainingArguments", *(_line(field, width) for field in rest)]
    else:
        lines.append(f"\n{len(rest)} more are transformers' `TrainingArguments`, such as learning_rate: --help-all.")
    return "\n".join(lines)


def _line(field: Field, width: int) -> str:
    default = f" [{field.default}]" if field.default not in ("", "None", "''") else ""
    text = f"  --{field.name:<27}{field.help}"
    room = width - len(default)
    return (text if len(text) <= room else text[: room - 1] + "…") + default


if __name__ == "__main__":
    main()
