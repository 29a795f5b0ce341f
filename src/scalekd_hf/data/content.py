"""What a data set holds, in short, so that a run does not go on with another: the same on every machine, and cheap to find."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute

from ..borrowed.datasets import chosen_rows, files_beneath


__all__ = ["commit_of", "of_rows", "of_stream"]

END = 4096  # bytes of a file, at its beginning and at its end: a Parquet file ends in the sizes and the bounds of its columns
SAMPLED = 32  # rows whose images are read
COMMIT = re.compile(r"@[0-9a-f]{40}/")


def of_stream(stream: datasets.IterableDataset) -> str:
    """By name, size, beginning and end of local files; of others by name, and on the Hub by commit."""
    digest = hashlib.blake2b(digest_size=8)
    for place in files_beneath(stream):
        _add(digest, os.path.basename(place).split("?")[0])
        if os.path.isfile(place):
            with open(place, "rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                _add(digest, size, opened.read(END))
                opened.seek(max(0, size - END))
                _add(digest, opened.read(END))
        elif commit := COMMIT.search(place):
            _add(digest, commit[0])
    return digest.hexdigest()


def commit_of(stream: datasets.IterableDataset) -> str | None:
    """The commit of the Hub that a stream is read at; None where it is not read from there."""
    found = (COMMIT.search(place) for place in files_beneath(stream))
    return next((match[0].strip("@/") for match in found if match), None)


def of_rows(rows: datasets.Dataset, image_column: str) -> str:
    """By all labels, and the names and sizes of all images; some images are read whole. A user's transform is not run."""
    digest = hashlib.blake2b(digest_size=8)
    chosen = chosen_rows(rows)
    for column in rows.data.columns:
        for part in _gist(column, chosen):
            digest.update(part)
    stored = rows.with_format("arrow")
    for number in np.linspace(0, len(rows) - 1, min(SAMPLED, len(rows)), dtype=int).tolist():
        _add(digest, _image(stored[number].to_pylist()[0].get(image_column)))
    return digest.hexdigest()


def _gist(values: Any, chosen: Any) -> Iterator[bytes]:
    """What stands for the chosen ones of the values of an Arrow column, however it is cut into chunks; no image is read."""
    kind = values.type
    if pyarrow.types.is_struct(kind):
        for field in kind:
            yield from _gist(pyarrow.compute.struct_field(values, field.name), chosen)
    elif pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
        yield from _gist(pyarrow.compute.binary_length(values), chosen)
    elif pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        names = pyarrow.compute.replace_substring_regex(values, r"(?s)^.*[/\\]", "")  # of files, wherever they lie
        yield "".join(f"{name}\0" for name in _chosen(names, chosen).to_pylist()).encode("utf-8", "surrogatepass")
    elif pyarrow.types.is_integer(kind):
        yield _chosen(values.cast(pyarrow.int64()).fill_null(-1), chosen).to_numpy().tobytes()


def _chosen(values: Any, chosen: Any) -> Any:
    return values if chosen is None else values.take(chosen)


def _image(value: Any) -> Any:
    if isinstance(value, dict) and value.get("bytes") is not None:
        return value["bytes"]
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, (str, Path)):
        return str(value)
    return Path(path).read_bytes() if os.path.isfile(path) else os.path.basename(path)


def _add(digest: Any, *values: Any) -> None:
    for value in values:
        content = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little") + content)
