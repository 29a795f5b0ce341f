"""Top-1 and top-5 accuracy as an `evaluate.Metric` that needs no download."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import EvalPrediction

from ..images import counted
from ..method.losses import counted_in_loss
from .probes import nearest_neighbours


__all__ = [
    "CountedLoss",
    "OfCounted",
    "TOP_K",
    "TopKAccuracy",
    "compute_accuracy",
    "compute_neighbours",
    "counted_classes",
    "keep_top5",
]

TOP_K = 5


class TopKAccuracy(evaluate.Metric):
    """Share of images whose label is the first, or among the first five predictions.

    `predictions` are class indices (N, k), best first; `references` the labels (N,).
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Top-1 and top-5 accuracy from ranked class indices.",
            citation="",
            inputs_description="predictions: (N, k) class indices, best first; references: (N,) labels.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        hits = np.asarray(predictions) == np.asarray(references)[:, None]
        return {"top1": float(hits[:, 0].mean()), "top5": float(hits[:, :TOP_K].any(axis=1).mean())}


def keep_top5(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (B, K) to the indices of the five largest, (B, min(5, K)), so that evaluation gathers little."""
    return torch.topk(logits, min(TOP_K, logits.shape[-1]), dim=-1).indices


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of the trainer, without images that do not count; `predictions` comes from `keep_top5`."""
    predictions, references = counted_classes(prediction)
    if not len(references):
        return {}  # a split without labels
    return TopKAccuracy(keep_in_memory=True).compute(predictions=predictions, references=references)


def compute_neighbours(prediction: EvalPrediction, device: torch.device) -> dict[str, float]:
    """`compute_metrics` of the trainer for a backbone, whose `predictions` are features.

    Returns:
        `neighbours_top1`: the share of the evaluation images whose class their 20 nearest among the others vote for, see
        `nearest_neighbours`. Nothing without labels.
    """
    features, labels = (torch.from_numpy(values).to(device) for values in counted_classes(prediction))
    features, labels = features[labels >= 0], labels[labels >= 0]  # -1: an image without a label
    if len(labels) < 2:
        return {}
    numbers, labels = torch.unique(labels, return_inverse=True)  # class indices may be any numbers
    found = nearest_neighbours(features, labels, features, len(numbers), leave_one_out=True)
    return {"neighbours_top1": float((found == labels).double().mean())}


def counted_classes(prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
    """Predictions (N, ...) and class indices (N,) of the images that count; of soft labels the largest share's."""
    predictions, references = (
        np.concatenate(values) if isinstance(values, list) else np.asarray(values)  # batches, if they were kept apart
        for values in (prediction.predictions, prediction.label_ids)
    )
    counts = counted(references)
    if references.ndim == 2:
        counts, references = counts & references.any(axis=1), references.argmax(axis=1)
    return predictions[counts], references[counts]


class OfCounted:
    """A `compute_metrics` of the user's, which sees no image that does not count: undecodable, or without a label."""

    def __init__(self, compute_metrics: Any):
        self.compute_metrics = compute_metrics

    def __call__(self, prediction: EvalPrediction, **options: Any) -> Any:
        counts = _each(counted, prediction.label_ids)
        if not options and not np.concatenate(counts if isinstance(counts, list) else [counts]).any():
            return {}  # a split without labels
        parts = {name: getattr(prediction, name) for name in ("predictions", "label_ids", "inputs", "losses")}
        kept = {name: _kept(part, counts) for name, part in parts.items()}
        return self.compute_metrics(EvalPrediction(**kept), **options)


def _each(function: Any, batches: Any) -> Any:
    return [function(batch) for batch in batches] if isinstance(batches, list) else function(batches)


def _kept(values: Any, counts: Any) -> Any:
    """Rows that count, of arrays in tuples, in mappings, or by batches as `counts` is."""
    if isinstance(counts, list) and isinstance(values, list):
        return [_kept(batch, mask) for batch, mask in zip(values, counts, strict=True)]
    if isinstance(values, dict):
        return {name: _kept(value, counts) for name, value in values.items()}
    if isinstance(values, (tuple, list)):
        return type(values)(_kept(value, counts) for value in values)
    fits = values is not None and not isinstance(counts, list) and len(values) == len(counts)
    return values[counts] if fits else values


class CountedLoss:
    """The mean loss of an evaluation over the images that count, on all processes; the parent's is over blanks, too."""

    def __init__(self, task_loss: str, device: torch.device):
        self.task_loss = task_loss
        self._sums = torch.zeros(2, device=device)  # of the losses, and of the images

    def add(self, loss: Tensor, labels: Tensor) -> None:
        """Take in a batch: its mean loss, and its labels (B,) or (B, K)."""
        images = counted_in_loss(labels, self.task_loss).sum()
        self._sums += torch.stack([torch.where(images > 0, loss * images, 0.0), images])

    def mean(self, accelerator: Accelerator) -> float | None:
        """Over all processes, which must all ask; None where no image counted."""
        total, images = accelerator.reduce(self._sums, "sum").tolist()
        return total / images if images else None
