"""A network's features on labelled images that it was not trained on: nearest neighbours, and a linear probe."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ..data.dataset import dataset_labels
from ..data.folders import ALL, split_of
from ..data.holdout import held_out_share, hold_out
from ..data.labels import class_order
from ..data.loading import load_local, load_split, matching_files
from ..models.students import POOLINGS, Student
from ..training.config import ScaleKDConfig
from ..training.metrics import counted_classes
from ..training.model import asked_images
from ..training.probes import choose_weight_decay, fit_linear, nearest_neighbours, scores
from ..training.trainer import ScaleKDTrainer


__all__ = ["evaluate_features", "extract_features", "features_of", "load_known_images", "probe"]


def load_known_images(arguments: Any) -> Any:
    """The labelled images that the classifiers know: `train_files`, else `train_split`, without the share held out.

    Args:
        arguments: an `EvaluateArguments`, whose images to be classified are loaded, and `eval_split` known by name.

    Raises:
        ValueError: there are none, or they are those to be classified.
    """
    share, shared = held_out_share(arguments.eval_split), "these are the images to be classified, too"
    if arguments.train_files is not None:
        if both := _shared_files(arguments.train_files, arguments.eval_files):
            raise ValueError(f"`train_files` are {arguments.train_files!r}, with {both!r}: {shared}. Name others.")
        return load_split(arguments, arguments.train_files, arguments.train_split)
    if arguments.dataset is None:
        if share is not None:
            return hold_out(load_split(arguments, arguments.eval_files, arguments.eval_split), share)[0]
        raise ValueError(
            "`train_files` are missing: k-NN and the linear probe need labelled images that are not those to be classified. Name "
            "them, or hold out a share of the others with `eval_split` 0.1."
        )
    local = load_local(arguments)
    if share is not None:
        return hold_out(load_split(arguments, None, arguments.train_split, local), share)[0]
    if _share_rows(arguments.train_split, arguments.eval_split) or (local is not None and ALL in local):
        raise ValueError(
            f"`train_split` is {arguments.train_split!r}: {shared}. Name another, or hold out a share with `eval_split` 0.1."
        )
    return load_split(arguments, None, arguments.train_split, local)


def _shared_files(known: str, asked: str | None) -> str | None:
    """A file that two patterns both match, or the URL that both are."""
    if known == asked:
        return known
    return min({*matching_files(known)} & {*matching_files(asked or "")}, default=None)


def _share_rows(known: str, asked: str) -> bool:
    """Whether two splits, or sums of splits, have rows in common; of two slices of one split it is known if they are the same."""
    parts: list[dict[str, str]] = []
    for split in (known, asked):
        words = [word.strip().partition("[") for word in split.split("+")]
        parts.append({split_of(name) or name: rows for name, _, rows in words})
    both = parts[0].keys() & parts[1].keys()
    return any(not parts[0][name] or not parts[1][name] or parts[0][name] == parts[1][name] for name in both)


def features_of(student: Student, pooling: str) -> Student:
    """The same network seen as a backbone, whatever classifier it has; `features` then pools as asked.

    Raises:
        ValueError: an unknown pooling, or the pooled output of a network that puts out logits.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"`pooling` must be one of {list(POOLINGS)}, got {pooling!r}.")
    if pooling == "model" and student.num_labels:
        raise ValueError(
            f"`pooling` is 'model', but `model` {student.name!r} has a classifier, and puts out logits. Leave `pooling` out, or build "
            "it without: `--model_args '{\"num_classes\": 0}'`."
        )
    student.num_labels, student.labels, student.pooling = 0, None, pooling
    return student


