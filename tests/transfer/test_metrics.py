"""Mean IoU and average precision: those of the reference implementations, whoever has seen which image."""

import contextlib
import io
import json
import sys

import numpy as np
import pytest
import torch
import torch.distributed
from processes import in_processes
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from scalekd_hf.images import ImageSpec
from scalekd_hf.transfer.metrics import DetectionMetrics, SegmentationMetrics, class_maps
from scalekd_hf.transfer.preparation import DetectionPreparation


STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
SIZE = (204, 208)


def masks_of(boxes, size=SIZE):
    masks = torch.zeros((len(boxes), *size), dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
        mask[top : top + (bottom - top) // 3, left : left + (right - left) // 3] = False  # a corner is missing
    return masks


def cases(images=12, classes=4):
    """Made predictions and targets: of all sizes, crowds, images of nothing, false alarms, doubles and more than 100 guesses."""
    torch.manual_seed(5)
    predictions, targets = [], []
    for number in range(images):
        count = number % 4
        top_left, sides = torch.rand(count, 2) * 40, 8 + torch.rand(count, 2) * 160
        boxes = torch.cat([top_left, top_left + sides], 1)
        labels = torch.randint(classes - 1, (count,))  # the last class has no object
        crowd = torch.tensor([number % 5 == 3 and place == 1 for place in range(count)], dtype=torch.bool)
        area = masks_of(boxes).sum((1, 2)).float()
        targets.append({"boxes": boxes, "labels": labels, "iscrowd": crowd, "area": area, "masks": masks_of(boxes)})
        shaken = boxes.repeat(2, 1) + torch.randn(2 * count, 4) * 4
        more = 110 if number == 3 else 2
        noise = torch.rand(more, 2) * 60
        guesses = torch.cat([shaken, torch.cat([noise, noise + 10 + torch.rand(more, 2) * 80], 1)]).clamp(0, 204)
        kinds = torch.cat([labels, labels, torch.randint(classes, (more,))])
        predictions.append(
            {"boxes": guesses, "labels": kinds, "scores": torch.rand(len(kinds)), "masks": masks_of(guesses)}
        )
    return predictions, targets


def by_pycocotools(predictions, targets, folder, kind):
    """The same by pycocotools, from files."""
    found = []
    truth = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": str(number)} for number in range(4)],
    }
    for number, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
        truth["images"].append({"id": number, "height": SIZE[0], "width": SIZE[1]})
        for side, place in [(s, p) for s in (prediction, target) for p in range(len(s["labels"]))]:
            left, top, right, bottom = side["boxes"][place].tolist()
            runs = mask_api.encode(np.asfortranarray(side["masks"][place].numpy().astype(np.uint8)))
            entry = {"image_id": number, "category_id": int(side["labels"][place])}
            entry["segmentation"] = {"size": list(SIZE), "counts": runs["counts"].decode()}
            if side is target:
                entry |= {"id": len(truth["annotations"]) + 1, "iscrowd": int(side["iscrowd"][place])}
                entry |= {"area": float(side["area"][place])}
            if side is target or kind == "bbox":
                entry["bbox"] = [left, top, right - left, bottom - top]
            if side is prediction:
                found.append(entry | {"score": float(side["scores"][place])})
            else:
                truth["annotations"].append(entry)
    if kind == "bbox":
        found = [{name: value for name, value in entry.items() if name != "segmentation"} for entry in found]
    (folder / "truth.json").write_text(json.dumps(truth), encoding="utf-8")
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "truth.json"))
        evaluation = COCOeval(coco, coco.loadRes(str(folder / "found.json")), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:6]


def expected(folder, cases, kinds=("bbox", "segm")):
    values = {}
    for kind, name in zip(("bbox", "segm"), ("box", "mask"), strict=True):
        if kind in kinds:
            stats = by_pycocotools(*cases, folder, kind)
            values |= {f"{name}_{stat}": value for stat, value in zip(STATS, stats, strict=True)}
    return values


