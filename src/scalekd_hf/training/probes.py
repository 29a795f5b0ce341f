"""How good features are without training them further: the nearest neighbours' votes, and a linear classifier.

Shapes in this file: N training images, M images to classify, C features, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


__all__ = ["WEIGHT_DECAYS", "choose_weight_decay", "fit_linear", "nearest_neighbours", "scores"]

NEIGHBOURS, TEMPERATURE = 20, 0.07  # DINO's (Caron et al. 2021, arXiv 2104.14294, section 4.1 and its code)
WEIGHT_DECAYS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
HELD_OUT = 0.1  # of the training images, for the choice among them
MOST_STEPS = 200
QUERIES, ROWS = 1024, 65536  # that are computed at once


def nearest_neighbours(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, classes: int, leave_one_out: bool = False
) -> Tensor:
    """The class that the 20 most similar images vote for, each with exp(cosine / 0.07): DINO's protocol.

    Args:
        bank, bank_labels: features (N, C) and class indices (N,) that are known.
        queries: features (M, C).
        classes: K.
        leave_one_out: the queries are the bank itself, and none votes for itself.

    Returns:
        Classes (M,).
    """
    bank = F.normalize(bank.float(), dim=1)
    found = []
    for start in range(0, len(queries), QUERIES):
        part = F.normalize(queries[start : start + QUERIES].float(), dim=1)
        similarity = part @ bank.T
        if leave_one_out:
            rows = torch.arange(len(part), device=part.device)
            similarity[rows, start + rows] = -torch.inf
        count = min(NEIGHBOURS, len(bank) - leave_one_out)
        cosines, neighbours = similarity.topk(count, dim=1)
        votes = torch.zeros(len(part), classes, device=part.device)
        votes.scatter_add_(1, bank_labels[neighbours], (cosines / TEMPERATURE).exp())
        found.append(votes.argmax(1))
    return torch.cat(found)


def fit_linear(
    features: Tensor, labels: Tensor, classes: int, weight_decay: float, start: Tensor | None = None
) -> Tensor:
    """The softmax regression that L-BFGS finds: the mean cross-entropy and weight_decay / 2 · ||W||² are least.

    Args:
        features, labels: (N, C) and class indices (N,).
        classes: K.
        weight_decay: of the weights, not of the biases.
        start: where to begin, as what is returned; at 0 by default.

    Returns:
        Weights and, in the last row, biases (C + 1, K).
    """
    solution = features.new_zeros((features.shape[1] + 1, classes)) if start is None else start.clone()
    solution.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [solution], max_iter=MOST_STEPS, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = weight_decay / 2 * solution[:-1].square().sum()
        total.backward()
        for rows, truth in zip(features.split(ROWS), labels.split(ROWS), strict=True):
            loss = F.cross_entropy(scores(solution, rows), truth, reduction="sum") / len(features)
            loss.backward()
            total = total + loss.detach()
        return total.detach()

    with torch.enable_grad():
        optimizer.step(closure)
    return solution.detach()


def scores(solution: Tensor, features: Tensor) -> Tensor:
    """Features (M, C) to logits (M, K) by what `fit_linear` returns."""
    return features @ solution[:-1] + solution[-1]


def choose_weight_decay(features: Tensor, labels: Tensor, classes: int) -> float:
    """The weight decay whose classifier is right most often on a tenth of the training images that it has not seen.

    Args:
        features, labels: (N, C) and class indices (N,).
        classes: K.

    Returns:
        One of `WEIGHT_DECAYS`; of equals the largest.
    """
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).to(features.device)
    held_out, kept = order.split([count := max(1, round(HELD_OUT * len(order))), len(order) - count])
    best, most, solution = WEIGHT_DECAYS[0], -1, None
    for weight_decay in WEIGHT_DECAYS:
        solution = fit_linear(features[kept], labels[kept], classes, weight_decay, solution)
        right = int((scores(solution, features[held_out]).argmax(1) == labels[held_out]).sum())
        if right > most:
            best, most = weight_decay, right
    return best
