"""k-NN and linear probe: against plain arithmetic and scikit-learn, and as `scalekd evaluate` has them."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DIGITS, TEACHER, settings, small_student, timm_vit
from processes import in_processes

from scalekd_hf import load_student
from scalekd_hf.cli.main import main
from scalekd_hf.models.saving import save_student
from scalekd_hf.tools.evaluation import EvaluateArguments
from scalekd_hf.tools.probing import evaluate_features, extract_features, features_of, load_known_images, probe
from scalekd_hf.training.probes import (
    WEIGHT_DECAYS,
    choose_weight_decay,
    fit_linear,
    nearest_neighbours,
    scores,
)


TEST = str(DIGITS / "test-*.parquet")


def blobs(count, classes=5, channels=12, spread=1.5, seed=0):
    """Features (N, C) around a centre for each class, and class indices (N,)."""
    centres = torch.randn(classes, channels, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + spread * torch.randn(count, channels, generator=generator), labels


def voted(bank, labels, query, classes, left_out=None):
    """The class that the 20 nearest vote for, in float64."""
    bank, query = (x.double().numpy() for x in (bank, query))
    cosines = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
    if left_out is not None:
        cosines[left_out] = -np.inf
    votes = np.zeros(classes)
    for place in np.argsort(-cosines)[:20]:
        votes[labels[place]] += np.exp(cosines[place] / 0.07)
    return votes.argmax()


def test_neighbours_vote_as_dinos_do(monkeypatch):
    monkeypatch.setattr("scalekd_hf.training.probes.QUERIES", 7)  # in several parts
    (bank, labels), (queries, _) = blobs(90), blobs(40, seed=1)
    found = nearest_neighbours(bank, labels, queries, 5)
    assert found.tolist() == [voted(bank, labels, query, 5) for query in queries]
    alone = nearest_neighbours(bank, labels, bank, 5, leave_one_out=True)
    assert alone.tolist() == [voted(bank, labels, query, 5, place) for place, query in enumerate(bank)]
    assert alone.tolist() != nearest_neighbours(bank, labels, bank, 5).tolist()
    few = nearest_neighbours(bank[:3], labels[:3], queries, 5)  # fewer than 20
    assert few.tolist() == [voted(bank[:3], labels[:3], query, 5) for query in queries]


@pytest.mark.parametrize("weight_decay", [0.1, 1e-3])
def test_the_linear_probe_is_the_least_of_its_loss(monkeypatch, weight_decay):
    monkeypatch.setattr("scalekd_hf.training.probes.ROWS", 50)  # in several parts
    features, labels = blobs(160)
    solution = fit_linear(features, labels, 5, weight_decay).double().requires_grad_(True)
    loss = F.cross_entropy(scores(solution, features.double()), labels)
    loss = loss + weight_decay / 2 * solution[:-1].square().sum()
    (gradient,) = torch.autograd.grad(loss, solution)
    assert gradient.abs().max() < 2e-5


@pytest.mark.parametrize("weight_decay", [0.1, 1e-3])
def test_both_agree_with_scikit_learn(weight_decay):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    (known, labels), (queries, _) = blobs(300), blobs(200, seed=1)
    regression = LogisticRegression(C=1 / (len(known) * weight_decay), max_iter=10_000, tol=1e-8)
    expected = regression.fit(known.double().numpy(), labels).predict_proba(queries.double().numpy())
    found = scores(fit_linear(known, labels, 5, weight_decay), queries).softmax(1).numpy()
    assert abs(found - expected).max() < 1e-3
    votes = {"metric": "cosine", "algorithm": "brute", "weights": lambda distances: np.exp((1 - distances) / 0.07)}
    neighbours = KNeighborsClassifier(20, **votes).fit(known.double().numpy(), labels)
    expected = neighbours.predict(queries.double().numpy())
    assert nearest_neighbours(known, labels, queries, 5).tolist() == expected.tolist()


def test_the_weight_decay_is_chosen_on_images_that_are_known():
    hard = choose_weight_decay(*blobs(60, channels=200, spread=6), 5)
    easy = choose_weight_decay(*blobs(400, spread=0.01), 5)
    assert easy == WEIGHT_DECAYS[0]  # all of them are right: the largest
    assert hard in WEIGHT_DECAYS
    known, asked = blobs(200), blobs(100, seed=1)
    found = probe(known, asked, torch.device("cpu"))
    far = [(features, 10**9 + 3 * labels) for features, labels in (known, asked)]  # any numbers
    assert probe(*far, torch.device("cpu")) == found
    assert found["weight_decay"] == probe(known, (asked[0], asked[1].flip(0)), torch.device("cpu"))["weight_decay"]
    assert (found["images"], found["train_images"]) == (100, 200) and found["knn_top1"] > 0.6


def test_constant_features_and_their_scale_do_not_matter():
    known, asked = blobs(200), blobs(100, seed=1)
    first = probe(known, asked, torch.device("cpu"))
    scale = torch.logspace(-3, 3, 12)
    scaled = [(torch.cat([x * scale, torch.ones(len(x), 1)], 1), labels) for x, labels in (known, asked)]
    scaled[1][0][:, -1] = 1e4  # constant where it is known
    assert probe(*scaled, torch.device("cpu"))["linear_top1"] == pytest.approx(first["linear_top1"], abs=0.011)


@pytest.fixture
def parts():
    files = {
        part: str(DIGITS / f"{part}-00000-of-0000{2 if part == 'test' else 4}.parquet") for part in ("train", "test")
    }
    return [datasets.Dataset.from_parquet(file).select(range(60)) for file in files.values()]


def test_features_are_of_each_image_once_in_order(tmp_path, parts):
    config, student = settings(tmp_path, per_device_eval_batch_size=25), features_of(small_student(), "map")
    mapped, streamed = (extract_features(student, rows, config) for rows in (parts[0], parts[0].to_iterable_dataset()))
    assert mapped[1].tolist() == streamed[1].tolist() == parts[0]["label"]
    assert mapped[0].shape == (60, student.dims[1]) and torch.allclose(mapped[0], streamed[0], atol=1e-6)
    with pytest.raises(ValueError, match="have no column 'label'"):
        extract_features(student, parts[0].remove_columns("label"), config)


def test_a_classifier_is_probed_before_its_classifier(tmp_path, parts):
    student, config = load_student(str(TEACHER), pretrained=True), settings(tmp_path)
    found = evaluate_features(features_of(student, "map"), *parts, config)
    assert found["features"] == "mean of norm" and found["knn_top1"] > 0.8 and found["linear_top1"] > 0.8
    student = load_student(str(TEACHER), pretrained=True)
    with pytest.raises(ValueError, match="`pooling` is 'model'.*has a classifier"):
        features_of(student, "model")


def test_the_models_own_features_are_the_class_token_of_a_vit(tmp_path, parts):
    vit = timm_vit(num_classes=0)
    known, _ = extract_features(features_of(load_student(vit), "model"), parts[0], settings(tmp_path))
    mean, _ = extract_features(features_of(load_student(vit), "map"), parts[0], settings(tmp_path))
    student = load_student(vit).eval()
    penultimate, last, _ = student(torch.zeros(1, 3, 32, 32))
    assert known.shape == mean.shape == (60, last.shape[1]) and not torch.allclose(known, mean, atol=1e-3)


def test_labels_of_two_data_sets_are_matched_by_name(tmp_path, parts):
    student = features_of(load_student(str(TEACHER), pretrained=True), "map")
    same = evaluate_features(student, *parts, settings(tmp_path))
    names = parts[1].features["label"].names[::-1]
    renamed = parts[1].map(lambda row: {"label": 9 - row["label"]})
    renamed = renamed.cast_column("label", datasets.ClassLabel(names=names))
    assert evaluate_features(student, parts[0], renamed, settings(tmp_path)) == same
    others = parts[1].cast_column("label", datasets.ClassLabel(names=[f"other {number}" for number in range(10)]))
    with pytest.raises(ValueError, match="`eval_dataset` has other classes"):
        evaluate_features(student, parts[0], others, settings(tmp_path))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"eval_files": TEST}, "`train_files` are missing: k-NN"),
        ({"eval_files": TEST, "train_files": TEST}, "these are the images to be classified, too"),
        ({"dataset": str(DIGITS), "eval_split": "train"}, "`train_split` is 'train': these are the images"),
        ({"dataset": str(DIGITS), "eval_split": "train[:10%]"}, "`train_split` is 'train': these are the images"),
        ({"dataset": str(DIGITS), "train_split": "train+test", "eval_split": "test"}, "these are the images"),
        ({"eval_files": TEST, "train_files": str(DIGITS / "*.parquet")}, "these are the images to be classified, too"),
    ],
)
def test_images_that_are_to_be_classified_are_not_known(given, message):
    with pytest.raises(ValueError, match=message):
        load_known_images(EvaluateArguments(model="x", **given))


def test_a_share_is_held_out_of_the_files(tmp_path):
    rows = load_known_images(EvaluateArguments(model="x", eval_files=TEST, eval_split="0.3", streaming=False))
    assert 150 < len(rows) < 330


def test_the_command_measures_a_backbone(tmp_path, capsys):
    folder = tmp_path / "backbone"
    save_student(small_student(num_classes=0), folder)
    (folder / "README.md").write_text("---\nlibrary_name: timm\n---\n# A backbone\n")
    train = str(DIGITS / "train-00001-of-00004.parquet")
    words = ["--train_files", train, "--eval_files", TEST, "--use_cpu", "--output_dir", str(tmp_path / "out")]
    words += ["--disable_tqdm", "true", "--per_device_eval_batch_size", "64"]
    main(["evaluate", str(folder), *words, "--update_card"])
    said = capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (row["images"], row["train_images"], row["known"]) == (360, 359, "train-00001-of-00004.parquet")
    assert "top1" not in row and 0.2 < row["knn_top1"] <= 1 and 0.2 < row["linear_top1"] <= 1
    assert f"{row['knn_top1']:.2%}" in said and "top-1" not in said and "NLL" not in said
    text = (tmp_path / "out" / "evaluation.md").read_text()
    assert "k-NN (k = 20" in text and "features: mean of" in text
    card = (folder / "README.md").read_text()
    assert f"{row['linear_top1']:.2%}" in card and "name: k-NN top-1" in card
    shutil.copytree(TEACHER, tmp_path / "teacher")
    main(["evaluate", str(tmp_path / "teacher"), *words])
    main(["evaluate", str(tmp_path / "teacher"), *words, "--probe", "true"])
    rows = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [("top1" in row, "knn_top1" in row) for row in rows] == [(False, True), (True, False), (False, True)]
    with pytest.raises(SystemExit):
        data = ["--dataset", str(DIGITS), "--eval_split", "test"]
        main(["evaluate", str(folder), "--benchmark", "imagenet-1k", *data, *words[4:]])
    assert "`benchmark` 'imagenet-1k' is for classifiers" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_measure_the_same(tmp_path, parts):
    def measure():
        config = settings(tmp_path, per_device_eval_batch_size=7)
        student = features_of(load_student(str(TEACHER), pretrained=True), "map")
        found = evaluate_features(student, *(part.to_iterable_dataset() for part in parts), config)
        if config.process_index == 0:
            (tmp_path / f"{config.world_size}.json").write_text(json.dumps(found))

    for processes in (1, 2):
        for outcome in in_processes(tmp_path, measure, processes=processes):
            assert outcome.status == 0, outcome.text[-3000:]
    one, two = (json.loads((tmp_path / f"{processes}.json").read_text()) for processes in (1, 2))
    assert one == two and one["images"] == 60
