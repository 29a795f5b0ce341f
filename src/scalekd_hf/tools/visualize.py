"""Where a teacher's features and a student's projected features agree, as maps and as a picture of them.

Source: ScaleKD (arXiv 2411.06786), section 3.2. The feature losses are distances of unit vectors, so that
each is told by cosine similarities: with N positions, loss = 2N · (1 - mean cosine), in either view.

Shapes in this file: B images, H x W grid of the teacher's last map, N = H*W, D channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..method.heads import FEATURE_TERMS, LINEAR_TERM
from ..method.losses import mimicking_target, unit_tokens
from ..training.model import ScaleKDModel


__all__ = ["agreement_maps", "cosine_map", "draw_agreement"]

DOTS_PER_INCH = 120
TITLE = "Agreement of teacher and projected student features"
COLOURS = "RdBu"  # red, white, blue: told apart by colour-blind people, too


@torch.no_grad()
def agreement_maps(model: ScaleKDModel, pixel_values: Tensor) -> dict[str, Tensor]:
    """Cosine similarity of projected student features and the teacher's last features, position by position.

    Compared is what the feature losses compare, in evaluation mode: BatchNorm takes its running statistics, and
    an image's maps do not depend on those beside it. The penultimate tokens have passed the teacher's last stage.

    Args:
        model: with a teacher and mimicking heads; its mode and its buffers stay as they are.
        pixel_values: (B, 3, height, width), normalised and sized for the student.

    Returns:
        A float32 map (B, H, W) in [-1, 1] for each feature term of the model, by the names in `FEATURE_TERMS`, or of `LINEAR_TERM`.

    Raises:
        ValueError: a model without a teacher or heads.
    """
    teacher, heads = model.teacher, model.heads
    if teacher is None or heads is None:
        missing = "teacher" if teacher is None else "mimicking heads, as all of its feature weights are 0"
        raise ValueError(
            f"`model` has no {missing}: no features are compared. Give one that is built with a teacher, and with "
            "`spatial_weight` or `frequency_weight` above 0."
        )
    tokens: dict[str, Tensor] = {}

    def keep(name: str, module: Any, args: Any, output: Tensor) -> None:
        tokens[name] = output

    def last_stage(entering: Tensor) -> Tensor:
        entered = list(tokens)  # the penultimate projectors, which have just run; the views are one batch
        perceived = teacher.last_stage(entering)
        tokens.update(zip(entered, perceived.chunk(len(entered)), strict=True))
        return perceived

    hooks = [projector.register_forward_hook(partial(keep, name)) for name, projector in heads.projectors()]
    training = model.training
    try:
        model.eval()
        teacher_last, _ = teacher(model.normaliser.for_teacher(pixel_values))
        penultimate, last, _ = model.student(pixel_values)
        heads(penultimate, last, teacher_last, last_stage)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    without = {term: heads.removes_direct_component[term.split("_")[1]] for term in heads.terms}
    return {term: cosine_map(tokens[term], teacher_last, without[term]) for term in heads.terms}


def cosine_map(tokens: Tensor, teacher_map: Tensor, remove_direct_component: bool) -> Tensor:
    """Cosine similarity at each position of the grid (section 3.2).

    Args:
        tokens: (B, H*W, D), the projected student tokens.
        teacher_map: (B, D, H, W), the teacher's last map.
        remove_direct_component: of the frequency view: each channel's mean over the grid is taken off both sides first.

    Returns:
        A float32 map (B, H, W) in [-1, 1].
    """
    student, teacher = (
        unit_tokens(tokens, remove_direct_component),
        mimicking_target(teacher_map, remove_direct_component),
    )
    cosines = (student * teacher).sum(-1)
    return cosines.clamp(-1, 1).unflatten(1, teacher_map.shape[2:])


def draw_agreement(
    images: Tensor, before: Mapping[str, Tensor], after: Mapping[str, Tensor], file: str | Path
) -> None:
    """Draw maps before and after training beside their images, a row for each image, with the mean under each map.

    Args:
        images: uint8 (B, 3, height, width).
        before, after: what `agreement_maps` returns for these images; all maps share one colour scale.
        file: the picture; its ending says the format, such as .png or .pdf.

    Raises:
        ValueError: maps of different terms or of another number of images, or a format that Matplotlib does not know.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    _check_maps(len(images), before, after)
    terms = [term for term in (*FEATURE_TERMS, LINEAR_TERM) if term in before]
    pairs = (("before training", before), ("after training", after))
    colours = ScalarMappable(Normalize(-1, 1), COLOURS)
    sheet = _Sheet(len(images), len(terms), images.shape[-2] / images.shape[-1])
    figure = Figure((sheet.width, sheet.height), dpi=DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    for row, image in enumerate(images.cpu()):
        axes = _axes(figure, sheet.cell(row, 0), "", f"image {row + 1}")
        axes.imshow(image.permute(1, 2, 0).numpy(), aspect="auto")
        for column, (term, (when, maps)) in enumerate(itertools.product(terms, pairs)):
            cosines = maps[term][row].cpu()
            mean = round(cosines.mean().item(), 2) + 0.0  # no -0.00
            axes = _axes(figure, sheet.cell(row, 1 + column), when if row == 0 else "", f"mean {mean:.2f}")
            axes.imshow(cosines.numpy(), norm=colours.norm, cmap=colours.cmap, aspect="auto")
    figure.text(sheet.margin / sheet.width, 1 - 0.1 / sheet.height, TITLE, va="top", fontsize=13)
    for column, term in enumerate(terms):
        stage, view = term.split("_")
        x, y = sheet.heading(column)
        figure.text(x, y, f"{stage} stage,\n{view} view", ha="center", va="bottom", fontsize=12)
    bar = figure.colorbar(colours, figure.add_axes(sheet.bar()), ticks=[-1, -0.5, 0, 0.5, 1])
    bar.set_label("cosine similarity", fontsize=11)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


@dataclass(frozen=True)
class _Sheet:
    """Where things lie in a picture: sizes in inches, places as shares of it (left, bottom, width, height)."""

    rows: int
    terms: int
    shape: float  # height of an image, its width being 1

    side, apart, between, below, above, margin, key = 1.3, 0.1, 0.35, 0.35, 1.2, 0.15, 1.1

    @property
    def width(self) -> float:
        return self.margin + self.side + self.terms * (self.between + 2 * self.side + self.apart) + self.key

    @property
    def height(self) -> float:
        return self.above + self.rows * (self.side * self.shape + self.below) + 0.05

    def cell(self, row: int, column: int) -> tuple[float, float, float, float]:
        """Of the image (column 0) or of a map."""
        left = self.margin + column * (self.side + self.apart) + (column + 1) // 2 * (self.between - self.apart)
        top = self.above + row * (self.side * self.shape + self.below)
        return self._shares(left, top, self.side, self.side * self.shape)

    def heading(self, term: int) -> tuple[float, float]:
        """Of the middle between two maps, above their titles."""
        left, bottom, width, height = self.cell(0, 2 + 2 * term)
        return left - self.apart / 2 / self.width, bottom + height + 0.27 / self.height

    def bar(self) -> tuple[float, float, float, float]:
        """Of the colour bar, from the top of the first row to the bottom of the last."""
        height = self.rows * (self.side * self.shape + self.below) - self.below
        return self._shares(self.width - self.key + 0.25, self.above, 0.15, height)

    def _shares(self, left: float, top: float, width: float, height: float) -> tuple[float, float, float, float]:
        bottom = self.height - top - height
        return left / self.width, bottom / self.height, width / self.width, height / self.height


def _axes(figure: Any, place: tuple[float, float, float, float], title: str, below: str) -> Any:
    axes = figure.add_axes(place, xticks=[], yticks=[])
    axes.set_title(title, fontsize=11, pad=4)
    axes.set_xlabel(below, fontsize=11, labelpad=3)
    return axes


def _check_maps(images: int, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    if set(before) != set(after):
        raise ValueError(
            f"`before` has maps of {list(before)} and `after` of {list(after)}: they are compared term by term. Make both "
            "with the same model."
        )
    for name, maps in (("before", before), ("after", after)):
        for term, cosines in maps.items():
            if len(cosines) != images:
                raise ValueError(
                    f"`{name}` has {len(cosines)} maps of {term!r} for {images} `images`: each image needs its own. Give "
                    "`agreement_maps` the same images."
                )
