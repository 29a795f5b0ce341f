"""Samples of dense tasks: masks and boxes move with their pixels, the same after a stop, and batches say where there is image."""

import itertools

import datasets
import numpy as np
import pytest
import torch
from dense_files import CLASSES, encoded, mask_of, polygon, scene, write_coco, write_masks, write_parquet
from helpers import RangeServer
from torchvision.ops import box_convert, masks_to_boxes

from scalekd_hf.data.bad_images import BadImages
from scalekd_hf.data.dataset import prepare_dataset
from scalekd_hf.data.decoding import BadImageError
from scalekd_hf.data.stream import Partition
from scalekd_hf.images import ImageSpec
from scalekd_hf.transfer.annotations import DenseDataArguments, load_dense_data
from scalekd_hf.transfer.collation import DenseCollator
from scalekd_hf.transfer.preparation import DetectionPreparation, SegmentationPreparation


SPEC = ImageSpec((40, 40))


def objects_of(number, **more):
    _, objects = scene(number)
    boxes = [list(map(float, box)) for _, *box in objects]
    fields = {"bbox": boxes, "category": [kind for kind, *_ in objects]}
    return fields | {"segmentation": [polygon(*box) for box in boxes]} | more


def row_of(number, **more):
    return {"image": {"bytes": encoded(scene(number)[0])}, "objects": objects_of(number, **more)}


def mask_row(number, **how):
    pixels, objects = scene(number)
    return {"image": {"bytes": encoded(pixels)}, "label": {"bytes": encoded(mask_of(pixels, objects, **how))}}


def brightest(pixels):
    """Which colour of a pixel is the strongest, and where it is so strong that it belongs to an object, each (h, w)."""
    return pixels.argmax(0), pixels.max(0).values > 150


# Detection


def detector(training=True, **options):
    return DetectionPreparation(SPEC, training, 3, label_column="objects", masks=True, seed=4, **options)


def check_objects(sample, plain=True):
    """Each box lies around its mask, and the mask on pixels of the colour of its class."""
    labels, (height, width) = sample["labels"], sample["pixel_values"].shape[1:]
    boxes = box_convert(labels["boxes"], "cxcywh", "xyxy") * torch.tensor([width, height, width, height])
    assert labels["masks"].shape == (len(boxes), height, width)
    for kind, box, mask in zip(labels["class_labels"], boxes, labels["masks"], strict=True):
        around = masks_to_boxes(mask[None].float())[0] + torch.tensor([0, 0, 1, 1])
        assert (around - box).abs().max() <= 1.5, (around, box)
        if mask.sum() < 30:
            continue  # mostly edge
        colours, strong = brightest(sample["pixel_values"].float())
        inner = mask.bool() & strong
        assert inner.sum() > 0.5 * mask.sum()
        if plain:  # colours are as they were
            assert (colours[inner] == kind).float().mean() > 0.95


@pytest.mark.parametrize("square", [False, True])
def test_boxes_and_masks_of_training_move_with_their_pixels(square):
    preparation, sizes, counts = detector(square=square), set(), set()
    if square:
        colours = preparation.transform.transforms.pop(0)
        assert type(colours).__name__ == "RandomPhotometricDistort"
    for number in range(30):
        sample = preparation(row_of(number), 0, (number, 0))
        assert sample["pixel_values"].dtype == torch.uint8 and type(sample["pixel_values"]) is torch.Tensor
        check_objects(sample)
        sizes.add(tuple(sample["pixel_values"].shape[1:]))
        counts.add(len(sample["labels"]["boxes"]) - len(scene(number)[1]))
    if square:
        assert sizes == {(40, 40)} and min(counts) < 0  # objects have left their crops
    else:
        assert {min(size) for size in sizes} >= {32, 34, 40} and counts == {0}
        assert max(max(size) for size in sizes) <= 67


