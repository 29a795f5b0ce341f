"""Dense data as people have it: what is read from it, what is refused, and which annotations are left out, with the reason."""

import json
import logging

import datasets
import numpy as np
import pytest
from dense_files import CLASSES, coco_content, encoded, polygon, scene, write_coco, write_parquet

from scalekd_hf.data.decoding import BadImageError
from scalekd_hf.data.labels import class_order
from scalekd_hf.images import ImageSpec
from scalekd_hf.transfer.annotations import DenseDataArguments, load_dense_data
from scalekd_hf.transfer.preparation import DetectionPreparation
from scalekd_hf.transfer.targets import decode_masks, read_objects


SPEC = ImageSpec((40, 40))
SIZE = (40, 60)


def load(task="detect", masks=False, **arguments):
    return load_dense_data(DenseDataArguments(**arguments), task, masks)


def boxes_of(dataset):
    """Classes and boxes by image, as a preparation reads them."""
    found = {}
    for row in dataset:
        pixels = np.asarray(row["image"])
        objects = read_objects(row["objects"], pixels.shape[:2], 3, "xywh")
        found[pixels.tobytes()] = list(zip(objects.labels.tolist(), objects.boxes.tolist(), strict=True))
    return found


def scenes(numbers):
    made = {}
    for number in numbers:
        pixels, objects = scene(number)
        made[pixels.tobytes()] = [(kind, [x, y, x + w, y + h]) for kind, x, y, w, h in objects]
    return made


# COCO files


def test_a_folder_of_coco_is_read_and_gaps_of_its_ids_closed(tmp_path):
    root = write_coco(tmp_path, {"train2017": range(6), "val2017": range(6, 9)})
    data = load(dataset=str(root), masks=True)
    assert data.class_names == CLASSES and data.box_format == "xywh"
    assert boxes_of(data.train) == scenes(range(6)) and boxes_of(data.evaluation) == scenes(range(6, 9))
    assert data.evaluation.features["objects"]["category"].feature.names == CLASSES
    row = data.train[0]
    assert decode_masks(row["objects"]["segmentation"], (row["image"].height, row["image"].width)).any()


def test_roboflows_folders_and_files_named_by_themselves_are_read(tmp_path):
    root = write_coco(tmp_path / "robo", {"train": range(4), "valid": range(4, 6)}, layout="roboflow")
    data = load(dataset=str(root))
    assert boxes_of(data.train) == scenes(range(4)) and boxes_of(data.evaluation) == scenes(range(4, 6))
    file = tmp_path / "elsewhere" / "boxes.json"
    file.parent.mkdir()
    (root / "train" / "_annotations.coco.json").rename(file)
    with pytest.raises(ValueError, match="Name their folder with `train_images`"):
        load(train_files=str(file), eval_split="none")
    data = load(train_files=str(file), train_images=str(root / "train"), eval_split="none")
    assert boxes_of(data.train) == scenes(range(4)) and data.evaluation is None
    data = load(train_files=str(file), train_images=str(root / "train"), eval_split="0.5")
    assert boxes_of(data.train) | boxes_of(data.evaluation) == scenes(range(4))
    with pytest.raises(ValueError, match="`train_files`, but no `eval_files`"):
        load(train_files=str(file), train_images=str(root / "train"))


def without_objects(content):
    kept = {content["images"][0]["id"]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] not in kept]


def test_images_of_nothing_are_evaluated_and_not_trained_on(tmp_path, caplog):
    root = write_coco(tmp_path, {"train2017": range(4), "val2017": range(4, 7)}, without_objects)
    with caplog.at_level(logging.WARNING):
        data = load(dataset=str(root))
    assert "1 of 4 training images have no objects and are left out" in caplog.text
    assert len(data.train) == 3 and len(data.evaluation) == 3
    sample = data.preparation(SPEC, False)(data.evaluation[0], 0, 0)
    assert sample["target"]["boxes"].shape == (0, 4) and "blank" not in sample
    assert data.preparation(SPEC, True, square=True)(data.evaluation[0], 0, 0)["labels"]["boxes"].shape == (0, 4)
    none = write_coco(tmp_path / "none", {"train2017": range(3)}, lambda content: content.update(annotations=[]))
    with pytest.raises(ValueError, match="Not one of the 3 training images has an object"):
        load(dataset=str(none), eval_split="none")


def rename(content):
    content["categories"][0]["name"] = "mug"