@pytest.mark.parametrize("masks", [False, True])
def test_average_precision_is_that_of_pycocotools(tmp_path, masks):
    made = cases()
    values = expected(tmp_path, made, ("bbox", "segm") if masks else ("bbox",))
    assert all(0.02 < value < 0.98 for value in values.values())  # so that equality says something
    metric = DetectionMetrics(masks)
    for start in range(0, 12, 5):
        metric.update(*(part[start : start + 5] for part in made))
    assert metric.compute() == pytest.approx(values, abs=1e-6)
    metric.reset()
    metric.update(*(part[:5] for part in made))
    part = expected(tmp_path, [side[:5] for side in made], ("bbox", "segm") if masks else ("bbox",))
    assert metric.compute() == pytest.approx({name: value for name, value in part.items() if value >= 0}, abs=1e-6)


def test_false_alarms_in_images_of_nothing_count_for_masks_too():
    """By masks alone, torchmetrics leaves out images that have none."""
    targets = cases(2)[1][1:]
    perfect = [{**target, "scores": torch.ones(len(target["labels"]))} for target in targets]
    nothing = {name: value[:0] for name, value in targets[0].items()}
    alarm = {**perfect[0], "scores": perfect[0]["scores"] + 1}
    metric = DetectionMetrics(masks=True)
    metric.update(perfect, targets)
    assert metric.compute()["mask_ap"] == 1
    metric.update([alarm], [nothing])
    results = metric.compute()
    assert results["mask_ap"] == results["box_ap"] == pytest.approx(0.5)


def test_blanks_do_not_count_and_without_objects_nothing_is_computed():
    predictions, targets = cases(3)
    metric = DetectionMetrics()
    metric.update([predictions[0], predictions[0]], [None, {**targets[0]}])  # the first target has no objects
    with pytest.raises(ValueError, match="Not one object was evaluated"):
        metric.compute()
    metric.update(predictions, targets)
    before = metric.compute()
    metric.update([predictions[2]], [None])
    assert metric.compute() == before
    with pytest.raises(ValueError, match="`predictions` has no 'masks'"):
        DetectionMetrics(masks=True).update([{"boxes": 0}], [targets[1]])


def shares(made, world_size):
    """Images of each rank, as an evaluation deals them out, the last of which has none."""
    return [
        [side[rank :: world_size - 1] if rank < world_size - 1 else [] for side in made] for rank in range(world_size)
    ]


def of_a_rank(file, made, maps):
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    boxes, pixels = DetectionMetrics(masks=True), SegmentationMetrics("abc")
    boxes.update(*shares(made, size)[rank])
    pixels.update(*shares(maps, size)[rank])
    results = boxes.compute() | pixels.compute() | pixels.iou_by_class()
    file.with_suffix(f".{rank}").write_text(json.dumps(results), encoding="utf-8")
    torch.distributed.destroy_process_group()


def test_processes_with_other_numbers_of_images_find_what_one_finds(tmp_path):
    made, maps = cases(5), segmented(5)
    boxes, pixels = DetectionMetrics(masks=True), SegmentationMetrics("abc")
    boxes.update(*made)
    pixels.update(*maps)
    alone = boxes.compute() | pixels.compute() | pixels.iou_by_class()
    outcomes = in_processes(tmp_path, of_a_rank, tmp_path / "results", made, maps, processes=3)
    assert [outcome.status for outcome in outcomes] == [0, 0, 0], outcomes
    for rank in range(3):
        results = json.loads((tmp_path / f"results.{rank}").read_text(encoding="utf-8"))
        assert results == pytest.approx(alone, nan_ok=True)


# Segmentation


def segmented(images):
    """Class maps and masks of other sizes, with ignored pixels."""
    rng = torch.Generator().manual_seed(3)
    maps, masks = [], []
    for number in range(images):
        size = (7 + number, 9)
        mask = torch.randint(3, size, generator=rng)
        guess = torch.where(torch.rand(size, generator=rng) < 0.6, mask, torch.randint(3, size, generator=rng))
        mask[torch.rand(size, generator=rng) < 0.2] = 255
        maps.append(guess)
        masks.append({"mask": mask.to(torch.uint8)})
    return maps, masks


