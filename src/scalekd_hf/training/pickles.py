"""What engines pickle in a checkpoint: loading it runs whatever it names, so it may name only what they write themselves.

DeepSpeed and torch's distributed checkpoints load these files without `weights_only`.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.serialization import get_unsafe_globals_in_checkpoint

from ..models.saving import broken_file


__all__ = ["check_pickles"]

DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
METADATA = {
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")  # the latter as Python 3.13 writes them
        for name in ("PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
    ),
    *("torch.Size", "torch.serialization._get_layout", "torch.distributed.checkpoint.filesystem._StorageInfo"),
    *(
        f"torch.distributed.checkpoint.metadata.{name}"
        for name in (
            *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
            *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    ),
}


def check_pickles(folder: Path) -> None:
    """Refuse a checkpoint of DeepSpeed or FSDP that would run something when it is loaded.

    Raises:
        ValueError: with the file, and what it names.
    """
    for file in sorted(folder.glob("global_step*/**/*.pt")):
        _check(folder, file.relative_to(folder), _named(file))
    for file in sorted(folder.glob("*/.metadata")):
        name = file.relative_to(folder)
        try:
            with file.open("rb") as opened:
                metadata = _Metadata(opened).load()
            kinds, stored = metadata.state_dict_metadata, metadata.storage_data
            objects = [part for key, part in stored.items() if isinstance(kinds[key.fqn], BytesStorageMetadata)]
        except Exception as error:  # whatever a damaged pickle leads to
            raise ValueError(broken_file(folder, str(name), error)) from error
        for part in objects:
            with (file.parent / part.relative_path).open("rb") as opened:
                opened.seek(part.offset)
                _check(folder, name.parent / part.relative_path, _named(io.BytesIO(opened.read(part.length))))


def _named(file: Any) -> Iterable[str]:
    try:
        return get_unsafe_globals_in_checkpoint(file)
    except Exception as error:  # as above
        return [f"nothing that can be read: {error}"]


def _check(folder: Path, name: Path, named: Iterable[str]) -> None:
    if foreign := sorted(set(named) - DEEPSPEED):
        raise ValueError(
            f"The checkpoint {str(folder)!r} is not loaded: {str(name)!r} pickles {', '.join(foreign)}, which no run of ours writes and "
            "which could run code. Begin a new run from its student, which is in safetensors; where you trust it, call "
            "`torch.serialization.add_safe_globals` with them first."
        )


class _Metadata(pickle.Unpickler):
    """Reads the list of parts of a distributed checkpoint, and knows nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of that name.

        Raises:
            UnpicklingError: it has no place in such a list.
        """
        is_kind = module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout))
        if is_kind or ("." not in name and f"{module}.{name}" in METADATA):
            return super().find_class(module.removesuffix("._local"), name)
        raise pickle.UnpicklingError(f"{module}.{name}")