def test_evaluation_keeps_the_objects_of_the_original():
    preparation = detector(training=False)
    pixels, objects = scene(5)
    sample = preparation(row_of(5, iscrowd=[1] + [0] * (len(objects) - 1)), 0, 5)
    target = sample["target"]
    boxes = [[left, top, left + width, top + height] for _, left, top, width, height in objects]
    assert target["boxes"].tolist() == boxes and target["labels"].tolist() == [kind for kind, *_ in objects]
    assert target["iscrowd"].tolist() == [True] + [False] * (len(objects) - 1)
    assert target["area"].tolist() == [width * height for *_, width, height in objects]
    assert target["masks"].shape == (len(objects), *pixels.shape[:2])
    assert torch.equal(target["masks"].any(0), torch.from_numpy(mask_of(pixels, objects) > 0))
    assert sample["size"] == pixels.shape[:2] and min(sample["pixel_values"].shape[1:]) == 40
    relative = box_convert(sample["labels"]["boxes"], "cxcywh", "xyxy") * torch.tensor(pixels.shape[1::-1] * 2)
    assert torch.allclose(relative, target["boxes"][1:], atol=1e-3)  # without the crowd
    assert "masks" not in sample["labels"]


def test_crowds_are_not_learned_and_classes_come_in_the_models_order():
    count = len(scene(3)[1])
    assert count > 1
    preparation = detector(class_order=[2, 0, 1])
    sample = preparation(row_of(3, iscrowd=[True] + [False] * (count - 1)), 0, 3)
    assert sample["labels"]["class_labels"].tolist() == [[2, 0, 1][kind] for kind, *_ in scene(3)[1][1:]]
    names = detector(class_names=CLASSES)
    named = names(row_of(3, category=[CLASSES[kind] for kind, *_ in scene(3)[1]]), 0, 3)
    assert named["labels"]["class_labels"].tolist() == [kind for kind, *_ in scene(3)[1]]


def test_every_form_of_segmentation_gives_the_same_mask():
    from faster_coco_eval.core import mask as api

    box = [9.0, 5.0, 12.0, 8.0]
    (height, width), (shape,) = scene(2)[0].shape[:2], [polygon(*box)]
    runs = api.merge(api.frPyObjects(shape, height, width))
    flat = np.concatenate([[0], api.decode(runs).ravel(order="F"), [2]])
    lengths = np.diff(np.flatnonzero(np.diff(flat) != 0), prepend=-0).tolist()
    assert sum(lengths) == height * width and len(lengths) > 10
    forms = [
        shape,
        {"size": [height, width], "counts": runs["counts"].decode()},
        {"size": [height, width], "counts": lengths},
        f"{shape}",
    ]
    found = []
    for form in forms:
        value = {"bbox": [box], "category": [1], "segmentation": [form]}
        row = row_of(2) | {"objects": value}
        found.append(detector(training=False)(row, 0, 2)["target"]["masks"])
    assert found[0].sum() == 96 and all(torch.equal(found[0], other) for other in found[1:])


# Segmentation


def segmenter(training=True, size=(40, 40), **options):
    return SegmentationPreparation(ImageSpec(size), training, 3, seed=2, **{"zero_is_ignored": True, **options})


def check_mask(sample):
    colours, strong = brightest(sample["pixel_values"].float())
    classes = sample["labels"].long()
    inner = (classes != 255) & strong
    if (classes != 255).sum() < 30:
        return  # mostly edge
    assert inner.sum() > 0.6 * (classes != 255).sum()
    assert (colours[inner] == classes[inner]).float().mean() > 0.95
    assert (classes[strong] != 255).float().mean() > 0.7  # of what is coloured, all but edges is of a class


def test_masks_of_training_move_with_their_pixels():
    preparation, shapes, parts = segmenter(), set(), []
    preparation.distort.transforms = preparation.distort.transforms[:1]  # colours stay
    for number in range(40):
        sample = preparation(mask_row(number), 0, (number, 0))
        assert type(sample["labels"]) is torch.Tensor and sample["labels"].shape == sample["pixel_values"].shape[1:]
        check_mask(sample)
        shapes.add(tuple(sample["labels"].shape))
        parts.append(int((sample["labels"] != 255).sum()))
    assert (
        (40, 40) in shapes and min(min(shape) for shape in shapes) < 30 and max(max(shape) for shape in shapes) == 40
    )
    assert (
        np.quantile(parts, 0.9) > 4 * np.quantile(parts, 0.2) > 0
    )  # near and far, and every crop has something to learn from


