"""Images that cannot be decoded: left out, counted, listed, and too many of them an error."""

import io
import itertools
import json
import os

import datasets
import numpy as np
import pytest
import torch
from helpers import settings, small_student, some_slow
from PIL import Image
from processes import in_processes

from scalekd_hf import ScaleKDTrainer
from scalekd_hf.data.bad_images import BadImages, TooManyBadImagesError, where
from scalekd_hf.data.sources import StreamReadError
from scalekd_hf.images import IGNORED_LABEL


ROWS = 30
BAD = {4: b"", 5: b"not an image", 17: None}  # by row; the last is cut short


def encoded(number):
    pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Thirty images in three shards, of which three cannot be decoded: two in a row, one at the end of its shard."""
    folder = tmp_path_factory.mktemp("bad")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    for shard, (start, stop) in enumerate(((0, 10), (10, 18), (18, ROWS))):
        contents = [BAD.get(row, encoded(row)) if row in BAD else encoded(row) for row in range(start, stop)]
        contents = [encoded(0)[:300] if content is None else content for content in contents]
        rows = {"image": [{"bytes": content, "path": None} for content in contents]}
        rows["label"] = [row % 10 for row in range(start, stop)]
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{shard}.parquet")
    return sorted(str(file) for file in folder.iterdir())


def trainer_for(folder, files, kind="stream", **changes):
    torch.manual_seed(0)
    data = datasets.load_dataset("parquet", data_files=files, split="train", streaming=kind == "stream")
    options = {"max_steps": 9, "per_device_train_batch_size": 10, "max_bad_images": 0.2, "shuffle_buffer_size": 4}
    args = settings(folder, **{**options, "per_device_eval_batch_size": 7, "save_steps": 1, **changes})
    return ScaleKDTrainer(small_student(), None, args, data, data)


def listed(folder):
    return [json.loads(line) for line in (folder / "bad_images.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["stream", "map"])
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_listed_once_with_their_place_and_training_goes_on(tmp_path, files, caplog, kind, workers):
    trainer = trainer_for(tmp_path, files, kind, dataloader_num_workers=workers)
    trainer.train()
    assert trainer.state.global_step == 9 and trainer.loss_log.images_seen == 90
    found = sorted(listed(tmp_path), key=lambda entry: entry["row"])
    assert [(entry["row"], entry["kind"]) for entry in found] == [(4, "empty"), (5, "not an image"), (17, "truncated")]
    if kind == "stream":
        assert [(entry["shard"], entry["shard_row"]) for entry in found] == [(0, 4), (0, 5), (1, 7)]
    assert trainer.feed.bad_images["training"].kinds == {
        "empty": 1,
        "not an image": 1,
        "truncated": 1,
    }  # in three passes
    assert "Undecodable images met in training: " in caplog.text and "bad_images.jsonl" in caplog.text
    shard = " (row 7 of shard 1)" if kind == "stream" else ""
    assert caplog.text.count(f"Left out of the training data: row 17{shard}. An image is truncated") == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_files_of_a_folder_are_named(tmp_path, caplog, streaming):
    for number in range(12):
        folder = tmp_path / "photos" / ("cat", "great tit")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02}.jpg").write_bytes(encoded(number) if number != 5 else b"")
    data = datasets.load_dataset("imagefolder", data_dir=tmp_path / "photos", split="train", streaming=streaming)
    args = settings(tmp_path / "run", max_steps=9, max_bad_images=0.1, save_strategy="no")
    trainer = ScaleKDTrainer(small_student(num_classes=2), None, args, data, data)
    trainer.train()
    trainer.evaluate()
    file = str(tmp_path / "photos" / "great tit" / "05.jpg")
    assert [(entry["data"], entry["file"]) for entry in listed(tmp_path / "run")] == [
        ("training", file),
        ("evaluation", file),
    ]
    assert caplog.text.count(f"Left out of the training data: {file}. An image is empty") == 1
    resumed = trainer.feed.bad_images["training"]
    again = BadImages(resumed.file, 0.1)
    again.add("training", [])
    assert again.kinds == resumed.kinds == {"empty": 1}


@pytest.mark.parametrize("kind", some_slow(["stream", "map"], 1))
def test_a_run_over_bad_images_resumes_exactly(tmp_path, files, kind):
    whole = trainer_for(tmp_path, files, kind, save_strategy="steps", per_device_train_batch_size=3)
    whole.train()
    for step in reversed(range(1, 9)):  # going back sets later ones aside
        resumed = trainer_for(tmp_path, files, kind, save_strategy="no", per_device_train_batch_size=3)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        for expected, actual in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
            assert torch.equal(expected, actual), step
    assert len(listed(tmp_path)) <= 3  # not again after each resume


@pytest.mark.parametrize("kind", ["stream", "map"])
def test_too_many_bad_images_stop_the_run_with_the_list_and_a_checkpoint(tmp_path, files, kind):
    trainer = trainer_for(tmp_path, files, kind, max_bad_images=0.05, max_steps=100, per_device_train_batch_size=2)
    with pytest.raises(TooManyBadImagesError, match=r"`max_bad_images` \(0.05\) of 30.*row \d+ \(.*bad_images.jsonl"):
        trainer.train()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert 0 < trainer.state.global_step < 100 and checkpoint.name == f"checkpoint-{trainer.state.global_step}"
    again = trainer_for(tmp_path, files, kind, max_bad_images=0.2, max_steps=20, per_device_train_batch_size=2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 20


@pytest.mark.parametrize("kind", ["stream", "map"])
def test_the_loss_of_an_evaluation_is_the_mean_over_the_good_images(tmp_path, files, kind):
    losses = []
    for batch in (1, 7, 30):  # by ones, a batch holds nothing but a bad image
        trainer = trainer_for(tmp_path, files, kind, per_device_eval_batch_size=batch)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5) and losses[0] > 0


def test_bad_images_in_an_evaluation_stop_the_run_with_a_checkpoint(tmp_path, files):
    trainer = trainer_for(tmp_path, files, max_bad_images=0.2, eval_strategy="steps", eval_steps=2)
    trainer.feed.bad_images["evaluation"].share = 0.01
    with pytest.raises(TooManyBadImagesError):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("fails", ["read", "count"])
def test_images_that_fail_one_process_in_an_evaluation_stop_all_with_a_checkpoint(tmp_path, files, fails):
    def evaluate_at_two():
        options = {"max_bad_images": 1.0, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
        trainer = trainer_for(tmp_path / "run", files, ddp_timeout=20, **options)
        if os.environ["RANK"] == "1" and fails == "count":
            trainer.feed.bad_images["evaluation"].share = 0.0
        if os.environ["RANK"] == "1" and fails == "read":
            trainer.get_eval_dataloader = lambda data, get=trainer.get_eval_dataloader: Breaking(get(data))
        trainer.train()

    outcomes = in_processes(tmp_path, evaluate_at_two, processes=2)
    assert [outcome.status for outcome in outcomes] == [75, 1], outcomes[0].text[-3000:] + outcomes[1].text[-3000:]
    assert {"read": "StreamReadError: gone", "count": "TooManyBadImagesError"}[fails] in outcomes[1].text
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-2" and (checkpoint / "rng_state_1.pth").exists()


class Breaking:
    """A loader whose third batch cannot be read."""

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        yield from itertools.islice(self.loader, 2)
        raise StreamReadError("gone")


def test_data_without_one_good_image_is_an_error(tmp_path, files):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    rows = {"image": [{"bytes": b"no", "path": None}] * 8, "label": [0] * 8}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "bad.parquet")
    trainer = trainer_for(tmp_path / "run", [str(tmp_path / "bad.parquet")], max_bad_images=1.0)
    with pytest.raises(TooManyBadImagesError, match=r"images cannot be decoded.*not an image"):
        trainer.train()


@pytest.mark.parametrize("kind", ["stream", "map"])
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_do_not_count_in_an_evaluation(tmp_path, files, kind, workers):
    trainer = trainer_for(tmp_path, files, kind, dataloader_num_workers=workers)
    predicted = trainer.predict(trainer.eval_dataset)
    assert [row for row, label in enumerate(predicted.label_ids) if label == IGNORED_LABEL] == sorted(BAD)
    assert len(predicted.label_ids) == ROWS
    good = [row for row in range(ROWS) if row not in BAD]
    hits = predicted.predictions[good] == predicted.label_ids[good][:, None]
    assert predicted.metrics["test_top1"] == pytest.approx(hits[:, 0].mean())
    assert sorted(entry["row"] for entry in listed(tmp_path)) == sorted(BAD)
    trainer.feed.bad_images["evaluation"].share = 0.01
    with pytest.raises(TooManyBadImagesError):
        trainer.evaluate()


def test_a_name_that_is_no_file_does_not_hide_the_row():
    entry = {"row": 12, "shard": 1, "shard_row": 2, "file": "image.png"}
    assert where(entry) == "row 12 (row 2 of shard 1), image.png"
    assert where({"row": 3, "file": "https://x.org/3.jpg"}) == "https://x.org/3.jpg"


def test_none_is_forgotten_where_two_passes_mingle(tmp_path):
    bad = BadImages(tmp_path / "bad.jsonl", share=0.05)
    for row in range(6):  # the readers of two workers, of which one is in the next pass already
        for number in (0, 1):
            bad.add("training", [{"row": row, "pass": number, "kind": "truncated", "reason": "it ends"}])
    with pytest.raises(TooManyBadImagesError, match="6 images cannot be decoded"):
        bad.check(images=100, processes=1)
    bad.add("training", [{"row": 7, "pass": 3, "kind": "truncated", "reason": "it ends"}])
    bad.check(images=100, processes=1)  # those passes have ended


@pytest.mark.parametrize("kind", ["stream", "map"])
@pytest.mark.parametrize("task_loss", ["cross_entropy", "binary_cross_entropy"])
def test_soft_labels_of_undecodable_images_do_not_count(tmp_path, kind, task_loss):
    soft = torch.rand(12, 10, generator=torch.Generator().manual_seed(0)).mul(3).softmax(1).tolist()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Sequence(datasets.Value("float32"))})
    losses = []
    for name, bad in (("whole", ()), ("bad", (1, 7, 8))):
        contents = [b"no image" if row in bad else encoded(row) for row in range(12)]
        good = [row for row in range(12) if bad or row not in (1, 7, 8)]
        rows = {"image": [{"bytes": contents[row], "path": None} for row in good], "label": [soft[r] for r in good]}
        file = tmp_path / f"{name}.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
        data = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=kind == "stream")
        torch.manual_seed(0)
        args = settings(tmp_path / name, task_loss=task_loss, max_bad_images=0.5, per_device_eval_batch_size=5)
        losses.append(ScaleKDTrainer(small_student(), None, args, eval_dataset=data).evaluate())
    for metric in ("eval_loss", "eval_top1"):
        assert losses[0][metric] == pytest.approx(losses[1][metric], rel=1e-5), metric


@pytest.mark.parametrize(
    ("share", "images", "processes", "allowed"), [(0.1, 30, 1, 3), (0.1, 60, 2, 3), (0.01, 30, 1, 1), (0.0, 30, 1, 0)]
)
def test_just_as_many_as_are_allowed_do_not_stop_a_run(tmp_path, share, images, processes, allowed):
    bad = BadImages(tmp_path / "bad_images.jsonl", share)
    entries = [{"row": row, "kind": "empty", "reason": "", "pass": 0} for row in range(allowed + 1)]
    bad.add("train", entries[:allowed])
    bad.check(images, processes)
    bad.add("train", entries[allowed:])
    with pytest.raises(TooManyBadImagesError):
        bad.check(images, processes)


def test_a_list_that_cannot_be_written_ends_no_run_and_its_images_count(tmp_path, caplog):
    (tmp_path / "full").touch()
    bad = BadImages(tmp_path / "full" / "bad_images.jsonl", 0.0)
    bad.add("train", [{"row": 0, "kind": "empty", "reason": "", "pass": 0}])
    assert bad.summary() == "empty: 1" and "lacks an image" in caplog.text
    with pytest.raises(TooManyBadImagesError):
        bad.check(30, 1)
