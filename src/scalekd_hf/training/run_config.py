"""`RunConfig`: `TrainingArguments` with what every training run on images has in common, whatever it learns."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.integrations import is_tensorboard_available

from .config_checks import LR_SCALINGS, check_run_settings
from .precision import keep_autocast, say_tf32_in_both_ways


__all__ = ["RunConfig"]

logger = logging.getLogger(__name__)


@dataclass
class RunConfig(TrainingArguments):
    """Settings of images, optimisation and run that distillation and transfer share.

    Args:
        pixel_range (`list[float]`, *optional*):
            Black and white of pixels that are not uint8. By default by their type: see `docs/data.md`.
        shuffle_buffer_size (`int`, *optional*, defaults to `1000`):
            Rows of a stream that are shuffled together; shards are shuffled, too. Each worker holds so many encoded
            images. Map-style data sets are shuffled whole.
        max_bad_images (`float`, *optional*, defaults to `0.01`):
            Share of the images of a pass that may be undecodable before the run stops. Each is listed in
            `bad_images.jsonl` in `output_dir`, and its place goes to the next image.
        timm_optim (`str`, *optional*):
            Name of an optimiser of timm, instead of `optim`. Published: `"lamb"`, and `"momentum"` (SGD, 0.9).
        decay_all (`bool`, *optional*, defaults to `False`):
            Weight decay also on norms, biases and other vectors, position and bias tables, class tokens and queries.
            Published: `True` with SGD, with LAMB and for Mixers.
        no_weight_decay (`list[str]`, *optional*):
            Parts of parameters' names that have no weight decay, in the place of tables, tokens and queries; whether
            vectors have is up to `decay_all`. Published: `["pos_embed", "cls_token"]` for ViT and Mixers,
            `["relative_position_bias_table"]` for ConvNeXt, Swin and EVA-02: learned queries are decayed in all of them.
        base_batch_size (`int`, *optional*):
            Global batch that `learning_rate` is for; the rate is scaled to the batch of the run.
        lr_scaling (`str`, *optional*, defaults to `"linear"`):
            `"linear"`, or `"sqrt"`, the rule for scaling it.
        lr_milestones (`list[float]`, *optional*):
            Shares of the run after which the rate falls to a tenth, instead of `lr_scheduler_type`. Published: 0.3, 0.6
            and 0.9 for ResNet-50, 100 epochs.
        lr_by_epoch (`bool`, *optional*, defaults to `False`):
            A cosine falls at the beginning of each epoch instead of at each step; the warm-up goes by steps. Published:
            `True` wherever there is a cosine.
        images_per_epoch (`int`, *optional*):
            Images that count as an epoch, where that is not a pass over the data set.
        channels_last (`bool`, *optional*, defaults to `False`):
            Keep maps and convolutions in channels-last order, which GPUs prefer for convolutional students in bf16;
            `benchmarks/step.py` measures it for a pair.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Delete the run that `output_dir` holds when training starts.
        allow_data_mismatch (`bool`, *optional*, defaults to `False`):
            Resume with other batches, processes, workers, seed or data set than the checkpoint's: the run goes on at the
            same number of images seen, in another order.
        allow_settings_mismatch (`bool`, *optional*, defaults to `False`):
            Resume with other settings of the method, the images or the optimisation, another teacher or other taps than
            the checkpoint's.

    > Parent defaults that differ here: `remove_unused_columns=False` (images are transformed on the fly),
    > `ddp_find_unused_parameters=False` (every trained parameter has a gradient; the search costs time),
    > `logging_nan_inf_filter=False` (it synchronises every step and hides what this trainer reports),
    > `report_to="tensorboard"` where it is installed, `logging_steps=50`, `ddp_static_graph=True` without gradient accumulation and compiling, and `dataloader_num_workers`, which is 8, or as many as there are CPU cores for each process,
    > where a GPU is used, and 0 on the CPU.
    """

    # Images
    pixel_range: list[float] | None = field(
        default=None,
        metadata={"help": "Least and largest value of pixels that are not uint8. By default by their type."},
    )
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "Rows of a stream that are shuffled together; shards are shuffled, too."}
    )
    max_bad_images: float = field(
        default=0.01, metadata={"help": "Share of the images that may be undecodable before the run stops."}
    )

    # Optimisation
    timm_optim: str | None = field(
        default=None, metadata={"help": "Name of an optimiser of timm, such as lamb, instead of `optim`."}
    )
    decay_all: bool = field(
        default=False, metadata={"help": "Weight decay also on norms, biases, position tables and queries."}
    )
    no_weight_decay: list[str] | None = field(
        default=None, metadata={"help": "Parts of names without weight decay, instead of tables, tokens and queries."}
    )
    base_batch_size: int | None = field(
        default=None, metadata={"help": "Global batch that `learning_rate` is for; the rate is scaled to the run's."}
    )
    lr_scaling: str = field(
        default="linear",
        metadata={"help": "How `learning_rate` is scaled to the batch.", "choices": list(LR_SCALINGS)},
    )
    lr_milestones: list[float] | None = field(
        default=None, metadata={"help": "Shares of the run after which the rate falls to a tenth."}
    )
    lr_by_epoch: bool = field(
        default=False, metadata={"help": "A cosine falls once an epoch instead of at each step."}
    )
    images_per_epoch: int | None = field(
        default=None, metadata={"help": "Images that count as an epoch. By default those of the data set."}
    )
    channels_last: bool = field(
        default=False, metadata={"help": "Channels-last memory order of maps and convolutions."}
    )

    # Run
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the run that `output_dir` holds when training starts."}
    )
    allow_data_mismatch: bool = field(
        default=False, metadata={"help": "Resume with other batches, processes, workers, seed or data than before."}
    )
    allow_settings_mismatch: bool = field(
        default=False, metadata={"help": "Resume with other settings, teacher or taps than before."}
    )

    # Other defaults than the parent's
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: images are transformed on the fly."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every trained parameter has a gradient; the search costs time."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must stay off: it hides a loss that is not finite, and synchronises."}
    )
    dataloader_num_workers: int | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Workers that decode images, for each process. By default 8 with a GPU, else 0."},
    )
    report_to: None | str | list[str] = field(
        default=None,
        metadata={
            "help": "Trackers: tensorboard, wandb, trackio, none. By default tensorboard where it is installed."
        },
    )
    logging_steps: float = field(
        default=50, metadata={"help": "Log every so many steps; below 1, a share of all training steps."}
    )

    def __post_init__(self) -> None:
        if self.dataloader_num_workers is None:
            cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            self.dataloader_num_workers = (
                min(8, max(1, cores)) if torch.cuda.is_available() and not self.use_cpu else 0
            )
        if self.report_to is None:
            self.report_to = "tensorboard" if is_tensorboard_available() else "none"
        try:
            super().__post_init__()
        except ValueError as error:
            if "support bf16" not in str(error):
                raise
            raise ValueError(
                "`bf16` is on, and there is no GPU here that computes in it. Set `bf16` to false, or `use_cpu` to true for a CPU."
            ) from error
        if super().n_gpu > 1:
            logger.warning(
                "%d GPUs are visible to this one process, which uses the first. `accelerate launch` (or `torchrun`) starts a "
                "process for each; `CUDA_VISIBLE_DEVICES` chooses another.",
                super().n_gpu,
            )
        keep_autocast(self)
        if self.torch_compile or self.tf32 is not None:
            say_tf32_in_both_ways()
        if self.ddp_static_graph is None:  # with accumulation, DDP skips the exchange now and then
            self.ddp_static_graph = self.gradient_accumulation_steps == 1 and not self.torch_compile
        if str(self.resume_from_checkpoint).lower() in ("true", "false"):  # the parent's field knows paths only
            self.resume_from_checkpoint = str(self.resume_from_checkpoint).lower() == "true" or None  # type: ignore[assignment]
        check_run_settings(self)

    @property
    def device(self) -> torch.device:
        """The parent's; a CPU without the number that processes together give it, to which torch 2.11 loads no checkpoint."""
        device: torch.device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def n_gpu(self) -> int:
        """At most one for each process: the parent's `DataParallel` would copy the student without its teacher."""
        return min(1, super().n_gpu)
