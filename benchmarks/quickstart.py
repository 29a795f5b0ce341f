"""The quickstart over seeds: top-1 of the student alone and distilled, and the gain.

    python benchmarks/quickstart.py [--seeds 10]   # on the test part
    python benchmarks/quickstart.py --tune         # every rate and weight decay, on the validation part

Two runs at a time, each on one thread.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import logging
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from scalekd_hf.cli.distill import baseline_config, run
from scalekd_hf.data.loading import load_data
from scalekd_hf.tools.recipe import DistillArguments, parse_config
from scalekd_hf.tools.words import shipped_folder


ARMS = ("alone", "distilled")
RATES = (5e-3, 1e-2, 2e-2, 4e-2)
DECAYS = (0.3, 1.0, 3.0)
TUNING_SEEDS = (100, 101)  # and not those of the report


def accuracy(task: tuple[str, int, dict[str, Any]]) -> float:
    """Top-1 in percent of one arm with a seed and other settings."""
    arm, seed, changes = task
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        words = [str(shipped_folder() / "configs" / "quickstart.yaml"), "--use_cpu", "--report_to", "none"]
        words += ["--disable_tqdm", "true", "--output_dir", folder]
        arguments, config = parse_config(DistillArguments, words)
        if arm == "alone":
            config = baseline_config(words, arguments, config)
        arguments = dataclasses.replace(arguments, **{k: v for k, v in changes.items() if hasattr(arguments, k)})
        settings = {key: value for key, value in changes.items() if hasattr(config, key)}
        config = dataclasses.replace(config, seed=seed, logging_strategy="no", **settings)
        with contextlib.redirect_stdout(io.StringIO()):
            metrics, _ = run(arguments, config, load_data(arguments), distil=arm == "distilled")
    return 100 * metrics["top1"]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def tune(pool: ProcessPoolExecutor) -> None:
    """Both arms with every rate and weight decay: the mean over the tuning seeds on the validation part."""
    grid = list(itertools.product(RATES, DECAYS))
    files = {"eval_files": str(shipped_folder() / "data/numbers/validation-*.parquet")}
    tasks = [
        (arm, seed, {"learning_rate": rate, "weight_decay": decay, **files})
        for (rate, decay), arm, seed in itertools.product(grid, ARMS, TUNING_SEEDS)
    ]
    found = pool.map(accuracy, tasks)
    print(f"{'rate':>8}{'decay':>7}" + "".join(f"{arm:>11}" for arm in ARMS) + "   top-1 on the validation part")
    means = {}
    for setting in grid:
        for arm in ARMS:
            means[setting, arm] = statistics.mean(next(found) for _ in TUNING_SEEDS)
        print(
            f"{setting[0]:>8g}{setting[1]:>7g}" + "".join(f"{means[setting, arm]:>10.2f}%" for arm in ARMS), flush=True
        )
    for arm in ARMS:
        best = max(grid, key=lambda setting: means[setting, arm])  # noqa: B023
        print(f"best {arm}: learning_rate {best[0]:g}, weight_decay {best[1]:g}")


def report(pool: ProcessPoolExecutor, seeds: int) -> None:
    """Both arms with the quickstart's settings, on the test part."""
    found = pool.map(accuracy, [(arm, seed, {}) for seed in range(seeds) for arm in ARMS])
    print(f"{'seed':>6}{'alone':>10}{'distilled':>11}{'gain':>8}")
    rows = []
    for seed in range(seeds):
        alone, distilled = next(found), next(found)
        rows.append((alone, distilled, distilled - alone))
        print(f"{seed:>6}{alone:>9.2f}%{distilled:>10.2f}%{distilled - alone:>+8.2f}", flush=True)
    (alone, _), (distilled, _), (gain, error) = (mean_and_error(list(column)) for column in zip(*rows, strict=True))
    print(f"{'mean':>6}{alone:>9.2f}%{distilled:>10.2f}%{gain:>+8.2f} ± {error:.2f} (standard error)")
    print(f"the gain is {gain / error:.1f} standard errors; top-1 on 1,000 test images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tune", action="store_true")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        tune(pool) if arguments.tune else report(pool, arguments.seeds)


if __name__ == "__main__":
    main()
