"""Of `datasets`: how it opens files, and what a stream is made of.

A stream does not tell publicly which files it reads, nor whether it shuffles. What it is made of is a chain of iterables, each
around the one before, of which the innermost knows the files.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import datasets
from datasets.utils.file_utils import xopen


__all__ = [
    "arrow_files",
    "chosen_rows",
    "columns_of_files",
    "files_beneath",
    "files_of",
    "has_rows_in_shard_order",
    "open_file",
    "parquet_row_groups",
    "parts_of",
    "token_of",
    "unshuffled",
]

# Kinds of iterables whose shards, one after the other, are their rows in their order. That is not so after `take`, `skip`,
# `shuffle` or interleaving.
IN_SHARD_ORDER = {
    "ArrowExamplesIterable",
    "ExamplesIterable",
    "FilteredExamplesIterable",
    "FormattedExamplesIterable",
    "MappedExamplesIterable",
    "RebatchedArrowExamplesIterable",
    "SelectColumnsIterable",
    "VerticallyConcatenatedMultiSourcesExamplesIterable",
}
SHUFFLED = {"BufferShuffledExamplesIterable", "InterleavedShardsExamplesIterable"}
PASSED_ON = {"RebatchedArrowExamplesIterable", "SelectColumnsIterable"}  # rows as they are

logger = logging.getLogger(__name__)


def open_file(path: str, token: str | bool | None = None) -> Any:
    """Open a file to read, here, on the Hub, behind a proxy or in an archive, as a stream of it would."""
    return xopen(path, "rb", download_config=datasets.DownloadConfig(token=token))


def parts_of(stream: datasets.IterableDataset) -> Any:
    """What a stream is made of: the outermost of its iterables."""
    return stream._ex_iterable


def has_rows_in_shard_order(stream: datasets.IterableDataset) -> bool:
    """Whether the shards of a stream, one after the other, are its rows in their order."""
    waiting = [parts_of(stream)]
    while waiting:
        examples = waiting.pop()
        if type(examples).__name__ not in IN_SHARD_ORDER:
            return False
        inner = [examples.ex_iterable] if hasattr(examples, "ex_iterable") else getattr(examples, "ex_iterables", [])
        waiting.extend(inner)
    return True


def unshuffled(stream: datasets.IterableDataset) -> datasets.IterableDataset:
    """A stream without a shuffle of its own, which the trainer does, for every pass anew and so that it can resume."""
    examples = parts_of(stream)
    if type(examples).__name__ != "BufferShuffledExamplesIterable":
        return stream
    while type(examples).__name__ in SHUFFLED:
        examples = examples.ex_iterable
    logger.warning("The stream's own `shuffle()` is left out: the trainer shuffles each pass (`shuffle_buffer_size`).")
    stream = copy.copy(stream)
    stream._ex_iterable = examples
    return stream


def files_of(stream: datasets.IterableDataset) -> dict[str, Any]:
    """What a stream that passes rows on as they are reads, by the names of its builder's arguments, such as `files`."""
    return getattr(_innermost(stream), "kwargs", {})


def files_beneath(stream: datasets.IterableDataset) -> list[str]:
    """The files that a stream reads, whatever is made of its rows since; none where it is made in other ways."""
    waiting, found = [parts_of(stream)], []
    while waiting:
        examples = waiting.pop()
        lists = (values for _, values in sorted(getattr(examples, "kwargs", {}).items()) if isinstance(values, list))
        found += [value for values in lists for value in values if isinstance(value, str)]
        inner = [examples.ex_iterable] if hasattr(examples, "ex_iterable") else getattr(examples, "ex_iterables", [])
        waiting.extend(reversed(inner))
    return found


def parquet_row_groups(stream: datasets.IterableDataset) -> list[tuple[str, tuple[int, ...] | None]] | None:
    """The files of a plain Parquet stream, and which row groups of each it reads, None for all; None for other streams."""
    builder, files = _builder(stream), files_of(stream)
    if getattr(builder, "name", None) != "parquet" or builder.config.filters is not None or "files" not in files:
        return None
    return list(zip(files["files"], files["row_groups_list"], strict=True))


def arrow_files(stream: datasets.IterableDataset) -> list[str] | None:
    """The files of a plain stream of Arrow files; None for other streams."""
    return files_of(stream).get("files") if getattr(_builder(stream), "name", None) == "arrow" else None


def columns_of_files(stream: datasets.IterableDataset) -> datasets.Features:
    """What the files of a plain stream are read as, whatever was cast since: inferred from the first of them, or from a card."""
    builder = _builder(stream)
    return builder.info.features if builder is not None and builder.config.features is None else datasets.Features()


def token_of(stream: datasets.IterableDataset) -> str | bool | None:
    """The token for the Hub that a stream was opened with."""
    return getattr(_builder(stream), "token", None)


def _innermost(stream: datasets.IterableDataset) -> Any:
    examples = parts_of(stream)
    while type(examples).__name__ in PASSED_ON:
        examples = examples.ex_iterable
    return examples


def _builder(stream: datasets.IterableDataset) -> Any:
    return getattr(getattr(_innermost(stream), "generate_tables_fn", None), "__self__", None)


def chosen_rows(rows: datasets.Dataset) -> Any:
    """Which rows of its table a data set has, and in which order, as an Arrow column; None where it has all in theirs."""
    return None if rows._indices is None else rows._indices.column(0)