def reorder(content):
    """The same classes with other ids."""
    ids = {3: 12, 7: 11, 90: 10}
    for entry in content["categories"]:
        entry["id"] = ids[entry["id"]]
    for entry in content["annotations"]:
        entry["category_id"] = ids[entry["category_id"]]


def test_classes_must_be_those_of_training_and_are_taken_by_name(tmp_path):
    root = write_coco(tmp_path, {"train2017": range(3)})
    write_coco(root, {"val2017": range(3, 5)}, rename)
    with pytest.raises(
        ValueError, match="other classes than the training data. The data alone has 'mug'. Training alone has 'pen'"
    ):
        load(dataset=str(root))
    write_coco(root, {"val2017": range(3, 5)}, reorder)
    assert boxes_of(load(dataset=str(root)).evaluation) == scenes(range(3, 5))
    with pytest.raises(ValueError, match="`class_names` has 2 names, and the data have 3 classes"):
        load(dataset=str(root), class_names=["cup", "key"])
    with pytest.raises(ValueError, match="`num_classes` is 80, but the data name 3"):
        load(dataset=str(root), num_classes=80)
    with pytest.raises(
        ValueError, match=r"3 classes and the model 2.*The model alone has 'dog'"
    ):  # what a head is checked by
        class_order("train_dataset", load(dataset=str(root)).class_names, ["cup", "dog"], 2)


def boxes_alone(content):
    for entry in content["annotations"]:
        entry["segmentation"] = []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("categories"), "cannot be read as a COCO file .KeyError, 'categories'"),
        (lambda content: content["categories"][0].update(name="cup"), "has several categories 'cup'"),
        (lambda content: content["categories"].append({"id": 3, "name": "dog"}), "has 2 categories of the id 3"),
        (lambda content: content.update(images=[]), "no categories, or no images"),
        (
            lambda content: [entry.update(file_name="no.png") for entry in content["images"]],
            "such as 'no.png', are not in",
        ),
        (boxes_alone, "has boxes without a segmentation, and the head learns masks"),
    ],
)
def test_files_that_are_not_what_they_should_be_are_refused(tmp_path, change, message):
    root = write_coco(tmp_path, {"train2017": range(3)}, change)
    with pytest.raises(ValueError, match=message):
        load(dataset=str(root), masks=True, eval_split="none")


def test_splits_must_be_there_once_and_settings_must_not_contradict(tmp_path):
    root = write_coco(tmp_path, {"train2017": range(3), "train2014": range(3)})
    with pytest.raises(
        ValueError, match="`train_split` is 'train', and in .* 2 of that name, 'train2014', 'train2017'"
    ):
        load(dataset=str(root), eval_split="none")
    assert len(load(dataset=str(root), train_split="train2014", eval_split="none").train) == 3
    with pytest.raises(ValueError, match=r"`eval_split` is 'validation'.*only 'train2014', 'train2017'.*hold out"):
        load(dataset=str(root), train_split="train2014")
    with pytest.raises(ValueError, match="boxes of COCO files are left, top, width and height"):
        load(dataset=str(root), box_format="xyxy")
    with pytest.raises(ValueError, match="`task` is 'panoptic'"):
        load("panoptic", dataset=str(root))


def spoil(content):
    content["annotations"][0]["image_id"] = 999
    content["annotations"][1]["bbox"][0] = -4.0


def test_what_a_file_alone_shows_is_counted(tmp_path, caplog):
    root = write_coco(tmp_path, {"train2017": range(3, 6)}, spoil)
    with caplog.at_level(logging.WARNING):
        load(dataset=str(root), eval_split="none")
    assert "1 objects of images that it does not list, such as 999" in caplog.text
    assert "1 boxes that reach more than a pixel beyond their image" in caplog.text


# Broken objects


def objects(**changes):
    fields = {"bbox": [[5.0, 6.0, 20.0, 10.0], [30.0, 20.0, 10.0, 10.0]], "category": [0, 2]}
    return fields | {"segmentation": [polygon(5, 6, 20, 10), polygon(30, 20, 10, 10)]} | changes


