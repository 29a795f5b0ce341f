"""The endless sequence of images of a training run, dealt out to ranks and workers, and one pass of an evaluation.

Every image of the sequence has a place, counted from the start of the run. Places are dealt out in
micro-batches, to the ranks side by side and to the workers of a rank in turn, so that each reader knows how many
of a pass it gets. From a map-style data set it fetches just the rows at its places; of a stream it
reads as many rows in one run. All readers end a pass at the same place, and where a stopped run stood
follows from the number of images it had seen.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderShard
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..borrowed.datasets import open_file
from .bad_images import TooManyBadImagesError, describe
from .decoding import BadImageError
from .preparation import RowPreparation
from .sources import Shards, Table, retrying


__all__ = ["ImageStream", "Partition", "StreamLoader"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Partition:
    """How the sequence of images is divided among the workers of all ranks.

    Args:
        batch_size: images in a micro-batch of one rank.
        world_size: ranks.
        workers: workers of each rank.
        start: place in the sequence from which on it is divided like this.
    """

    batch_size: int
    world_size: int = 1
    workers: int = 1
    start: int = 0

    @property
    def step(self) -> int:
        """Images in a micro-batch of all ranks."""
        return self.batch_size * self.world_size

    def dealt(self, rank: int, worker: int, place: int) -> int:
        """Places before `place` that a worker of a rank gets."""
        steps, rest = divmod(max(place - self.start, 0), self.step)
        turns, turn = divmod(steps, self.workers)
        images = (turns + (turn > worker)) * self.batch_size
        if turn == worker:
            images += min(max(rest - rank * self.batch_size, 0), self.batch_size)
        return images

    def shares(self, first: int, last: int) -> list[range]:
        """The places [first, last) cut into one contiguous range for each reader, ranks first, then their workers."""
        readers = itertools.product(range(self.world_size), range(self.workers))
        sizes = [self.dealt(*reader, last) - self.dealt(*reader, first) for reader in readers]
        ends = list(itertools.accumulate(sizes, initial=max(first, self.start)))
        return [range(*ends[reader : reader + 2]) for reader in range(len(sizes))]


class ImageStream(IterableDataset):
    """Prepared images of a map-style data set or a stream: endless and reshuffled each pass in training.

    An image that cannot be decoded gives its place to the next one of its reader, augmented anew; in evaluation
    it is a blank that does not count. Its sample then says so in `bad_image`.

    Args:
        source: the rows.
        preparation: row to sample.
        seed, buffer_size: of the shuffle of each pass; a stream's rows are shuffled in blocks of the buffer's size.
        max_bad_images: share of the images that may be undecodable.
        label: one of the labels, to make others of its shape.
    """

    def __init__(
        self,
        source: Table | Shards,
        preparation: RowPreparation,
        seed: int = 0,
        buffer_size: int = 1000,
        max_bad_images: float = 0.01,
        label: Any = 0,
    ):
        self.source, self.preparation, self.label = source, preparation, label
        self.seed, self.buffer_size, self.max_bad_images = seed, buffer_size, max_bad_images
        self.partition, self.rank, self.images_seen = Partition(1), 0, 0

    def __len__(self) -> int:
        """Images in the data set, for an evaluation; the stream of a training run has no end."""
        if self.preparation.training:
            raise TypeError("a training stream is endless")
        return len(self.source)

    @property
    def places_per_pass(self) -> int:
        """Images between two reshuffles."""
        return len(self.source) * self.preparation.repeats

    def training_loader(self, partition: Partition, rank: int, images_seen: int, **options: Any) -> DataLoader:
        """The data loader of one rank, from a place on that is a whole number of micro-batches after the partition's start."""
        self.partition, self.rank, self.images_seen = partition, rank, images_seen
        self._log_reading()
        # A generator of its own: the global one stays as it is, which a resumed run relies on.
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self, partition.batch_size, worker_init_fn=outlive_signals, generator=generator, **options)

    def evaluation_loader(self, batch_size: int, rank: int, world_size: int, **options: Any) -> StreamLoader:
        """The data loader of one rank for a single pass; the last batch is filled up with blanks, which are cut off."""
        workers = max(1, options.get("num_workers", 0))
        self.partition, self.rank = Partition(batch_size, world_size, workers), rank
        padding = -len(self) % self.partition.step
        logger.info("Evaluation of %d images; %d blanks fill the last batch and do not count.", len(self), padding)
        generator = torch.Generator().manual_seed(self.seed)
        return StreamLoader(
            self, batch_size=batch_size, worker_init_fn=outlive_signals, generator=generator, **options
        )

    def row_order(self) -> np.ndarray:
        """Row numbers of an evaluation in the order in which its batches come, those of all ranks side by side."""
        shares = self.partition.shares(0, len(self))
        batches = []
        for step in range(-(-len(self) // self.partition.step)):
            turn, worker = divmod(step, self.partition.workers)
            for rank in range(self.partition.world_size):
                share = shares[rank * self.partition.workers + worker]
                batches.append(share[turn * self.partition.batch_size : (turn + 1) * self.partition.batch_size])
        return np.array([place for batch in batches for place in batch], dtype=np.int64)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        if not self.preparation.training:
            yield from self._evaluation_samples(worker)
        elif isinstance(self.source, Table):
            yield from self._without_bad_images(self._from_table(self.source, worker, workers))
        else:
            yield from self._without_bad_images(self._from_shards(self.source, worker, workers))

    def _from_table(self, table: Table, worker: int, workers: int) -> Iterator[tuple[int, int, int, Any]]:
        """Pass, row number, repeat and row at each place of a worker."""
        first = self.images_seen + self.rank * self.partition.batch_size
        for batch in itertools.count(worker, workers):
            for place in range(self.partition.batch_size):
                pass_number, place = divmod(first + batch * self.partition.step + place, self.places_per_pass)
                position, repeat = divmod(place, self.preparation.repeats)
                number = int(table.order(self.seed, pass_number)[position])
                yield pass_number, number, repeat, table[number]

    def _from_shards(self, shards: Shards, worker: int, workers: int) -> Iterator[tuple[int, int, int, Any]]:
        partition = replace(self.partition, workers=workers)
        worker = (
            worker + (self.images_seen - partition.start) // partition.step
        ) % workers  # the worker whose turn it is comes first
        for pass_number in itertools.count(self.images_seen // self.places_per_pass):
            start = pass_number * self.places_per_pass
            first = max(start, partition.start)
            share = partition.shares(first, start + self.places_per_pass)[self.rank * workers + worker]
            seen = partition.dealt(self.rank, worker, self.images_seen) - partition.dealt(self.rank, worker, first)
            places = range(share.start - start, share.stop - start)
            for number, repeat, row in self._shuffled(shards, pass_number, places, max(0, seen)):
                yield pass_number, number, repeat, row

    def _shuffled(self, shards: Shards, pass_number: int, places: range, skip: int) -> Iterator[tuple[int, int, Any]]:
        """Row number, repeat and row of a range of places in a random order; blocks that are skipped whole are not read."""
        repeats, order = self.preparation.repeats, shards.order(self.seed, pass_number)
        end, rows = -(-places.stop // repeats), None
        held: dict[int, tuple[int, Any]] = {}  # of the rows read and not yet given, by their position in the pass
        for start in range(places.start // repeats, end, self.buffer_size):
            block = range(start, min(start + self.buffer_size, end))
            todo = self._block_places(pass_number, block, places)
            skip, todo = max(0, skip - len(todo)), todo[skip:]
            if not todo:
                continue
            if rows is None:
                rows = enumerate(itertools.islice(shards.rows(order, start), end - start), start)
            held.update(itertools.islice(rows, len(block) - len(held)))
            wanted = {place // repeats for place in todo}
            held = {position: row for position, row in held.items() if position in wanted}
            for turn, place in enumerate(todo):
                position, repeat = divmod(place, repeats)
                yield held[position][0], repeat, held[position][1]
                if turn + 1 == len(todo) or todo[turn + 1] // repeats != position:
                    del held[position]
                    held.update(itertools.islice(rows, 1))  # in its place, one of the next block is read

    def _block_places(self, pass_number: int, block: range, places: range) -> list[int]:
        """The places of a block of rows, row by row in a random order."""
        repeats = self.preparation.repeats
        shuffled = np.random.default_rng((self.seed, pass_number, block.start)).permutation(len(block))
        runs = ((block.start + int(offset)) * repeats for offset in shuffled)
        return [place for run in runs for place in range(run, run + repeats) if place in places]

    def _evaluation_samples(self, worker: int) -> Iterator[dict[str, Any]]:
        """One pass in the order of the data set, and blanks to the end of the last batch."""
        assert isinstance(self.source, Shards)
        partition, shards = self.partition, self.source
        share = partition.shares(0, len(self))[self.rank * partition.workers + worker]
        rows = shards.rows(list(range(len(shards.counts))), share.start)
        for number, row in itertools.islice(rows, len(share)):
            yield prepare_or_blank(self.preparation, self._with_bytes(row), number, self.label, shards.place(number))
        steps = -(-len(self) // partition.step)
        batches = steps // partition.workers + (steps % partition.workers > worker)
        for _ in range(batches * partition.batch_size - len(share)):
            yield self.preparation.blank(self.label)

    def _without_bad_images(self, places: Iterator[tuple[int, int, int, Any]]) -> Iterator[dict[str, Any]]:
        """Samples, where the next good one also takes the places of bad ones before it."""
        waiting: list[dict[str, Any]] = []
        for pass_number, number, repeat, row in places:
            try:
                row = self._with_bytes(row)
                sample = self.preparation(row, pass_number, (number, repeat))
            except BadImageError as error:
                place, value = self.source.place(number), row[self.preparation.image_column]
                waiting.append(describe(error, number, place, value) | {"pass": pass_number})
                if len(waiting) > self.max_bad_images * len(self.source) + 1:
                    raise TooManyBadImagesError.of(waiting, self.max_bad_images, len(self.source)) from None
                continue
            image = row[self.preparation.image_column]
            sample = annotated(sample, number, self.source.place(number), image, {"pass": pass_number})
            for bad in waiting:
                instead = self.preparation(row, pass_number, (number, repeat, "instead of", bad["row"]))
                yield instead | {"bad_image": bad}
            waiting = []
            yield sample

    def _with_bytes(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row whose images, a mask among them, are with their bytes where they are only paths on the network."""
        return row | {column: with_bytes(row[column]) for column in self.preparation.columns if column in row}

    def _log_reading(self) -> None:
        """Say what it costs to have fewer shards than readers, in rows that more than one of them reads."""
        if isinstance(self.source, Table) or self.partition.world_size * self.partition.workers <= len(
            self.source.counts
        ):
            return
        shares = self.partition.shares(self.partition.start, self.partition.start + self.places_per_pass)
        bounds = [(share.start - self.partition.start) // self.preparation.repeats for share in shares if share]
        again = self.source.read_twice(self.source.order(self.seed, 0), bounds)
        logger.warning(
            "The stream has %d shards for %d readers (ranks x workers): each reads its part of a shard, and %d of %d rows "
            "are read more than once a pass, though decoded once. More shards, or fewer workers, save reading.",
            len(self.source.counts),
            len(shares),
            again,
            len(self.source),
        )


def with_bytes(image: Any) -> Any:
    """An image that is only a path on the network, with its bytes; anything else as it is."""
    if not isinstance(image, dict) or image.get("bytes") is not None or "://" not in str(image.get("path")):
        return image

    def read() -> bytes:
        with open_file(image["path"]) as opened:
            content: bytes = opened.read()
        return content

    return {"bytes": retrying(read, image["path"]), "path": image["path"]}


def annotated(
    sample: dict[str, Any], number: int, place: dict[str, int], image: Any, more: dict[str, int] | None = None
) -> dict[str, Any]:
    """A sample; where it is used although something is bad about it, which it brings as an error, with row and file of that."""
    error = sample.get("bad_image")
    if not isinstance(error, BadImageError):
        return sample
    return sample | {"bad_image": describe(error, number, place, image) | (more or {})}


def prepare_or_blank(
    preparation: RowPreparation, row: dict[str, Any], number: int, label: Any, place: dict[str, int]
) -> dict[str, Any]:
    """A sample of an evaluation; a blank that does not count where the image cannot be decoded."""
    image = row[preparation.image_column]
    try:
        return annotated(preparation(row, 0, number), number, place, image)
    except BadImageError as error:
        return preparation.blank(label) | {"bad_image": describe(error, number, place, image)}


class StreamLoader(DataLoaderShard):
    """accelerate's loader of one rank's part of a stream; after the last batch, `gather_for_metrics` cuts its blanks off."""

    def __len__(self) -> int:
        """Batches of each rank."""
        return -(-len(self.dataset) // self.dataset.partition.step)

    @property
    def total_batch_size(self) -> int:
        """Images in a batch of all ranks."""
        return int(self.dataset.partition.step)


def end_workers() -> None:
    """Tell the workers that are left to end: multiprocessing tells them once more, which they follow, and waits for them."""
    for process in multiprocessing.active_children():
        process.terminate()


atexit.register(end_workers)  # runs before multiprocessing's own, which was registered before


def outlive_signals(worker: int) -> None:
    """Let a worker live on after what a whole group may get, Ctrl-C, SIGHUP and a first SIGTERM: its trainer needs it."""
    for name in {"SIGINT", "SIGHUP"} & set(dir(signal)):  # Windows has no SIGHUP
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
