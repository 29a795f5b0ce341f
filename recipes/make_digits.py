"""Make the quickstart's data: handwritten digits as 32x32 PNG in Parquet shards.

The 1,797 images of 8x8 cells that scikit-learn ships (Optical Recognition of Handwritten Digits, E. Alpaydin
and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0), enlarged with bicubic interpolation; 1,437 to train and
360, the same share of each digit, to evaluate.

    pip install -e ".[dev]" && python recipes/make_digits.py
"""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


FOLDER = Path(__file__).parent / "data" / "digits"
SHARDS = {"train": 4, "test": 2}
FEATURES = datasets.Features(
    {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
)


def enlarge(cells: np.ndarray) -> Image.Image:
    """8x8 cells with ink from 0 to 16 to a 32x32 grey image."""
    return Image.fromarray((cells * 15.9375).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)


def main() -> None:
    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=360, stratify=digits.target, random_state=0
    )
    FOLDER.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        data = datasets.Dataset.from_dict(
            {"image": [enlarge(digits.images[row]) for row in rows], "label": digits.target[rows].tolist()},
            features=FEATURES,
        )
        for shard in range(SHARDS[split]):
            file = FOLDER / f"{split}-{shard:05d}-of-{SHARDS[split]:05d}.parquet"
            data.shard(SHARDS[split], shard, contiguous=True).to_parquet(file)
            print(f"{file.name}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
