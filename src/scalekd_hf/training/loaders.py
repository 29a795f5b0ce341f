"""What feeds a trainer, whatever it learns: loaders of streams of images, and the account of those that cannot be decoded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed
from torch.utils.data import DataLoader

from ..data.bad_images import BadImages
from ..data.sources import Shards, Table
from ..data.stream import ImageStream, Partition, outlive_signals
from .position import RunPosition
from .run_config import RunConfig


__all__ = ["Feed", "check_same_files", "named", "seed_of_images"]

BAD_IMAGES_FILE = "bad_images{}.jsonl"

logger = logging.getLogger(__name__)


class Feed:
    """Loaders of the prepared data sets, and the account of undecodable images.

    Args:
        args: of the run.
        collator: samples to a batch.

    Attributes:
        position: where the run goes on, and from where on its images are dealt out as they are now.
        bad_images: undecodable ones in "training" and in "evaluation".
    """

    def __init__(self, args: RunConfig, collator: Any):
        self.args, self.collator, self.position = args, collator, RunPosition()
        rank = f"_rank{args.process_index}" if args.world_size > 1 else ""
        file = Path(str(args.output_dir), BAD_IMAGES_FILE.format(rank))
        self.bad_images = {data: BadImages(file, args.max_bad_images) for data in ("training", "evaluation")}
        self._evaluation_loaders: dict[str, tuple[Any, DataLoader]] = {}  # with persistent workers

    def start_at(self, position: RunPosition) -> None:
        """Have training go on from there."""
        self.position = position

    def training_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch as the model trains on it."""
        return batch

    def training_loader(self, stream: ImageStream) -> DataLoader:
        """Endless batches of this process, from the position of the run on."""
        workers = max(1, self.args.dataloader_num_workers or 0)
        partition = Partition(self._batch_size, self.args.world_size, workers, self.position.layout_start)
        images_seen = self.position.images_seen
        return stream.training_loader(partition, self.args.process_index, images_seen, **self._loader_options())

    def evaluation_loader(
        self, dataset: Any, make_loader: Callable[[Any], DataLoader], name: str | None = None
    ) -> DataLoader:
        """One pass over a prepared data set, its images dealt out to processes and workers.

        Args:
            dataset: a stream, or a map-style data set.
            make_loader: the parent's, for a map-style one.
            name: of a data set that is evaluated more than once, so that its workers may stay.
        """
        persistent = name is not None and self.args.dataloader_persistent_workers
        kept, loader = self._evaluation_loaders.get(str(name), (None, None))
        if persistent and kept is dataset and loader is not None:
            return loader
        loader = self._new_evaluation_loader(dataset, make_loader, persistent)
        if persistent:
            self._evaluation_loaders[str(name)] = dataset, loader
        return loader

    def _new_evaluation_loader(
        self, dataset: Any, make_loader: Callable[[Any], DataLoader], persistent: bool
    ) -> DataLoader:
        loader: Any
        if isinstance(dataset, ImageStream):
            options = self._loader_options()
            persistent = persistent and bool(self.args.dataloader_num_workers)
            batch_size, rank, processes = self.args.eval_batch_size, self.args.process_index, self.args.world_size
            loader = dataset.evaluation_loader(batch_size, rank, processes, **options, persistent_workers=persistent)
        else:
            loader = self._whole(make_loader, dataset)
            own = getattr(loader, "base_dataloader", loader)
            own.worker_init_fn = outlive_signals
            own.generator = torch.Generator()  # so that training draws the same with an evaluation and without
        return cast(DataLoader, loader)

    def _whole(self, make_loader: Callable[[Any], DataLoader], dataset: Any) -> Any:
        """The parent's loader, which `dataloader_drop_last` would shorten: it is for training."""
        kept, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return make_loader(dataset)
        finally:
            self.args.dataloader_drop_last = kept

    def _loader_options(self) -> dict[str, Any]:
        return {
            "collate_fn": self.collator,
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory,
            "prefetch_factor": self.args.dataloader_prefetch_factor,
            "multiprocessing_context": self.args.dataloader_multiprocessing_context,
        }

    @property
    def _batch_size(self) -> int:
        return self.args.train_batch_size or 1

    def warn_of_settings_without_effect(self, *data: Any) -> None:
        """Name settings that shape `Trainer`'s own loaders, and that streams of images do not heed."""
        every = [dataset for given in data for dataset in (given.values() if isinstance(given, dict) else [given])]
        if not any(isinstance(dataset, ImageStream) for dataset in every):
            return
        accelerator: Any = self.args.accelerator_config
        without_effect = {
            "dataloader_drop_last": self.args.dataloader_drop_last,
            "dataloader_in_order": not self.args.dataloader_in_order,
            "train_sampling_strategy": self.args.train_sampling_strategy != "random",
            "accelerator_config.split_batches": accelerator.split_batches,
            "accelerator_config.dispatch_batches": accelerator.dispatch_batches,
        }
        for name in (name for name, is_set in without_effect.items() if is_set):
            logger.warning(
                "`%s` has no effect on streams of images: training is one endless sequence, shuffled anew in each pass and "
                "dealt out in order, and an evaluation counts every image once.",
                name,
            )

    def take_bad_images(self, batches: list[dict[str, Any]], dataset: Any) -> None:
        """Take what training batches say of undecodable images out of them.

        Raises:
            TooManyBadImagesError: the stream has more than `max_bad_images` allows.
        """
        bad = self.bad_images["training"]
        for batch in batches:
            bad.add("training", batch.pop("bad_images", []))
        if isinstance(dataset, ImageStream):
            bad.check(len(dataset.source), self.args.world_size)

    def report_bad_images(self) -> None:
        """Say how many there were, and where they are listed."""
        for data, bad in self.bad_images.items():
            if bad.kinds:
                logger.warning(
                    "Undecodable images met in %s: %s. They are listed in %r.", data, bad.summary(), str(bad.file)
                )

    def order_settings(self, dataset: Any) -> dict[str, Any]:
        """What the order of a training set's images depends on, by the names of settings."""
        settings: dict[str, Any] = {
            "seed": seed_of_images(self.args),
            "repeated_augmentation": getattr(self.args, "repeated_augmentation", 1),
        }
        batch, accumulated = self._batch_size, self.args.gradient_accumulation_steps
        if isinstance(dataset, ImageStream):
            settings["images"] = len(dataset.source)
            settings |= {"content": dataset.source.content} if dataset.source.content else {}
            if isinstance(dataset.source, Table):  # any reader can fetch any row
                step = batch * accumulated * self.args.world_size
                return settings | {"images per step": step, "processes": self.args.world_size}
            settings |= {"commit": dataset.source.commit} if dataset.source.commit else {}
            settings |= {"files": dataset.source.name, "shuffle_buffer_size": self.args.shuffle_buffer_size}
        return settings | {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulated,
            "processes": self.args.world_size,
            "dataloader_num_workers": self.args.dataloader_num_workers,
        }


