"""The method once more: slow, plain, with SciPy's DCT and loops, from the paper's equations.

Nothing here is shared with the package, so that an error in one does not hide in the other. Weights are
read from a flat mapping by the projectors' parameter names.
"""

import math

import torch
from scipy.fft import dctn, idctn


def project(weights, student_map, num_heads, softmax_scale, queries=None, stem_norm="batch"):
    """Cross attention projector in training mode: (B, C, h, w) to (B, N, D)."""
    w = weights
    z = torch.conv2d(student_map, w["stem.conv.weight"], w["stem.conv.bias"], padding=1)
    axes = (0, 2, 3) if stem_norm == "batch" else (1,)
    mean = z.mean(axes, keepdim=True)
    variance = ((z - mean) ** 2).mean(axes, keepdim=True)
    z = (z - mean) / torch.sqrt(variance + 1e-5)
    z = z * w["stem.norm.weight"].view(1, -1, 1, 1) + w["stem.norm.bias"].view(1, -1, 1, 1)
    z = z.clamp(min=0) + w["pos_embed"]
    batch, channels = z.shape[:2]
    context = z.reshape(batch, channels, -1).permute(0, 2, 1)
    outputs = []
    for image in range(batch):
        q = w["queries"] if queries is None else queries[image]
        q = affine(w, "query_proj", q).clamp(min=0)
        q, k, v = affine(w, "attn.q", q), affine(w, "attn.k", context[image]), affine(w, "attn.v", context[image])
        head_dim = q.shape[-1] // num_heads
        heads = []
        for head in range(num_heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            scores = q[:, part] @ k[:, part].T / math.sqrt(head_dim) * softmax_scale
            scores = torch.exp(scores - scores.max(dim=1, keepdim=True).values)
            heads.append(scores / scores.sum(dim=1, keepdim=True) @ v[:, part])
        attended = affine(w, "attn.proj", torch.cat(heads, dim=1))
        mean = attended.mean(1, keepdim=True)
        deviation = torch.sqrt(((attended - mean) ** 2).mean(1, keepdim=True) + 1e-5)
        n = (attended - mean) / deviation * w["norm.weight"] + w["norm.bias"]
        outputs.append(n + affine(w, "mlp.fc2", affine(w, "mlp.fc1", n).clamp(min=0)))
    return torch.stack(outputs)


def affine(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def spatial_loss(tokens, teacher_map):
    """Sum over tokens of the squared distance of unit vectors, mean over images."""
    total = 0.0
    for image in range(len(tokens)):
        target = teacher_map[image].flatten(1).T
        for p, t in zip(tokens[image], target, strict=True):
            total = total + ((p / p.norm() - t / t.norm()) ** 2).sum()
    return total / len(tokens)


def frequency_loss(tokens, teacher_map):
    """The same after a DCT over the grid, coefficient [0, 0] set to zero, and the inverse."""
    height, width = teacher_map.shape[2:]
    maps = tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)
    return spatial_loss(
        without_direct_component(maps).flatten(2).transpose(1, 2), without_direct_component(teacher_map)
    )


class _WithoutDirectComponent(torch.autograd.Function):
    """DCT-II, zero, inverse: linear, symmetric, so its own gradient."""

    @staticmethod
    def forward(ctx, maps):
        return torch.from_numpy(remove_direct_component(maps.detach().numpy()))

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(remove_direct_component(grad.numpy()))


without_direct_component = _WithoutDirectComponent.apply


def remove_direct_component(maps):
    coefficients = dctn(maps, axes=(2, 3), norm="ortho")
    coefficients[:, :, 0, 0] = 0
    return idctn(coefficients, axes=(2, 3), norm="ortho")


def logit_loss(student_logits, teacher_logits, temperature):
    student, teacher = student_logits / temperature, teacher_logits / temperature
    p = torch.exp(teacher) / torch.exp(teacher).sum(1, keepdim=True)
    log_q = student - torch.log(torch.exp(student).sum(1, keepdim=True))
    return -(p * log_q).sum(1).mean() * temperature**2


def task_loss(logits, labels):
    log_q = logits - torch.log(torch.exp(logits).sum(1, keepdim=True))
    return -torch.stack([row[label] for row, label in zip(log_q, labels, strict=True)]).mean()


def feature_losses(weights, penultimate, last, teacher_last, last_stage, num_heads, softmax_scale, **options):
    """The four losses; `weights` maps the names of the four projectors to theirs."""
    losses = {}
    for view, loss in (("spatial", spatial_loss), ("frequency", frequency_loss)):
        first, second = f"penultimate_{view}", f"last_{view}"
        p = last_stage(project(weights[first], penultimate, num_heads[0], softmax_scale, **options))
        m = project(weights[second], last, num_heads[1], softmax_scale, queries=p, **options)
        losses[first], losses[second] = loss(p, teacher_last), loss(m, teacher_last)
    return losses
