"""A trained classifier on labelled images: accuracy, likelihood, calibration, speed and size. See `probing` for features."""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from torch import Tensor

from ..data.dataset import dataset_labels
from ..data.folders import ALL
from ..data.holdout import held_out_share, hold_out
from ..data.imagenet import BENCHMARKS, ReaL, benchmark, check_classes, label_places, read_real_labels
from ..data.loading import DataArguments, load_local, load_split
from ..images import IGNORED_LABEL
from ..models.students import POOLINGS, Student, load_student
from ..publishing.provenance import hardware
from ..training.config import ScaleKDConfig
from ..training.feeding import prepare_images
from ..training.metrics import TOP_K
from ..training.model import asked_images
from ..training.trainer import ScaleKDTrainer
from .plan import IMAGES, gflops_of
from .recipe import mapping


__all__ = [
    "EvaluateArguments",
    "PerImage",
    "evaluate_model",
    "load_data",
    "load_model",
    "measure_model",
    "summarise",
]

BINS = 15
WARM_UP, REPEATS = 2, 5


@dataclass
class EvaluateArguments(DataArguments):
    """What is evaluated, and on what.

    Args:
        model: name as `load_student` takes it: a folder, a Hub id, `timm/<name>` or `hf-hub:<id>`.
        model_args: further arguments of the model, as JSON or a mapping.
        benchmark: a labelled set for ImageNet's classes by its name, see `imagenet.BENCHMARKS`.
        eval_split: by default the only one, else "validation"; of class folders that are not split, what to call them; or
            the share that training held out.
        real_labels: the authors' real.json, for the benchmark imagenet-real; timm's copy by default.
        probe: measure the features by k-NN and a linear probe that know `train_files` or `train_split`, instead of the
            classifier; a model without one is always measured so.
        pooling: what its features are, see `Student`.
        update_card: put the result into the model card: README.md of the folder, or the repository's on the Hub.
    """

    model: str = field(default="", metadata={"help": "Name or folder of the model; may come first."})
    model_args: dict | str | None = field(default=None, metadata={"help": "Arguments of the model, as JSON."})
    benchmark: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(known.name for known in BENCHMARKS)}."}
    )
    eval_split: str = field(default="", metadata={"help": "Split to evaluate on; the only one, or validation."})
    real_labels: str | None = field(default=None, metadata={"help": "real.json, for imagenet-real."})
    probe: bool = field(
        default=False, metadata={"help": "Measure features by k-NN and linear probe, not the classifier."}
    )
    pooling: str = field(
        default="map",
        metadata={"help": "Features: mean of the last map, or the model's own.", "choices": list(POOLINGS)},
    )
    update_card: bool = field(default=False, metadata={"help": "Put the result into the model card."})

    def __post_init__(self) -> None:
        self.model_args = mapping(self.model_args, "model_args")
        if not self.model:
            raise ValueError("`model` is missing: name a model, a Hub id or a folder.")
        if self.benchmark is not None:
            benchmark(self.benchmark)
        elif self.dataset is None and self.eval_files is None:
            raise ValueError("There is no data: set `dataset`, `eval_files` or `benchmark`.")
        if self.dataset is not None and self.eval_files is not None:
            raise ValueError("`dataset` and `eval_files` are both set: which is meant? Leave one out.")
        if self.probe and self.benchmark is not None:
            raise ValueError(
                f"`benchmark` is {self.benchmark!r}, which says which classes a classifier has, and `probe` measures features. Set "
                "`dataset` and `eval_split` instead."
            )
        if self.real_labels is not None and self.benchmark != "imagenet-real":
            raise ValueError("`real_labels` are for `--benchmark imagenet-real`: leave them out, or set that.")