def check_same_files(prepared: Any, name: str, args: RunConfig) -> None:
    """Refuse a stream whose files are in another order on each process; every process must call it.

    Args:
        prepared: the data set.
        name: the argument that errors name.

    Raises:
        ValueError: they are.
    """
    if not isinstance(prepared, ImageStream) or not isinstance(prepared.source, Shards) or args.world_size == 1:
        return
    names: list[Any] = [None] * args.world_size
    torch.distributed.all_gather_object(names, prepared.source.name)
    if len(set(names)) > 1:
        raise ValueError(
            f"`{name}` has its files in another order on each process, as after `shuffle()` without a seed. Leave "
            "`shuffle()` out: the trainer shuffles the images of a pass."
        )


def seed_of_images(args: RunConfig) -> int:
    """The seed of the order and the augmentation of the images."""
    return args.seed if args.data_seed is None else args.data_seed


def named(own: Any, asked: Any) -> tuple[Any, str | None]:
    """The data set to evaluate, and its name: "" for a trainer's only one, None for one that is not the trainer's.

    Args:
        own: the trainer's, or several by name.
        asked: a data set, a name, or None for the trainer's.
    """
    name = asked if isinstance(asked, str) else "" if asked is None or asked is own else None
    return (own[name] if name else own if name == "" else asked), name
