"""Where rows come from: a map-style data set by index, or a stream shard by shard, in the order of a pass.

Both know their number of rows, so that a pass has an end that all processes know, and a place in it can
be found again without reading what comes before.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import datasets
import numpy as np
import pyarrow.ipc
import pyarrow.parquet
from datasets.fingerprint import Hasher

from ..borrowed.datasets import (
    arrow_files,
    columns_of_files,
    files_beneath,
    files_of,
    has_rows_in_shard_order,
    open_file,
    parquet_row_groups,
    parts_of,
    token_of,
)
from ..network import is_of_network
from ..texts import redacted, without_secrets
from . import content
from .labels import some


__all__ = ["Shards", "StreamReadError", "Table", "arrow_reader", "distinct_values", "retrying"]

logger = logging.getLogger(__name__)

LASTING_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError)  # trying again does not help
RETRY_DELAYS = (1, 4, 16, 60, 120)  # seconds before each new try; `datasets` itself tries again before that
MAX_UNITS = 4096  # where there are more shards, neighbours are one unit
READ_ROWS = 64  # converted from Arrow at a time
COUNT_LOG_SECONDS = 30


class StreamReadError(RuntimeError):
    """A stream could not be read, also after several tries."""


class Table:
    """Rows of a map-style data set."""

    def __init__(self, rows: datasets.Dataset, columns: list[str]):
        self.rows, self.columns = rows.select_columns(columns), columns
        self._order: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.empty(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.rows[number]

    @cached_property
    def content(self) -> str | None:
        """What the rows are, in short; None where that is not known."""
        return content.of_rows(self.rows, self.columns[0])

    def place(self, number: int) -> dict[str, int]:
        """Nothing more is to be said of a row than its number."""
        return {}

    def order(self, seed: int, pass_number: int) -> np.ndarray:
        """Row numbers in the order of a pass."""
        if self._order[0] != (seed, pass_number):
            shuffled = np.random.default_rng((seed, pass_number)).permutation(len(self))
            self._order = ((seed, pass_number), shuffled)
        return self._order[1]


class Shards:
    """A stream as counted units, each one or more shards that are read as a whole, of pieces where reading can start.

    Args:
        stream: a `datasets.IterableDataset`.
        columns: those that are needed.
    """

    def __init__(self, stream: datasets.IterableDataset, columns: list[str]):
        self.pieces = _counted(stream)  # rows of each piece of each unit
        self.name = _name(stream)
        self.stream = stream.select_columns(columns) if stream.features else stream
        self.counts = [sum(unit) for unit in self.pieces]
        self.offsets = [0, *itertools.accumulate(self.counts)]

    def __len__(self) -> int:
        return self.offsets[-1]

    @cached_property
    def content(self) -> str | None:
        """What the files are, in short; None where they are not known."""
        return content.of_stream(self.stream) if files_beneath(self.stream) else None

    @property
    def commit(self) -> str | None:
        """Of the Hub, where the files are there."""
        return content.commit_of(self.stream)

    def place(self, number: int) -> dict[str, int]:
        """Shard, and row in it, of a row number."""
        unit = bisect.bisect_right(self.offsets, number) - 1
        return {"shard": unit, "shard_row": number - self.offsets[unit]}

    def order(self, seed: int, pass_number: int) -> list[int]:
        """Units in the order of a pass."""
        return np.random.default_rng((seed, pass_number)).permutation(len(self.counts)).tolist()

    def rows(self, order: list[int], position: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Row numbers and rows of the units in `order`, from a position in that sequence on."""
        for unit in order:
            if position >= self.counts[unit]:
                position -= self.counts[unit]
                continue
            for row_number, row in enumerate(self._unit(unit, position), start=position):
                yield self.offsets[unit] + row_number, row
            position = 0

    def read_twice(self, order: list[int], bounds: list[int]) -> int:
        """Rows that are read in vain where readers start at `bounds` (positions in the sequence) and not at a piece."""
        pieces = (rows for unit in order for rows in self.pieces[unit])
        starts = [0, *itertools.accumulate(pieces)]
        return sum(bound - starts[bisect.bisect_right(starts, bound) - 1] for bound in bounds)

    def _unit(self, unit: int, start: int) -> Iterator[dict[str, Any]]:
        """Rows of a unit from `start` on; what fails is opened again where it failed."""
        failures = 0
        while True:
            try:
                for row in self._open(unit, start):
                    yield row
                    start, failures = start + 1, 0
            except Exception as error:
                _wait_or_raise(error, failures, f"shard {unit} of {len(self.counts)}")
                failures += 1
                continue
            if start != self.counts[unit]:
                raise StreamReadError(
                    f"Shard {unit} of the stream has {start} rows and had {self.counts[unit]} when they were counted: its "
                    f"files have changed. Delete {str(_cache_folder())!r} and start a new run."
                )
            return

    def _open(self, unit: int, start: int) -> Iterator[dict[str, Any]]:
        units, pieces = len(self.counts), self.pieces[unit]
        stream = self.stream.shard(units, unit) if units > 1 else self.stream
        if start and len(pieces) > 1:
            bounds = [0, *itertools.accumulate(pieces)]
            first = bisect.bisect_right(bounds, start) - 1
            stream, start = stream.reshard(), start - bounds[first]
            parts = [stream.shard(len(pieces), piece) for piece in range(first, len(pieces))]
        else:
            parts = [stream]
        # `iter` with batches does not split by worker a second time.
        rows = (row for part in parts for batch in part.iter(batch_size=READ_ROWS) for row in _rows(batch))
        yield from itertools.islice(rows, start, None)


