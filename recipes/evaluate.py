"""Evaluate a classifier on labelled images: accuracy, likelihood, calibration, speed, parameters and FLOPs; a backbone, or any
model with `--probe true`, by k-NN and a linear probe of its features.

    python recipes/evaluate.py MODEL --benchmark imagenet-v2 --dataset FOLDER [--any_field value ...]
    python recipes/evaluate.py MODEL --dataset FOLDER_OR_ID [--eval_split SPLIT] [--update_card]
    accelerate launch recipes/evaluate.py MODEL --eval_files 'data/*.parquet'
    python recipes/evaluate.py BACKBONE --train_files 'data/train-*.parquet' --eval_files 'data/val-*.parquet'

MODEL is a folder, a Hub id, `timm/<name>` or `hf-hub:<id>`. The table goes to the screen, and to `evaluation.json` and
`evaluation.md` in `--output_dir` (`evaluation/<model>`), beside what they hold already. Settings may also come from a
YAML file in the place of MODEL, which then names it.
"""

import importlib
import sys
from pathlib import Path


if __name__ == "evaluate":
    # A script beside this file wants the package of that name, which this file hides from it: it takes its place.
    paths, here = sys.path[:], Path(__file__).resolve().parent
    sys.path[:] = [path for path in paths if Path(path).resolve() != here]
    del sys.modules[__name__]
    importlib.import_module(__name__)
    sys.path[:] = paths

if __name__ == "__main__":
    from scalekd_hf.cli.main import main

    main(["evaluate", *sys.argv[1:]])
