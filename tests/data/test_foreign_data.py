"""Nothing that comes with a data set is executed, and nothing of an archive is written."""

import io
import os
import pickle
import shutil
import stat
import subprocess
import tarfile

import datasets
import pytest
import torch
from foreign import Payload, works, yaml_payload
from helpers import DIGITS, settings, small_student
from PIL import EpsImagePlugin, Image
from test_stream import encoded, labels, steps_of

from scalekd_hf import ScaleKDTrainer
from scalekd_hf.data.decoding import BadImageError, open_image
from scalekd_hf.data.formats import image_endings
from scalekd_hf.data.loading import DataArguments, load_data
from scalekd_hf.data.sources import StreamReadError


def archive(file, beside=(), name="{:03}", links=(), images=5):
    """A WebDataset archive; `beside` are more files of each image, by their ending."""
    with tarfile.open(file, "w") as tar:
        for number in range(images):
            own = beside(number) if callable(beside) else beside
            for ending, content in (("jpg", encoded(number)), ("cls", str(number).encode()), *own):
                entry = tarfile.TarInfo(f"{name.format(number)}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        for number, (kind, target) in enumerate(links):
            entry = tarfile.TarInfo(f"9{number}.jpg")
            entry.type, entry.linkname = kind, target
            tar.addfile(entry)
    return str(file)


def training_data(**arguments):
    return load_data(DataArguments(**arguments, eval_split="none"))[0]


@pytest.mark.parametrize("streaming", [True, False])
def test_pickles_in_archives_are_not_executed(tmp_path, streaming):
    mark, saved = tmp_path / "mark", io.BytesIO()
    assert works(mark)
    torch.save(Payload(mark), saved)
    for ending in ("pkl", "pickle", "pyd"):  # bytes that nobody asks for
        file = archive(tmp_path / f"{ending}.tar", [(ending, pickle.dumps(Payload(mark)))])
        assert len(list(training_data(train_files=file, streaming=streaming))) == 5
    for ending in ("pth", "npy"):
        content = saved.getvalue() if ending == "pth" else b"\x93NUMPY\x01\x00v\x00" + pickle.dumps(Payload(mark))
        file = archive(tmp_path / f"{ending}.tar", [(ending, content)])
        with pytest.raises(ValueError, match=f"{ending}.tar' cannot be loaded: "):
            training_data(train_files=file, streaming=streaming)
    good = io.BytesIO()
    torch.save(torch.zeros(2), good)

    def late(number):  # after those that `datasets` looks at
        return [("pth", (saved if number == 8 else good).getvalue())]

    file = archive(tmp_path / "late.tar", late, images=9)
    with pytest.raises((ValueError, StreamReadError), match="a pickle of more than tensors, which could run code"):
        steps_of(training_data(train_files=file, streaming=streaming), 5, image_column="jpg", label_column="cls")
    assert not mark.exists()


@pytest.mark.parametrize("streaming", [True, False])
def test_archives_write_nothing_wherever_their_names_and_links_point(tmp_path, streaming, monkeypatch):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(encoded(7))
    links = [(tarfile.SYMTYPE, str(secret)), (tarfile.LNKTYPE, str(secret)), (tarfile.SYMTYPE, "../../secret.jpg")]
    kept = sorted(tmp_path.rglob("*"))
    for number, name in enumerate(("../../{:03}", f"{tmp_path}/there/{{:03}}", "{:03}")):
        file = archive(folder / f"{number}.tar", name=name, links=links if number == 2 else ())
        data = training_data(train_files=file, streaming=streaming, cache_dir=str(tmp_path / "cache"))
        found = labels(steps_of(data, 5, batch_size=1, image_column="jpg", label_column="cls"))
        assert sorted(found) == list(range(5))  # no link is read
    written = {path for path in tmp_path.rglob("*") if tmp_path / "cache" not in (path, *path.parents)}
    assert written == {*kept, *(folder / f"{number}.tar" for number in range(3))}


def test_code_and_tags_of_a_folder_of_data_are_not_executed(tmp_path):
    mark, folder = tmp_path / "mark", tmp_path / "theirs"
    folder.mkdir()
    (folder / "theirs.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    for dataset in (folder, folder / "theirs.py"):
        with pytest.raises(ValueError, match="theirs.*Code that comes with a data set is never run"):
            training_data(dataset=str(dataset))
    (folder / "theirs.py").unlink()
    shutil.copy(DIGITS / "train-00000-of-00004.parquet", folder)
    (folder / "README.md").write_text(f"---\nlicense: {yaml_payload(mark)}\n---\n")
    with pytest.raises(ValueError, match=r"theirs'.* cannot be loaded: ConstructorError"):
        training_data(dataset=str(folder))
    (folder / "README.md").unlink()
    (folder / "train-00000-of-00004.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"train-00000-of-00004.parquet' cannot be read"):
        training_data(train_files=str(folder / "*.parquet"))
    assert not mark.exists()


def test_postscript_is_a_program_and_no_image(tmp_path, monkeypatch):
    mark, saved = tmp_path / "mark", io.BytesIO()
    (tmp_path / "gs").write_text(f"#!/bin/sh\nmkdir -p '{mark}'\n")
    (tmp_path / "gs").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    Image.new("RGB", (32, 32)).save(saved, "EPS")
    with pytest.raises((OSError, subprocess.CalledProcessError)):
        Image.open(io.BytesIO(saved.getvalue())).load()
    mark.rmdir()  # so Pillow runs it
    for value in (saved.getvalue(), {"bytes": saved.getvalue(), "path": "a.jpg"}, Image.open(saved)):
        with pytest.raises(BadImageError):
            open_image(value)
    assert not image_endings() & {".eps", ".ps"} and ".png" in image_endings()
    images = [{"bytes": content, "path": None} for content in [encoded(0)] * 7 + [saved.getvalue()]]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    data = datasets.Dataset.from_dict({"image": images, "label": list(range(8))}, features=features)
    options = {"max_steps": 1, "max_bad_images": 0.5}
    ScaleKDTrainer(small_student(), None, settings(tmp_path / "run", **options), data).train()
    assert (tmp_path / "run" / "bad_images.jsonl").read_text().count('"row": 7') == 1
    assert not mark.exists()
