"""The report of the demo: one HTML file with the reward curve drawn as SVG. Nothing is fetched when it is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM = 860, 320, 46, 36
COLORS = ("#2563eb", "#059669")


@dataclass
class Curve:
    """One device: mean reward of its recent episodes by time (s), and when adapters were swapped in (s, version)."""

    name: str
    points: list[tuple[float, float]] = field(default_factory=list)
    swaps: list[tuple[float, int]] = field(default_factory=list)


def _place(t: float, value: float, *, end: float) -> tuple[float, float]:
    x = LEFT + (WIDTH - LEFT - 10) * t / max(end, 1e-9)
    return round(x, 1), round(10 + (HEIGHT - BOTTOM - 10) * (1 - value), 1)


def _axes(end: float) -> list[str]:
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = _place(0, tick, end=end)
        parts.append(f'<line x1="{x}" y1="{y}" x2="{WIDTH - 10}" y2="{y}" class="grid"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for n in range(6):
        x, y = _place(end * n / 5, 0, end=end)
        anchor = "end" if n == 5 else "middle"
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="{anchor}">{end * n / 5:.0f} s</text>')
    return parts


def draw(curves: Sequence[Curve], *, before: float, after: float) -> str:
    """The reward curves as an SVG element; held-out reward before and after as two dots."""
    end = max((t for c in curves for t, _ in c.points), default=1.0)
    parts = _axes(end)
    for curve, color in zip(curves, COLORS, strict=False):
        for t, version in curve.swaps:
            x, top = _place(t, 1, end=end)
            parts.append(
                f'<line x1="{x}" y1="{top}" x2="{x}" y2="{HEIGHT - BOTTOM}" class="swap">'
                f"<title>adapter {version} at {t:.0f} s</title></line>"
            )
        line = " ".join("{},{}".format(*_place(t, v, end=end)) for t, v in curve.points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
    for t, value, label in ((0.0, before, "before"), (end, after, "after")):
        x, y = _place(t, value, end=end)
        parts.append(
            f'<circle cx="{x}" cy="{y}" r="5" class="held"><title>held-out {label}: {value:.2f}</title></circle>'
        )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="reward over time">{"".join(parts)}</svg>'


def write(path: Path, curves: Sequence[Curve], *, before: float, after: float, rows: Sequence[tuple[str, str]]) -> None:
    """Write the page: the curve, what its marks mean, and the table."""
    table = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    legend = " ".join(
        f'<span style="color:{color}">&#9632;</span> {escape(curve.name)}'
        for curve, color in zip(curves, COLORS, strict=False)
    )
    path.write_text(f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>clawloop demo</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2rem auto; padding: 0 1rem; color: #1f2937 }}
svg {{ width: 100%; height: auto }} text {{ font-size: 11px; fill: #6b7280 }}
.grid {{ stroke: #e5e7eb }} .swap {{ stroke: #d1d5db; stroke-dasharray: 3 3 }} .held {{ fill: #dc2626 }}
table {{ border-collapse: collapse; margin-top: 1rem }} th {{ text-align: left; font-weight: 500; padding-right: 2rem }}
th, td {{ border-bottom: 1px solid #e5e7eb; padding-block: .3rem }}
</style>
<h1>The loop closed on one machine</h1>
<p>Mean reward of the last episodes that the agent played, as its user judged them. Dashed lines: a new adapter was
swapped in while the agent went on. Red dots: held-out reward, sampled at the serving temperature. {legend}</p>
{draw(curves, before=before, after=after)}
<table>{table}</table>
</html>
""")
