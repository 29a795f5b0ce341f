"""Masks of classes: what is read from files and folders, and which are left out, with the reason."""

import io
import logging

import datasets
import numpy as np
import pytest
from dense_files import CLASSES, encoded, mask_of, scene, write_masks
from PIL import Image

from scalekd_hf.data.decoding import BadImageError
from scalekd_hf.images import ImageSpec
from scalekd_hf.transfer.annotations import DenseDataArguments, load_dense_data
from scalekd_hf.transfer.targets import read_mask


SPEC = ImageSpec((40, 40))


def load(**arguments):
    return load_dense_data(DenseDataArguments(**arguments), "segment")


def image_of(pixels, form="PNG", palette=None):
    image, file = Image.fromarray(pixels), io.BytesIO()
    if palette is not None:
        image.putpalette(palette)
    image.save(file, form)
    return {"bytes": file.getvalue(), "path": None}


def test_masks_of_every_kind_of_file_are_read():
    indices = np.arange(20, dtype=np.uint8).reshape(4, 5) % 3
    colours = np.stack([indices] * 3, 2)
    wide = indices.astype(np.uint16)
    palette = [255, 0, 0, 0, 255, 0, 0, 0, 255] + [0] * (3 * 253)
    for value in (image_of(indices), image_of(colours), image_of(wide), image_of(indices, palette=palette)):
        assert np.array_equal(read_mask(value, (4, 5), 3, False), indices)
    assert np.array_equal(read_mask(image_of(indices > 0), (4, 5), 2, False), indices > 0)
    ignored = read_mask(image_of(indices), (4, 5), 2, True)
    assert np.array_equal(ignored, np.where(indices == 0, 255, indices - 1))


COLOURFUL = np.random.default_rng(0).integers(0, 3, (4, 5, 3), dtype=np.uint8)
MASK = np.ones((4, 5), np.uint8)
BAD_MASKS = {
    "mask of another size": lambda: image_of(np.ones((5, 4), np.uint8)),
    "mask value beyond the classes": lambda: image_of(MASK * 3),
    "mask without class indices": lambda: image_of(COLOURFUL),
    "mask truncated": lambda: {"bytes": image_of(np.tile(COLOURFUL[..., 0], (40, 40)))["bytes"][:90]},
    "mask not an image": lambda: {"bytes": b"nothing of the kind"},
    "mask missing": lambda: "no/such/file.png",
    "mask empty": lambda: {"bytes": None, "path": None},
    "mask out of range": lambda: image_of(MASK.astype(np.uint16) * 300),
}


@pytest.mark.parametrize("kind", BAD_MASKS)
def test_broken_masks_leave_out_the_image_with_the_reason(kind):
    size = (160, 200) if kind == "mask truncated" else (4, 5)
    with pytest.raises(BadImageError) as found:
        read_mask(BAD_MASKS[kind](), size, 3, False)
    assert found.value.kind == kind


def test_masks_that_lost_their_indices_to_compression_are_refused():
    with pytest.raises(BadImageError, match="a JPEG, which changes values"):
        read_mask(image_of(MASK, form="JPEG"), (4, 5), 3, False)


def test_values_beyond_are_named_as_the_mask_has_them():
    with pytest.raises(BadImageError, match="has the values 7, but the classes are 1 to 3"):
        read_mask(image_of(MASK * 7), (4, 5), 3, True)


def classes_in(data, split="train"):
    made = set()
    for number, row in enumerate(getattr(data, split)):
        made |= set(data.preparation(SPEC, False)(row, 0, number)["target"]["mask"].unique().tolist())
    return made


def test_ade20k_is_read_with_its_names_or_numbers(tmp_path):
    root = write_masks(tmp_path, {"training": range(4), "validation": range(4, 6)}, "ADE_train_")
    data = load(dataset=str(root))
    assert data.class_names == [str(number) for number in range(150)] and data.zero_is_ignored
    assert len(data.train) == 4 and len(data.evaluation) == 2
    kinds = {kind for number in range(4) for kind, *_ in scene(number)[1]}
    assert classes_in(data) == kinds | {255}
    table = (
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t9\t9\t1\twall, room\n2\t0.1\t9\t9\t1\tkey\n3\t0\t1\t1\t1\tpen"
    )
    (root / "objectInfo150.txt").write_text(table, encoding="utf-8")
    assert load(dataset=str(root)).class_names == ["wall", "key", "pen"]
    assert load(dataset=str(root), class_names=CLASSES).class_names == CLASSES


def test_folders_of_masks_are_read_by_their_names(tmp_path, caplog):
    root = write_masks(tmp_path, {"train": range(4), "val": range(4, 6)}, masks="masks", first=0, around=255)
    (root / "images" / "train" / "0000.jpg").rename(root / "images" / "train" / "alone.jpg")
    with pytest.raises(ValueError, match="Nothing tells the classes of the masks"):
        load(dataset=str(root))
    names = tmp_path / "names.txt"
    names.write_text("\n".join(CLASSES), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        data = load(dataset=str(root), class_names=str(names))
    assert data.class_names == CLASSES and not data.zero_is_ignored and len(data.train) == 3
    assert "1 images without a mask are left out: 'alone'" in caplog.text
    assert "1 masks without an image are left out: '0000'" in caplog.text
    assert load(dataset=str(root), num_classes=3).class_names == ["0", "1", "2"]
    with pytest.raises(ValueError, match="at most 255 classes"):
        load(dataset=str(root), num_classes=256)
    for file in (root / "masks" / "val").iterdir():
        file.rename(file.with_name(f"x{file.name}"))
    with pytest.raises(ValueError, match="has 2 images and .* 2 masks, but not one of the same name"):
        load(dataset=str(root), num_classes=3)


def test_folders_without_splits_hold_out_a_share(tmp_path):
    root = write_masks(tmp_path, {".": range(8)}, masks="labels", first=0, around=255)
    with pytest.raises(ValueError, match="`eval_split` is 'validation'.*hold out"):
        load(dataset=str(root), num_classes=3)
    data = load(dataset=str(root), num_classes=3, eval_split="0.4")
    assert len(data.train) + len(data.evaluation) == 8 and len(data.evaluation) > 0


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_with_a_column_of_masks_are_read(tmp_path, streaming):
    rows = {"image": [], "annotation": []}
    for number in range(4):
        pixels, objects = scene(number)
        rows["image"].append({"bytes": encoded(pixels), "path": None})
        rows["annotation"].append({"bytes": encoded(mask_of(pixels, objects)), "path": None})
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    file = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    how = {"train_files": file, "eval_split": "none", "streaming": streaming, "cache_dir": str(tmp_path / "cache")}
    data = load(class_names=CLASSES, zero_is_ignored=True, **how)
    assert data.label_column == "annotation" and data.zero_is_ignored
    assert classes_in(data) == {kind for number in range(4) for kind, *_ in scene(number)[1]} | {255}
    with pytest.raises(ValueError, match="`label_column` is 'mask'"):
        load(class_names=CLASSES, label_column="mask", **how)


def test_masks_whose_classes_are_counted_from_one_are_refused(tmp_path):
    root = write_masks(tmp_path, {"train": range(8)}, masks="masks", first=1, around=255)
    how = {"dataset": str(root), "class_names": CLASSES, "eval_split": "none"}
    with pytest.raises(
        ValueError, match="have values up to 3, and none is 0, but the 3 classes are 0 to 2: each would be taken"
    ):
        load(**how, zero_is_ignored=False)
    assert classes_in(load(**how, zero_is_ignored=True)) == {0, 1, 2, 255}
