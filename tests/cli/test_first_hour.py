"""A newcomer's hour, played in short from the wheel, and the notebook."""

import json
import os
from pathlib import Path

import pytest
from helpers import ROOT, run


CIFAR10 = Path(os.environ.get("SCALEKD_CIFAR10", ROOT.parent / "shared" / "data" / "cifar10"))
NOTEBOOK = ROOT / "notebooks" / "first_student.ipynb"


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10's images, which the photos are made from, are not here")
def test_the_first_hour_from_the_wheel(tmp_path):
    words = ["benchmarks/first_hour.py", CIFAR10 / "train-00000-*.parquet", "--short", "--folder", tmp_path]
    finished = run("python", *words, timeout=600)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    hour = json.loads((tmp_path / "hour.json").read_text())
    assert set(hour["results"]) == {"teacher", "student alone", "student distilled"} and hour["same again"]
    assert [file.rpartition("photos/")[2] for file in hour["bad images"]] == ["dog/empty.jpg"]
    assert 80 <= hour["evaluated"]["images"] <= 160
    assert hour["evaluated"]["top1"] == pytest.approx(hour["results"]["student distilled"]["top1"])
    assert hour["seconds"]["scalekd --help"] < 2


@pytest.mark.slow
def test_the_notebook_runs_and_draws(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    pictures = [pictures_of(cell) for cell in notebook.cells]
    for cell in notebook.cells:
        cell.source = cell.source.replace("max_steps=400", "max_steps=4")
    for _ in range(2):  # who has changed a value runs it again
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert sum(pictures) == 2 and [pictures_of(cell) for cell in notebook.cells] == pictures


def pictures_of(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
