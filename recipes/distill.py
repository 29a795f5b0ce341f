"""Distil a strong vision transformer into a student with ScaleKD.

    accelerate launch recipes/distill.py [CONFIG.yaml] [--any_field value ...]

Without a configuration this is the quickstart: numbers of two handwritten digits, a small Swin teacher, a narrow ResNet, first
alone, then distilled; a minute on two CPU cores. `--baseline` adds the student alone to any other run. `--plan` (or
`--plan json`) prints what the run would do, in seconds and without weights, data or GPU, and stops.
"""

import sys

from scalekd_hf.cli.main import main


if __name__ == "__main__":
    words = sys.argv[1:]
    named = bool(words) and not words[0].startswith("-")
    main(["distill", *words] if named or "--help" in words else ["quickstart", *words])
