"""Make the quickstart's data: two handwritten digits on 32x32 pixels, to be read as a number from 00 to 99.

The digits are the 1,797 of 8x8 cells that scikit-learn ships (Optical Recognition of Handwritten Digits, E. Alpaydin and
C. Kaynak, UCI Machine Learning Repository, CC BY 4.0), each enlarged to 16x16 and put at a height of its own. No digit
is in two parts: 957 make the numbers to train on, 360 those on which settings are chosen (validation), and 480 those that
no choice has seen (test). The student has 3 images of each number, 10 are in either of the others; its teacher has learned
from 200.

    pip install -e ".[dev]" && python recipes/make_numbers.py [--teacher outputs/numbers]
"""

import argparse
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


FOLDER = Path(__file__).parent / "data" / "numbers"
SHARDS = {"teacher": 1, "train": 4, "validation": 2, "test": 2}
OF_EACH = {"teacher": 200, "train": 3, "validation": 10, "test": 10}  # images of each number
SEEDS = {"teacher": 1, "train": 2, "validation": 3, "test": 4}
FEATURES = datasets.Features(
    {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"{number:02}" for number in range(100)])}
)


def parts() -> dict[str, dict[int, np.ndarray]]:
    """The digits, each an image of 8x8 cells with ink from 0 to 16, by part and by what they say."""
    digits = load_digits()
    rows = np.arange(len(digits.target))
    rows, validation = train_test_split(rows, test_size=360, stratify=digits.target, random_state=0)
    train, test = train_test_split(rows, test_size=480, stratify=digits.target[rows], random_state=0)
    found = {"teacher": train, "train": train, "validation": validation, "test": test}
    return {
        part: {digit: digits.images[rows[digits.target[rows] == digit]] for digit in range(10)}
        for part, rows in found.items()
    }


def draw(left: np.ndarray, right: np.ndarray, heights: np.ndarray) -> Image.Image:
    """Two digits side by side, each with this many pixels above it (0 to 16)."""
    image = Image.new("L", (32, 32))
    for column, (cells, height) in enumerate(zip((left, right), heights, strict=True)):
        digit = Image.fromarray((cells * 15.9375).astype(np.uint8)).resize((16, 16), Image.Resampling.BICUBIC)
        image.paste(digit, (16 * column, int(height)))
    return image


def make(digits: dict[int, np.ndarray], of_each: int, seed: int) -> datasets.Dataset:
    """So many images of each number, in random order, from random digits."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(100), of_each))
    images = [
        draw(
            generator.choice(digits[number // 10]), generator.choice(digits[number % 10]), generator.integers(0, 17, 2)
        )
        for number in labels
    ]
    return datasets.Dataset.from_dict({"image": images, "label": labels.tolist()}, features=FEATURES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="a folder for the 20,000 images that the teacher learns from")
    teacher = parser.parse_args().teacher
    for part, digits in parts().items():
        folder = teacher if part == "teacher" else FOLDER
        if folder is None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        data = make(digits, OF_EACH[part], SEEDS[part])
        shards = SHARDS[part]
        for shard in range(shards):
            file = folder / f"{'train' if part == 'teacher' else part}-{shard:05d}-of-{shards:05d}.parquet"
            data.shard(shards, shard, contiguous=True).to_parquet(file)
            print(f"{file.name}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
