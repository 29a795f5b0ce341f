"""A run does not go on with other data than it was stopped in, without a word."""

import io
import json
import tarfile

import datasets
import numpy as np
import pytest
from helpers import RangeServer, settings, small_student, some_slow
from PIL import Image

from scalekd_hf import ScaleKDTrainer
from scalekd_hf.borrowed.datasets import files_beneath
from scalekd_hf.data.content import of_rows, of_stream
from scalekd_hf.data.dataset import prepare_dataset
from scalekd_hf.data.loading import DataArguments, load_data
from scalekd_hf.data.preparation import Preparation
from scalekd_hf.images import ImageSpec
from scalekd_hf.manifest import seal
from scalekd_hf.training.position import RUN_STATE_FILE


def picture(seed):
    saved = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels[:16] if seed == 99 else pixels).save(saved, "BMP")
    return saved.getvalue()


class Parquet:
    streaming, arguments, columns = True, {"train_files": "*.parquet"}, {}

    def write(self, folder, part, seeds):
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["class0", "class1", "class2"])}
        )
        rows = {"image": [{"bytes": picture(seed), "path": None} for seed in seeds]}
        rows["label"] = [row % 3 for row in range(len(seeds))]
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{part}.parquet")


class Table(Parquet):
    streaming = False


class Tar:
    streaming, arguments = True, {"train_files": "*.tar"}
    columns = {"image_column": "bmp", "label_column": "cls"}

    def write(self, folder, part, seeds):
        with tarfile.open(folder / f"{part}.tar", "w") as tar:
            for row, seed in enumerate(seeds):
                for ending, content in (("bmp", picture(seed)), ("cls", str(row % 3).encode())):
                    entry = tarfile.TarInfo(f"{row:03}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


class Folder:
    streaming, arguments, columns = True, {"dataset": ""}, {}

    def write(self, folder, part, seeds):
        (folder / f"class{part % 3}").mkdir(exist_ok=True)
        for row, seed in enumerate(seeds):
            (folder / f"class{part % 3}" / f"{part}-{row:03}.bmp").write_bytes(picture(seed))


KINDS = [Parquet, Table, Tar, Folder]


def last_file(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())[-1]


CHANGES = {  # with the same number of files and images where that can be
    "other images": lambda kind, folder: kind.write(folder, 1, range(90, 98)),
    "one image": lambda kind, folder: kind.write(folder, 1, [8, 9, 10, 99, 12, 13, 14, 15]),
    "a file more": lambda kind, folder: kind.write(folder, 3, range(8)),
    "a file less": lambda kind, folder: files(folder)[-1].unlink(),
    "another order": lambda kind, folder: files(folder)[-1].rename(files(folder)[-1].with_stem("0-")),
    "a file cut": lambda kind, folder: files(folder)[-1].write_bytes(files(folder)[-1].read_bytes()[:-600]),
}


def files(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())


def data_of(kind, folder):
    arguments = {name: str(folder / value) for name, value in kind.arguments.items()}
    return load_data(DataArguments(**arguments, streaming=kind.streaming, eval_split="none"))[0]


def content_of(kind, folder):
    columns = {"image_column": "image", "label_column": "label", **kind.columns}
    return prepare_dataset(
        data_of(kind, folder), "train_dataset", Preparation(ImageSpec(), True, **columns)
    ).source.content


def written(kind, folder):
    folder.mkdir(parents=True)
    for part in range(3):
        kind.write(folder, part, range(8 * part, 8 * part + 8))
    return folder


KINDS = [Parquet(), Table(), Tar(), Folder()]


@pytest.mark.parametrize("kind", KINDS)
def test_what_data_hold_is_the_same_anywhere_and_another_where_a_file_has_changed(tmp_path, kind):
    known = content_of(kind, written(kind, tmp_path / "here"))
    assert known == content_of(kind, written(kind, tmp_path / "there" / "and later"))
    for name, change in CHANGES.items():
        change(kind, written(kind, tmp_path / name))
        try:
            assert content_of(kind, tmp_path / name) != known, name
        except ValueError as error:
            assert name == "a file cut" and "cannot be read" in str(error)


def test_what_a_user_has_made_of_a_stream_is_known_by_its_files(tmp_path):
    kind, folders = KINDS[0], [written(KINDS[0], tmp_path / name) for name in ("here", "there", "other")]
    kind.write(folders[2], 1, range(90, 98))
    streams = [data_of(kind, folder) for folder in folders]
    made = [
        lambda s: s.map(lambda row: row),
        lambda s: s.filter(lambda row: row["label"] < 2).take(9),
        lambda s: s.shuffle(3),
    ]
    for change in [*made, lambda s: datasets.concatenate_datasets([s, s.skip(3)])]:
        one, same, other = (of_stream(change(stream)) for stream in streams)
        assert one == same != other
    assert not files_beneath(datasets.IterableDataset.from_generator(lambda: iter([{"image": 1}])))


def test_rows_are_known_however_they_are_stored_and_others_of_their_table_are_not_taken_for_them(tmp_path):
    folder = written(KINDS[1], tmp_path / "here")
    rows = datasets.load_dataset("parquet", data_files=sorted(str(file) for file in folder.iterdir()), split="train")
    rows.save_to_disk(tmp_path / "stored", num_shards=2)
    known = of_rows(rows, "image")
    seen = rows.with_transform(lambda batch: {"image": [np.random.default_rng().random(3)] * len(batch["image"])})
    for same in (
        datasets.load_from_disk(tmp_path / "stored"),
        seen,
        rows.select(range(len(rows))),
        rows.flatten_indices(),
    ):
        assert of_rows(same, "image") == known
    halves = [rows.select(range(12)), rows.select(range(12, 24)), rows.shuffle(seed=0).select(range(12))]
    assert len({of_rows(half, "image") for half in halves}) == 3
    assert of_rows(halves[2].flatten_indices(), "image") == of_rows(halves[2], "image")


@pytest.mark.parametrize("kind", some_slow(KINDS, 1))
def test_a_run_is_not_resumed_on_other_data(tmp_path, kind):
    folder, out = written(kind, tmp_path / "data"), tmp_path / "run"

    def trainer_for(steps, **changes):
        options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 1, **kind.columns}
        student = small_student(labels=["class0", "class1", "class2"], num_classes=3)
        return ScaleKDTrainer(student, None, settings(out, **options, **changes), data_of(kind, folder))

    trainer_for(1).train()
    CHANGES["other images"](kind, folder)
    with pytest.raises(ValueError, match=r"written with other settings of the data: content \w{16} to \w{16}\."):
        trainer_for(2).train(resume_from_checkpoint=True)
    trainer_for(2, allow_data_mismatch=True).train(resume_from_checkpoint=True)
    file = out / "checkpoint-2" / RUN_STATE_FILE
    state = json.loads(file.read_text())
    del state["data"]["content"]  # as in checkpoints of before
    file.write_text(json.dumps(state))
    seal(file.parent)
    again = trainer_for(3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3


def test_a_stream_of_the_hub_that_has_had_another_commit_is_refused_with_the_former_one(tmp_path):
    file, out = written(KINDS[0], tmp_path / "data") / "0.parquet", tmp_path / "run"
    commits = ["a" * 40, "b" * 40]

    def train(server, commit, steps, **changes):
        place = f"{server.url}/datasets/me/photos@{commit}/0.parquet"
        data = datasets.load_dataset("parquet", data_files=place, split="train", streaming=True)
        options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 1}
        student = small_student(labels=["class0", "class1", "class2"], num_classes=3)
        trainer = ScaleKDTrainer(student, None, settings(out, **options, **changes), data)
        return trainer.train(resume_from_checkpoint=steps > 1).global_step

    with RangeServer({f"/datasets/me/photos@{commit}/0.parquet": file.read_bytes() for commit in commits}) as server:
        train(server, commits[0], 1)
        with pytest.raises(
            ValueError, match=rf"(?s)commit {commits[0]} to {commits[1]}.*revision='{commits[0]}'` reads"
        ):
            train(server, commits[1], 2)
        assert train(server, commits[0], 2) == 2
        assert train(server, commits[1], 3, allow_data_mismatch=True) == 3
