"""Which images can be decoded here: those that Pillow knows, by itself or by a plugin that is installed.

The plugins are registered where this module is imported, and so in every process that decodes.
"""

from __future__ import annotations

import logging
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec

from PIL import Image, features


__all__ = ["PROGRAM", "image_endings", "package_for_bytes", "package_for_ending"]

logger = logging.getLogger(__name__)

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
PROGRAM = "EPS"  # the one format that Pillow gives to another program, Ghostscript, to be run
JXL_STARTS = (b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n")


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
    return (
        kind in Image.OPEN
        and kind != PROGRAM
        and (kind != "AVIF" or "pillow_avif" in sys.modules or bool(features.check("avif")))
    )


@cache
def image_endings() -> set[str]:
    """Endings, in small letters, of the files that can be decoded."""
    return {ending for ending, kind in Image.registered_extensions().items() if _is_known(kind)}


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


_register()
