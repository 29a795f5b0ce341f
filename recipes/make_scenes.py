"""Make scenes with known masks and boxes: objects of CIFAR-10 on the photographs that scikit-image ships.

    pip install -e ".[dev]" && python recipes/make_scenes.py --cifar10 uoft-cs/cifar10 --output_dir outputs/scenes

The folder is two data sets in one: like ADE20K (`images/training/*.jpg`, `annotations/training/*.png` with the class of
each pixel, `classes.txt` with the names in their order), and like COCO (`annotations/instances_training.json`), the same
for `validation`. Here 0 is the class `background`, not to be ignored, and every pixel has a class; a category of the JSON
has the number that its pixels have in the masks.

Objects are whole images of CIFAR-10 within a rounded outline, from an ellipse to nearly a square: at 32 px there is no
cutting out that could be relied on. The outline drops the corners, where objects seldom are, and leaves no straight edges
by which to find a box. Training scenes have objects of CIFAR-10's training images, validation scenes of its test images,
each on photographs of their own; none of these shows a class of CIFAR-10 as large as the objects are. An object in front
hides what is behind it: masks, boxes and areas are of what is seen, and what would be hidden by more than 70% is left out.

The same seed makes the same scenes, however many there are, and of another size others.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from PIL import Image


CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
NAMES = ["background", *CLASSES]
# Those that are in scikit-image's wheel, by what skimage.data calls them; without the cat (a class), pages and drawings.
PHOTOGRAPHS = {
    "training": ["astronaut", "brick", "camera", "coffee", "grass", "immunohistochemistry", "moon", "rocket"],
    "validation": ["coins", "gravel", "hubble_deep_field", "retina", "stereo_motorcycle"],
}
OBJECTS = {"training": "train", "validation": "test"}  # which part of CIFAR-10
SMALLEST, LARGEST = 24, 0.75  # an object's side: pixels, and as a share of the scene's
LEAST_SEEN = 0.3  # of an object, or it is left out


@dataclass(frozen=True)
class Scene:
    """A scene and what is seen in it.

    Attributes:
        image: uint8 (size, size, 3).
        masks: bool (objects, size, size), what is seen of each; no pixel is in two.
        labels: (objects,), from 1 to 10: the place of each in `NAMES`.
    """

    image: np.ndarray
    masks: np.ndarray
    labels: list[int]

    def classes(self) -> np.ndarray:
        """The class of each pixel, uint8 (size, size), 0 where there is no object."""
        found = np.zeros(self.image.shape[:2], np.uint8)
        for mask, label in zip(self.masks, self.labels, strict=True):
            found[mask] = label
        return found


def photographs(split: str) -> list[np.ndarray]:
    """The backgrounds of a split, uint8 (height, width, 3), grey ones with three equal channels."""
    import skimage.data

    found = [getattr(skimage.data, name)() for name in PHOTOGRAPHS[split]]
    found = [photo[0] if isinstance(photo, tuple) else photo for photo in found]  # the motorcycle, seen from the left
    return [np.stack([photo] * 3, axis=-1) if photo.ndim == 2 else photo for photo in found]


def background(photos: list[np.ndarray], size: int, generator: np.random.Generator) -> np.ndarray:
    """A square of one of the photographs, at its resolution or coarser, perhaps mirrored: uint8 (size, size, 3)."""
    photo = photos[generator.integers(len(photos))]
    height, width = photo.shape[:2]
    side = int(generator.integers(size, min(height, width) + 1))
    top, left = generator.integers(height - side + 1), generator.integers(width - side + 1)
    square = Image.fromarray(photo[top : top + side, left : left + side])
    square = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
    return square[:, ::-1] if generator.random() < 0.5 else square


def outline(side: int, roundness: float) -> np.ndarray:
    """Which pixels of a square |x|^roundness + |y|^roundness <= 1 covers: an ellipse with 2. bool (side, side)."""
    away = np.abs((np.arange(side) + 0.5) / (side / 2) - 1) ** roundness
    return away[:, None] + away[None, :] <= 1


def compose(
    photos: list[np.ndarray],
    draw: Callable[[int], tuple[Image.Image, int]],
    number_of_images: int,
    size: int,
    generator: np.random.Generator,
) -> Scene:
    """A scene of one to five objects, from the front to the back, so that each knows what hides it.

    Args:
        photos: the backgrounds, each at least `size` pixels high and wide.
        draw: the object of that number, from 0 on: its image and its class in `NAMES`.
        number_of_images: how many objects there are to draw from.
        size: of the scene, in pixels.
    """
    image = background(photos, size, generator).copy()
    free = np.ones((size, size), bool)
    masks, labels = [], []
    for _ in range(generator.integers(1, 6)):
        number, side = int(generator.integers(number_of_images)), int(generator.integers(SMALLEST, LARGEST * size + 1))
        shape = outline(side, generator.uniform(2, 5))
        top, left = generator.integers(size - side + 1, size=2)
        place = np.s_[top : top + side, left : left + side]
        seen = np.zeros_like(free)
        seen[place] = shape & free[place]
        if seen.sum() < LEAST_SEEN * shape.sum():
            continue
        picture, label = draw(number)
        image[place][seen[place]] = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))[seen[place]]
        free &= ~seen
        masks.append(seen)
        labels.append(label)
    return Scene(image, np.stack(masks), labels)


def annotations(scene: Scene, image_id: int, first_id: int) -> list[dict]:
    """The objects of a scene as COCO writes them: box (x, y, width, height) and area in pixels, the mask in runs."""
    found = []
    for number, (mask, label) in enumerate(zip(scene.masks, scene.labels, strict=True)):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        corner, shape = (columns[0], rows[0]), (np.ptp(columns) + 1, np.ptp(rows) + 1)
        found.append(
            {
                "id": first_id + number,
                "image_id": image_id,
                "category_id": label,
                "bbox": [int(value) for value in (*corner, *shape)],
                "area": int(mask.sum()),
                "segmentation": {"size": list(mask.shape), "counts": runs(mask)},
                "iscrowd": 0,
            }
        )
    return found


def runs(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed runs: lengths of pixels without and with the object by turns, column by column."""
    pixels = mask.flatten(order="F")
    borders = np.flatnonzero(np.diff(pixels, prepend=False)).tolist()  # the first run, without, may have no pixel
    return np.diff([0, *borders, len(pixels)]).tolist()


