"""Distil a strong vision transformer into a student with ScaleKD.

    accelerate launch recipes/distill.py [CONFIG.yaml] [--any_field value ...]

Without a configuration this is the quickstart: handwritten digits, a small Swin teacher, a small CNN student, first
alone, then distilled; minutes on a CPU. `--baseline` adds the student alone to any other run. `--plan` (or
`--plan json`) prints what the run would do, in seconds and without weights, data or GPU, and stops.
"""

from pathlib import Path

from scalekd_hf.cli.distill import main


if __name__ == "__main__":
    main(default_config=Path(__file__).parent / "configs" / "quickstart.yaml")
