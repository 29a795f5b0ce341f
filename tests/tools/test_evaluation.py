"""Evaluation: its numbers against plain arithmetic, ImageNet's sets by their names, and the recipe as a command."""

import json
import time

import datasets
import numpy as np
import pytest
import timm
import torch
from helpers import DIGITS, TEACHER, settings, small_student, timm_vit
from PIL import Image
from processes import in_processes
from timm.data import create_transform, resolve_data_config
from transformers import pipeline

from scalekd_hf import load_student
from scalekd_hf.borrowed.timm import IMAGENET_INFO as INFO
from scalekd_hf.data.imagenet import benchmark, check_classes, class_places, label_places, read_real_labels
from scalekd_hf.images import IGNORED_LABEL
from scalekd_hf.tools.evaluation import (
    EvaluateArguments,
    PerImage,
    evaluate_model,
    load_data,
    measure_model,
    summarise,
)


SYNSETS = (INFO / "imagenet_synsets.txt").read_text().split()


def expected(logits, labels, classes=None):
    """The metrics image by image, of logits (N, K) and labels (N,) in whole numbers of the model."""
    logits = np.asarray(logits, np.float64)
    classes = list(range(logits.shape[1])) if classes is None else classes
    hits, hits5, losses, bins = [], [], [], [[] for _ in range(15)]
    for row, label in zip(logits, labels, strict=True):
        exponents = {c: np.exp(row[c] - max(row[d] for d in classes)) for c in classes}
        total = sum(exponents.values())
        ranked = sorted(classes, key=lambda c: -row[c])
        hits.append(ranked[0] == label)
        hits5.append(label in ranked[:5])
        losses.append(-np.log(exponents[label] / total))
        confidence = exponents[ranked[0]] / total
        number = next(n for n in range(15) if n / 15 < confidence <= (n + 1) / 15)
        bins[number].append((hits[-1], confidence))
    gaps = [abs(sum(h for h, _ in b) - sum(c for _, c in b)) for b in bins]
    means = {"top1": np.mean(hits), "top5": np.mean(hits5), "nll": np.mean(losses), "ece": sum(gaps) / len(hits)}
    return {"images": len(hits), **means}


def measured(logits, labels, **options):
    found = PerImage(**options)(torch.tensor(logits, dtype=torch.float32), torch.tensor(labels))
    return summarise(*(tensor.numpy() for tensor in found))


def test_metrics_equal_plain_arithmetic():
    generator = np.random.default_rng(0)
    logits = 3 * generator.normal(size=(200, 12))
    labels = np.where(generator.random(200) < 0.5, logits.argmax(1), generator.integers(0, 12, 200))
    assert measured(logits, labels) == pytest.approx(expected(logits, labels), rel=1e-5)
    counted = generator.random(200) < 0.7
    ignored = np.where(counted, labels, IGNORED_LABEL)
    assert measured(logits, ignored) == pytest.approx(expected(logits[counted], labels[counted]), rel=1e-5)


def test_calibration_error_by_hand():
    """Two images at 0.95, one of them right, and two at 0.62, both right: half of 0.45 and half of 0.38."""
    logits = np.log([[0.95, 0.05], [0.95, 0.05], [0.62, 0.38], [0.62, 0.38]])
    assert measured(logits, [0, 1, 0, 0])["ece"] == pytest.approx(0.415, rel=1e-5)
    neighbours = np.log([[0.9, 0.1], [0.95, 0.05]])  # 0.9 is in the bin that ends at 14/15
    assert measured(neighbours, [0, 1])["ece"] == pytest.approx((0.1 + 0.95) / 2, rel=1e-5)


def test_a_subset_chooses_among_its_classes_alone():
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(50, 30))
    logits[:, 29] += 10  # outside, and the largest
    classes, places = [3, 4, 7, 11, 12, 20, 25], [25, 3, 4, 20, 7, 11, 12]
    labels = generator.integers(0, 7, 50)
    found = measured(logits, labels, places=places, classes=classes)
    truth = [places[label] for label in labels]
    assert found == pytest.approx(expected(logits, truth, classes), rel=1e-5)
    assert found["top1"] > 0 == measured(logits, truth)["top1"]


def test_outputs_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite for 1 images"):
        measured([[0.0, 1.0], [float("nan"), 1.0]], [0, 1])


