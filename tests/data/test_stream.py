"""The sequence of images: every image of a pass once, in the same order after a stop, whoever reads it."""

import io
import itertools
import json
import tarfile

import aiohttp
import datasets
import numpy as np
import pytest
import torch
from helpers import RangeServer, some_slow
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from processes import in_child

from scalekd_hf.data import sources
from scalekd_hf.data.dataset import prepare_dataset
from scalekd_hf.data.preparation import Collator, Preparation, collate
from scalekd_hf.data.sources import Shards, StreamReadError
from scalekd_hf.data.stream import Partition
from scalekd_hf.images import IGNORED_LABEL, ImageSpec


SPEC = ImageSpec((16, 16), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bicubic", 1.0)
ROWS = 40
LAYOUTS = [(1, 0), (1, 2), (2, 0), (2, 2), (1, 4), (3, 2)]  # ranks, workers; the last has more readers than shards


def encoded(number, form="JPEG"):
    pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Forty images in four uneven Parquet shards of row groups of three."""
    folder = tmp_path_factory.mktemp("shards")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=ROWS)})
    for shard, (start, stop) in enumerate(itertools.pairwise([0, 4, 20, 27, ROWS])):
        rows = {"image": [{"bytes": encoded(n), "path": None} for n in range(start, stop)]}
        rows["label"] = list(range(start, stop))
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{shard}.parquet", batch_size=3)
    return sorted(str(file) for file in folder.iterdir())


def stream_of(files, kind="stream"):
    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=kind == "stream")


def prepared(data, training=True, buffer_size=8, repeats=1, **changes):
    options = {"crop_scale": (0.3, 1.0), "seed": 3, "repeats": repeats, **changes}
    return prepare_dataset(data, "train_dataset", Preparation(SPEC, training, **options), (5, buffer_size))


def batches_of(data, rank=0, world_size=1, workers=0, batch_size=2, seen=0, start=0, **options):
    """An endless iterator over the training batches of one rank."""
    layout = Partition(batch_size, world_size, max(1, workers), start)
    collator = Collator(collate)
    return iter(
        prepared(data, **options).training_loader(layout, rank, seen, num_workers=workers, collate_fn=collator)
    )


def steps_of(data, steps, world_size=1, **options):
    """The first batches of all ranks, as one list of (label, image) for each step."""
    ranks = [batches_of(data, rank, world_size, **options) for rank in range(world_size)]
    taken = []
    for _ in range(steps):
        batches = [next(rank) for rank in ranks]
        taken.append(
            [pair for batch in batches for pair in zip(batch["labels"].tolist(), batch["pixel_values"], strict=True)]
        )
    return taken


def labels(steps):
    return [label for step in steps for label, _ in step]


def same(first, second):
    assert labels(first) == labels(second)
    return all(
        torch.equal(a, b)
        for one, two in zip(first, second, strict=True)
        for (_, a), (_, b) in zip(one, two, strict=True)
    )


@pytest.mark.parametrize(
    "layout", [Partition(2), Partition(3, 2, 2), Partition(1, 3, 4), Partition(4, 2, 3, 5), Partition(7, 1, 2, 11)]
)
def test_readers_are_dealt_exactly_the_places_of_their_batches(layout):
    readers = list(itertools.product(range(layout.world_size), range(layout.workers)))
    count = dict.fromkeys(readers, 0)
    for place in range(layout.start, layout.start + 200):
        for reader in readers:
            assert layout.dealt(*reader, place) == count[reader], (reader, place)
        step, rest = divmod(place - layout.start, layout.step)
        count[rest // layout.batch_size, step % layout.workers] += 1
    shares = layout.shares(layout.start + 17, layout.start + 90)
    assert [place for share in shares for place in share] == list(range(layout.start + 17, layout.start + 90))


@pytest.mark.parametrize("kind", ["stream", "map"])
@pytest.mark.parametrize(("world_size", "workers"), some_slow(LAYOUTS[::-1], 3))
def test_every_image_of_a_pass_is_read_by_exactly_one_reader(files, kind, world_size, workers):
    # 60 images by ones: a pass and a half, its end in the middle of a round of the workers.
    data = stream_of(files, kind)
    seen = labels(steps_of(data, 120 // world_size, world_size, workers=workers, batch_size=1))
    for start in range(0, 120 - ROWS + 1, ROWS):
        assert sorted(seen[start : start + ROWS]) == list(range(ROWS))
    assert seen[:ROWS] != seen[ROWS : 2 * ROWS] and seen[:ROWS] != sorted(seen[:ROWS])


@pytest.mark.parametrize("kind", ["stream", "map"])
def test_augmentation_belongs_to_the_image_and_the_pass(files, kind):
    data = stream_of(files, kind)
    alone = dict(pair for step in steps_of(data, 10, batch_size=4) for pair in step)
    for world_size, workers in LAYOUTS[1:]:
        steps = steps_of(data, 40 // world_size, world_size, workers=workers, batch_size=1)
        assert all(torch.equal(image, alone[label]) for step in steps[: ROWS // world_size] for label, image in step)
    second = dict(pair for step in steps_of(data, 10, batch_size=4, seen=ROWS) for pair in step)
    assert second.keys() == alone.keys()
    assert not any(torch.equal(second[label], alone[label]) for label in alone)


def test_a_stream_and_a_data_set_in_memory_augment_an_image_alike(files):
    one, two = (
        dict(p for s in steps_of(stream_of(files, kind), 10, batch_size=4) for p in s) for kind in ("stream", "map")
    )
    assert all(torch.equal(one[label], two[label]) for label in one)


def test_the_order_of_a_data_set_in_memory_does_not_depend_on_its_readers(files):
    data = stream_of(files, "map")
    first = steps_of(data, 12, batch_size=6)
    assert same(first, steps_of(data, 12, 3, batch_size=2, workers=2))


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize(("world_size", "workers"), some_slow([(2, 3), (1, 0), (1, 2)], 2))
@pytest.mark.parametrize("kind", some_slow(["stream", "map"], 1))
def test_a_reader_goes_on_where_it_stopped(files, kind, world_size, workers, repeats):
    options = {"workers": workers, "batch_size": 3, "repeats": repeats}
    data = stream_of(files, kind)
    whole = steps_of(data, 50, world_size, **options)
    for step in (1, 7, 20, 44):
        rest = steps_of(data, 3, world_size, seen=step * 3 * world_size, **options)
        assert same(rest, whole[step : step + 3]), step


def test_other_readers_go_on_at_the_same_number_of_images_and_keep_to_passes(files):
    data = stream_of(files)
    rest = labels(steps_of(data, 40, 2, workers=2, batch_size=1, seen=26, start=26))
    assert sorted(rest[ROWS - 26 : 2 * ROWS - 26]) == list(range(ROWS))  # the next pass is whole
    again = labels(steps_of(data, 20, 2, workers=2, batch_size=1, seen=66, start=26))
    assert again == rest[40:]


@pytest.mark.parametrize("kind", ["stream", "map"])
def test_repeated_augmentation_gives_an_image_several_times_in_a_row(files, kind):
    steps = steps_of(stream_of(files, kind), 80, batch_size=3, repeats=3, workers=2)
    assert all(len({label for label, _ in step}) == 1 for step in steps[:ROWS] if len(step) == 3 and kind == "map")
    assert sorted(labels(steps)[: 3 * ROWS]) == sorted(list(range(ROWS)) * 3)
    (_, one), (_, two), _ = steps[0]
    assert not torch.equal(one, two)


@pytest.mark.parametrize(("world_size", "workers"), some_slow([(3, 2), (5, 3), *LAYOUTS[:-1]], 3))
@pytest.mark.parametrize("batch_size", [3, 64])
def test_an_evaluation_reads_each_image_once_and_knows_its_row(files, world_size, workers, batch_size):
    data = prepared(stream_of(files), training=False)
    ranks = []
    for rank in range(world_size):
        loader = data.evaluation_loader(batch_size, rank, world_size, num_workers=workers, collate_fn=collate)
        ranks.append([batch["labels"] for batch in loader])
        assert len(ranks[-1]) == len(loader) and all(len(batch) == batch_size for batch in ranks[-1])
    gathered = torch.cat([torch.cat(batches) for batches in zip(*ranks, strict=True)]).tolist()
    assert gathered[:ROWS] == data.row_order().tolist() and sorted(gathered[:ROWS]) == list(range(ROWS))
    assert set(gathered[ROWS:]) <= {IGNORED_LABEL}


class Log:
    """A stream of four shards of ten images that notes which rows are read."""

    def __init__(self):
        self.read = []

    def stream(self):
        def rows(shards):
            for shard in shards:
                for row in range(shard * 10, shard * 10 + 10):
                    self.read.append(row)
                    yield {"image": encoded(row), "label": row}

        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": list(range(4))})


def test_what_was_seen_is_not_read_again_after_a_stop():
    log = Log()
    data = prepared(log.stream(), buffer_size=5)
    log.read.clear()
    loader = iter(data.training_loader(Partition(1), 0, 3 * ROWS + 36, collate_fn=collate))
    next(loader)
    assert len(log.read) <= 10 + 1 + 5  # the shard in which it stood, and one row ahead of each given


def test_images_are_counted_once(files, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    counted = []
    count = sources._count_by_reading
    monkeypatch.setattr(sources, "_count_by_reading", lambda *args: counted.append(1) or count(*args))
    assert len(Shards(stream_of(files), ["image"])) == ROWS and not counted  # footers tell
    wrapped = stream_of(files).map(lambda row: row)
    assert [len(Shards(wrapped, ["image"])) for _ in range(2)] == [ROWS, ROWS]
    assert counted == [1]
    assert len(list((tmp_path / "scalekd_lengths").iterdir())) == 2


def test_files_that_change_after_they_were_counted_are_noticed(files, tmp_path):
    copy = tmp_path / "0.parquet"
    copy.write_bytes(open(files[1], "rb").read())
    data = prepared(stream_of([str(copy)]))
    copy.write_bytes(open(files[0], "rb").read())
    with pytest.raises(StreamReadError, match="Shard 0 of the stream has 4 rows and had 16"):
        list(itertools.islice(iter(data), 20))


def test_fewer_shards_than_readers_are_read_in_parts_and_the_log_says_what_it_costs(files, caplog):
    labels(steps_of(stream_of(files), 1, 3, workers=2, batch_size=1))
    assert "4 shards for 6 readers" in caplog.text and "of 40 rows are read more than once" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.take(13),
        lambda s: s.skip(25),
        lambda s: s.skip(3).take(20),
        lambda s: s.filter(lambda row: row["label"] % 3 == 0),
        lambda s: s.map(lambda row: {"label": 39 - row["label"]}),
        lambda s: datasets.interleave_datasets([s.take(20), s.skip(20)]),
        lambda s: datasets.concatenate_datasets([s, s.take(5)]),
        lambda s: s.shuffle(seed=3, buffer_size=4, max_buffer_input_shards=1).take(15),
        lambda s: s.repeat(2),
    ],
)
def test_streams_that_the_user_has_changed_keep_their_rows_and_their_order(files, monkeypatch, change):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    stream = change(stream_of(files))
    expected = [row["label"] for row in stream]
    data = prepared(stream, training=False)
    taken = [batch["labels"] for batch in data.evaluation_loader(4, 0, 1, num_workers=2, collate_fn=collate)]
    rows = torch.cat(taken)[: len(expected)].tolist()
    assert [label for _, label in sorted(zip(data.row_order().tolist(), rows, strict=True))] == expected
    steps = steps_of(stream, len(expected), workers=2, batch_size=1)
    assert sorted(labels(steps)) == sorted(expected)


def test_a_shuffle_of_the_users_is_left_to_the_trainer(files, caplog):
    shuffled = stream_of(files).shuffle(seed=0, buffer_size=10)
    assert sorted(labels(steps_of(shuffled, 20))) == list(range(ROWS))
    assert "`shuffle()` is left out" in caplog.text


def test_a_cache_that_cannot_be_used_costs_counting_and_no_run(files, tmp_path, monkeypatch, caplog):
    stream = stream_of(files)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("not a folder")
    assert len(Shards(stream, ["image"])) == ROWS and "cannot be kept" in caplog.text
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    Shards(stream_of(files), ["image"])
    (file,) = (tmp_path / "scalekd_lengths").iterdir()
    file.write_text("")
    assert len(Shards(stream_of(files), ["image"])) == ROWS and "counted again" in caplog.text


def test_tar_files_and_folders_of_images_are_read_alike(tmp_path, caplog):
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(shard * 5, shard * 5 + 5):
                for suffix, content in (("jpg", encoded(number)), ("cls", str(number).encode())):
                    entry = tarfile.TarInfo(f"{number:03}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    for number in range(10):
        folder = tmp_path / "folder" / f"{number:03}"
        folder.mkdir(parents=True)
        (folder / "image.jpg").write_bytes(encoded(number))
    tars = [str(tmp_path / f"{shard}.tar") for shard in range(2)]
    web = datasets.load_dataset("webdataset", data_files=tars, split="train", streaming=True)
    options = {"image_column": "jpg", "label_column": "cls"}
    one = dict(pair for step in steps_of(web, 5, **options) for pair in step)
    for streaming in (True, False):
        folder = datasets.load_dataset("imagefolder", data_dir=tmp_path / "folder", split="train", streaming=streaming)
        two = dict(pair for step in steps_of(folder, 5, workers=2) for pair in step)
        assert one.keys() == two.keys() == set(range(10))
        assert all(torch.equal(one[label], two[label]) for label in one)
    assert "streams a folder of images in the order of its names" in caplog.text


@pytest.fixture
def server(files, monkeypatch):
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 1)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL", 0.01)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0.01)
    with RangeServer({f"/{number}.parquet": open(file, "rb").read() for number, file in enumerate(files)}) as server:
        yield server


def test_a_network_that_fails_for_a_while_changes_nothing(files, server, monkeypatch, caplog):
    monkeypatch.setattr(sources, "RETRY_DELAYS", (0.01,) * 20)
    expected = labels(steps_of(stream_of(files), 20))
    data = prepared(stream_of([f"{server.url}/{number}.parquet" for number in range(4)]))
    server.fail_every(2)
    taken = itertools.islice(iter(data.training_loader(Partition(2), 0, 0, collate_fn=collate)), 20)
    assert [label for batch in taken for label in batch["labels"].tolist()] == expected
    assert server.failures and "once more in 0.01 s" in caplog.text


def test_counting_outlives_a_network_that_fails_for_a_while(server, monkeypatch):
    monkeypatch.setattr(sources, "RETRY_DELAYS", (0.01,) * 20)
    stream = stream_of([f"{server.url}/{number}.parquet" for number in range(4)]).map(lambda row: row)
    server.fail_every(3)
    assert len(prepared(stream).source) == ROWS and server.failures


def test_a_network_that_stays_away_ends_the_stream(server, monkeypatch):
    monkeypatch.setattr(sources, "RETRY_DELAYS", (0.01,) * 2)
    data = prepared(stream_of([f"{server.url}/{number}.parquet" for number in range(4)]))
    server.fail_every(1)
    with pytest.raises(StreamReadError, match="Reading shard . of 4 failed 3 times, at last with"):
        next(iter(data))


def test_workers_end_with_the_same_error(server, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "RETRY_DELAYS", ())
    data = prepared(stream_of([f"{server.url}/{number}.parquet" for number in range(4)]))
    server.fail_every(1)

    def read():
        with pytest.raises(StreamReadError, match="failed 1 times"):
            next(iter(data.training_loader(Partition(2, 1, 1), 0, 0, num_workers=1, collate_fn=collate)))

    outcome = in_child(tmp_path, read)
    assert outcome.status == 0, outcome.text[-3000:]


def test_the_list_of_a_cache_is_plain_json(files, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    Shards(stream_of(files), ["image"])
    (file,) = (tmp_path / "scalekd_lengths").iterdir()
    assert json.loads(file.read_text()) == [[3, 1], [3] * 5 + [1], [3, 3, 1], [3] * 4 + [1]]


def hub_client_error():
    """What the client that `huggingface_hub` happens to use raises, without a response."""
    client = HfHubHTTPError.__bases__[0]
    assert not issubclass(client, OSError)
    return client.__new__(client)


@pytest.mark.parametrize("error", [aiohttp.ClientPayloadError("cut"), hub_client_error(), TimeoutError(), OSError()])
def test_errors_of_network_clients_are_tried_again(monkeypatch, error):
    monkeypatch.setattr(sources, "RETRY_DELAYS", (0.0,) * 2)
    answers = [error, error, "read"]

    def read():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert sources.retrying(read, "a file") == "read"
    answers[:] = [error] * 3
    with pytest.raises(StreamReadError, match="Reading a file failed 3 times"):
        sources.retrying(read, "a file")


def test_what_a_users_function_raises_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(sources, "RETRY_DELAYS", (60.0,))
    data = datasets.IterableDataset.from_generator(lambda: iter([{"image": 1}]))
    with pytest.raises(ZeroDivisionError):
        sources.retrying(lambda: next(iter(data.map(lambda row: {"image": 1 / 0}))), "a stream")
