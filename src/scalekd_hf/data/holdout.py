"""A share of the images held out for evaluation, where a data set has no split for it.

Which images these are is up to what is in their files: the same for teacher, student and evaluation, whatever the files
are called and in whatever order they come; copies of an image are on one side.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import datasets


__all__ = ["held_out_share", "hold_out", "refuse_stream"]

PART = 4096  # bytes at the beginning and at the end of a file that tell it from others, with its length
PLAIN = (b"BM", b"II*\x00", b"MM\x00*", b"P5", b"P6")  # how BMP, TIFF and PNM begin

logger = logging.getLogger(__name__)


def held_out_share(split: str) -> float | None:
    """The share that a split such as "0.1" means; None for a name.

    Raises:
        ValueError: a number that is no share.
    """
    try:
        share = float(split)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise ValueError(f"`eval_split` {split!r} is a share of the images: it must lie between 0 and 1.")
    return share


def refuse_stream(share: float) -> NoReturn:
    """A stream is not divided: all of it would have to be read first."""
    raise ValueError(f"`eval_split` {share:g} holds out images of a whole data set: set `streaming` to false.")


def hold_out(dataset: Any, share: float) -> tuple[Any, Any]:
    """Divide a data set into what is trained on and what is held out.

    Args:
        dataset: a map-style `datasets.Dataset` with a column of images.
        share: of the images that is held out, nearly.

    Raises:
        ValueError: a stream, no column of images, or one part would be empty.
    """
    if not isinstance(dataset, datasets.Dataset):
        refuse_stream(share)
    column = next((name for name, kind in dataset.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise ValueError(f"`eval_split` {share:g} needs a column of images; the columns are {list(dataset.features)}.")
    files = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    is_out = [_place(row[column]) < share for row in files]
    parts = [[row for row, out in enumerate(is_out) if out == which] for which in (False, True)]
    if not all(parts):
        raise ValueError(
            f"`eval_split` {share:g} of {len(is_out)} images leaves one part empty. Choose another share."
        )
    train, held_out = (dataset.select(rows) for rows in parts)
    _warn_of_missing_classes(dataset, train, held_out)
    logger.info("Held out for evaluation: %d of %d images.", len(held_out), len(dataset))
    return train, held_out


def _place(image: dict[str, Any] | None) -> float:
    """Where an image lies between 0 and 1, by its content."""
    content = (image or {}).get("bytes")
    if content is None and image is not None:
        with Path(str(image["path"])).open("rb") as file:
            gist, size = _gist(file)
    else:
        gist, size = _gist(io.BytesIO(content or b""))
    digest = hashlib.blake2b(gist + size.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _gist(file: BinaryIO) -> tuple[bytes, int]:
    """A file's beginning and end, of formats without compression (whose ends may be a common border) parts between, and its size."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    gist = file.read(PART)
    if size > PART:
        file.seek(max(PART, size - PART))
        gist += file.read(PART)
    for eighth in range(1, 8) if gist.startswith(PLAIN) else ():
        file.seek(size * eighth // 8)
        gist += file.read(PART)
    return gist, size


def _warn_of_missing_classes(dataset: Any, train: Any, held_out: Any) -> None:
    for name, kind in dataset.features.items():
        if isinstance(kind, datasets.ClassLabel):
            for part, what in ((train, "to train on"), (held_out, "to evaluate on")):
                missing = sorted(set(dataset[name]) - set(part[name]))
                if missing:
                    logger.warning("There is no image %s of %s.", what, ", ".join(map(str, kind.int2str(missing))))