def test_classes_are_found_by_name():
    assert class_places(["n01443537", "n01440764"], "") == [1, 0]
    assert class_places(sorted(map(str, range(1000))), "")[:4] == [0, 1, 10, 100]
    assert class_places(["goldfish, Carassius auratus", "tench", "Cardigan, Cardigan Welsh corgi"], "") == [1, 0, 264]
    words = timm.data.ImageNetInfo().label_descriptions()
    words[517] = "crane2"  # as the data set on the Hub has it: ImageNet names two classes "crane"
    assert class_places(words, "") == list(range(1000))
    words[3], words[4] = words[4], words[3]
    assert class_places(words, "")[2:6] == [2, 4, 3, 5]
    with pytest.raises(ValueError, match=r"`x` has classes that are not ImageNet's: 'seven' \(1 of 2\)"):
        class_places(["tench", "seven"], "`x`")
    with pytest.raises(ValueError, match="not ImageNet's"):
        class_places([f"name {number}" for number in range(1000)], "`x`")


@pytest.mark.parametrize("letter", ["a", "r"])
def test_subsets_are_the_published_ones(letter):
    places = [int(place) for place in (INFO / f"imagenet_{letter}_indices.txt").read_text().split()]
    which = benchmark(f"imagenet-{letter}")
    assert which.classes == places and len(places) == 200
    with pytest.raises(ValueError, match="they may count either"):
        label_places(None, which)
    outside = next(name for place, name in enumerate(SYNSETS) if place not in places)
    with pytest.raises(ValueError, match=f"'{outside}' are none of them"):
        label_places([outside], which)


def test_models_with_other_classes_are_refused():
    def check(model):
        check_classes(model.name, model.labels, model.num_labels)

    with pytest.raises(ValueError, match="has 10 classes, but `benchmark` needs ImageNet's 1000"):
        check(small_student())
    student = small_student(num_classes=1000)
    check(student)
    student.labels = list(SYNSETS)
    check(student)
    student.labels[:2] = student.labels[1::-1]
    with pytest.raises(ValueError, match="another order: its class 0 is 'n01443537', which is usually 1"):
        check(student)


def imagenet_model():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet.r160_in1k", pretrained=False)
    with torch.no_grad():
        model.fc.weight.normal_(std=2.0)  # otherwise it says the same of every image
    return model


def make_images(folder, names):
    """A small PNG of its own for each name, a path below the folder."""
    generator = np.random.default_rng(7)
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = generator.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((48, 40)).save(file, format="PNG")
    return [folder / name for name in names]


def logits_of(model, files):
    """Image by image, with timm's own transform."""
    transform = create_transform(**resolve_data_config({}, model=model), is_training=False)
    with torch.no_grad():
        return torch.cat([model.eval()(transform(Image.open(file).convert("RGB"))[None]) for file in files]).numpy()


def arguments(**options):
    return EvaluateArguments(model="any", **options)


