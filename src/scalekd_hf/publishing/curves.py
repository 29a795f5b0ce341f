"""The course of a run as a picture: losses, learning rate and accuracy over the images seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..method.distiller import ALL_TERMS


__all__ = ["draw_curves"]

ACCURACIES = {"eval_top1": "top-1", "eval_top5": "top-5", "eval_neighbours_top1": "neighbours' top-1"}
ACCURACIES |= {"eval_mean_iou": "mean IoU", "eval_pixel_accuracy": "pixel accuracy"}
ACCURACIES |= {"eval_box_ap": "box AP", "eval_mask_ap": "mask AP", "eval_box_ap50": "box AP at IoU 0.5"}


def draw_curves(history: list[dict[str, Any]], file: str | Path) -> bool:
    """Draw what a trainer has logged.

    Args:
        history: `trainer.state.log_history`.
        file: the PNG to write.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    training = [entry for entry in history if "loss" in entry and "images_seen" in entry]
    if not training:
        return False
    seen = np.array([entry["images_seen"] for entry in training])
    unit, name = (1e6, "million images seen") if seen[-1] >= 2e6 else (1e3, "thousand images seen")
    evaluations = [entry for entry in history if any(key in entry for key in ACCURACIES)]
    figure = Figure(figsize=(4.2 * (3 if evaluations else 2), 3.6), layout="constrained")
    axes = figure.subplots(1, 3 if evaluations else 2)
    for term in ("loss", *ALL_TERMS):
        values = [entry.get(term, np.nan) for entry in training]
        if np.isfinite(values).any():
            width: dict[str, Any] = {"color": "black", "linewidth": 2} if term == "loss" else {}
            width |= {"linestyle": "--"} if term == "logit" else {}  # it may lie on the task's
            axes[0].plot(seen / unit, values, label=term.replace("_", " "), **width)
    axes[0].set(title="loss (weighted) and its terms (unweighted)", yscale="log")
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low, high * (high / low) ** 0.5)  # room for the legend
    axes[0].legend(fontsize="x-small", ncols=2, loc="upper right")
    axes[1].plot(seen / unit, [entry["learning_rate"] for entry in training])
    axes[1].set(title="learning rate", ylim=(0, None))
    if evaluations:
        steps = [entry["step"] for entry in training]
        places = np.interp([entry["step"] for entry in evaluations], steps, seen / unit)
        for key, label in ACCURACIES.items():
            values = [100 * entry.get(key, np.nan) for entry in evaluations]
            if np.isfinite(values).any():
                axes[2].plot(places, values, marker="o", markersize=3, label=label)
        axes[2].set(title="accuracy on the evaluation data, %")
        axes[2].legend(fontsize="small")
    for axis in axes:
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    return True
