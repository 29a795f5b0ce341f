"""Small real models and data that the tests share. Libraries are imported where they are used: xdist's controller needs none."""

import gc
import os
import socket
from pathlib import Path

import pytest
from deprecations import HEARD


with socket.socket() as opened:
    opened.bind(("127.0.0.1", 0))
    HUB_PORT = opened.getsockname()[1]
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{HUB_PORT}"  # where `hub` serves; read when the client is imported
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
os.environ["OMP_NUM_THREADS"] = "1"  # small models: threads that wait for each other cost more than they give
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

os.chdir(Path(__file__).parents[1])  # recipes name their data from there


def pytest_collection_finish(session):
    """Each training run collects garbage, which takes a third of a second with all modules in the heap: they stay."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread_and_no_bars():
    import datasets
    import torch

    datasets.disable_progress_bars()
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_that_is_to_go():
    yield
    HEARD.check()


@pytest.fixture
def device(request):
    """The card, or the device of that name that a test is parametrised with; float32 is float32 there."""
    import torch
    from helpers import place

    torch.backends.fp32_precision = "none"  # which a compiling trainer turns to TF32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield place(getattr(request, "param", "cuda"))
    torch.backends.fp32_precision = "none"
    torch.use_deterministic_algorithms(False)  # which `full_determinism` turns on


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk():
    os.fsync = lambda descriptor: None  # checkpoints reach a busy disk in minutes; processes of their own do wait


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory):
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on loopback, and a client that is online with a cache of its own."""
    from hub_server import HubServer
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.setattr(constants, name, str(tmp_path / "cache"))
    monkeypatch.setattr("scalekd_hf.publishing.hub.PAUSES", (0.0, 0.0))
    with HubServer(HUB_PORT) as server:
        yield server


@pytest.fixture(scope="session")
def digits():
    """The first 96 training images of the digits, map-style."""
    import datasets
    from helpers import DIGITS

    return datasets.Dataset.from_parquet(str(DIGITS / "train-00000-of-00004.parquet")).select(range(96))


@pytest.fixture(scope="session")
def digits_stream():
    """All training digits, streaming, four shards."""
    import datasets
    from helpers import DIGITS

    files = sorted(str(file) for file in DIGITS.glob("train-*.parquet"))
    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
