"""What a ScaleKD step costs: the floor of any distillation, the published step, ours, and ours compiled.

    python benchmarks/step.py [--student timm/resnet50 --teacher timm/swin_small_patch4_window7_224] [--batch 8 16 32]
        [--image_size 224 448] [--stem shared separable] [--compile default reduce-overhead]

One process, one machine. Each round times every way once, forward and backward without the optimiser:

    floor       teacher forward, student forward and backward: no distillation with this pair can do less; compiled, too
    published   the step as it was published, plainly (benchmarks/published.py)
    ours        the package's
    compiled    the package's under torch.compile, in each mode asked for; "reduce-overhead" records CUDA graphs

That the loss and the student's gradients of the published step are ours is checked first, in float64 on a few images; in the
precision measured, ours may be no less exact. Utilisation is against a matrix product timed in the same rounds, in the same
precision (float32 without TF32, which the trainer turns on where it compiles). The first batch, image size and teacher are those
of the comparison; further ones, and lighter stems, are measured one at a time, for how the cost changes. Writes a table,
step.json and step.png as it goes.
"""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import Work, describe, graph_pools_gib, interleave, matrix_product, peak_gib, tflops_of, without_tf32
from published import PublishedStep
from torch import Tensor, nn

from scalekd_hf import ScaleKDConfig, load_student, load_teacher
from scalekd_hf.method.projector import STEMS
from scalekd_hf.tools.recipe import mapping
from scalekd_hf.training.model import ScaleKDModel, build_model


CLASSES = [str(index) for index in range(1000)]
PRECISIONS = ("float32", "bf16")
TOLERANCE = {
    "float64": 1e-4,
    "float32": 1e-4,
    "bf16": 1e-2,
}  # relative; the losses are taken in float32 even in float64
CHECKED = 8  # images at most
MODES = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@dataclass(kw_only=True)
class Setting:
    """What a row is measured in."""

    batch: int
    image_size: int
    teacher: str
    stem: str = "full"


