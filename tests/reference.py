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


def task_loss(logits, labels, smoothing=0.0):
    """Cross-entropy with the target spread a little over all classes."""
    log_q = logits - torch.log(torch.exp(logits).sum(1, keepdim=True))
    hit = torch.stack([row[label] for row, label in zip(log_q, labels, strict=True)])
    return -((1 - smoothing) * hit + smoothing * log_q.mean(1)).mean()


def binary_task_loss(logits, labels):
    """Sigmoids against one-hot labels: a sum over classes, a mean over images."""
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        probabilities = 1 / (1 + torch.exp(-row))
        for number, probability in enumerate(probabilities):
            total = total - torch.log(probability if number == label else 1 - probability)
    return total / len(logits)


def channel_norm(weights, student_map):
    """LayerNorm over the channels of a map (B, C, h, w)."""
    mean = student_map.mean(1, keepdim=True)
    deviation = torch.sqrt(((student_map - mean) ** 2).mean(1, keepdim=True) + 1e-5)
    scale, shift = (weights[name].view(1, -1, 1, 1) for name in ("weight", "bias"))
    return (student_map - mean) / deviation * scale + shift


def feature_losses(weights, penultimate, last, teacher_last, last_stage, num_heads, softmax_scale, **options):
    """The four losses; `weights` maps the names of the four projectors to theirs."""
    losses = {}
    for view, loss in (("spatial", spatial_loss), ("frequency", frequency_loss)):
        first, second = f"penultimate_{view}", f"last_{view}"
        p = last_stage(project(weights[first], penultimate, num_heads[0], softmax_scale, **options))
        m = project(weights[second], last, num_heads[1], softmax_scale, queries=p, **options)
        losses[first], losses[second] = loss(p, teacher_last), loss(m, teacher_last)
    return losses


def first_step(kind, parameters, gradients, rate, decay, decayed, max_norm, epsilon):
    """The first step of an optimiser, in place.

    `decayed` says of each parameter whether it decays; `max_norm` is of the whole gradient, 0 for no clipping.
    """
    if max_norm:
        gradients = scaled(gradients, max_norm)
    if kind == "Lamb":
        gradients = scaled(gradients, 1.0)  # its own clipping
    for p, g, decays in zip(parameters, gradients, decayed, strict=True):
        wd = decay if decays else 0.0
        if kind == "SGD":
            update = g + wd * p  # a momentum buffer begins with the gradient
        else:
            adaptive = g / (g.abs() + epsilon)  # Adam's moments, their bias corrected
            update = adaptive + wd * p
            if kind == "Lamb" and p.norm() > 0 and update.norm() > 0:
                update = update * p.norm() / update.norm()
        p -= rate * update


def scaled(gradients, max_norm):
    norm = torch.sqrt(sum((g**2).sum() for g in gradients))
    return [g * min(1.0, max_norm / norm.item()) for g in gradients]
