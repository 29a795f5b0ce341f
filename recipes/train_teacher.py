"""Fine-tune any image classifier on your own data, so that it can teach: it then knows your labels.

accelerate launch recipes/train_teacher.py recipes/configs/quickstart_teacher.yaml [--any_field value ...]
"""

import sys

from scalekd_hf.cli.main import main


if __name__ == "__main__":
    main(["train-teacher", *sys.argv[1:]])
