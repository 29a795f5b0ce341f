"""A ScaleKD step written down as it was published, to be compared with ours: plain, and with nothing saved.

Four separate projectors with explicit attention, learned queries repeated for every image, DCT matrices built in every call, two
passes through the teacher's last stage, and the teacher's side of each loss computed anew.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd_hf.method.heads import FEATURE_TERMS
from scalekd_hf.method.projector import CrossAttentionProjector
from scalekd_hf.training.model import ScaleKDModel


class Projector(nn.Module):
    """One projector with the weights of ours: (B, C, h, w) to (B, N, D)."""

    def __init__(self, ours: CrossAttentionProjector):
        super().__init__()
        self.parts = copy.deepcopy(ours)

    def forward(self, student_map: Tensor, queries: Tensor | None = None) -> Tensor:
        parts, attention = self.parts, self.parts.attn
        z = F.relu(parts.stem.norm(parts.stem.conv(student_map))) + parts.pos_embed
        z = z.flatten(2).transpose(1, 2)
        if queries is None:
            queries = parts.queries.unsqueeze(0).repeat(z.shape[0], 1, 1)
        q, k, v = attention.q(F.relu(parts.query_proj(queries))), attention.k(z), attention.v(z)
        q, k, v = (x.reshape(*x.shape[:2], attention.num_heads, -1).permute(0, 2, 1, 3) for x in (q, k, v))
        weights = torch.softmax((q @ k.transpose(-2, -1)) * attention.scale, dim=-1)
        out = attention.proj((weights @ v).transpose(1, 2).reshape(queries.shape[0], -1, q.shape[1] * q.shape[3]))
        n = parts.norm(out)
        return n + parts.mlp.fc2(F.relu(parts.mlp.fc1(n)))


def dct_matrix(size: int, device: torch.device) -> Tensor:
    """The orthonormal DCT-II, (size, size)."""
    k = torch.arange(size, dtype=torch.float32, device=device)
    matrix = torch.cos(math.pi / size * (k[None] + 0.5) * k[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def without_direct_component(maps: Tensor) -> Tensor:
    """(B, D, H, W) to the frequencies, coefficient [0, 0] set to zero, and back."""
    rows, columns = (dct_matrix(size, maps.device) for size in maps.shape[2:])
    frequencies = rows @ maps @ columns.T
    mask = torch.ones_like(frequencies)
    mask[:, :, 0, 0] = 0
    return rows.T @ (frequencies * mask) @ columns


def view_loss(tokens: Tensor, teacher_map: Tensor, view: str) -> Tensor:
    """Distance of unit vectors, a sum over tokens and channels, a mean over images."""
    with torch.autocast(tokens.device.type, enabled=False):
        teacher_map = teacher_map.float()
        maps = tokens.float().transpose(1, 2).reshape(teacher_map.shape)
        if view == "frequency":
            maps, teacher_map = without_direct_component(maps), without_direct_component(teacher_map)
        difference = F.normalize(maps, dim=1) - F.normalize(teacher_map, dim=1)
        return (difference**2).sum() / len(maps)


class PublishedStep(nn.Module):
    """The whole step, on the student and the teacher of a `ScaleKDModel` and with copies of its projectors."""

    def __init__(self, model: ScaleKDModel):
        super().__init__()
        assert model.heads is not None
        self.student, self.weights = model.student, dict(model.weights)
        self.__dict__["ours"] = model  # for its teacher, which is no child of this module either
        self.projectors = nn.ModuleDict({name: Projector(ours) for name, ours in model.heads.projectors()})

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        """Images (B, 3, height, width) and labels (B,) to the weighted loss."""
        teacher = self.ours.teacher
        with torch.no_grad():
            teacher_last, teacher_logits = teacher(self.ours.normaliser.for_teacher(pixel_values))
        penultimate, last, logits = self.student(pixel_values)
        losses = {}
        for view in ("spatial", "frequency"):
            first, second = f"penultimate_{view}", f"last_{view}"
            perceived = teacher.last_stage(self.projectors[first](penultimate))
            losses[first] = view_loss(perceived, teacher_last, view)
            losses[second] = view_loss(self.projectors[second](last, perceived), teacher_last, view)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            losses["task"] = F.cross_entropy(logits, labels)
            soft = teacher_logits.float().softmax(-1)
            losses["logit"] = -(soft * logits.log_softmax(-1)).sum(-1).mean()
        assert set(FEATURE_TERMS) < set(losses)
        return sum((self.weights[name] * value for name, value in losses.items()), torch.zeros_like(losses["task"]))
