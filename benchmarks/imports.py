"""How long the names of the package take to import, each in a process of its own, and the memory they take.

python benchmarks/imports.py
"""

import resource
import statistics
import subprocess
import sys
import time


STATEMENTS = (
    "import scalekd_hf",
    "import torch",
    "from scalekd_hf import CrossAttentionProjector",
    "from scalekd_hf import load_student",
    "from scalekd_hf import ScaleKDConfig",
    "from scalekd_hf import ScaleKDTrainer",
)
REPEATS = 3


def main() -> None:
    print(f"{'median of ' + str(REPEATS):<50}{'s':>8}{'peak MB so far':>16}")
    for statement in STATEMENTS:
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True)
            seconds.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # of the largest child until now
        print(f"{statement:<50}{statistics.median(seconds):>8.2f}{peak:>16.0f}")


if __name__ == "__main__":
    main()
