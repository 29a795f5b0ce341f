"""A plan as a table for people."""

from __future__ import annotations

from typing import Any


__all__ = ["plan_text", "shown"]


def shown(value: Any, form: str = "{:.1f}") -> str:
    """A number in a form, or with two digits where it would be nothing in it: small models have figures, too."""
    if not isinstance(value, float):
        return str(value)
    return form.format(value) if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def plan_text(plan: Any) -> str:
    """Models, projectors, work, memory, schedule and expected speed of a `Plan`."""
    lines = []
    for name, model in plan.models.items():
        lines.append(f"{name:<9} {model['name']}")
        lines.append(
            f"          {shown(model['parameters'] / 1e6, '{:.2f}')} M parameters, {shown(model['gflops'])} GFLOP forward"
        )
        for stage in ("penultimate", "last"):
            grid, dim = model[f"{stage}_grid"], model[f"{stage}_dim"]
            tap = f", tapped at {model[f'{stage}_tap']}" if f"{stage}_tap" in model else ""
            lines.append(f"          {stage:<12} grid {grid[0]}x{grid[1]}, width {dim}{tap}")
    if plan.projectors:
        lines.append(f"{'projectors':<24}{'heads':>6}{'M params':>10}{'GFLOP':>8}  maps")
    for name, row in plan.projectors.items():
        lines.append(
            f"  {name:<22}{row['heads'] or '-':>6}{row['parameters'] / 1e6:>10.2f}{shown(row['gflops']):>8}  {row['maps']}"
        )
    lines += _block("GFLOP of a training step, per image", plan.gflops_per_image, "{:.1f}")
    lines += _block("memory per process, GiB (estimated)", plan.memory_gib, "{:.2f}")
    lines += _block("schedule", plan.schedule, "{:g}")
    lines += _block("GB that each GPU sends in a step", plan.communication_gb, "{:.2f}")
    lines += _block("GiB on each GPU", plan.launcher_gib, "{:.2f}")
    if plan.scaling:
        title = f"GPUs (H100, {plan.precision})"
        lines.append(f"{title:<24}{'images/s':>10}{'computing':>11}{'cores/GPU':>11}  limit (estimated)")
    for name, row in plan.scaling.items():
        lines.append(
            f"  {name:<22}{row['images_per_second']:>10.0f}{row['efficiency']:>11.0%}{row['cores_per_gpu']:>11.1f}  "
            f"{row['limit']}"
        )
    lines += [f"note: {note}" for note in plan.notes]
    lines += [f"warning: {warning}" for warning in plan.warnings]
    if plan.error:
        lines.append(f"This run would fail: {plan.error}")
    return "\n".join(lines)


def _block(title: str, values: dict[str, Any], number: str) -> list[str]:
    rows = [f"  {name:<30}{shown(value, number)}" for name, value in values.items()]
    return [title, *rows] if rows else []