BROKEN = {
    "unknown category": [
        {"category": [0, 3]},
        {"category": [0, -1]},
        {"category": [0, "dog"]},
        {"category": [0, None]},
    ],
    "malformed objects": [
        {"category": [0]},
        {"bbox": [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0]]},
        {"bbox": [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, float("nan")]]},
        {"bbox": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], "category": [0] * 4, "segmentation": [None] * 4},
        {"bbox": None},
        {"area": [1.0]},
    ],
    "annotation of another size": [{"height": 60, "width": 40}],
    "malformed segmentation": [
        {"segmentation": [polygon(5, 6, 20, 10), [[1.0, 2.0, 3.0, 4.0]]]},  # which mask libraries take for a box
        {"segmentation": [polygon(5, 6, 20, 10), [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]]]},
        {"segmentation": [polygon(5, 6, 20, 10), [[1.0, 2.0, 3.0, 4.0, 5.0, float("inf")]]]},
        {"segmentation": [polygon(5, 6, 20, 10), [[1.0, 2.0, 3.0, 4.0, 5.0, 1e9]]]},
        {"segmentation": [polygon(5, 6, 20, 10), {"size": list(SIZE), "counts": [-5, 2405]}]},
        {"segmentation": [polygon(5, 6, 20, 10), None]},
        {"segmentation": [polygon(5, 6, 20, 10), "no json"]},
        {"segmentation": [polygon(5, 6, 20, 10), {"size": list(SIZE), "counts": [5, 6]}]},
        {"segmentation": [polygon(5, 6, 20, 10), {"size": list(SIZE), "counts": "zzzzz0000"}]},
        {"segmentation": [polygon(5, 6, 20, 10), {"counts": [2400]}]},
        {"segmentation": [polygon(5, 6, 20, 10), [["a"] * 6]]},
        {"segmentation": None},
    ],
    "mask of another size": [{"segmentation": [polygon(5, 6, 20, 10), {"size": [60, 40], "counts": [2400]}]}],
}


@pytest.mark.parametrize(("kind", "changes"), [(kind, changes) for kind, many in BROKEN.items() for changes in many])
def test_broken_objects_leave_out_the_image_with_the_reason(kind, changes):
    data = {"image": {"bytes": encoded(np.zeros((*SIZE, 3), np.uint8))}, "objects": objects(**changes)}
    preparation = DetectionPreparation(SPEC, True, 3, masks=True, label_column="objects", class_names=CLASSES)
    with pytest.raises(BadImageError) as found:
        preparation(data, 0, 0)
    assert found.value.kind == kind


@pytest.mark.parametrize(
    "box", [[10.0, 10.0, 0.0, 5.0], [10.0, 10.0, 5.0, -3.0], [70.0, 10.0, 5.0, 5.0], [-9.0, 3.0, 9.0, 9.0]]
)
def test_objects_that_cannot_be_seen_are_left_out_and_the_image_stays(box):
    value = objects(bbox=[box, [30.0, 20.0, 10.0, 10.0]], area=[4.0, None])
    found = read_objects(value, SIZE, 3, "xywh")
    assert found.boxes.tolist() == [[30, 20, 40, 30]] and found.labels.tolist() == [2] and found.area.tolist() == [100]
    assert "1 of 2 objects have boxes without area, or wholly outside" in found.left_out
    assert len(found.segmentations) == 1 and found.clipped == 0


def test_boxes_end_at_the_border_and_more_than_rounding_is_counted():
    value = objects(bbox=[[-5.0, 6.0, 20.0, 10.0], [50.5, 20.0, 10.0, 10.0]])
    found = read_objects(value, SIZE, 3, "xywh")
    assert found.boxes.tolist() == [[0, 6, 15, 16], [50.5, 20, 60, 30]]
    assert found.clipped == 1 and not found.left_out


def test_objects_may_be_a_list_of_structures_and_fields_have_other_names():
    value = [
        {"bboxes": [5.0, 6.0, 25.0, 16.0], "label": "pen", "is_crowd": 1},
        {"bboxes": [1.0, 2.0, 3.0, 4.0], "label": "cup", "is_crowd": 0},
    ]
    found = read_objects(value, SIZE, 3, "xyxy", {name: place for place, name in enumerate(CLASSES)})
    assert found.boxes.tolist() == [[5, 6, 25, 16], [1, 2, 3, 4]] and found.labels.tolist() == [2, 0]
    assert found.iscrowd.tolist() == [True, False] and found.area.tolist() == [200, 4]
    assert read_objects([], SIZE, 3, "xyxy").boxes.shape == (0, 4)


# Data sets with a column of objects


