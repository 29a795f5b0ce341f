"""Checkpoints of others, in pickle: tensors and plain containers are read, nothing else is made, and nothing is run."""

from __future__ import annotations

import pickle
import tarfile
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..manifest import check_file


__all__ = ["read_foreign"]

# Functions that make tensors of storages, by the names that pickles have for them; `torch.load` itself knows the storages.
MAKERS = {
    *(f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "parameter")),
    "torch.serialization._get_layout",
}
TYPES = {"collections.OrderedDict": OrderedDict, "torch.Size": torch.Size, "torch.device": torch.device}
PROGRAM = "constants.pkl"  # which TorchScript archives have


class _Broken(ValueError):
    """A file that is said to be damaged, or of another kind."""


class _Unknown(dict):
    """Stands in the place of an object that is not made: it keeps what is put into it, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Unknown:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """As of a list."""

    def extend(self, items: Any) -> None:
        """As of a list."""

    def add(self, item: Any) -> None:
        """As of a set."""

    __hash__ = object.__hash__  # type: ignore[assignment]


class _Unpickler(pickle.Unpickler):
    """Knows what tensors are made of; all else becomes `_Unknown`, whatever it is called."""

    passed_over: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name in a pickle; nothing of it is imported but of torch."""
        full = f"{module}.{name}"
        if full in TYPES:
            return TYPES[full]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if full in MAKERS:
            return partial(super().find_class(module, name))  # of which a pickle may set attributes
        self.passed_over.add(full)
        return _Unknown


def read_foreign(file: str | Path) -> tuple[Any, list[str]]:
    """What a checkpoint file of torch or safetensors holds, on the CPU.

    Args:
        file: of `torch.save`, in its present or its former format, or `.safetensors`.

    Returns:
        Its content, with an empty mapping in the place of each object that is no tensor, number, text or plain container, and the
        names of the kinds of such objects.

    Raises:
        ValueError: a file that is missing, damaged, or of another kind.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(
            f"`checkpoint` {str(file)!r} is no file. Give the path of a .pth, .pt, .bin or .safetensors file."
        )
    check_file(file)
    try:
        if file.suffix == ".safetensors":
            return load_file(file), []
        return _read(file)
    except _Broken:
        raise
    except Exception as error:  # whatever a damaged or made-up file leads to
        raise _Broken(_broken(file, error)) from error


def _read(file: Path) -> tuple[Any, list[str]]:
    refused = ""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(name.rpartition("/")[2] == PROGRAM for name in archive.namelist()):
                refused = "it is a TorchScript program, which would have to be run"
    elif tarfile.is_tarfile(file):
        refused = "it is a tar archive, of torch before 0.1.10"
    if refused:
        raise _Broken(_broken(file, refused))
    try:
        return torch.load(file, map_location="cpu", weights_only=True), []
    except Exception:  # it holds other objects, or is damaged
        pass

    class Reader(_Unpickler):
        """With a list of its own."""

        passed_over: set[str] = set()

    class Inert:
        """As `torch.load` wants the module `pickle`."""

        Unpickler = Reader

        @staticmethod
        def load(opened: Any, **options: Any) -> Any:
            """One object of a file."""
            return Reader(opened, **options).load()

    content = torch.load(file, map_location="cpu", weights_only=False, pickle_module=Inert)
    return content, sorted(Reader.passed_over)


def _broken(file: Path, reason: Any) -> str:
    return f"`checkpoint` {str(file)!r} cannot be read: {str(reason) or type(reason).__name__}. Fetch it again; a file that needs a program of its own is never loaded here."
