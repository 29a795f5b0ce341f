"""A short run in one of the ways of `launched_runs.py`: engine_run.py WAY FOLDER [CHECKPOINT]."""

import os
import sys
from pathlib import Path

import torch


sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "training")]

from launched_runs import train


way, folder, *checkpoint = sys.argv[1:]
options = {"bf16": True, "ema_decay": 0.9, "use_cpu": not torch.cuda.is_available()}
# Two processes stand for one on a CPU, and share its batch.
options["batch"] = 8 // int(os.environ.get("WORLD_SIZE", 1))
train(Path(folder, way), way, resume=str(Path(folder, way, *checkpoint)) if checkpoint else None, **options)
