"""Data sets from names, folders and files."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import datasets
import huggingface_hub
import pyarrow.parquet

from ..network import lost_connection
from ..texts import redacted, without_secrets
from .folders import ALL, FOLDERS, read_folder, split_of
from .holdout import held_out_share, hold_out
from .labels import some
from .sources import arrow_reader


__all__ = ["DataArguments", "count_images", "load_data", "load_local", "load_split", "matching_files"]

AGAIN = "The same command tries again; `--streaming true` reads while training, and tries again by itself."
UNUSED_FILE = "unused_files.jsonl"
FORMATS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}


@dataclass
class DataArguments:
    """Where the images come from.

    Args:
        dataset: data set on the Hub, or a local folder that `datasets.load_dataset` understands.
        train_files, eval_files: glob patterns, or URLs, of Parquet, WebDataset or Arrow files, instead of `dataset`.
        dataset_config, revision: configuration and revision (branch, tag or commit) of the data set.
        folders: what the folders in a folder of images are, "classes" or "splits", where that is not clear from their names.
        cache_dir: where downloads are kept; by default the cache of `datasets`.
        train_split, eval_split: its splits; `none` to evaluate on nothing. A share such as 0.1 for `eval_split` holds out so
            much of `train_split`, see `hold_out`.
        streaming: read while training, without a download first; a local folder of images is never copied anyway.
    """

    dataset: str | None = field(default=None, metadata={"help": "Data set on the Hub, or a local folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    revision: str | None = field(default=None, metadata={"help": "Revision of the data set: branch, tag or commit."})
    folders: str = field(
        default="auto", metadata={"help": "What the folders of a folder of images are.", "choices": list(FOLDERS)}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads of the data set are kept."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="validation", metadata={"help": "Split to evaluate on, or a share to hold out."})
    train_files: str | None = field(default=None, metadata={"help": "Files to train on, instead of `dataset`."})
    eval_files: str | None = field(default=None, metadata={"help": "Files to evaluate on, instead of `dataset`."})
    streaming: bool = field(default=True, metadata={"help": "Read while training, without a download first."})


def load_data(arguments: DataArguments, list_in: str | Path | None = None) -> tuple[Any, Any]:
    """The training and the evaluation data set.

    Args:
        arguments: where the images come from.
        list_in: folder in which the files of a folder of images that are not used are listed, in `unused_files.jsonl`.

    Raises:
        ValueError: no source, files that do not exist, or a data set that cannot be loaded.
    """
    if arguments.dataset is None and arguments.train_files is None:
        raise ValueError("There is no data: set `dataset`, or `train_files` and `eval_files`.")
    local = load_local(arguments, list_in) if arguments.train_files is None or arguments.eval_files is None else None
    train = load_split(arguments, arguments.train_files, arguments.train_split, local)
    share = held_out_share(arguments.eval_split)
    if share is not None and arguments.eval_files is not None:
        raise ValueError(
            f"`eval_split` {arguments.eval_split!r} holds out a share, but there are `eval_files`, too: which is meant? Leave one "
            "out."
        )
    if share is not None:
        return hold_out(train, share)
    evaluation = None
    evaluate = arguments.eval_split.lower() != "none"
    if arguments.eval_files is not None or (arguments.dataset is not None and evaluate):
        evaluation = load_split(arguments, arguments.eval_files, arguments.eval_split, local)
    return train, evaluation


def count_images(arguments: DataArguments) -> int | None:
    """Images in the training files, where they are Parquet and say so."""
    files = matching_files(arguments.train_files) if arguments.train_files else []
    if not files or any(Path(file).suffix != ".parquet" for file in files):
        return None
    return sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)


def matching_files(pattern: str) -> list[str]:
    """Files that a pattern matches, sorted; a folder of it may have brackets in its name, as it is written."""
    folder, name = os.path.split(pattern)
    return sorted(glob.glob(pattern, recursive=True) or glob.glob(os.path.join(glob.escape(folder), name)))


def load_local(arguments: DataArguments, list_in: str | Path | None = None) -> dict[str, datasets.Dataset] | None:
    """The splits of a folder of images, or of a data set that `save_to_disk` wrote; None for what `datasets` reads.

    Where there are none, all is under "all", and is trained on. Arguments as of `load_data`.

    Raises:
        ValueError: see `read_folder`.
    """
    folder = Path(str(arguments.dataset))
    if arguments.dataset is None or not folder.is_dir():
        _check_no_folder(arguments)
        return None
    if (folder / "dataset_dict.json").is_file():
        return dict(datasets.load_from_disk(str(folder)))
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return {ALL: datasets.load_from_disk(str(folder))}
    images = read_folder(folder, arguments.folders)
    if images is None:
        _check_no_folder(arguments)
        return None
    if list_in is not None:
        images.list_unused(Path(list_in) / UNUSED_FILE)
    return images.tables()


def _check_no_folder(arguments: DataArguments) -> None:
    if arguments.folders != "auto":
        raise ValueError(
            f"`folders` is {arguments.folders!r}, but `dataset` {arguments.dataset!r} is no local folder of images. Leave it out."
        )


def _of_local(local: dict[str, datasets.Dataset], split: str) -> datasets.Dataset:
    """A split, slices of one such as `train[:10%]`, or a sum, as `datasets` writes them; `val` is `validation`."""

    def known(word: re.Match[str]) -> str:
        name = word[0] if word[0] in local else split_of(word[0]) or word[0]
        return ALL if name == "train" and ALL in local else name

    spec = re.sub(r"[A-Za-z_.]+", known, split)
    rows = {name: len(dataset) for name, dataset in local.items()}
    parts = datasets.ReadInstruction.from_spec(spec).to_absolute(rows)
    taken = [
        local[part.splitname].select(range(part.from_ or 0, rows[part.splitname] if part.to is None else part.to))
        for part in parts
    ]
    return taken[0] if len(taken) == 1 else datasets.concatenate_datasets(taken)


def load_split(
    arguments: DataArguments, pattern: str | None, split: str, local: dict[str, datasets.Dataset] | None = None
) -> Any:
    """One split: of the files that a pattern matches, else of the data set that the arguments name.

    Args:
        arguments: where the images come from.
        pattern: of files.
        split: its name.
        local: what `load_local` has found.

    Raises:
        ValueError: see `load_data`.
    """
    options: dict[str, Any] = {"cache_dir": arguments.cache_dir, "streaming": arguments.streaming}
    if options["streaming"] and "[" in split and (pattern is not None or local is None):
        raise ValueError(f"The split {split!r} is a slice, which a stream does not know: set `streaming` to false.")
    if pattern is not None:
        files = [pattern] if "://" in pattern else matching_files(pattern)
        if not files:
            raise ValueError(f"No file matches {pattern!r}, seen from {str(Path.cwd())!r}.")
        suffix = Path(files[0]).suffix
        if suffix not in FORMATS:
            raise ValueError(redacted(f"{files[0]!r} is not of a known kind; known: {', '.join(FORMATS)}."))
        check_same_names([file for file in files if "://" not in file])
        try:
            escaped = [
                file if "://" in file else glob.escape(file) for file in files
            ]  # `datasets` takes them for patterns
            return datasets.load_dataset(FORMATS[suffix], data_files=escaped, split="train", **options)
        except Exception as error:  # those of network clients and of the decoders of archives are of all kinds
            lost = lost_connection(error)
            told = _told(error) if lost is None else f"{type(lost).__name__}, {lost}"
            remedy = _archives_remedy(error) if lost is None else AGAIN
            raise ValueError(
                redacted(f"{pattern!r} cannot be loaded: {told}. {remedy}").rstrip()
            ) from without_secrets(error)
    source = {"path": arguments.dataset, "name": arguments.dataset_config, "revision": arguments.revision}
    try:
        folder = Path(str(arguments.dataset))
        if local is not None:
            return _of_local(local, split)
        if folder.is_dir():
            builder = datasets.load_dataset_builder(**source)
            # A stream of a folder knows no random access, which files on a disk allow.
            options["streaming"] = arguments.streaming and builder.name != "imagefolder"
            by_split = getattr(builder.config, "data_files", None) or {}
            check_same_names([str(file) for files in by_split.values() for file in files])
        return datasets.load_dataset(**source, split=split, **options)
    except Exception as error:  # those of network clients are of all kinds
        raise ValueError(
            f"`dataset` {arguments.dataset!r} (configuration {arguments.dataset_config!r}, revision {arguments.revision!r}, "
            f"split {split!r}) cannot be loaded: {_told(error)}. {_remedy(arguments, split, error)}"
        ) from without_secrets(error)


def _told(error: BaseException) -> str:
    """An error of another library as a sentence without its end."""
    error = _innermost(error)
    if isinstance(error, UnpicklingError):  # torch would advise to run what is in it
        return "a file in it is a pickle of more than tensors, which could run code and is not loaded"
    kind = "" if isinstance(error, (OSError, RuntimeError, ValueError)) else f"{type(error).__name__}, "
    return redacted(f"{kind}{str(error) or repr(error)}").rstrip(".")


def _innermost(error: BaseException) -> BaseException:
    """What `datasets` met, where it says only that it met something."""
    hidden = isinstance(error, datasets.exceptions.DatasetGenerationError)
    return error.__cause__ if hidden and error.__cause__ is not None else error


def _remedy(arguments: DataArguments, split: str, error: Exception) -> str:
    """What to do about a data set that the Hub does not give out, or that lacks a split."""
    dataset = str(arguments.dataset)
    if ("nknown split" in str(error) or "Bad split" in str(error)) and split == arguments.eval_split:
        return "Name one of these with `eval_split`, hold out a share of the others (`--eval_split 0.1`), or set it to none."
    if lost_connection(error) is not None:
        return AGAIN
    if remedy := _archives_remedy(error):
        return remedy
    if "scripts are no longer supported" in str(error):
        return "Code that comes with a data set is never run: ask its author for Parquet files, or name those as `train_files`."
    if not isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return ""
    page = f"{huggingface_hub.constants.ENDPOINT}/datasets/{dataset}"
    account = "with an account that may read it: `hf auth login`, or its token in HF_TOKEN"
    if "gated" in str(error):
        return f"Accept its terms on {page}, then log in {account}."
    return f"Check the name on {page}. If it is private or gated, log in {account}."


def _archives_remedy(error: BaseException) -> str:
    """What to do about archives that `datasets` cannot read as WebDataset; nothing for other errors."""
    error = _innermost(error)
    if isinstance(error, UnpicklingError) or "allow_pickle" in str(error):
        return "Leave such files out of the archives: images and labels are all that is read."
    if "invalid literal for int" in str(error):
        return "A file `.cls` holds the index of a class. Call those with names `.txt`, and set `label_column` to txt."
    if "share the same prefix or the same types" in str(error):
        return "Each image needs the same kinds of files beside it: one without a label has -1 in its `.cls`."
    return ""


def check_same_names(files: list[str]) -> None:
    """Refuse Parquet and Arrow files whose columns name their classes in different ways: the first one's names would be taken for
    the labels of all.

    Args:
        files: local ones; those of other kinds are passed over.

    Raises:
        ValueError: with the first file that differs.
    """
    known: dict[str, tuple[list[str], str]] = {}
    for file in files:
        for column, feature in _features(file).items():
            if not isinstance(feature, datasets.ClassLabel):
                continue
            names, first = known.setdefault(column, (feature.names, file))
            if names != feature.names:
                raise ValueError(
                    f"{file!r} has other names for the classes in its column {column!r} than {first!r}, or another order: "
                    f"{some(feature.names)}, and {some(names)}. The labels of all would be read by the latter. Give files to train "
                    "on and to evaluate on apart, as `train_files` and `eval_files`; store those of one split with one list of names."
                )


def _features(file: str) -> datasets.Features:
    """The columns of a Parquet or Arrow file, as `datasets` knows them; none of others.

    Raises:
        ValueError: a file that is damaged.
    """
    try:
        return datasets.Features.from_arrow_schema(_schema(file))
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{file!r} cannot be read: {error}. Fetch it again, or leave it out.") from error


def _schema(file: str) -> Any:
    if file.endswith(".parquet"):
        return pyarrow.parquet.read_schema(file)
    if file.endswith(".arrow"):
        with pyarrow.memory_map(file) as mapped:
            return arrow_reader(mapped).schema
    return pyarrow.schema([])
