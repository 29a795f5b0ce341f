"""Draw where the teacher's features and the student's projected features agree, before and after training.

    python recipes/visualize.py CONFIG.yaml --checkpoint CHECKPOINT [--images N] [--output FILE] [--any_field value ...]

CONFIG.yaml is the one that the run was started with; what its command line changed is given here again. Or it is the
`config_resolved.yaml` in the run's output folder. CHECKPOINT is a `checkpoint-N` folder of that run. Shown are the
first images of the evaluation data. A run with an averaged student shows the average.
"""

import sys

from scalekd_hf.cli.main import main


if __name__ == "__main__":
    main(["visualize", *sys.argv[1:]])
