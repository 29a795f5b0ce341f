"""The way from a data set to samples: every image once, the same augmentation wherever it is read."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from scalekd_hf.data import ImageDataset, ImageStream, Preparation, collate, dataset_labels, prepare_dataset
from scalekd_hf.loading import ImageSpec


SPEC = ImageSpec((16, 16), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bicubic", 1.0)
ROWS = 40


def picture(number):
    """A 16x16 image whose first channel is constant and tells its number."""
    array = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    array[..., 0] = number
    return Image.fromarray(array)


@pytest.fixture(scope="module")
def stream_files(tmp_path_factory):
    """Forty images in four uneven Parquet shards."""
    folder = tmp_path_factory.mktemp("shards")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=ROWS)})
    bounds = [0, 4, 20, 27, ROWS]
    for shard, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        rows = {"image": [picture(n) for n in range(start, stop)], "label": list(range(start, stop))}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{shard}.parquet")
    return sorted(str(file) for file in folder.iterdir())


def stream_of(files):
    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)


def training(**changes):
    return Preparation(SPEC, training=True, **{"crop_scale": (0.3, 1.0), "seed": 3, **changes})


def reader(files, rank=0, world_size=1, consumed=0, batch_size=2, **options):
    stream = ImageStream(stream_of(files), training(), seed=5, buffer_size=8)
    return iter(stream.loader(batch_size, rank, world_size, consumed, **options))


def take(loader, batches):
    return [next(loader) for _ in range(batches)]


def labels(batches):
    return [label for batch in batches for label in batch["labels"].tolist()]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (1, 4), (3, 2)])
def test_every_image_of_a_pass_is_read_by_exactly_one_reader(stream_files, world_size, workers):
    # With 3 x 2 readers there are more readers than shards. Batches of one, so that a pass ends where it ends.
    seen = []
    for rank in range(world_size):
        stream = ImageStream(stream_of(stream_files), training(), seed=5, buffer_size=8)
        stream.rank, stream.world_size = rank, world_size
        slots = max(1, workers)
        for worker in range(slots):
            from scalekd_hf.data import _share

            shuffled = stream.stream.shuffle(seed=5, buffer_size=8, max_buffer_input_shards=1)
            seen += [row["label"] for row in _share(shuffled, rank * slots + worker, world_size * slots)]
    assert sorted(seen) == list(range(ROWS))


def test_passes_are_reshuffled_and_complete(stream_files):
    batches = take(reader(stream_files, batch_size=4), 20)
    first, second = labels(batches[:10]), labels(batches[10:])
    assert sorted(first) == sorted(second) == list(range(ROWS))
    assert first != second and first != sorted(first)
    assert labels(take(reader(stream_files, batch_size=4), 20)) == first + second


def test_augmentation_belongs_to_the_image_and_the_pass(stream_files):
    def by_label(loader, batches):
        return {
            int(n): image
            for batch in take(loader, batches)
            for n, image in zip(batch["labels"], batch["pixel_values"], strict=True)
        }

    alone = by_label(reader(stream_files, batch_size=4), 10)
    workers = by_label(reader(stream_files, batch_size=1, num_workers=2), 30)
    assert len(workers) > 10
    assert all(torch.equal(workers[number], alone[number]) for number in workers)
    again = by_label(reader(stream_files, batch_size=4, consumed=10), 10)
    assert any(not torch.equal(again[number], alone[number]) for number in alone)


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("consumed", [1, 5, 17, 23])
def test_a_reader_goes_on_where_it_stopped(stream_files, workers, consumed):
    options = {"num_workers": workers} if workers else {}
    whole = take(reader(stream_files, **options), consumed + 6)
    rest = take(reader(stream_files, consumed=consumed, **options), 6)
    for expected, actual in zip(whole[consumed:], rest, strict=True):
        assert torch.equal(expected["pixel_values"], actual["pixel_values"])


def test_a_stream_without_features_augments_by_the_pixels(stream_files):
    def first_pass():
        stream = ImageStream(stream_of(stream_files).map(lambda row: row), training(), seed=5, buffer_size=8)
        return take(iter(stream.loader(4, 0, 1, 0)), 3)

    for one, two in zip(first_pass(), first_pass(), strict=True):
        assert torch.equal(one["pixel_values"], two["pixel_values"])


def test_an_image_is_known_by_its_bytes_not_by_its_path(tmp_path):
    values = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "x.png"
        picture(5).save(file)
        stream = ImageStream(
            datasets.Dataset.from_dict({"image": [0]}).to_iterable_dataset(), training(label_column=None), 0
        )
        values.append(stream._prepare({"image": {"bytes": None, "path": str(file)}}, 0)["pixel_values"])
    assert torch.equal(*values)


def test_sixteen_bit_images_and_floats_keep_their_range():
    grey = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    encoded = io.BytesIO()
    Image.fromarray(grey).save(encoded, "PNG")
    plain = Preparation(SPEC, training=False)
    deep = plain({"image": {"bytes": encoded.getvalue()}}, 0, 0)["pixel_values"]
    eight = plain({"image": (grey // 256).astype(np.uint8)}, 0, 0)["pixel_values"]
    share = plain({"image": (grey // 256) / 255.0}, 0, 0)["pixel_values"]
    assert torch.equal(deep, eight) and (share - eight).abs().max() < 0.02


def test_a_batch_with_some_labels_is_refused():
    image = torch.zeros(3, 2, 2)
    with pytest.raises(ValueError, match="1 of 2 images in a batch have no label"):
        collate([{"pixel_values": image, "labels": 1}, {"pixel_values": image, "labels": None}])


def test_augmenting_leaves_the_random_states_alone():
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    training()({"image": picture(1), "label": 1}, 0, 0)
    assert torch.equal(states[0], torch.get_rng_state()) and np.array_equal(states[1], np.random.get_state()[1])


def test_a_map_style_data_set_augments_by_row_and_pass():
    rows = datasets.Dataset.from_dict({"image": [picture(n) for n in range(3)], "label": [0, 1, 2]})
    data = ImageDataset(rows.cast_column("image", datasets.Image()), training())
    first = data[1]["pixel_values"]
    assert torch.equal(first, data[1]["pixel_values"])
    data.set_epoch(1)
    assert not torch.equal(first, data[1]["pixel_values"])
    assert len(data) == 3


def test_evaluation_resizes_and_crops_the_centre():
    preparation = Preparation(SPEC.updated(crop_pct=0.5), training=False)
    array = np.zeros((64, 64, 3), np.uint8)
    array[16:48, 16:48] = 255  # the half of the side that the crop keeps
    value = preparation({"image": Image.fromarray(array)}, 0, 0)["pixel_values"]
    assert value.shape == (3, 16, 16) and value[:, 2:-2, 2:-2].min() == pytest.approx((1 - 0.5) / 0.25)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_images_of_every_mode_become_rgb(mode):
    image = picture(7).convert(mode)
    encoded = io.BytesIO()
    image.save(encoded, "TIFF")
    for value in (image, {"bytes": encoded.getvalue(), "path": None}, encoded.getvalue()):
        assert Preparation(SPEC, training=False)({"image": value}, 0, 0)["pixel_values"].shape == (3, 16, 16)


def test_labels_may_be_absent_or_soft():
    image = torch.zeros(3, 2, 2)
    assert "labels" not in collate([{"pixel_values": image}])
    batch = collate([{"pixel_values": image, "labels": [0.5, 0.5]}, {"pixel_values": image, "labels": [1.0, 0.0]}])
    assert batch["labels"].shape == (2, 2) and batch["pixel_values"].shape == (2, 3, 2, 2)


def test_label_names_come_from_the_data_set(digits):
    assert dataset_labels(digits, "label") == list("0123456789")
    assert dataset_labels(digits, "other") is None and dataset_labels([1, 2], "label") is None


def test_finished_samples_stay_as_they_are():
    samples = [{"pixel_values": torch.zeros(3, 4, 4), "labels": 1}]
    assert prepare_dataset(samples, "train_dataset", training) is samples


def test_columns_may_have_other_names(digits):
    data = digits.rename_columns({"image": "img", "label": "fine_label"})
    prepared = prepare_dataset(data, "train_dataset", lambda: training(image_column="img", label_column="fine_label"))
    assert prepared[0]["labels"] == data[0]["fine_label"]