def test_a_crop_has_more_than_one_class_where_ten_tries_find_one():
    pixels = np.zeros((80, 320, 3), np.uint8)
    mask = np.zeros((80, 320), np.uint8)
    mask[:, 280:] = 1  # an eighth
    row = {"image": {"bytes": encoded(pixels)}, "label": {"bytes": encoded(mask)}}
    preparation = segmenter(zero_is_ignored=False, size=(20, 20))
    samples = [preparation(row, 0, number)["labels"] for number in range(60)]
    mixed = [bool(((sample == 1).float().mean() - 0.5).abs() <= 0.25) for sample in samples]
    assert np.mean(mixed) > 0.25  # one crop in nine by chance, at the most


def test_every_crop_has_something_to_learn_from():
    mask = np.full((160, 200), 255, np.uint8)
    mask[150:158, 3:11] = 1
    row = {"image": {"bytes": encoded(np.zeros((160, 200, 3), np.uint8))}, "label": {"bytes": encoded(mask)}}
    preparation = SegmentationPreparation(SPEC, True, 3)
    for number in range(40):
        assert set(preparation(row, number, 0)["labels"].unique().tolist()) == {1, 255}, number
    row["label"] = {"bytes": encoded(np.full((160, 200), 255, np.uint8))}
    with pytest.raises(BadImageError, match="no pixel of a class"):
        preparation(row, 0, 0)
    assert SegmentationPreparation(SPEC, False, 3)(row, 0, 0)["target"]["mask"].unique().tolist() == [255]


def test_evaluation_resizes_and_keeps_the_mask():
    pixels, objects = scene(1)
    sample = segmenter(training=False)(mask_row(1), 0, 1)
    check_mask(sample)
    assert min(sample["labels"].shape) == 40 and sample["size"] == pixels.shape[:2]
    assert torch.equal(sample["target"]["mask"], torch.from_numpy(mask_of(pixels, objects, first=0, around=255)))
    wide = {"image": {"bytes": encoded(pixels[:5])}, "label": {"bytes": encoded(mask_of(pixels, objects)[:5])}}
    assert max(segmenter(training=False)(wide, 0, 1)["labels"].shape) == 160


def test_mask_values_mean_the_models_classes():
    found = segmenter(training=False, class_order=[1, 2, 0])(mask_row(4), 0, 4)["target"]["mask"]
    plain = segmenter(training=False)(mask_row(4), 0, 4)["target"]["mask"]
    seen = plain != 255
    assert torch.equal(found[seen], torch.tensor([1, 2, 0])[plain[seen].long()].to(torch.uint8))
    assert (found[~seen] == 255).all()
    from_zero = segmenter(training=False, zero_is_ignored=False)(mask_row(4, first=0, around=255), 0, 4)
    assert torch.equal(from_zero["target"]["mask"], plain)
    assert torch.equal(segmenter(training=False)(mask_row(4, around=255), 0, 4)["target"]["mask"], plain)


def test_what_is_drawn_depends_on_seed_pass_and_row_alone():
    rows = [mask_row(number) for number in range(3)]
    first = [segmenter()(row, 1, (number, 0)) for number, row in enumerate(rows)]
    state = torch.get_rng_state()
    again = [segmenter()(rows[number], 1, (number, 0)) for number in (2, 0, 1)]
    detector()(row_of(0), 0, 0), segmenter(training=False)(rows[0], 0, 0), detector(training=False)(row_of(0), 0, 0)
    assert torch.equal(torch.get_rng_state(), state)  # of the run
    for number, sample in zip((2, 0, 1), again, strict=True):
        assert all(torch.equal(sample[name], first[number][name]) for name in sample)
    other = segmenter()(rows[0], 2, (0, 0))
    assert not np.array_equal(other["pixel_values"], first[0]["pixel_values"])