def plainly(maps, masks, classes):
    """Mean IoU, pixel accuracy and mean accuracy, class by class over all pixels."""
    guess = np.concatenate([values.numpy().ravel() for values in maps])
    truth = np.concatenate([target["mask"].numpy().ravel() for target in masks])
    guess, truth = guess[truth != 255], truth[truth != 255]
    unions = {k: ((guess == k) | (truth == k)).sum() for k in range(classes)}
    iou = [((guess == k) & (truth == k)).sum() / unions[k] for k in range(classes) if unions[k]]
    right = [(guess[truth == k] == k).mean() for k in range(classes) if (truth == k).any()]
    return {"mean_iou": np.mean(iou), "pixel_accuracy": (guess == truth).mean(), "mean_accuracy": np.mean(right)}


def test_mean_iou_counted_by_hand():
    metric = SegmentationMetrics(["sky", "sea", "sand", "ship"])
    guess = torch.tensor([[0, 0, 1], [1, 2, 2]])
    metric.update([guess], [{"mask": torch.tensor([[0, 1, 1], [1, 255, 0]])}])
    # sky: 1 of {2 guessed, 2 true}: 1 of 3; sea: 2 of 3; sand: guessed once where it is not: 0; ship: nowhere
    assert metric.compute() == pytest.approx(
        {"mean_iou": (1 / 3 + 2 / 3 + 0) / 3, "pixel_accuracy": 3 / 5, "mean_accuracy": (1 / 2 + 2 / 3) / 2}
    )
    of = metric.iou_by_class()
    assert (of["sky"], of["sea"], of["sand"]) == pytest.approx((1 / 3, 2 / 3, 0))
    assert np.isnan(of["ship"])


def test_mean_iou_is_that_of_all_pixels_and_not_of_images():
    maps, masks = segmented(6)
    metric = SegmentationMetrics("abcd")  # the last of which is nowhere
    metric.update(maps[:2], masks[:2])
    metric.update([*maps[2:], maps[0]], [*masks[2:], None])
    assert metric.compute() == pytest.approx(plainly(maps, masks, 4))
    metric.reset()
    metric.update(maps[:1], masks[:1])
    assert metric.compute() == pytest.approx(plainly(maps[:1], masks[:1], 4))


def test_what_cannot_be_compared_is_refused():
    metric = SegmentationMetrics("ab")
    with pytest.raises(ValueError, match=r"map of shape \(2, 3\) for a mask of \(3, 2\)"):
        metric.update([torch.zeros(2, 3)], [{"mask": torch.zeros(3, 2)}])
    metric.update([torch.zeros(2, 2, dtype=torch.long)], [{"mask": torch.full((2, 2), 255)}])
    with pytest.raises(ValueError, match="Not one pixel was evaluated"):
        metric.compute()
    with pytest.raises(ValueError, match="a single class"):
        SegmentationMetrics(["all"])


def test_class_maps_leave_out_what_is_padded_and_have_the_original_size():
    logits = torch.zeros(2, 2, 8, 8)
    logits[:, 0] = 0.5
    logits[0, 1, :4, 2:6] = 1  # the right two thirds of what is image
    logits[:, 1, :, 6:] = logits[0, 1, 4:] = 9  # padded
    mask = torch.zeros(2, 8, 8)
    mask[0, :4, :6] = 1
    maps = class_maps(logits, mask, torch.tensor([[8, 12], [5, 5]]))
    assert [tuple(found.shape) for found in maps] == [(8, 12), (5, 5)]
    assert (maps[0] == torch.arange(12).ge(4).long()).float().mean() == 1


@pytest.mark.parametrize("missing", ["faster_coco_eval", "torchmetrics.detection"])
def test_what_is_not_installed_is_named_with_its_extra(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install 'scalekd-hf\[transfer\]'"):
        DetectionMetrics()
    if missing == "faster_coco_eval":
        monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
        with pytest.raises(ImportError, match=r"Masks of objects need faster-coco-eval"):
            DetectionPreparation(ImageSpec(), True, 3, masks=True)