def distinct_values(dataset: Any, column: str) -> set[Any] | None:
    """The values of a column, without None; None where nothing but reading all columns would tell.

    Args:
        dataset: a `datasets.Dataset`, or a stream: local Parquet and Arrow files are read by column.
        column: of numbers or texts.
    """
    if isinstance(dataset, datasets.Dataset):
        return set(dataset.unique(column)) - {None}
    if not isinstance(dataset, datasets.IterableDataset):
        return None
    parquet, arrow = parquet_row_groups(dataset), arrow_files(dataset)
    files = [file for file, _ in parquet] if parquet is not None else arrow or []
    if not files or not all(os.path.isfile(file) for file in files):
        return None
    values: set[Any] = set()
    for file, groups in parquet or [(file, None) for file in files]:
        with pyarrow.memory_map(file) as mapped:
            if arrow is not None:
                table = arrow_reader(mapped).read_all()
            else:
                opened = pyarrow.parquet.ParquetFile(mapped)
                wanted = range(opened.num_row_groups) if groups is None else groups
                table = opened.read_row_groups(list(wanted), columns=[column])
            values.update(table.column(column).unique().to_pylist())
    return values - {None}


def arrow_reader(mapped: Any) -> Any:
    """A reader of a memory-mapped Arrow file, in either of its formats; what is not looked at is not read."""
    try:
        return pyarrow.ipc.open_stream(mapped)
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(mapped)


def _rows(batch: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))


def retrying(read: Callable[[], Any], what: str) -> Any:
    """The result of `read`, tried again after failures of the network.

    Raises:
        StreamReadError: it failed too often.
    """
    for failures in itertools.count():
        try:
            return read()
        except Exception as error:
            _wait_or_raise(error, failures, what)


def _wait_or_raise(error: Exception, failures: int, what: str) -> None:
    """Wait before another try; raise an error that another try would not mend, or after too many."""
    if isinstance(error, UnpicklingError):  # of a file `.pth` in an archive
        raise StreamReadError(
            f"{what.capitalize()} holds a pickle of more than tensors, which could run code: it is not read."
        ) from error
    if not is_of_network(error):
        raise error
    if failures >= len(RETRY_DELAYS) or isinstance(error, LASTING_ERRORS):
        told = redacted(f"Reading {what} failed {failures + 1} times, at last with {type(error).__name__}: {error}")
        raise StreamReadError(told) from without_secrets(error)
    delay = RETRY_DELAYS[failures]
    told = redacted(f"Reading {what} failed ({type(error).__name__}: {error})")
    logger.warning("%s; once more in %g s.", told, delay)
    time.sleep(delay)


# Counting


