"""Teach a student to segment or to detect.

    accelerate launch recipes/transfer.py segment recipes/configs/transfer/resnet50_upernet_ade20k.yaml --student outputs/resnet50

The first word is the task. `scalekd transfer` does the same.
"""

import sys

from scalekd_hf.cli.main import main


if __name__ == "__main__":
    main(["transfer", *sys.argv[1:]])
