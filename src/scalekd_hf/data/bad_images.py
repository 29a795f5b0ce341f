"""Images that could not be decoded: counted, listed in a file, and too many of them an error."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from ..texts import one_line, redacted
from .decoding import BadImageError


__all__ = ["BadImages", "TooManyBadImagesError", "describe", "where"]

logger = logging.getLogger(__name__)

SHOWN = 10


class TooManyBadImagesError(ValueError):
    """More images than `max_bad_images` allows could not be decoded."""

    @classmethod
    def of(
        cls, bad: list[dict[str, Any]], share: float, images: int, file: Path | None = None
    ) -> TooManyBadImagesError:
        """The error, with the first of the images."""
        shown = ", ".join(f"{where(entry)} ({entry['kind']})" for entry in bad[:SHOWN])
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        return cls(
            f"{len(bad)} images cannot be decoded, more than `max_bad_images` ({share:g}) of {images} allows: {shown}{more}. "
            f"{f'All are listed in {str(file)!r}. ' if file else ''}Mend the data, or raise `max_bad_images`."
        )


def describe(error: BadImageError, number: int, place: dict[str, int], value: Any) -> dict[str, Any]:
    """What is known of an image that could not be decoded: its row, its shard where there are shards, its file and why."""
    path = value.get("path") if isinstance(value, dict) else value
    file = {"file": redacted(path)} if isinstance(path, (str, Path)) else {}
    return {"row": number, **place, **file, "kind": error.kind, "reason": redacted(error)}


def where(entry: dict[str, Any]) -> str:
    """How an image is found again, in words: by its file, or by its row, and where there are shards by the row in its own."""
    file = one_line(entry.get("file", ""))
    if "://" in file or (file and Path(entry["file"]).is_file()):
        return file
    shard = f" (row {entry['shard_row']} of shard {entry['shard']})" if "shard" in entry else ""
    return f"row {entry['row']}{shard}{f', {file}' if file else ''}"


class BadImages:
    """Counts the undecodable images of this process by kind, each once, and lists them in a file of JSON lines.

    Args:
        file: made with the first of them.
        share: of a pass that may be undecodable (`max_bad_images`).
    """

    def __init__(self, file: Path, share: float):
        self.file, self.share = file, share
        self.kinds: Counter[str] = Counter()
        self._listed: set[tuple[int, str | None]] | None = None  # rows and files of its data
        self._by_pass: dict[int, list[dict[str, Any]]] = {}

    def add(self, data: str, entries: list[dict[str, Any]]) -> None:
        """Take in what a batch said; `data` names the data set, always the same."""
        if self._listed is None:
            lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
            listed = [entry for entry in map(json.loads, lines) if entry["data"] == data]
            self._listed = {(entry["row"], entry.get("file")) for entry in listed}
            self.kinds.update(entry["kind"] for entry in listed)
        for entry in entries:
            # Workers end a pass at different times, so that two passes mingle about its end.
            self._by_pass.setdefault(entry.get("pass", 0), []).append(entry)
            for ended in [number for number in self._by_pass if number < max(self._by_pass) - 1]:
                del self._by_pass[ended]
            key = (entry["row"], entry.get("file"))
            if key not in self._listed:
                self._listed.add(key)
                self.kinds[entry["kind"]] += 1
                self._list({"data": data, **entry})
                if len(self._listed) <= SHOWN:
                    logger.warning("Left out of the %s data: %s. %s", data, where(entry), one_line(entry["reason"]))

    def _list(self, entry: dict[str, Any]) -> None:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(entry) + "\n")
        except OSError as error:  # it counts all the same; a full disk ends a run where it would lose a checkpoint
            logger.warning("%r lacks an image that was left out (%s).", str(self.file), error)

    def restart(self) -> None:
        """A new pass over the data begins."""
        self._by_pass = {}

    def check(self, images: int, processes: int) -> None:
        """Refuse to go on where this process met too many in one pass over `images` images.

        Raises:
            TooManyBadImagesError: with the first of them.
        """
        for bad in self._by_pass.values():
            if len(bad) > (max(1, self.share * images / processes) if self.share else 0):
                raise TooManyBadImagesError.of(bad, self.share, images // processes, self.file)

    def summary(self) -> str:
        """Number of each kind, in words; empty without any."""
        return ", ".join(f"{kind}: {count}" for kind, count in self.kinds.most_common())
