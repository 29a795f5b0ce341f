"""What benchmarks/gpu.py found, as a block of Markdown for benchmarks/README.md."""

from __future__ import annotations

from typing import Any


Found = dict[str, dict[str, Any]]
GOALS = (  # of the compiled step, the faster way of the two; what they are read from is in `ratios`
    ("compiled, over the published step's speed", "speed", "at least 1.6x, then 2.5x", lambda value: value >= 1.6),
    ("share of the matrix product's rate", "utilisation", "at least 50%", lambda value: value >= 0.5),
    ("overhead over the floor, of what FLOPs alone say", "overhead", "at most 1.15x", lambda value: value <= 1.15),
    ("peak memory, of the published step's", "memory", "below 1x", lambda value: value < 1),
)


def markdown(found: Found) -> str:
    """All parts so far, each with its problems."""
    machine = found.get("machine", {})
    words = [f"{name} {value}" for name, value in machine.items() if name not in ("card", "problems")]
    lines = [
        "## On a GPU",
        "",
        f"`python benchmarks/gpu.py` on {machine.get('card', 'no card')}; {', '.join(words)}.",
        "",
    ]
    for part, write in WRITERS.items():
        if part in found:
            lines += write(found)
    problems = [f"- {part}: {text}" for part, figures in found.items() for text in figures.get("problems", ())]
    return "\n".join([*lines, *(["What failed or was cut short:", "", *problems, ""] if problems else [])])


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def tested(part: str, title: str) -> Any:
    def write(found: Found) -> list[str]:
        figures = found[part]
        counts = ", ".join(f"{number} {kind}" for kind, number in figures.get("tests", {}).items())
        measured = [f"- {name}: {value}" for name, value in figures.get("measured", {}).items()]
        return [f"**{title}**: {counts or 'no result'}.", "", *measured, *([""] if measured else [])]

    return write


def steps(found: Found) -> list[str]:
    rows = found["step"].get("rows", [])
    head = ["pair, run", "way", "layout", "ms", "images/s", "peak GiB", "GFLOP an image", "of the product's rate"]
    cells = [
        [
            f"{row['pair']}, {row['run']}",
            row["way"],
            row["layout"],
            f"{row['milliseconds']:.1f} (± {row['spread']:.1%})",
            f"{row['images_per_second']:.0f}",
            f"{row['peak_gib']:.2f}",
            f"{row['gflop_per_image']:.1f}",
            f"{row['utilisation']:.0%}",
        ]
        for row in rows
    ]
    return [f"**The step**, {found['step'].get('machine', '')}, bf16:", "", *table(head, cells), *goals(found)]


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What the goals are about, by pair, of the fastest compiled way; the published step and the floor of its own run."""
    found = {}
    for pair in dict.fromkeys(row["pair"] for row in rows):
        ways = [row for row in rows if row["pair"] == pair and row["way"].startswith("compiled")]
        if not ways:
            continue
        ours = min(ways, key=lambda row: row["milliseconds"])
        beside = {row["way"]: row for row in rows if row["pair"] == pair and row["run"] == ours["run"]}
        published, floor = beside["published"], beside[f"floor {ours['way']}"]
        in_default = next((row for row in ways if row["way"] == "compiled"), ours)  # graphs hold their memory for good
        time = ours["milliseconds"] / floor["milliseconds"]
        found[pair] = {
            "speed": published["milliseconds"] / ours["milliseconds"],
            "utilisation": ours["utilisation"],
            "overhead": time / (ours["gflop_per_image"] / floor["gflop_per_image"]),
            "memory": in_default["peak_gib"] / published["peak_gib"],
        }
    return found


def goals(found: Found) -> list[str]:
    measured = ratios(found["step"].get("rows", []))
    lines = [
        [pair, what, f"{values[name]:.2f}", goal, "yes" if is_met(values[name]) else "**no**"]
        for pair, values in measured.items()
        for what, name, goal, is_met in GOALS
    ]
    for what, run in found.get("trainer", {}).items():
        if isinstance(run, dict) and "share" in run:
            met = "yes" if run["share"] >= 0.9 else "**no**"
            lines.append(
                [
                    "Swin-S to ResNet-50",
                    f"trainer, {what}, of the bare step",
                    f"{run['share']:.2f}",
                    "at least 0.9",
                    met,
                ]
            )
    return table(["pair", "goal", "measured", "asked for", "met"], lines) if lines else []


def trained(found: Found) -> list[str]:
    rows = [
        [
            what,
            f"{run['bare']:.0f}",
            f"{run['trainer']:.0f}",
            f"{run['share']:.1%}",
            f"{run['waiting']:.1%}",
            "" if run["peak_gib"] is None else f"{run['peak_gib']:.2f}",
            str(run["workers"]),
        ]
        for what, run in found["trainer"].items()
        if isinstance(run, dict) and "share" in run
    ]
    head = ["", "bare step, images/s", "trainer, images/s", "of it", "waiting for data", "peak GiB", "workers"]
    return ["**The trainer**, Swin-S to ResNet-50, on JPEGs:", "", *table(head, rows)]


def planned(found: Found) -> list[str]:
    """Plan and truth: FLOPs, memory, and the rate that `scaling.py` assumes."""
    rows = []
    for pair, plan in found["plan"].items():
        if not isinstance(plan, dict):
            continue
        measured = [row for row in found.get("step", {}).get("rows", []) if row["pair"] == pair]
        eager = next((row for row in measured if row["way"] == "ours"), None)
        best = max(
            measured, key=lambda row: row["images_per_second"] * (not row["way"].startswith("floor")), default=None
        )
        memory = plan["memory_gib"]
        in_step = sum(memory[name] for name in ("activations", "gradients", "weights in bf16"))
        gflops = plan["gflops_per_image"]["total"]
        per_gpu = plan["scaling"]["8"]["images_per_second"] / 8
        rows += [
            [pair, "GFLOP an image", f"{gflops:.1f}", shown(eager and eager["gflop_per_image"], ".1f")],
            [
                pair,
                "GiB of a step: activations, gradients, bf16 weights",
                f"{in_step:.2f}",
                shown(eager and eager["peak_gib"]),
            ],
            [pair, "images/s of one card", f"{per_gpu:.0f}", shown(best and best["images_per_second"], ".0f")],
            [pair, "`scaling.FLOPS`, bf16", "4e14", shown(best and best["images_per_second"] * gflops * 1e9, ".2g")],
        ]
    run = found.get("trainer", {}).get("eager")
    if rows and isinstance(run, dict):
        total = next(iter(found["plan"].values()))["memory_gib"]["total"]
        rows.append(["Swin-S to ResNet-50", "GiB of the whole run", f"{total:.2f}", shown(run["peak_gib"])])
    return ["**Plan and truth**:", "", *table(["pair", "what", "planned", "measured"], rows)]


def shown(value: Any, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


def reported(found: Found) -> list[str]:
    return [found["results"]["report"], ""] if "report" in found["results"] else []


WRITERS = {
    "correctness": tested("correctness", "Correctness, the tests marked `gpu`"),
    "step": steps,
    "trainer": trained,
    "plan": planned,
    "engines": tested("engines", "Engines through the Trainer"),
    "results": reported,
}
