"""What feeds a transfer: prepared data sets, and batches as its model takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.dataset import ImageDataset, prepare_dataset
from ..data.stream import ImageStream, outlive_signals
from ..images import Normaliser
from ..training.loaders import Feed, check_same_files, seed_of_images
from .config import TransferConfig
from .tasks import Task


__all__ = ["DenseFeed"]


class DenseFeed(Feed):
    """The loaders of a transfer, and its batches on the device.

    Args:
        args: of the run.
        task: makes samples of rows, and takes what the model needs of a batch.
    """

    def __init__(self, args: TransferConfig, task: Task):
        super().__init__(args, task.collator)
        self.task, self.normaliser = task, Normaliser(task.spec)

    def prepared(self, dataset: Any, name: str) -> Any:
        """A data set of `load_dense_data` with the transforms of the task.

        Args:
            dataset: a `datasets` object, or None, or one that is prepared.
            name: the argument that errors name; "train" is augmented.

        Raises:
            ValueError: see `prepare_dataset`.
        """
        if dataset is None or isinstance(dataset, (ImageStream, ImageDataset)):
            return dataset
        preparation = self.task.preparation(name == "train", seed_of_images(self.args))
        shuffle = (seed_of_images(self.args), self.args.shuffle_buffer_size)
        one_first = self.args.main_process_first(desc="counting the images")
        bad = self.args.max_bad_images
        prepared = prepare_dataset(dataset, name, preparation, shuffle, bad, one_first=one_first)
        check_same_files(prepared, name, self.args)
        return prepared

    def training_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch as the model trains on it: on the device, normalised, zero where it is padded."""
        return self.task.inputs(self._on_device(batch))

    def evaluation_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch as the model is evaluated on it; what it is compared with stays where it is."""
        self.bad_images["evaluation"].add("evaluation", batch.pop("bad_images", []))
        return self._on_device({name: value for name, value in batch.items() if name != "labels"})

    def _on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = {name: self._moved(value) if name != "targets" else value for name, value in batch.items()}
        pixels = self.normaliser.for_student(batch["pixel_values"]) * batch["pixel_mask"][:, None]
        if self.args.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        return batch | {"pixel_values": pixels}

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self.args.device, non_blocking=True)
        if isinstance(value, list):
            return [self._moved(entry) for entry in value]
        if isinstance(value, dict):
            return {name: self._moved(entry) for name, entry in value.items()}
        return value

    def _new_evaluation_loader(
        self, dataset: Any, make_loader: Callable[[Any], DataLoader], persistent: bool
    ) -> DataLoader:
        """Of a map-style data set each process its share, every image once: the parent's loader repeats some to come out even."""
        if isinstance(dataset, ImageStream):
            return super()._new_evaluation_loader(dataset, make_loader, persistent)
        share = Share(dataset, self.args.process_index, self.args.world_size, self.args.eval_batch_size)
        options = self._loader_options() | {
            "persistent_workers": persistent and bool(self.args.dataloader_num_workers)
        }
        generator = torch.Generator()  # so that training draws the same with an evaluation and without
        return DataLoader(
            share, self.args.eval_batch_size, worker_init_fn=outlive_signals, generator=generator, **options
        )


class Share(Dataset):
    """The images of one process, filled up with blanks to as many whole batches as the others have.

    Args:
        images: of all processes.
        rank, world_size: the process, of so many.
        batch_size: of one process.
    """

    def __init__(self, images: ImageDataset, rank: int, world_size: int, batch_size: int):
        self.images, self.rank, self.world_size, self.batch_size = images, rank, world_size, batch_size

    def __len__(self) -> int:
        return -(-len(self.images) // (self.world_size * self.batch_size)) * self.batch_size

    def __getitem__(self, place: int) -> dict[str, Any]:
        number = place * self.world_size + self.rank
        if number < len(self.images):
            sample: dict[str, Any] = self.images[number]
            return sample
        blank: dict[str, Any] = self.images.preparation.blank(self.images.label)
        return blank
