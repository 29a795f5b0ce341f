"""Write a student as ONNX and as a `torch.export` program, and check both against it.

    python recipes/export.py STUDENT [--output_dir DIR] [--formats onnx torch]

STUDENT is a folder, a Hub id, `timm/<name>` or `hf-hub:<id>`. The files go into its folder, or into `export/`.
"""

import sys

from scalekd_hf.cli.main import main


if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
