"""Which images are decoded: those of the formats listed here that Pillow knows, by itself or by a plugin that is installed.

Pillow opens more than images of data sets, some of it by programs of others (EPS by Ghostscript): none of it is tried. The plugins are registered where this module is imported, and so in every process that decodes.
"""

from __future__ import annotations

import logging
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec

from PIL import Image, features


__all__ = [
    "FORMATS",
    "foreign_format",
    "image_endings",
    "jxl_size",
    "package_for_bytes",
    "package_for_ending",
    "readable_formats",
]

logger = logging.getLogger(__name__)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF", "JXL")  # by Pillow's names
PLUGINS = {
    "pillow_heif": "register_heif_opener",
    "pi_heif": "register_heif_opener",
    "pillow_jxl": "",
    "pillow_avif": "",
}
# By Pillow's name of the format: the package that decodes it, and the endings of its files.
PACKAGES = {
    "HEIF": ("pillow-heif", (".heic", ".heif", ".hif")),
    "JXL": ("pillow-jxl-plugin", (".jxl",)),
    "AVIF": ("pillow-avif-plugin", (".avif", ".avifs")),
}
JXL_CODE = b"\xff\x0a"
JXL_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # of width to height
JXL_STARTS = (JXL_CODE, b"\x00\x00\x00\x0cJXL \r\n\x87\n")


def _register() -> None:
    Image.init()
    for module, function in PLUGINS.items():
        if find_spec(module) is None or (module == "pillow_avif" and _is_known("AVIF")):
            continue
        try:
            plugin = import_module(module)
            if function:
                getattr(plugin, function)()
        except Exception as error:  # a library that it needs, of all kinds
            logger.warning("The plugin %s of Pillow cannot be loaded (%s): its images are not read.", module, error)


def _is_known(kind: str) -> bool:
    """Whether images of a format can be decoded; Pillow may have been built without AVIF, and have its name all the same."""
    return kind in Image.OPEN and (kind != "AVIF" or "pillow_avif" in sys.modules or bool(features.check("avif")))


def readable_formats() -> list[str]:
    """The formats that Pillow is to try, by its names."""
    return [kind for kind in FORMATS if kind in Image.OPEN]


def foreign_format(start: bytes) -> str | None:
    """The format that is not read and that content which starts like this may have, by Pillow's name of it."""
    start = start[:16].ljust(16, b"\x00")
    if start.startswith(b"%PDF"):
        return "PDF"
    others = ((kind, accept) for kind, (_, accept) in Image.OPEN.items() if kind not in FORMATS and accept is not None)
    return next((kind for kind, accept in others if accept(start) is True), None)


@cache
def image_endings() -> set[str]:
    """Endings, in small letters, of the files that can be decoded."""
    return {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS and _is_known(kind)}


def package_for_ending(ending: str) -> str | None:
    """The package without which files of that ending are not decoded; None for other endings, or where it is installed."""
    found = ((package, kind) for kind, (package, endings) in PACKAGES.items() if ending in endings)
    return next((package for package, kind in found if not _is_known(kind)), None)


def package_for_bytes(content: bytes) -> str | None:
    """The package without which an encoded image is not decoded; None for others, or where it is installed."""
    kind = None
    if content.startswith(JXL_STARTS):
        kind = "JXL"
    elif content[4:8] == b"ftyp":
        brands = content[8 : min(int.from_bytes(content[:4], "big"), 64)]
        kind = (
            "AVIF"
            if b"avif" in brands or b"avis" in brands
            else "HEIF"
            if b"hei" in brands or b"mif1" in brands
            else None
        )
    return PACKAGES[kind][0] if kind is not None and not _is_known(kind) else None


def jxl_size(content: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG XL, by its header (ISO/IEC 18181-1); None of other content, or where it cannot be read.

    Its plugin decodes what it opens, before Pillow looks at the size.
    """
    start = 0 if content.startswith(JXL_CODE) else _jxl_code(content)
    if start is None or content[start : start + 2] != JXL_CODE:
        return None
    bits = int.from_bytes(content[start + 2 : start + 14], "little")

    def read(count: int) -> int:
        nonlocal bits
        value, bits = bits & ((1 << count) - 1), bits >> count
        return value

    eighths = read(1)

    def side() -> int:
        return 8 * (read(5) + 1) if eighths else read((9, 13, 18, 30)[read(2)]) + 1

    height, ratio = side(), read(3)
    if ratio == 0:
        return side(), height
    wide, high = JXL_RATIOS[ratio - 1]
    return height * wide // high, height


def _jxl_code(content: bytes) -> int | None:
    """Where in the boxes of a JPEG XL file its code begins."""
    place = 0
    while place + 16 <= len(content):
        length, kind, header = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8], 8
        if length == 1:
            length, header = int.from_bytes(content[place + 8 : place + 16], "big"), 16
        if kind in (b"jxlc", b"jxlp"):
            return place + header + 4 * (kind == b"jxlp")
        if length < header:
            return None
        place += length
    return None


_register()