LAYOUTS = {  # folders, and the classes that they mean
    "imagenet-1k": {"n02123045": 281, "n01440764": 0, "n01443537": 1},
    "imagenet-v2": {"10": 10, "2": 2, "999": 999, "0": 0},
    "imagenet-a": {"n01498041": 6, "n12144580": 987, "n02077923": 150},
    "imagenet-r": {"n01443537": 1, "n02123045": 281, "n07920052": 967},
    "imagenet-sketch": {"n15075141": 999, "n01440764": 0},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_folders(name, tmp_path):
    """Every image counts, whatever words are in its name, and its folder says its class."""
    paths = [f"{folder}/{word}.png" for folder in LAYOUTS[name] for word in ("0.1_bullet train_0.8", "a_test 1", "x")]
    files = make_images(tmp_path / name, paths)
    for other in ("README.txt", f"{files[0].parent.name}/.DS_Store", f"{files[0].parent.name}/Thumbs.db"):
        (tmp_path / name / other).write_text("not an image")
    model = imagenet_model()
    truth = [LAYOUTS[name][file.parent.name] for file in files]
    classes = benchmark(name).classes
    assert classes is None or set(truth) <= set(classes)
    given = arguments(benchmark=name, dataset=str(tmp_path / name))
    found = evaluate_model(load_student(model), load_data(given), settings(tmp_path / "out"), name)
    assert found == pytest.approx(expected(logits_of(model, files), truth, classes), rel=1e-3, abs=1e-5)
    assert given.eval_split == "validation"


def real_files(tmp_path):
    names = [
        f"{SYNSETS[place]}/ILSVRC2012_val_{number:08d}.JPEG" for number, place in ((3, 0), (1, 7), (4, 2), (2, 5))
    ]
    files = make_images(tmp_path / "val", names)
    first = logits_of(imagenet_model(), files).argmax(1)  # of images 3, 1, 4, 2
    labels = [
        [int(first[1]), 5],
        [],
        [int(first[0]) - 1],
        [3, int(first[2])],
        [8],
    ]  # 1 right, 2 none, 3 wrong, 4 right
    (tmp_path / "real.json").write_text(json.dumps(labels))
    return files, labels


def test_real_labels_by_file_name(tmp_path):
    _, labels = real_files(tmp_path)
    given = arguments(benchmark="imagenet-real", dataset=str(tmp_path / "val"))
    student, config, data = load_student(imagenet_model()), settings(tmp_path / "out"), load_data(given)
    found = evaluate_model(student, data, config, "imagenet-real", str(tmp_path / "real.json"))
    assert found == {"images": 3, "top1": pytest.approx(2 / 3)}
    (tmp_path / "short.json").write_text(json.dumps(labels[:3]))
    with pytest.raises(ValueError, match="`real_labels` ends at image 3, but `dataset` has image 4"):
        evaluate_model(student, data, config, "imagenet-real", str(tmp_path / "short.json"))
    (tmp_path / "wrong.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="must be a JSON list"):
        evaluate_model(student, data, config, "imagenet-real", str(tmp_path / "wrong.json"))


def test_real_labels_by_order(tmp_path):
    """Images without names: the order says which is which, if all are there."""
    files, labels = real_files(tmp_path)
    ordered = sorted(files, key=lambda file: file.name)
    rows = {"image": [{"bytes": file.read_bytes(), "path": None} for file in ordered], "label": [0] * 4}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "four.json").write_text(json.dumps(labels[:4]))
    student, config = load_student(imagenet_model()), settings(tmp_path / "out")
    found = evaluate_model(student, data.to_iterable_dataset(), config, "imagenet-real", str(tmp_path / "four.json"))
    assert found == {"images": 3, "top1": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="nothing says which is which"):
        evaluate_model(student, data, config, "imagenet-real", str(tmp_path / "real.json"))


def test_timm_brings_the_real_labels():
    labels = json.loads((INFO / "imagenet_real_labels.json").read_text())
    assert read_real_labels(None) == labels and len(labels) == 50000


def digit_images(folder, count=30):
    """Digits as PNG files in folders of their classes, which are split in no way."""
    data = datasets.Dataset.from_parquet(str(DIGITS / "test-00000-of-00002.parquet")).select(range(count))
    names = data.features["label"].names
    files = []
    for number, row in enumerate(data):
        files.append(folder / names[row["label"]] / f"{number:02d}.png")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(files[-1])
    return files


def test_the_numbers_are_those_of_the_pipeline(tmp_path):
    """A teacher on a folder of the user's own, against transformers' pipeline on the same files."""
    files = digit_images(tmp_path / "digits", 60)
    files[7] = files[7].rename(files[7].with_name("a train 7.png"))  # a word that `datasets` takes for a split
    given = arguments(dataset=str(tmp_path / "digits"))
    found = evaluate_model(load_student(str(TEACHER), pretrained=True), load_data(given), settings(tmp_path / "out"))
    classify = pipeline("image-classification", model=str(TEACHER), top_k=10)
    names = [classify.model.config.id2label[place] for place in range(10)]
    scores = [{entry["label"]: entry["score"] for entry in answer} for answer in classify(list(map(str, files)))]
    logits = np.log([[row[name] for name in names] for row in scores])
    truth = [names.index(file.parent.name) for file in files]
    assert found == pytest.approx(expected(logits, truth), rel=1e-3, abs=1e-6)
    assert 0.9 < found["top1"] and given.eval_split == "validation"


@pytest.mark.parametrize("inside, split", [("", "validation"), ("test", "test")])
def test_folders_with_and_without_splits(inside, split, tmp_path):
    files = digit_images(tmp_path / "digits" / inside, 12)
    given = arguments(dataset=str(tmp_path / "digits"))
    data = load_data(given)
    assert (given.eval_split, len(data)) == (split, 12)
    assert data.features["label"].names == sorted({file.parent.name for file in files})


def evaluate_some(folder, rows):
    """On map-style data and a stream of as many rows; rank zero writes what came out."""
    files = [str(DIGITS / f"test-0000{number}-of-00002.parquet") for number in (0, 1)]
    data = datasets.Dataset.from_parquet(files, cache_dir=str(folder)).select(range(rows))
    stream = datasets.load_dataset("parquet", data_files=[f"{folder}/digits/*.parquet"], split="train", streaming=True)
    config = settings(folder, per_device_eval_batch_size=4)
    for kind, dataset in (("map", data), ("stream", stream)):
        torch.manual_seed(0)
        found = evaluate_model(small_student(), dataset, config)
        if config.process_index == 0:
            (folder / f"{kind}_{config.world_size}.json").write_text(json.dumps(found))


def test_one_process_and_two_count_every_image_once(tmp_path):
    rows = 23  # no multiple of the batch, nor of the processes
    files = [str(DIGITS / f"test-0000{number}-of-00002.parquet") for number in (0, 1)]
    data = datasets.Dataset.from_parquet(files, cache_dir=str(tmp_path)).select(range(rows))
    (tmp_path / "digits").mkdir()
    for part in range(2):
        data.shard(2, part, contiguous=True).to_parquet(tmp_path / "digits" / f"{part}.parquet")
    for processes in (1, 2):
        outcomes = in_processes(tmp_path / "log", evaluate_some, tmp_path, rows, processes=processes)
        assert all(outcome.status == 0 for outcome in outcomes), outcomes[-1].text
    found = [json.loads((tmp_path / f"{kind}_{n}.json").read_text()) for kind in ("map", "stream") for n in (1, 2)]
    for other in found:
        assert other == pytest.approx(found[0], rel=1e-5) and other["images"] == rows


def test_undecodable_images_do_not_count(tmp_path):
    files = digit_images(tmp_path / "digits", 30)
    files[5].write_bytes(b"not an image")
    found = evaluate_model(
        load_student(str(TEACHER), pretrained=True),
        load_data(arguments(dataset=str(tmp_path / "digits"))),
        settings(tmp_path / "out", max_bad_images=0.1),
    )
    assert found["images"] == 29


def test_data_that_cannot_be_evaluated_is_refused(tmp_path, digits):
    config, student = settings(tmp_path), small_student()

    def refused(message, data, **changes):
        with pytest.raises(ValueError, match=message):
            evaluate_model(student, data, settings(tmp_path, **changes) if changes else config)

    refused("no column 'label'", digits.remove_columns("label"))
    refused("`label_column` is 'none'", digits, label_column="none")
    refused("is empty", digits.select([]))
    bare = digits.cast_column("label", datasets.Value("int64"))
    refused("begins with -1", bare.remove_columns("label").add_column("label", [-1] * len(bare)))
    refused(
        "has 10 in row 0, but the model's classes are 0 to 9. Labels that begin at 1",
        bare.remove_columns("label").add_column("label", [10] * 96),
    )
    classes = datasets.ClassLabel(names=[f"{number} and more" for number in range(12)])
    refused("has 12 classes and the model 10", bare.cast_column("label", classes))


def test_arguments_that_cannot_be_meant_are_refused():
    for message, options in {
        "There is no data": {},
        "'imagenet-q' is not known; known: imagenet-1k": {"benchmark": "imagenet-q"},
        "both set": {"dataset": "a", "eval_files": "b"},
        "`real_labels` are for": {"dataset": "a", "real_labels": "real.json"},
    }.items():
        with pytest.raises(ValueError, match=message):
            arguments(**options)
    with pytest.raises(ValueError, match="no repository that is known"):
        load_data(arguments(benchmark="imagenet-a"))


@pytest.mark.parametrize("vit", [False, True])
def test_flops_are_twice_the_multiplications(vit, tmp_path):
    model = timm_vit() if vit else small_student().model
    student, total = load_student(model), 0

    def count(module, args, output):
        nonlocal total
        positions = output[0].numel() // output.shape[1 if isinstance(module, torch.nn.Conv2d) else -1]
        total += 2 * module.weight.numel() * positions

    hooks = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
    ]
    student.classify(torch.zeros(1, 3, *student.spec.size))
    for hook in hooks:
        hook.remove()
    if vit:
        tokens, depth, width = 17, 4, 24
        total += depth * 2 * 2 * tokens * tokens * width  # queries with keys, weights with values
    found = measure_model(student, settings(tmp_path, per_device_eval_batch_size=2))
    assert found["gflops"] == pytest.approx(total / 1e9, rel=1e-6)
    assert found["parameters"] == sum(tensor.numel() for tensor in model.parameters())


def test_speed_is_that_of_a_whole_batch(tmp_path):
    student = small_student()
    student.model.register_forward_hook(lambda *_: time.sleep(0.05))
    found = measure_model(student, settings(tmp_path, per_device_eval_batch_size=4))
    assert 20 < found["images_per_second"] < 80
    assert (found["batch_size"], found["device"], found["dtype"]) == (4, "1 CPU process", "float32")


def test_class_names_in_another_order_are_evaluated_by_name(tmp_path, digits, caplog):
    student = small_student(labels=list("0123456789"))
    bare = digits.cast_column("label", datasets.Value("int64"))
    reverse = bare.map(lambda row: {"label": 9 - row["label"]})
    same, other = (
        data.cast_column("label", datasets.ClassLabel(names=names))
        for data, names in ((bare, list("0123456789")), (reverse, list("9876543210")))
    )
    expected, found = (evaluate_model(student, data, settings(tmp_path)) for data in (same, other))
    assert found == pytest.approx(expected) and "in another order" in caplog.text