def test_the_form_of_boxes_is_stated_and_checked(tmp_path):
    numbers = range(12)
    corners = write_parquet(tmp_path / "xyxy.parquet", numbers, xyxy=True)
    sides = write_parquet(tmp_path / "xywh.parquet", numbers, xyxy=False)
    for file, right, wrong in ((corners, "xyxy", "xywh"), (sides, "xywh", "xyxy")):
        stated = {"train_files": file, "eval_split": "none", "num_classes": 3}
        with pytest.raises(ValueError, match=f"`box_format` is not set.* 0 as '{right}'"):
            load(**stated)
        with pytest.raises(ValueError, match=f"`box_format` is '{wrong}', but of the first .* 0 as '{right}'"):
            load(**stated, box_format=wrong)
        assert load(**stated, box_format=right).box_format == right
    with pytest.raises(ValueError, match="`box_format` is 'yolo'"):
        load(train_files=corners, num_classes=3, box_format="yolo")


def test_classes_of_objects_come_from_the_data_or_are_stated(tmp_path):
    named = write_parquet(tmp_path / "named.parquet", range(4), category=datasets.ClassLabel(names=CLASSES))
    other = write_parquet(tmp_path / "other.parquet", range(4), category=datasets.ClassLabel(names=CLASSES[::-1]))
    plain = write_parquet(tmp_path / "plain.parquet", range(4))
    how = {"box_format": "xyxy", "eval_split": "none"}
    assert load(train_files=named, **how).class_names == CLASSES
    with pytest.raises(
        ValueError, match="`class_names` has 3 names, and the data have 3 classes of their own, or another order"
    ):
        load(train_files=named, class_names=CLASSES[::-1], **how)
    with pytest.raises(ValueError, match="other classes than the training data, or another order"):
        load(train_files=named, eval_files=other, box_format="xyxy")
    with pytest.raises(ValueError, match="Nothing tells the classes of the objects"):
        load(train_files=plain, **how)
    assert load(train_files=plain, class_names=CLASSES, **how).class_names == CLASSES
    objects = [row["category"] for row in datasets.Dataset.from_parquet(plain)["objects"]]
    assert {0, 2} <= set(sum(objects, []))
    shifted = datasets.Dataset.from_parquet(plain).map(
        lambda row: {"objects": {**row["objects"], "category": [kind + 1 for kind in row["objects"]["category"]]}}
    )
    shifted.to_parquet(tmp_path / "shifted.parquet")
    for streaming in (False, True):
        counted_from_1 = {"train_files": str(tmp_path / "shifted.parquet"), "streaming": streaming, **how}
        with pytest.raises(ValueError, match="categories up to 3, and none is 0, but the 3 classes are 0 to 2"):
            load(class_names=CLASSES, **counted_from_1)
        assert len(load(class_names=["none", *CLASSES], **counted_from_1).class_names) == 4
    with pytest.raises(ValueError, match="`label_column` is 'boxes', but the columns of the data set are"):
        load(train_files=plain, label_column="boxes", **how)
    with pytest.raises(ValueError, match="has boxes without a segmentation .*'bbox', 'category'"):
        load(train_files=named, masks=True, **how)


def test_images_of_nothing_stay_in_a_stream_and_leave_a_table(tmp_path, caplog):
    file = write_parquet(tmp_path / "rows.parquet", range(3), category=datasets.ClassLabel(names=CLASSES))
    rows = datasets.Dataset.from_parquet(file, cache_dir=str(tmp_path / "cache"))
    empty = {"image": rows[0]["image"], "objects": {"bbox": [], "category": []}}
    more = datasets.concatenate_datasets([rows, datasets.Dataset.from_list([empty], features=rows.features)])
    more.to_parquet(file)
    how = {"train_files": file, "eval_split": "none", "box_format": "xyxy", "cache_dir": str(tmp_path / "again")}
    assert len(load(**how, streaming=False).train) == 3
    with caplog.at_level(logging.WARNING):
        stream = load(**how).train
    assert "stay in a stream" in caplog.text and len(list(stream)) == 4


def test_a_folder_of_images_with_metadata_is_read(tmp_path):
    root = tmp_path / "photos" / "train"
    content, files = coco_content(range(5))
    root.mkdir(parents=True)
    lines = []
    for image in content["images"]:
        own = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        (root / image["file_name"]).write_bytes(encoded(files[image["file_name"]]))
        fields = {"bbox": [entry["bbox"] for entry in own]}
        fields["categories"] = [[3, 7, 90].index(entry["category_id"]) for entry in own]
        lines.append(json.dumps({"file_name": image["file_name"], "objects": fields}))
    (root / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    how = {
        "dataset": str(root.parent),
        "eval_split": "none",
        "class_names": CLASSES,
        "cache_dir": str(tmp_path / "cache"),
    }
    data = load(**how, box_format="xywh")
    assert boxes_of(data.train) == scenes(range(5))