def _counted(stream: datasets.IterableDataset) -> list[list[int]]:
    """Rows of each piece of each unit of a stream, counted once and kept in the cache of `datasets`."""
    file = _cache_file(stream)
    if file is not None and file.exists():
        try:
            kept: list[list[int]] = json.loads(file.read_text(encoding="utf-8"))
            return kept
        except (OSError, ValueError) as error:
            logger.warning("The lengths in %r cannot be read (%s): the stream is counted again.", str(file), error)
    units = min(stream.num_shards, MAX_UNITS) if has_rows_in_shard_order(stream) else 1
    row_groups = _row_groups(stream)
    if row_groups is not None:
        grouped = np.array_split(np.arange(len(row_groups)), units)  # as `shard` groups them
        pieces = [[rows for shard in unit for rows in row_groups[shard]] for unit in grouped]
    else:
        pieces = _count_by_reading(stream, units)
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps(pieces), encoding="utf-8")
            unfinished.replace(file)
        except OSError as error:
            logger.warning("The lengths of the stream cannot be kept in %r (%s).", str(file.parent), error)
    return pieces


def _name(stream: datasets.IterableDataset) -> str:
    """What a stream's files are called, in their order, in short: processes and resumed runs must find the same."""
    lists = {key: values for key, values in files_of(stream).items() if isinstance(values, (list, tuple))}
    names = [os.path.basename(str(value)) for key in sorted(lists) for value in lists[key] if "iterator" not in key]
    return hashlib.blake2b("/".join(names).encode(), digest_size=4).hexdigest()


def _row_groups(stream: datasets.IterableDataset) -> list[list[int]] | None:
    """Rows of each row group of each file of a plain Parquet stream, from its footers; None for others.

    Raises:
        ValueError: a file has the names of a column's classes in another order than the stream.
    """
    files, token = parquet_row_groups(stream), token_of(stream)
    if files is None:
        return None
    columns = columns_of_files(stream) or {}

    def read(file: str, wanted: tuple[int, ...] | None) -> list[int]:
        with open_file(file, token) as opened:
            metadata = pyarrow.parquet.read_metadata(opened)
        _check_order(file, datasets.Features.from_arrow_schema(metadata.schema.to_arrow_schema()), columns)
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        return rows if wanted is None else [sum(rows[group] for group in wanted)]

    def retried(file: tuple[str, tuple[int, ...] | None]) -> list[int]:
        return retrying(lambda: read(*file), f"the footer of {file[0]}")

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(retried, files))


def _check_order(file: str, own: datasets.Features, columns: Mapping[str, Any]) -> None:
    """Refuse a file whose labels would be read by names in another order than its own."""
    for column, feature in own.items():
        names, read_as = (getattr(kind, "names", None) or [] for kind in (feature, columns.get(column)))
        if names != read_as and sorted(names) == sorted(read_as):
            raise ValueError(
                f"{file!r} has the classes of its column {column!r} in another order ({some(names)}) than the stream, which goes by "
                f"its first file or its card ({some(read_as)}): its labels would mean others. Load it as a data set of its own."
            )


def _count_by_reading(stream: datasets.IterableDataset, units: int) -> list[list[int]]:
    logger.warning("The length of the stream is not in its metadata: it is read once to count its images.")
    logged, total, pieces = time.monotonic(), 0, []

    def count(unit: int) -> int:
        part = stream.shard(units, unit) if units > 1 else stream
        return sum(len(next(iter(batch.values()))) for batch in part.iter(batch_size=READ_ROWS))

    for unit in range(units):
        pieces.append([retrying(lambda: count(unit), f"shard {unit} of {units}")])  # noqa: B023
        total += pieces[-1][0]
        if time.monotonic() - logged > COUNT_LOG_SECONDS:
            logged = time.monotonic()
            logger.warning("Counted %d images so far, in %d of %d shards.", total, unit + 1, units)
    return pieces


def _cache_folder() -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "scalekd_lengths"


def _cache_file(stream: datasets.IterableDataset) -> Path | None:
    """Where the counts are kept: by what the stream is made of, and by size and time of its local files."""
    try:
        made_of = Hasher.hash(parts_of(stream))
    except Exception:  # whatever a user's function holds that cannot be hashed
        return None
    names = [value for values in files_of(stream).values() if isinstance(values, list) for value in values]
    local = [Path(name).stat() for name in names if isinstance(name, str) and os.path.exists(name)]
    state = Hasher.hash([(file.st_size, file.st_mtime_ns) for file in local])
    return _cache_folder() / f"{made_of}-{state}.json"
