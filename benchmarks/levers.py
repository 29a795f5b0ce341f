"""What each way of making the step cheaper gives, alone: the same work without it and with it, side by side.

    python benchmarks/levers.py [--batch 8 --precision float32] [--only stems tail]

Each pair computes the same, which is checked first where both return tensors, on the maps and tokens of one teacher-student
pair (as benchmarks/step.py builds it), forward and backward. Prints the ratio of the times and of the peak memories.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from measuring import describe, interleave, peak_gib, without_tf32
from step import CLASSES, Setting, build
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from scalekd_hf.method.losses import mimicking_loss, mimicking_target
from scalekd_hf.method.projector import CrossAttentionProjector, as_multiplied


Pair = tuple[Callable[[], object], Callable[[], object]]


class Levers:
    """The pairs of work, by name; each method's text says what is expected on a GPU."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device, self.batch = args, torch.device(args.device), args.batch
        self.setting = Setting(batch=args.batch, image_size=args.image_size, teacher=args.teacher)
        self.model = build(self.setting, args).to(self.device)
        assert self.model.heads is not None and self.model.teacher is not None
        self.heads, self.teacher, self.student = self.model.heads, self.model.teacher, self.model.student
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=args.precision == "bf16")
        self.pixels = self.random(3, args.image_size, args.image_size, gradient=False)
        (dim, grid), (last_dim, last_grid) = zip(self.student.dims, self.student.grids, strict=True)
        self.penultimate, self.last = self.random(dim, *grid), self.random(last_dim, *last_grid)
        count = self.teacher.penultimate_grid[0] * self.teacher.penultimate_grid[1]
        self.tokens = self.random(count, self.teacher.penultimate_dim)
        self.teacher_map = self.random(self.teacher.dim, *self.teacher.grid, gradient=False)

    def random(self, *shape: int, gradient: bool = True) -> Tensor:
        return torch.randn(self.batch, *shape, device=self.device, requires_grad=gradient)

    def learn(self, forward: Callable[[], Tensor], others: Iterable[Tensor] = ()) -> Callable[[], Tensor]:
        """Forward and backward, to the model's parameters and other tensors; returns what the forward gave."""
        leaves = [self.penultimate, self.last, self.tokens, *self.model.parameters(), *others]
        reached: list[Tensor] = []

        def run() -> Tensor:
            with self.autocast:
                out = forward()
            out.float().square().sum().backward()
            reached[:] = reached or [tensor for tensor in leaves if tensor.grad is not None]
            for tensor in reached:
                tensor.grad = None
            return out.detach()

        return run

    def tail(self) -> Pair:
        """One pass of both views through the teacher's last stage instead of two: fewer, larger kernels; 1.1x at batch 32."""
        stage = self.teacher.last_stage
        return (
            self.learn(lambda: torch.cat([stage(self.tokens), stage(self.tokens * 2)])),
            self.learn(lambda: stage(torch.cat([self.tokens, self.tokens * 2]))),
        )

    def stems(self) -> Pair:
        """Both views' stems of a stage as one convolution of twice the channels: 1.1x of the stems where launches count."""
        convs = [self.heads.penultimate_spatial.stem.conv, self.heads.penultimate_frequency.stem.conv]

        def one() -> Tensor:
            weight, bias = torch.cat([conv.weight for conv in convs]), torch.cat([conv.bias for conv in convs])
            return F.conv2d(self.penultimate, weight, bias, padding=1)

        return self.learn(lambda: torch.cat([conv(self.penultimate) for conv in convs], 1)), self.learn(one)

    def attention(self) -> Pair:
        """A fused kernel instead of explicit softmax: no (queries x keys) matrix is kept; 1.5x of attention in bf16."""
        attention = self.heads.penultimate_spatial.attn
        cells, dim = self.tokens.shape[1], attention.q.in_features // attention.num_heads
        keys = self.penultimate.flatten(2).shape[2]
        q, k, v = (self.random(attention.num_heads, count, dim) for count in (cells, keys, keys))

        def explicit() -> Tensor:
            return torch.softmax((q * attention.scale) @ k.transpose(-2, -1), dim=-1) @ v

        def fused() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, scale=attention.scale)

        return self.learn(explicit, (q, k, v)), self.learn(fused, (q, k, v))

    def queries(self) -> Pair:
        """Learned queries projected once instead of for every image: saves 2 x batch x tokens x width² x 2 products."""
        projector = self.heads.penultimate_spatial

        def project(queries: Tensor) -> Tensor:
            return projector.attn.q(F.relu(projector.query_proj(queries)))

        return (
            self.learn(lambda: project(projector.queries.repeat(self.batch, 1, 1))),
            self.learn(lambda: project(projector.queries[None]).expand(self.batch, -1, -1)),
        )

    def context(self) -> Pair:
        """One copy of the student's tokens for keys and values, cast once, where each would make its own: 1.1x of both."""
        projector = self.heads.penultimate_spatial

        def keys_and_values(once: bool) -> Tensor:
            context = (self.penultimate + projector.pos_embed).flatten(2).transpose(1, 2)
            context = as_multiplied(context).contiguous() if once else context
            return torch.cat([projector.attn.k(context), projector.attn.v(context)])

        return self.learn(lambda: keys_and_values(False)), self.learn(lambda: keys_and_values(True))

    def order(self) -> Pair:
        """The last stems before the teacher's last stage: its activations are gone when their gradients come; no time, but memory."""
        late = copy.deepcopy(self.heads)
        for _, projector in late.projectors():
            projector.__class__ = type("Whole", (CrossAttentionProjector,), {})  # heads run it as one

        def losses(heads: nn.Module) -> Tensor:
            return torch.stack(
                [*heads(self.penultimate, self.last, self.teacher_map, self.teacher.last_stage).values()]
            )

        return self.learn(lambda: losses(late), late.parameters()), self.learn(lambda: losses(self.heads))

    def teacher_half(self) -> Pair:
        """The frozen teacher's weights kept in bf16: autocast casts frozen weights anew in every forward."""
        half = copy.deepcopy(self.teacher.model).to(torch.bfloat16)

        def forward(model: nn.Module, pixels: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
                return model(pixels).float()

        return lambda: forward(self.teacher.model, self.pixels), lambda: forward(half, self.pixels)

    def inference_mode(self) -> Pair:
        """The teacher's forward under inference mode instead of no_grad: saves some host time per operation."""

        def forward(context: type) -> Tensor:
            with context(), self.autocast:
                return self.teacher.model(self.pixels).float()

        return lambda: forward(torch.no_grad), lambda: forward(torch.inference_mode)

    def targets(self) -> Pair:
        """The teacher's side of the losses once per view instead of once per loss: two of four passes over its map."""
        tokens = self.random(*self.teacher_map.flatten(2).transpose(1, 2).shape[1:])

        def losses(once: bool) -> Tensor:
            total = []
            for without in (False, True):
                target = mimicking_target(self.teacher_map, without)
                for _ in range(2):
                    total.append(
                        mimicking_loss(
                            tokens, target if once else mimicking_target(self.teacher_map, without), without
                        )
                    )
            return torch.stack(total)

        return self.learn(lambda: losses(False), [tokens]), self.learn(lambda: losses(True), [tokens])

    def cosine(self) -> Pair:
        """The distance of unit vectors from their cosine, without the map of differences: one pass less over the map."""
        tokens = self.random(*self.teacher_map.flatten(2).transpose(1, 2).shape[1:])
        target = mimicking_target(self.teacher_map, False)

        def cosine() -> Tensor:
            with torch.autocast(self.device.type, enabled=False):
                norm = torch.linalg.vector_norm(tokens, dim=-1).clamp_min(1e-12)
                return 2 * (target.shape[1] - ((tokens * target).sum(-1) / norm).sum() / self.batch)

        return self.learn(lambda: mimicking_loss(tokens, target, False), [tokens]), self.learn(cosine, [tokens])

    def optimizer(self) -> Pair:
        """AdamW over all tensors in one kernel instead of a loop over tensors: 10x of the optimiser's host time."""

        def stepper(**options: bool) -> Callable[[], object]:
            model = copy.deepcopy(nn.ModuleList([self.student, self.heads]))
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            return torch.optim.AdamW(model.parameters(), **options).step

        return stepper(foreach=False, fused=False), stepper(fused=True)

    def average(self) -> Pair:
        """The moving average of the student by foreach kernels instead of a loop over its tensors."""
        averages = [ModelEmaV3(self.student.model, decay=0.999, foreach=foreach) for foreach in (False, True)]
        student = SimpleNamespace(state_dict=self.student.model.state_dict)
        loop, foreach = (lambda average=average: average.update(student) for average in averages)
        return loop, foreach

    def checkpointing(self) -> Pair:
        """The student's activations computed again in the backward pass: slower, but less memory."""
        labels = torch.randint(len(CLASSES), (self.batch,), device=self.device)
        model, again = self.model, build(self.setting, self.args).to(self.device)
        again.activation_checkpointing_enable()

        def step(module: nn.Module) -> Callable[[], object]:
            def run() -> None:
                with self.autocast:
                    loss = module(self.pixels, labels).loss
                loss.backward()
                module.zero_grad(set_to_none=True)

            return run

        return step(model), step(again)


NAMES = [name for name in vars(Levers) if not name.startswith("_") and name not in ("random", "learn")]


def main() -> None:
    args = parse()
    without_tf32()
    print(
        f"{args.student}, {args.teacher}, batch {args.batch}, {args.precision}; {describe(torch.device(args.device))}"
    )
    print(f"{'':<16}{'without, ms':>12}{'with, ms':>10}{'±':>6}{'faster':>9}{'memory':>9}")
    levers = Levers(args)
    for name in args.only or NAMES:
        without, with_ = getattr(levers, name)()
        check(name, without(), with_(), 1e-3 if args.precision == "float32" and name != "teacher_half" else 5e-2)
        times = interleave({"without": without, "with": with_}, args.rounds, levers.device)
        before, after = times["without"].median, times["with"].median
        memory = [peak_gib(work, levers.device) for work in (without, with_)]
        ratio = f"{memory[1] / memory[0]:.2f}x" if memory[0] > 1e-3 else "-"
        spread = max(value.spread for value in times.values())
        print(
            f"{name:<16}{1e3 * before:>12.2f}{1e3 * after:>10.2f}{spread:>6.1%}{before / after:>8.2f}x{ratio:>9}",
            flush=True,
        )


def check(name: str, one: object, other: object, tolerance: float) -> None:
    """Both ways must give the same."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        difference = ((one - other).norm() / one.norm()).item()
        assert difference < tolerance, f"{name}: the two ways differ by {difference:.1e}"


def parse() -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="timm/resnet50")
    parser.add_argument("--student_args")
    parser.add_argument("--teacher", default="timm/swin_small_patch4_window7_224")
    parser.add_argument("--teacher_args")
    parser.add_argument("--batch", type=int, default=128 if device == "cuda" else 8)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--precision", choices=["float32", "bf16"], default="bf16" if device == "cuda" else "float32")
    parser.add_argument("--rounds", type=int, default=20 if device == "cuda" else 5)
    parser.add_argument("--only", nargs="+", choices=NAMES)
    parser.add_argument("--device", default=device)
    return parser.parse_args()


if __name__ == "__main__":
    main()