def test_more_classes_than_masks_can_hold_are_refused():
    with pytest.raises(ValueError, match="`num_classes` is 256, but masks have at most 255"):
        SegmentationPreparation(SPEC, True, 256)
    with pytest.raises(ValueError, match="`box_format` is 'yolo'"):
        DetectionPreparation(SPEC, True, 3, box_format="yolo")


# Batches


def test_batches_are_padded_and_say_where_there_is_image():
    samples = [detector(training=False)(row_of(number), 0, number) for number in (0, 1)]
    samples += [detector(training=False).blank(None) | {"bad_image": {"row": 7}}]
    shapes = [sample["pixel_values"].shape[1:] for sample in samples]
    batch = DenseCollator()(samples)
    height, width = batch["pixel_values"].shape[2:]
    assert height % 32 == width % 32 == 0 and max(shape[0] for shape in shapes) <= height
    for number, (shape, mask) in enumerate(zip(shapes, batch["pixel_mask"], strict=True)):
        assert mask.sum() == shape[0] * shape[1] and mask[: shape[0], : shape[1]].all()
        assert not batch["pixel_values"][number][:, mask == 0].any()
        assert torch.equal(batch["pixel_values"][number][:, : shape[0], : shape[1]], samples[number]["pixel_values"])
    assert batch["sizes"].tolist()[:2] == [list(sample["size"]) for sample in samples[:2]]
    assert batch["targets"][2] is None and batch["blanks"] == [2] and batch["bad_images"] == [{"row": 7}]
    trained = DenseCollator()([detector()(row_of(number), 0, number) for number in (0, 1)])
    assert all(objects["masks"].shape[1:] == trained["pixel_values"].shape[2:] for objects in trained["labels"])
    assert "targets" not in trained and "blanks" not in trained


def test_batches_of_masks_count_nothing_where_they_are_padded():
    samples = [segmenter()(mask_row(number), 0, number) for number in range(4)] + [segmenter().blank(None)]
    batch = DenseCollator(size=(40, 40))(samples)
    assert batch["pixel_values"].shape == (5, 3, 64, 64) and batch["labels"].shape == (5, 64, 64)
    assert batch["labels"].dtype == torch.int64
    assert (batch["labels"][batch["pixel_mask"] == 0] == 255).all() and (batch["labels"][4] == 255).all()
    for sample, labels in zip(samples, batch["labels"], strict=True):
        height, width = sample["labels"].shape
        assert torch.equal(labels[:height, :width], sample["labels"].long())


# Streams