@dataclass(kw_only=True)
class Row(Setting):
    """One way of doing the step in one setting."""

    way: str
    precision: str
    layout: str
    milliseconds: float
    spread: float
    images_per_second: float
    peak_gib: float
    gflop_per_image: float
    utilisation: float


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    without_tf32()
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than run eagerly without a word
    base = Setting(batch=args.batch[0], image_size=args.image_size[0], teacher=args.teacher[0])
    others = [replace(base, batch=batch) for batch in args.batch[1:]]
    others += [replace(base, image_size=size) for size in args.image_size[1:]]
    others += [replace(base, teacher=teacher) for teacher in args.teacher[1:]]
    others += [replace(base, stem=stem) for stem in args.stem]
    print(f"{args.student}, {base.teacher}; {describe(device)}\n{HEADER}")
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []

    def add(measured: list[Row]) -> None:
        rows.extend(measured)
        result = {"machine": describe(device), "student": args.student, "rows": [*map(asdict, rows)]}
        (folder / "step.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        draw([row for row in rows if all(getattr(row, name) == value for name, value in vars(base).items())], folder)

    for precision in args.precision:
        for layout in args.layout:
            for modes in [[mode] for mode in args.compile] or [[]]:  # one after the other: each takes minutes
                measured = measure(base, precision, layout, args, modes)
                compare(measured)
                add(measured)
    for setting in others:
        add(measure(setting, args.precision[-1], args.layout[-1], args, args.compile, with_published=False))
    print(f"\nwritten to {folder}: step.json, step.png")


def measure(
    setting: Setting,
    precision: str,
    layout: str,
    args: argparse.Namespace,
    modes: list[str],
    with_published: bool = True,
) -> list[Row]:
    """Time the ways in one setting, interleaved, and print a row for each."""
    device = torch.device(args.device)
    torch.compiler.reset()  # the next setting's shapes are no change of this one's
    gc.collect()  # the former setting's models, which sit in cycles
    model = build(setting, args).to(device)
    if layout == "channels-last":
        model.to(memory_format=torch.channels_last)
    works = steps(model, setting, precision, layout, args, modes, with_published)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    product, product_tflop = matrix_product(device, dtype)
    times = interleave({**works, "product": product}, args.rounds, device, warm_up=2)
    rate = product_tflop / times["product"].median
    counted = {way: tflops_of(work) for way, work in works.items() if "compiled" not in way}
    rows = []
    for way, work in works.items():
        tflop = counted["floor" if "floor" in way else "ours" if "compiled" in way else way]
        seconds = times[way].median
        row = Row(
            **asdict(setting), way=way, precision=precision, layout=layout,
            milliseconds=1e3 * seconds, spread=times[way].spread, images_per_second=setting.batch / seconds,
            peak_gib=peak_of(way, work, device), gflop_per_image=1e3 * tflop / setting.batch,
            utilisation=tflop / seconds / rate,
        )  # fmt: skip
        rows.append(row)
        print(text_of(row), flush=True)
    print(f"{'':<60}matrix product: {rate:.3g} TFLOP/s", flush=True)
    return rows


def peak_of(way: str, work: Work, device: torch.device) -> float:
    """GiB of a way; of CUDA graphs all that they hold, those of the floor included."""
    has_graphs = device.type == "cuda" and way.endswith(("reduce-overhead", "max-autotune"))
    peak = peak_gib(work, device)
    return max(peak, graph_pools_gib()) if has_graphs else peak


def build(setting: Setting, args: argparse.Namespace) -> ScaleKDModel:
    """The pair with random weights and the package's choice of heads, in training mode."""
    torch.manual_seed(0)
    options = {"img_size": setting.image_size} if "swin" in setting.teacher or "vit" in setting.teacher else {}
    teacher = load_teacher(
        setting.teacher, pretrained=False, **{**options, **mapping(args.teacher_args, "teacher_args")}
    )
    student = load_student(
        args.student, labels=CLASSES, image_size=setting.image_size, **mapping(args.student_args, "student_args")
    )
    config = ScaleKDConfig(output_dir="unused", use_cpu=args.device == "cpu", stem=setting.stem, report_to="none")
    return build_model(student, teacher, config).train()


def steps(
    model: ScaleKDModel,
    setting: Setting,
    precision: str,
    layout: str,
    args: argparse.Namespace,
    modes: list[str],
    with_published: bool,
) -> dict[str, Work]:
    """The ways as functions of nothing; the published one is first compared with ours."""
    device = torch.device(args.device)
    torch.manual_seed(1)
    pixels = torch.randn(setting.batch, 3, setting.image_size, setting.image_size, device=device)
    if layout == "channels-last":
        pixels = pixels.to(memory_format=torch.channels_last)
    labels = torch.randint(len(CLASSES), (setting.batch,), device=device)
    cast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    student, teacher = model.student, model.teacher
    published = PublishedStep(model) if with_published else None
    assert teacher is not None

    def floor() -> Tensor:
        _, teacher_logits = teacher(model.normaliser.for_teacher(pixels))
        logits = student.classify(pixels)
        return F.cross_entropy(logits.float(), labels) + F.cross_entropy(logits.float(), teacher_logits.softmax(-1))

    def ours(module: nn.Module = model) -> Tensor:
        return module(pixels, labels).loss

    def step(loss: Work) -> Work:
        def run() -> None:
            with cast:
                computed = loss()
            computed.backward()  # type: ignore[attr-defined]
            for module in (model, published):
                if module is not None:
                    module.zero_grad(set_to_none=True)

        return run

    losses: dict[str, Work] = {"floor": floor}
    if published is not None:
        check_equal(model, published, pixels[:CHECKED], labels[:CHECKED], cast, TOLERANCE[precision])
        losses["published"] = lambda: published(pixels, labels)
    losses["ours"] = ours
    for mode in modes:
        how: dict[str, str] = {"mode": mode} if args.backend == "inductor" else {"backend": args.backend}
        compiled = torch.compile(model, **how)
        check_compiled(model, compiled, pixels, labels, cast)
        suffix = "" if mode == "default" else f" {mode}"
        losses[f"floor compiled{suffix}"] = torch.compile(floor, **how)
        losses[f"compiled{suffix}"] = lambda compiled=compiled: ours(compiled)
    return {name: step(loss) for name, loss in losses.items()}


def check_equal(
    model: ScaleKDModel,
    published: PublishedStep,
    pixels: Tensor,
    labels: Tensor,
    cast: torch.autocast,
    tolerance: float,
) -> None:
    """Refuse to time two ways that do not compute the same loss and gradients of the student.

    Rounding alone moves the gradients of an untrained network by thousandths in float32 and by tenths in bf16, so the two
    are compared in float64; from there, ours may lie no further than the published step does, but for chance.
    """
    ways = {"ours": model, "published": published}
    for module in ways.values():
        module.double()
    exact = gradients_of(model, published, pixels.double(), labels)
    in_float64 = differences(gradients_of(model, model, pixels.double(), labels), exact)
    for module in ways.values():
        module.float()
    with cast:
        rounded = {name: differences(gradients_of(model, way, pixels, labels), exact) for name, way in ways.items()}
    print(
        "from the published step in float64, (loss, gradient):", {"ours in float64": in_float64, **rounded}, flush=True
    )
    assert max(in_float64) < TOLERANCE["float64"], f"ours differs from the published step: {in_float64}"
    for kind, mine, theirs in zip(("loss", "gradient"), rounded["ours"], rounded["published"], strict=True):
        assert mine < max(tolerance, 1.25 * theirs), f"our {kind} is less exact: {mine:.1e}, published {theirs:.1e}"


def check_compiled(
    model: ScaleKDModel, compiled: nn.Module, pixels: Tensor, labels: Tensor, cast: torch.autocast
) -> None:
    """Refuse to time a compiled step that computes another loss, or gradients further away than rounding brings them."""
    with cast:
        eager, found = (gradients_of(model, way, pixels, labels) for way in (model, compiled))
    loss, gradient = differences(found, eager)
    print(f"compiled from eager, (loss, gradient): [{loss}, {gradient}]", flush=True)
    assert loss < 1e-2 and gradient < 1, (
        f"the compiled step differs: its loss by {loss:.1e}, its gradient by {gradient:.1e}"
    )


def gradients_of(model: ScaleKDModel, way: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A way's loss and its gradient with respect to all parameters of the student, in float64."""
    output = way(pixels, labels)
    loss = getattr(output, "loss", output)
    parameters = [parameter for parameter in model.student.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, parameters)
    return loss.detach().double(), torch.cat([gradient.flatten() for gradient in found]).double()


def differences(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> list[float]:
    """Relative, of the loss and of the gradient."""
    return [((one - other).norm() / other.norm()).item() for one, other in zip(found, exact, strict=True)]


HEADER = (
    f"{'':<26}{'precision':<10}{'layout':<15}{'batch':>6}{'px':>5}{'ms':>10}{'±':>6}{'images/s':>10}"
    f"{'peak GiB':>10}{'GFLOP/image':>13}{'of product':>12}"
)


def text_of(row: Row) -> str:
    return (
        f"{row.way:<26}{row.precision:<10}{row.layout:<15}{row.batch:>6}{row.image_size:>5}{row.milliseconds:>10.1f}"
        f"{row.spread:>6.1%}{row.images_per_second:>10.2f}{row.peak_gib:>10.3f}{row.gflop_per_image:>13.1f}"
        f"{row.utilisation:>12.0%}  {row.teacher}, {row.stem} stems"
    )


def compare(rows: list[Row]) -> None:
    """Print the ratios that the goals are about, of ours and of ours compiled; the published step is eager, as published."""
    by_way = {row.way: row for row in rows}
    published = by_way["published"]
    for row in rows:
        if "floor" in row.way or row is published:
            continue
        floor = by_way[f"floor {row.way}" if "compiled" in row.way else "floor"]
        time, work = row.milliseconds / floor.milliseconds, row.gflop_per_image / floor.gflop_per_image
        print(
            f"{row.way}: {published.milliseconds / row.milliseconds:.2f}x the published step's speed, "
            f"{row.peak_gib / published.peak_gib:.3f}x its memory; {time:.2f}x the time of {floor.way!r} for {work:.2f}x "
            f"its FLOPs: overhead {time / work:.2f}",
            flush=True,
        )
    print()


def draw(rows: list[Row], folder: Path) -> None:
    """Bars of the images per second, one group for each precision and layout."""
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys((row.precision, row.layout) for row in rows))
    ways = list(dict.fromkeys(row.way for row in rows))
    figure = Figure(figsize=(2.5 + 2 * len(groups), 4), layout="constrained")
    axis = figure.subplots()
    for index, way in enumerate(ways):
        bars = [row for row in rows if row.way == way]
        places = [
            groups.index((row.precision, row.layout)) + (index - len(ways) / 2 + 0.5) / (len(ways) + 1) for row in bars
        ]
        drawn = axis.bar(places, [row.images_per_second for row in bars], 1 / (len(ways) + 1), label=way)
        axis.bar_label(drawn, fmt="%.3g", fontsize="x-small")
    axis.set_xticks(range(len(groups)), [f"{precision}\n{layout}" for precision, layout in groups])
    axis.set(ylabel="images per second")
    axis.legend()
    figure.savefig(folder / "step.png", dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="timm/resnet50")
    parser.add_argument("--student_args", help="arguments of the student, as JSON")
    parser.add_argument("--teacher", nargs="+", default=["timm/swin_small_patch4_window7_224"])
    parser.add_argument("--teacher_args", help="arguments of the teacher, as JSON")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 128 on a GPU, 8 elsewhere")
    parser.add_argument("--image_size", type=int, nargs="+", default=[224])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, help="default: both, on a GPU bf16 first")
    parser.add_argument(
        "--layout", nargs="+", choices=["contiguous", "channels-last"], default=["contiguous", "channels-last"]
    )
    parser.add_argument("--stem", nargs="+", choices=STEMS[1:], default=[], help="lighter stems to measure too")
    parser.add_argument("--rounds", type=int, help="default: 20 on a GPU, 5 elsewhere")
    parser.add_argument(
        "--compile",
        nargs="*",
        choices=MODES,
        help="modes of torch.compile, with none nothing is; default: default on a GPU",
    )
    parser.add_argument("--backend", default="inductor", help="of torch.compile; modes are inductor's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="outputs/benchmarks/step")
    args = parser.parse_args()
    on_gpu = args.device != "cpu"
    args.batch = args.batch or [128 if on_gpu else 8]
    args.rounds = args.rounds or (20 if on_gpu else 5)
    args.precision = args.precision or list(PRECISIONS[::-1] if on_gpu else PRECISIONS)
    if args.compile is None:
        args.compile = MODES[:1] if on_gpu else []
    return args


if __name__ == "__main__":
    main()
