"""Data and runs that several files of tests share."""

import datasets
import numpy as np
import pytest
from PIL import Image
from processes import in_processes


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    generator = np.random.default_rng(0)
    for shard, rows in enumerate((6, 13, 9)):
        images = [Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(rows)]
        data = {"image": images, "label": [row % 10 for row in range(rows)]}
        datasets.Dataset.from_dict(data, features=features).to_parquet(folder / f"{shard}.parquet", batch_size=4)
    return sorted(str(file) for file in folder.iterdir())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in one process, on digits in the order of a data set in memory."""
    from launched_runs import train  # which needs DeepSpeed

    folder = tmp_path_factory.mktemp("alone")
    (outcome,) = in_processes(folder, train, folder, "ddp", 8)
    assert outcome.status == 0, outcome.text[-3000:]
    return folder