def same(first, second):
    """Whether two batches are equal, bit by bit."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name]), name
        elif name == "labels":
            assert len(value) == len(second[name])
            assert all(torch.equal(a[k], b[k]) for a, b in zip(value, second[name], strict=True) for k in a)
        else:
            assert value == second[name]


def batches(stream, seen, count, workers=2):
    loader = stream.training_loader(
        Partition(2, 1, max(1, workers)), 0, seen, num_workers=workers, collate_fn=DenseCollator()
    )
    return list(itertools.islice(iter(loader), count))


def damage(content):
    content["annotations"][0]["bbox"][2] = 0.0  # the image stays
    content["annotations"][-1]["category_id"] = 555  # the image is left out


def stream_of(root, **how):
    data = load_dense_data(DenseDataArguments(dataset=str(root), eval_split="none"), "detect", masks=True)
    preparation = data.preparation(SPEC, True, masks=True, seed=1)
    return prepare_dataset(data.train, "train_dataset", preparation, (3, 4), max_bad_images=0.3)


def test_a_stream_of_a_coco_folder_goes_on_where_it_stood(tmp_path):
    root = write_coco(tmp_path, {"train2017": range(9)}, damage)
    whole = batches(stream_of(root), 0, 11)
    rest = batches(stream_of(root), 14, 4)
    for first, second in zip(whole[7:], rest, strict=True):
        same(first, second)
    account = BadImages(tmp_path / "bad_images.jsonl", 1.0)
    for batch in whole:
        account.add("training", batch.get("bad_images", []))
    assert account.kinds == {"objects left out": 1, "unknown category": 1}
    passes = {entry["kind"]: set() for batch in whole for entry in batch.get("bad_images", [])}
    for entry in (entry for batch in whole for entry in batch.get("bad_images", [])):
        passes[entry["kind"]].add(entry["pass"])
        assert entry["file"].endswith(".png")
    assert {0, 1} <= passes["objects left out"]


def test_a_folder_of_masks_is_streamed_and_evaluated(tmp_path):
    root = write_masks(tmp_path / "ade", {"training": range(6), "validation": range(6, 9)}, "ADE_")
    (root / "annotations" / "validation" / "ADE_0007.png").write_bytes(encoded(np.zeros((5, 5), np.uint8)))
    data = load_dense_data(DenseDataArguments(dataset=str(root), class_names=CLASSES), "segment")
    stream = prepare_dataset(data.train, "train_dataset", data.preparation(SPEC, True), (0, 4))
    for first, second in zip(batches(stream, 0, 6)[4:], batches(stream, 8, 2), strict=True):
        same(first, second)
    evaluation = prepare_dataset(data.evaluation, "eval_dataset", data.preparation(SPEC, False))
    batch = DenseCollator()([evaluation[number] for number in range(3)])
    assert batch["blanks"] == [1] and [target is None for target in batch["targets"]] == [False, True, False]
    assert batch["bad_images"][0]["kind"] == "mask of another size" and batch["bad_images"][0]["row"] == 1


@pytest.mark.parametrize("xyxy", [False, True])
def test_a_parquet_stream_of_objects_goes_on_where_it_stood(tmp_path, xyxy):
    files = [write_parquet(tmp_path / f"{n}.parquet", range(6 * n, 6 * n + 6), xyxy) for n in range(2)]
    assert len(files) == 2
    arguments = DenseDataArguments(train_files=str(tmp_path / "*.parquet"), eval_files=files[1], num_classes=3)
    arguments.box_format = "xyxy" if xyxy else "xywh"
    data = load_dense_data(arguments, "detect")
    stream = prepare_dataset(data.train, "train_dataset", data.preparation(SPEC, True), (3, 4))
    whole, rest = batches(stream, 0, 9), batches(stream, 10, 4)
    for first, second in zip(whole[5:], rest, strict=True):
        same(first, second)
    evaluation = prepare_dataset(data.evaluation, "eval_dataset", data.preparation(SPEC, False))
    loader = evaluation.evaluation_loader(4, 0, 1, num_workers=2, collate_fn=DenseCollator())
    targets = [target for batch in loader for target in batch["targets"]]
    found = [target["boxes"].tolist() for target in targets if target is not None]
    expected = [[[x, y, x + w, y + h] for _, x, y, w, h in scene(number)[1]] for number in range(6, 12)]
    assert found == expected and len(targets) == 8  # two blanks fill the last batch


def test_bad_rows_are_errors_of_bad_images():
    with pytest.raises(BadImageError) as found:
        detector()({"image": {"bytes": b"no image"}, "objects": objects_of(0)}, 0, 0)
    assert found.value.kind == "not an image"


def test_masks_that_are_paths_on_the_network_are_fetched_too():
    files = {f"/{kind}/{n}.png": mask_row(n)[kind]["bytes"] for n in range(4) for kind in ("image", "label")}
    with RangeServer(files) as server:
        paths = {kind: [f"{server.url}/{kind}/{n}.png" for n in range(4)] for kind in ("image", "label")}
        features = datasets.Features({kind: datasets.Image() for kind in paths})
        rows = datasets.Dataset.from_dict(paths, features=features)
        stream = prepare_dataset(rows, "train_dataset", segmenter(), (0, 4), max_bad_images=0)
        (batch,) = batches(stream, 0, 1, workers=0)
    assert "bad_images" not in batch and ((batch["labels"] != 255).sum() > 0)