class PerImage:
    """`preprocess_logits_for_metrics` of a trainer: what is gathered of each image, and no logits.

    Args:
        places: the model's class for each label of the data, where they differ.
        classes: the model's classes among which it chooses; None for all.
    """

    def __init__(self, places: list[int] | None = None, classes: list[int] | None = None):
        self.places = torch.tensor(places) if places is not None else None
        self.classes = classes

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits (B, K) and labels (B,) to four tensors.

        Returns:
            The classes of the five largest (B, 5), best first; the label's log-probability and the first class's
            probability, float32 (B,); and the label as the model's class (B,), `IGNORED_LABEL` where an image does not
            count.
        """
        logits = logits.float()
        if self.classes is not None:
            chosen = torch.full_like(logits, -torch.inf)
            chosen[:, self.classes] = logits[:, self.classes]
            logits = chosen
        choices = logits.shape[1] if self.classes is None else len(self.classes)
        log_probabilities = logits.log_softmax(dim=1)
        values, first = log_probabilities.topk(min(TOP_K, choices), dim=1)
        counts = labels != IGNORED_LABEL
        targets = labels.clamp(min=0)
        if self.places is not None:
            self.places = self.places.to(labels.device)
            targets = self.places[targets]
        log_likelihood = log_probabilities.gather(1, targets[:, None])[:, 0]
        return first, log_likelihood, values[:, 0].exp(), torch.where(counts, targets, IGNORED_LABEL)


def summarise(
    first: np.ndarray, log_likelihood: np.ndarray, confidence: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """What `PerImage` found, over the images that count.

    Returns:
        `images`; `top1` and `top5`, shares; `nll`, the mean negative log-likelihood in nats; `ece`, the expected
        calibration error over 15 equal bins of the confidence (Guo et al. 2017, arXiv 1706.04599).

    Raises:
        ValueError: no image counts, or the outputs are not finite.
    """
    counts = labels != IGNORED_LABEL
    if not counts.any():
        raise ValueError("No image of the data can be counted: none could be decoded.")
    hits = first[counts] == labels[counts, None]
    confidence, log_likelihood = confidence[counts].astype(np.float64), log_likelihood[counts].astype(np.float64)
    if not np.isfinite(log_likelihood).all():
        raise ValueError(
            f"The model's outputs are not finite for {(~np.isfinite(log_likelihood)).sum()} images. Evaluate in float32: leave "
            "`bf16` and `fp16` out."
        )
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, weights=hits[:, 0] - confidence, minlength=BINS)  # accuracy less confidence, in images
    return {
        "images": int(counts.sum()),
        "top1": float(hits[:, 0].mean()),
        "top5": float(hits.any(axis=1).mean()),
        "nll": float(-log_likelihood.mean()),
        "ece": float(np.abs(gaps).sum() / counts.sum()),
    }


def load_data(arguments: EvaluateArguments, list_in: str | None = None) -> Any:
    """The labelled images that the arguments name, a `datasets` object; `arguments.eval_split` becomes the split's name.

    Files of a folder that are not used are listed in the folder `list_in`.

    Raises:
        ValueError: none are named, or they cannot be loaded.
    """
    which = benchmark(arguments.benchmark) if arguments.benchmark else None
    share = held_out_share(arguments.eval_split)
    if arguments.eval_files is not None:
        images = load_split(arguments, arguments.eval_files, arguments.eval_split)
        return images if share is None else hold_out(images, share)[1]
    if arguments.dataset is None and which is not None:
        if which.hub_id is None:
            raise ValueError(
                f"`benchmark` {which.name!r} has no repository that is known to be its authors': set `dataset` to the folder that "
                f"they publish ({which.folder}), or to a data set with these class names."
            )
        arguments.dataset = which.hub_id
    local = load_local(arguments, list_in)
    if share is not None:
        return hold_out(load_split(arguments, None, arguments.train_split, local), share)[1]
    if local is not None and ALL in local:  # without splits it is evaluated whole
        arguments.eval_split = arguments.eval_split or "validation"
        return local[ALL]
    if not arguments.eval_split:
        splits = list(local or ())
        if local is None and Path(str(arguments.dataset)).is_dir():
            splits = datasets.get_dataset_split_names(str(arguments.dataset), arguments.dataset_config)
        arguments.eval_split = splits[0] if len(splits) == 1 else "validation"
    return load_split(arguments, None, arguments.eval_split, local)


def load_model(arguments: EvaluateArguments, config: ScaleKDConfig) -> Student:
    """The classifier that the arguments name, with its weights."""
    return load_student(
        arguments.model,
        pretrained=True,
        image_size=config.image_size,
        **dict(arguments.model_args or {}),  # type: ignore[arg-type]
    )


def evaluate_model(
    student: Student,
    dataset: Any,
    config: ScaleKDConfig,
    benchmark_name: str | None = None,
    real_labels: str | None = None,
) -> dict[str, float]:
    """Evaluate a classifier with its own preprocessing, on one process or many, each image once.

    Args:
        student: as `load_student` gives it, a teacher as well.
        dataset: a `datasets` object with images and class indices, map-style or streaming.
        config: batch size, workers, precision; columns. `image_size`, `crop_pct`, `interpolation` and `antialias` replace
            the model's own.
        benchmark_name: what the data set is, if it is one of `imagenet.BENCHMARKS`.
        real_labels: see `EvaluateArguments`.

    Returns:
        As `summarise`; `top1` and `images` alone for imagenet-real, where the others are not defined.

    Raises:
        ValueError: data without class indices or without images, or with other classes than the model's.
    """
    if not config.has_labels:
        raise ValueError("An evaluation compares with labels, but `label_column` is 'none'. Set it to their column.")
    config = dataclasses.replace(config, push_to_hub=False, report_to="none", eval_do_concat_batches=True)
    which = benchmark(benchmark_name) if benchmark_name else None
    per_image, real = PerImage(), None
    if which is not None:
        check_classes(student.name, student.labels, student.num_labels)
    if which is not None and which.name != "imagenet-real":
        per_image = PerImage(label_places(dataset_labels(dataset, config.label_column), which), which.classes)
    student.spec = asked_images(student, config)
    prepared = prepare_images(dataset, "eval_dataset", student, config, compare_labels=which is None)
    label = getattr(prepared, "label", 0)
    if not (which is None and isinstance(label, str)):  # a name has been looked up
        _check_label(label, config.label_column, student.num_labels)
    if which is not None and which.name == "imagenet-real":
        real = ReaL(read_real_labels(real_labels), dataset, config.image_column, len(prepared))
    # The trainer compares class names with the model's, where the data set is not yet prepared.
    given = dataset if which is None else prepared
    trainer = ScaleKDTrainer(student, None, config, eval_dataset=given, preprocess_logits_for_metrics=per_image)
    found: Any = trainer.predict(cast(Any, trainer.eval_dataset)).predictions
    first, _, _, labels = found
    return real(first[:, 0], labels != IGNORED_LABEL) if real else summarise(*found)


def _check_label(label: Any, column: str, classes: int) -> None:
    if isinstance(label, (int, np.integer)) and 0 <= label < classes:
        return
    raise ValueError(
        f"`label_column` {column!r} begins with {label!r}, but class indices from 0 to {classes - 1} are needed. A split "
        "without labels cannot be evaluated: choose another with `eval_split`, or name the column of the labels."
    )


def measure_model(student: Student, config: ScaleKDConfig) -> dict[str, Any]:
    """Size and speed of a classifier.

    Returns:
        `parameters`; `gflops` of one image's forward pass, a multiplication and an addition being two; and
        `images_per_second` of the forward pass alone on one device, the median of five batches of random images that
        lie there already, with its `batch_size`, `device` and `dtype`.
    """
    device, batch = config.device, config.per_device_eval_batch_size
    student = student.to(device).eval()
    dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else student._dtype()
    pixel_values = torch.randn(max(batch, IMAGES), 3, *student.spec.size, device=device)
    with torch.no_grad():
        gflops = gflops_of(lambda: student.classify(pixel_values[:IMAGES]))
        with torch.autocast(device.type, dtype, enabled=config.bf16 or config.fp16):
            seconds = [_seconds(student, pixel_values[:batch]) for _ in range(WARM_UP + REPEATS)][WARM_UP:]
    return {
        "parameters": sum(parameter.numel() for parameter in student.model.parameters()),
        "gflops": gflops,
        "images_per_second": batch / statistics.median(seconds),
        "batch_size": batch,
        "device": hardware(1, device),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _seconds(student: Student, pixel_values: Tensor) -> float:
    def now() -> float:
        if pixel_values.device.type == "cuda":
            torch.cuda.synchronize(pixel_values.device)
        return time.perf_counter()

    start = now()
    student.classify(pixel_values)
    return now() - start