def extract_features(student: Student, dataset: Any, config: ScaleKDConfig) -> tuple[Tensor, Tensor]:
    """Features (N, C) and class indices (N,) of the images of a data set that can be decoded and have a label.

    Args:
        student: a backbone, see `features_of`; its own preprocessing is used, or what `config` asks for in its place.
        dataset: a `datasets` object with images and class indices, map-style or streaming.
        config: batch size, workers, precision; columns.

    Raises:
        ValueError: no image has a label, or features that are not finite.
    """
    config = dataclasses.replace(config, push_to_hub=False, report_to="none", eval_do_concat_batches=True)
    student.spec = asked_images(student, config)
    trainer = ScaleKDTrainer(student, None, config, compute_metrics=lambda prediction: {})
    output: Any = trainer.predict(dataset)
    if output.label_ids is None:
        raise ValueError(
            f"The data have no column {config.label_column!r} of class indices, which k-NN and a linear probe compare with. Name it "
            "with `label_column`."
        )
    features, labels = counted_classes(EvalPrediction(output.predictions, output.label_ids))
    features, labels = features[labels >= 0], labels[labels >= 0]
    if not len(labels):
        raise ValueError("No image of the data can be counted: none has a label and could be decoded.")
    if not np.isfinite(features).all():
        raise ValueError("The model's features are not finite. Evaluate in float32: leave `bf16` and `fp16` out.")
    return torch.from_numpy(features), torch.from_numpy(labels)


def probe(
    known: tuple[Tensor, Tensor], asked: tuple[Tensor, Tensor], device: torch.device, order: list[int] | None = None
) -> dict[str, float]:
    """Classify images by others whose labels are known.

    Args:
        known, asked: features (N, C) and class indices (N,), as `extract_features` gives them.
        device: to compute on.
        order: the class of `known` for each label of `asked`, where they differ.

    Returns:
        `images`, `train_images`; `knn_top1`, the share that `nearest_neighbours` finds right; `linear_top1`, that of a softmax
        regression on features that are standardised as the known ones are; and its `weight_decay`, which a tenth of the
        known images has chosen.
    """
    features, labels = (tensor.to(device) for tensor in known)
    queries, truth = (tensor.to(device) for tensor in asked)
    if order is not None:
        truth = torch.tensor(order, device=device)[truth]
    numbers, both = torch.unique(torch.cat([labels, truth]), return_inverse=True)  # class indices may be any numbers
    labels, truth, classes = both[: len(labels)], both[len(labels) :], len(numbers)
    neighbours = nearest_neighbours(features, labels, queries, classes)
    mean, deviation = features.mean(0), features.std(0)
    constant = deviation <= 1e-6 * deviation.max()
    features, queries = ((x - mean) / deviation.masked_fill(constant, torch.inf) for x in (features, queries))
    weight_decay = choose_weight_decay(features, labels, classes)
    linear = scores(fit_linear(features, labels, classes, weight_decay), queries).argmax(1)
    shares = {"knn_top1": neighbours == truth, "linear_top1": linear == truth}
    counts = {"images": len(truth), "train_images": len(labels)}
    return (
        counts | {name: float(hits.double().mean()) for name, hits in shares.items()} | {"weight_decay": weight_decay}
    )


def evaluate_features(student: Student, known: Any, asked: Any, config: ScaleKDConfig) -> dict[str, Any]:
    """k-NN and linear probe of a backbone on two data sets; every process must call it.

    Args:
        student: see `features_of`.
        known, asked: labelled images that the classifiers know, and that they classify; `datasets` objects.
        config: see `extract_features`.

    Returns:
        As `probe`, and `features`, what was measured. Of the processes the first alone computes the shares.

    Raises:
        ValueError: labels of other classes in one of the two than in the other; see `extract_features`.
    """
    if not config.has_labels:
        raise ValueError("An evaluation compares with labels, but `label_column` is 'none'. Set it to their column.")
    names = dataset_labels(known, config.label_column)
    order = (
        class_order("eval_dataset", dataset_labels(asked, config.label_column), names, len(names)) if names else None
    )
    parts = [extract_features(student, part, config) for part in (known, asked)]
    what = f"mean of {student.taps[1].module}" if student.pooling == "map" else "the model's own"
    found = probe(parts[0], parts[1], config.device, order) if config.process_index == 0 else {}
    return cast(dict[str, Any], found) | {"features": what}
