"""`ScaleKDConfig`: a `RunConfig` with the settings of the method and of its images."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..images import INTERPOLATIONS
from ..method.losses import LOGIT_LOSSES, TASK_LOSSES
from ..method.projector import PROJECTORS, STEM_NORMS, STEMS
from .config_checks import SYNC_BATCHNORMS, check_settings
from .run_config import RunConfig


__all__ = ["ScaleKDConfig"]


@dataclass
class ScaleKDConfig(RunConfig):
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
            T, softens both distributions of the logit term (section 3.4), which is multiplied by T².
        logit_loss (`str`, *optional*, defaults to `"kl"`):
            The logit term: `"kl"` as published; `"dist"`, the correlations within images and within classes of DIST
            (arXiv 2205.10536), **not the paper's method**, to compare with. Classes are compared over the images of a
            process's own micro-batch.
        projector (`str`, *optional*, defaults to `"cross_attention"`):
            `"cross_attention"` as published. `"linear"`, **not ScaleKD**, to compare with: plain feature matching, one linear
            layer from the student's last map to the teacher's. Its one term, `last_linear`, weighs `spatial_weight`; the
            settings of the other terms and of their projectors then have no effect.
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
        rand_augment (`float`, *optional*):
            Magnitude of RandAugment, of 10, with timm's increasing set and two operations.
            Published: 8.75 for ResNet-50 and MobileNet-V1, 9 for ViT, Swin, ConvNeXt and EVA-02, 8 for Mixers.
        rand_augment_std (`float`, *optional*, defaults to `0.5`):
            Standard deviation of that magnitude (timm's `mstd`). Published: 0.5 of the authors' levels, which are 0.625 of
            10 for ResNet-50 and MobileNet-V1, 1/3 for Mixers and 0.5 for the others.
        random_erasing (`float`, *optional*, defaults to `0.0`):
            Probability of erasing 0.02 to 1/3 of the area with pixel noise (published: 0.25).
        mixup_alpha (`float`, *optional*, defaults to `0.0`):
            Mixup's α; 0 for none. It mixes labels, too, or needs a `logit_weight` of 1. In no published run: the authors' configurations name 0.8 for ViT-B/14 and 0.5 for
            Mixer-B/14, in a place that distillation does not read.
        cutmix_alpha (`float`, *optional*, defaults to `0.0`):
            CutMix's α; 0 for none. With both, each batch gets one of them. As for mixup: 1.0 for ViT-B/14 is named only.
        repeated_augmentation (`int`, *optional*, defaults to `1`):
            Times that an image comes in a row, augmented anew.
        ema_decay (`float`, *optional*, defaults to `0.0`):
            Decay per step of a moving average of the student, which is then evaluated and saved. Published: 0.9999 for
            ViT, Swin, ConvNeXt, EVA-02 and two of the Mixers.
        sync_batchnorm (`str`, *optional*, defaults to `"none"`):
            BatchNorm statistics over all processes, on GPUs, of the `"student"` or of `"all"`, projectors included.
            Published: `"student"` for ResNet-50, 100 epochs.
        shard_teacher (`bool`, *optional*, defaults to `False`):
            Keep the teacher in parts, too, under FSDP2 and ZeRO-3, where it is too large for each GPU.

    > Other fields are those of `RunConfig`, and of `TrainingArguments`.
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
    logit_loss: str = field(
        default="kl", metadata={"help": "The logit term; only kl is the paper's.", "choices": list(LOGIT_LOSSES)}
    )
    projector: str = field(
        default="cross_attention",
        metadata={"help": "What projects features; linear is plain feature matching.", "choices": list(PROJECTORS)},
    )
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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self)

    @property
    def has_labels(self) -> bool:
        """Whether the images have labels."""
        return self.label_column.lower() != "none"
