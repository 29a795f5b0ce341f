"""`ScaleKDConfig`: `TrainingArguments` with the settings of the method and of the images."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.integrations import is_tensorboard_available

from ..images import INTERPOLATIONS
from ..method.losses import TASK_LOSSES
from ..method.projector import STEM_NORMS, STEMS
from .config_checks import LR_SCALINGS, SYNC_BATCHNORMS, check_settings
from .precision import keep_autocast, say_tf32_in_both_ways


__all__ = ["ScaleKDConfig"]

logger = logging.getLogger(__name__)


@dataclass
class ScaleKDConfig(TrainingArguments):
    """All settings of a run but the models and the data sets.

    The defaults of the method are those published for Swin teachers (arXiv 2411.06786, section 4 and
    the authors' configurations).

    Args:
        spatial_weight (`float`, *optional*, defaults to `0.08`):
            Weight of the two spatial mimicking losses (section 3.4). Published: 0.08 for Swin teachers, 0.016 for
            EVA-L at 224 px, 0.008 at 336 px. 0 leaves the view out.
        frequency_weight (`float`, *optional*, defaults to `0.06`):
            Weight of the two frequency mimicking losses. Published: 0.06, 0.008 and 0.004. 0 leaves the view out.
        last_frequency_weight (`float`, *optional*):
            Another weight for the frequency view of the last stage. Published: 0 in the 100-epoch Swin-S to ResNet-50
            run. By default `frequency_weight`.
        logit_weight (`float`, *optional*):
            λ: the logit term weighs λ, the task term 1 - λ (section 3.4). By default 0.5; 0 without a classifier in either model.
        temperature (`float`, *optional*, defaults to `1.0`):
            T, softens both distributions of the logit term (section 3.4).
        penultimate_num_heads (`int`, *optional*):
            Attention heads of the projectors to the teacher's penultimate stage; must divide its width. Published: 16
            for Swin-L, 8 for Swin-B and EVA-L, 3 for Swin-S. By default the largest divisor of the width up to 16.
        last_num_heads (`int`, *optional*):
            The same for the last stage. Published: 24 for Swin-L, 16 for Swin-B, 8 for EVA-L, 6 for Swin-S. By default
            the largest divisor of the width up to 24.
        softmax_scale (`float`, *optional*, defaults to `5.0`):
            Multiplies the attention's usual head_dim^-0.5 (authors' code). Published: 5; 1 for ConvNeXt-T and Swin-T.
        stem_norm (`str`, *optional*, defaults to `"batch"`):
            Norm of the projectors' stems, `"batch"` or `"layer"`. Published: `"layer"` for Swin-T only.
        penultimate_norm (`bool`, *optional*, defaults to `False`):
            A trainable LayerNorm over the channels of the penultimate map, before its projectors. Published: `True` for
            Swin-T, whose body in the authors' code has a norm at the end of each stage.
        learned_last_queries (`bool`, *optional*, defaults to `False`):
            Learned queries at the last stage instead of teacher parameter perception's (section 3.3). In no published run:
            the authors' configuration of the 100-epoch Swin-S to ResNet-50 pair asks for them, and their code ignores it.
        teacher_perception (`bool`, *optional*, defaults to `True`):
            Section 3.3. `False`, for an ablation: no penultimate terms, and learned queries at the last stage.
        remove_direct_component (`bool`, *optional*, defaults to `True`):
            In the frequency view (section 3.2). `False`, for an ablation: a second spatial view.
        stem (`str`, *optional*, defaults to `"full"`):
            `"full"` as published. Lighter, and **not the paper's method**: `"shared"` by the two views of a stage, or
            `"separable"` convolutions. docs/results.md compares them.
        teacher_last_blocks (`int`, *optional*, defaults to `2`):
            Blocks that count as the last stage of a plain ViT teacher (authors' code).
        teacher_drop_path (`float`, *optional*, defaults to `0.0`):
            Stochastic depth of a teacher given by name while its student trains. The authors' loop left theirs in training
            mode, with the rate it was built with: 0.1 for Swin-L, 0.3 for Swin-S, 0.5 for Swin-B.
        student_taps (`list[str]`, *optional*):
            The two modules of the student to tap by name, instead of those that the dry run finds.
        teacher_taps (`list[str]`, *optional*):
            The same of the teacher: the module that gets what enters its last stage, the module that puts out its last map.
        task_loss (`str`, *optional*, defaults to `"cross_entropy"`):
            `"cross_entropy"`, or `"binary_cross_entropy"` over sigmoids (ResNet-50, 300 epochs). Both take label smoothing.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column of the data set that holds the images.
        label_column (`str`, *optional*, defaults to `"label"`):
            Column that holds the class indices. `"none"` for images without labels: the task term is then absent.
        image_size (`int`, *optional*):
            Side of the student's images in pixels. By default the student's own.
        teacher_image_size (`int`, *optional*):
            Side of the teacher's images in pixels; the student's are resized on the device. By default its own.
        crop_scale (`list[float]`, *optional*, defaults to `[0.08, 1.0]`):
            Range of the share of the area that a random crop keeps in training (published: 0.08 to 1).
        pixel_range (`list[float]`, *optional*):
            Black and white of pixels that are not uint8. By default by their type: see `docs/data.md`.
        hflip (`float`, *optional*, defaults to `0.5`):
            Probability of a horizontal flip in training (published: 0.5).
        crop_pct (`float`, *optional*):
            Side of the centre crop over the shorter side after resizing, in evaluation. By default the student's own.
        interpolation (`str`, *optional*):
            Filter of resizing in training and evaluation, which the saved student's preprocessor has, too. By default the
            student's own. Published: bicubic; bilinear in the 100-epoch runs.
        antialias (`bool`, *optional*):
            Widen the filter where images shrink, as Pillow does. By default the student's own, `True` for all but those that
            were distilled without. Published: `False`, OpenCV's way, in the 100-epoch runs. No preprocessor of timm or
            transformers can say so: `pipeline` resizes with it, `recipes/evaluate.py` as in training.
        shuffle_buffer_size (`int`, *optional*, defaults to `1000`):
            Rows of a stream that are shuffled together; shards are shuffled, too. Each worker holds so many encoded
            images. Map-style data sets are shuffled whole.
        max_bad_images (`float`, *optional*, defaults to `0.01`):
            Share of the images of a pass that may be undecodable before the run stops. Each is listed in
            `bad_images.jsonl` in `output_dir`, and its place goes to the next image.
        rand_augment (`float`, *optional*):
            Magnitude of RandAugment, of 10, with timm's increasing set and two operations.
            Published: 8.75 for ResNet-50 and MobileNet-V1, 9 for ViT, Swin, ConvNeXt and EVA-02, 8 for Mixers.
        rand_augment_std (`float`, *optional*, defaults to `0.5`):
            Standard deviation of that magnitude (timm's `mstd`). Published: 0.5 of the authors' levels, which are 0.625 of
            10 for ResNet-50 and MobileNet-V1, 1/3 for Mixers and 0.5 for the others.
        random_erasing (`float`, *optional*, defaults to `0.0`):
            Probability of erasing 0.02 to 1/3 of the area with pixel noise (published: 0.25).
        mixup_alpha (`float`, *optional*, defaults to `0.0`):
            Mixup's α; 0 for none. In no published run: the authors' configurations name 0.8 for ViT-B/14 and 0.5 for
            Mixer-B/14, in a place that distillation does not read.
        cutmix_alpha (`float`, *optional*, defaults to `0.0`):
            CutMix's α; 0 for none. With both, each batch gets one of them. As for mixup: 1.0 for ViT-B/14 is named only.
        repeated_augmentation (`int`, *optional*, defaults to `1`):
            Times that an image comes in a row, augmented anew.
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
        ema_decay (`float`, *optional*, defaults to `0.0`):
            Decay per step of a moving average of the student, which is then evaluated and saved. Published: 0.9999 for
            ViT, Swin, ConvNeXt, EVA-02 and two of the Mixers.
        sync_batchnorm (`str`, *optional*, defaults to `"none"`):
            BatchNorm statistics over all processes, on GPUs, of the `"student"` or of `"all"`, projectors included.
            Published: `"student"` for ResNet-50, 100 epochs.
        shard_teacher (`bool`, *optional*, defaults to `False`):
            Keep the teacher in parts, too, under FSDP2 and ZeRO-3, where it is too large for each GPU.
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

    # Method
    spatial_weight: float = field(
        default=0.08, metadata={"help": "Weight of the two spatial mimicking losses. 0 leaves the view out."}
    )
    frequency_weight: float = field(
        default=0.06, metadata={"help": "Weight of the two frequency mimicking losses. 0 leaves the view out."}
    )
    last_frequency_weight: float | None = field(
        default=None, metadata={"help": "Another weight for the frequency view of the last stage."}
    )
    logit_weight: float | None = field(
        default=None,
        metadata={"help": "Weight λ of the logit term, 0.5; the task term weighs 1 - λ. 0 leaves it out."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature T of the logit term."})
    penultimate_num_heads: int | None = field(
        default=None,
        metadata={
            "help": "Heads of the penultimate projectors. By default the largest divisor of the width up to 16."
        },
    )
    last_num_heads: int | None = field(
        default=None,
        metadata={"help": "Heads of the last projectors. By default the largest divisor of the width up to 24."},
    )
    softmax_scale: float = field(default=5.0, metadata={"help": "Multiplies the attention's usual head_dim^-0.5."})
    stem_norm: str = field(
        default="batch", metadata={"help": "Norm of the projectors' stems.", "choices": list(STEM_NORMS)}
    )
    penultimate_norm: bool = field(
        default=False, metadata={"help": "A trainable LayerNorm on the penultimate map, before its projectors."}
    )
    learned_last_queries: bool = field(
        default=False, metadata={"help": "Learned queries at the last stage instead of teacher-made ones."}
    )
    teacher_perception: bool = field(
        default=True, metadata={"help": "Teacher parameter perception: penultimate terms and teacher-made queries."}
    )
    remove_direct_component: bool = field(
        default=True, metadata={"help": "Remove each channel's mean in the frequency view; false for an ablation."}
    )
    stem: str = field(
        default="full", metadata={"help": "Stems of the projectors; only full is the paper's.", "choices": list(STEMS)}
    )
    teacher_last_blocks: int = field(
        default=2, metadata={"help": "Blocks that count as the last stage of a plain ViT teacher."}
    )
    teacher_drop_path: float = field(
        default=0.0, metadata={"help": "Rate of stochastic depth that the teacher runs with while its student trains."}
    )
    student_taps: list[str] | None = field(
        default=None, metadata={"help": "Names of the two modules of the student to tap."}
    )
    teacher_taps: list[str] | None = field(
        default=None, metadata={"help": "First and last module of the teacher's last stage."}
    )
    task_loss: str = field(
        default="cross_entropy", metadata={"help": "The student's own loss.", "choices": list(TASK_LOSSES)}
    )

    # Images
    image_column: str = field(default="image", metadata={"help": "Column of the data set that holds the images."})
    label_column: str = field(
        default="label", metadata={"help": "Column that holds the class indices; none for no labels."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the student's images in pixels. By default the student's own."}
    )
    teacher_image_size: int | None = field(
        default=None, metadata={"help": "Side of the teacher's images in pixels. By default its own."}
    )
    crop_scale: list[float] = field(
        default_factory=lambda: [0.08, 1.0],
        metadata={"help": "Range of the share of the area that a random crop keeps in training."},
    )
    pixel_range: list[float] | None = field(
        default=None,
        metadata={"help": "Least and largest value of pixels that are not uint8. By default by their type."},
    )
    hflip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip in training."})
    crop_pct: float | None = field(
        default=None, metadata={"help": "Centre crop over the shorter side in evaluation. By default the student's."}
    )
    interpolation: str | None = field(
        default=None,
        metadata={"help": "Filter of resizing. By default the student's own.", "choices": list(INTERPOLATIONS)},
    )
    antialias: bool | None = field(
        default=None,
        metadata={"help": "Widen the filter where images shrink; false as OpenCV. By default the student's."},
    )
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "Rows of a stream that are shuffled together; shards are shuffled, too."}
    )
    max_bad_images: float = field(
        default=0.01, metadata={"help": "Share of the images that may be undecodable before the run stops."}
    )

    rand_augment: float | None = field(
        default=None, metadata={"help": "Magnitude of RandAugment, of 10 (timm's increasing set, 2 operations)."}
    )
    rand_augment_std: float = field(default=0.5, metadata={"help": "Standard deviation of RandAugment's magnitude."})
    random_erasing: float = field(default=0.0, metadata={"help": "Probability of erasing a part with pixel noise."})
    mixup_alpha: float = field(default=0.0, metadata={"help": "Mixup's α; 0 for none."})
    cutmix_alpha: float = field(default=0.0, metadata={"help": "CutMix's α; 0 for none."})
    repeated_augmentation: int = field(
        default=1, metadata={"help": "Times that an image comes in a row, augmented anew."}
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
    ema_decay: float = field(
        default=0.0, metadata={"help": "Decay of a moving average of the student, which is evaluated and saved."}
    )
    sync_batchnorm: str = field(
        default="none",
        metadata={"help": "Synchronise BatchNorm over processes, on GPUs.", "choices": list(SYNC_BATCHNORMS)},
    )
    shard_teacher: bool = field(
        default=False, metadata={"help": "Keep the teacher in parts, too, under FSDP2 and ZeRO-3."}
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
        check_settings(self)

    @property
    def device(self) -> torch.device:
        """The parent's; a CPU without the number that processes together give it, to which torch 2.11 loads no checkpoint."""
        device: torch.device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def n_gpu(self) -> int:
        """At most one for each process: the parent's `DataParallel` would copy the student without its teacher."""
        return min(1, super().n_gpu)

    @property
    def has_labels(self) -> bool:
        """Whether the images have labels."""
        return self.label_column.lower() != "none"
