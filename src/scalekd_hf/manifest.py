"""What the files of a checkpoint were when they were written, so that damage is found before anything of them is loaded."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash


__all__ = ["MANIFEST_FILE", "STUDENT_FILE", "check_file", "damage", "digest", "seal"]

MANIFEST_FILE = "scalekd_manifest.json"
STUDENT_FILE = "model.safetensors"  # the weights
ALGORITHM = "xxh3_128"  # finds damage, at the speed of memory; it is no signature
CHUNK = 1 << 20  # bytes
THREADS = 4


def seal(folder: Path) -> None:
    """Have the files of a folder on the disk, and write down their sizes and digests in a file beside them.

    Args:
        folder: whole, and not yet in its place: a machine that loses power does not lose what is in a sealed one.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST_FILE)
    with ThreadPoolExecutor(2 * THREADS) as pool:  # they are read from memory while the disk is waited for
        flushed, described = [pool.submit(_flush, file) for file in files], list(pool.map(_size_and_digest, files))
        for file in flushed:
            file.result()
    names = [file.relative_to(folder).as_posix() for file in files]
    manifest = folder / MANIFEST_FILE
    manifest.write_text(
        json.dumps({"algorithm": ALGORITHM, "files": dict(zip(names, described, strict=True))}, indent=1),
        encoding="utf-8",
    )
    _flush(manifest)


def damage(folder: str | Path) -> str:
    """Which file of a folder is not what it was when it was sealed, and why, in words; "" where all are.

    Files that came later are passed over. A folder without a manifest, of before November 2026, has no damage that could be found.
    """
    folder = Path(folder)
    if not (folder / MANIFEST_FILE).exists():
        return ""
    try:
        described = _read(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{MANIFEST_FILE} is damaged ({type(error).__name__}: {error})"
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: _damage(folder / name, *described[name]), described)
        return next((f"{name} {what}" for name, what in zip(described, found, strict=True) if what), "")


def check_file(file: Path) -> None:
    """Refuse a file that is not what the manifest beside it says, where there is one.

    Raises:
        ValueError: with the file's name.
    """
    if not (file.parent / MANIFEST_FILE).exists():
        return
    try:
        described = _read(file.parent).get(file.name)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{str(file.parent / MANIFEST_FILE)!r} is damaged ({error}). Use another checkpoint."
        ) from error
    if described is not None and (what := _damage(file, *described)):
        raise ValueError(f"{str(file)!r} {what}. Use another checkpoint, or fetch the file again.")


def digest(file: Path, state: Any) -> str:
    """Of a file's content, read piece by piece.

    Args:
        file: to read.
        state: a new one of the wanted kind, such as `hashlib.sha256()`.
    """
    piece = memoryview(bytearray(CHUNK))
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(piece):
            state.update(piece[:count])
    return str(state.hexdigest())


def _read(folder: Path) -> dict[str, tuple[int, str]]:
    """Size in bytes and digest of each file, by its name."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    if manifest["algorithm"] != ALGORITHM:
        raise ValueError(f"digests of the kind {manifest['algorithm']!r}; this version knows {ALGORITHM!r}")
    if outside := [name for name in manifest["files"] if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ValueError(f"it names files of other folders: {outside[0]!r}")
    return {str(name): (int(size), str(code)) for name, (size, code) in manifest["files"].items()}


def _size_and_digest(file: Path) -> tuple[int, str]:
    return file.stat().st_size, digest(file, xxhash.xxh3_128())


def _damage(file: Path, size: int, code: str) -> str:
    try:
        found = file.stat().st_size
        if found != size:
            return f"has {found} bytes, not the {size} that were written"
        return "" if digest(file, xxhash.xxh3_128()) == code else "holds other bytes than were written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error})"


def _flush(file: Path) -> None:
    with file.open("rb+") as opened:  # Windows flushes only what may be written
        os.fsync(opened.fileno())
