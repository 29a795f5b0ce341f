"""The quickstart over several seeds: accuracy of the student alone and distilled, and the gain.

python benchmarks/quickstart.py [--seeds 0 1 2]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).parents[1]


def run(seed: int, folder: Path) -> dict:
    """One quickstart with this seed, in a process of its own."""
    command = [sys.executable, "recipes/distill.py", "--seed", str(seed), "--output_dir", str(folder)]
    subprocess.run([*command, "--disable_tqdm", "true"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "results.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    rows = []
    print(f"{'seed':>6}{'alone':>9}{'distilled':>11}{'gain':>8}")
    for seed in parser.parse_args().seeds:
        with tempfile.TemporaryDirectory() as folder:
            results = run(seed, Path(folder) / "run")
        alone, distilled = (100 * results[f"student {arm}"]["top1"] for arm in ("alone", "distilled"))
        rows.append((alone, distilled, distilled - alone))
        print(f"{seed:>6}{alone:>8.2f}%{distilled:>10.2f}%{distilled - alone:>+8.2f}", flush=True)
    alone, distilled, gain = (statistics.mean(column) for column in zip(*rows, strict=True))
    print(f"{'mean':>6}{alone:>8.2f}%{distilled:>10.2f}%{gain:>+8.2f}")
    print(f"teacher {100 * results['teacher']['top1']:.2f}%, top-1 on 360 held-out images")


if __name__ == "__main__":
    main()