def write_split(folder: Path, split: str, scenes: int, cifar10: str, size: int, seed: int) -> dict:
    """Write the scenes of a split; returns its COCO-format annotations."""
    objects = datasets.load_dataset(cifar10, split=OBJECTS[split])
    column, label_column = (
        next(name for name, feature in objects.features.items() if isinstance(feature, kind))
        for kind in (datasets.Image, datasets.ClassLabel)
    )
    if objects.features[label_column].names != CLASSES:
        raise ValueError(
            f"`cifar10` {cifar10!r} has the classes {objects.features[label_column].names}: not CIFAR-10."
        )

    def draw(number: int) -> tuple[Image.Image, int]:
        row = objects[number]
        return row[column].convert("RGB"), row[label_column] + 1

    photos = photographs(split)
    images: list[dict] = []
    found: list[dict] = []
    for part in ("images", "annotations"):
        (folder / part / split).mkdir(parents=True)
    for number in range(scenes):
        generator = np.random.default_rng([seed, list(OBJECTS).index(split), number])
        scene = compose(photos, draw, len(objects), size, generator)
        name = f"{number:06}"
        Image.fromarray(scene.image).save(folder / "images" / split / f"{name}.jpg", quality=95)
        Image.fromarray(scene.classes()).save(folder / "annotations" / split / f"{name}.png")
        images.append({"id": number + 1, "file_name": f"{name}.jpg", "width": size, "height": size})
        found += annotations(scene, number + 1, len(found) + 1)
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES) if number]
    return {"images": images, "annotations": found, "categories": categories}


def write(folder: Path, cifar10: str, scenes: dict[str, int], size: int = 128, seed: int = 0) -> None:
    """Write both splits into a new folder.

    Args:
        folder: is made; must not hold anything yet.
        cifar10: CIFAR-10 on the Hub, or a folder of its Parquet files.
        scenes: how many, by split.
        size: of a scene, in pixels, from 96 to 160.

    Raises:
        ValueError: another size, a folder that holds something, no scenes in a split, or another data set.
    """
    if not 96 <= size <= 160:
        raise ValueError(
            f"`size` {size} is not from 96 to 160: objects of 32 px would be too large or too small in it."
        )
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"`output_dir` {str(folder)!r} holds something already: take a new folder, or remove it.")
    if few := {split: number for split, number in scenes.items() if number < 1}:
        raise ValueError(f"`scenes` {few}: a split needs one scene or more.")
    for split, number in scenes.items():
        coco = write_split(folder, split, number, cifar10, size, seed)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco), encoding="utf-8")
        print(f"{split}: {number} scenes with {len(coco['annotations'])} objects")
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", required=True, help="CIFAR-10 on the Hub, or a folder of its Parquet files")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/scenes"))
    parser.add_argument("--training", type=int, default=2000, help="how many scenes")
    parser.add_argument("--validation", type=int, default=500, help="how many scenes")
    parser.add_argument("--size", type=int, default=128, help="of a scene, in pixels: 96 to 160")
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    scenes = {"training": words.training, "validation": words.validation}
    try:
        write(words.output_dir, words.cifar10, scenes, words.size, words.seed)
    except ValueError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
