"""The figure beside the table of what each method learned: gains with their intervals, as a small SVG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape

WIDTH, ROW, TOP, BOTTOM = 720, 22, 46, 44  # px: of the figure, of a line, above the lines, below them
LEFT, RIGHT = 130, 700  # px: where the axis begins and ends
INK, FAINT, BLUE = "#333333", "#dddddd", "#0072B2"
STEP = 2  # points between two marks of the axis
TITLE = "Accuracy on {prompts} unseen card games: points gained over the SFT start"
NOTE = "Sampled answers, mean of {seeds} seeds, 95% intervals paired by prompt. make learning, {date}."


def draw(found: Mapping[str, Any]) -> str:
    """An SVG of every method's gain in sampled accuracy; `found` is what `learning_table.gather` returns."""
    methods = {name: row for name, row in found["methods"].items() if "gain" in row}
    gains = {name: [100 * x for x in row["gain"]["over_prompts"]] for name, row in methods.items()}
    low = _down(min([0.0, *(g[1] for g in gains.values())]))
    high = -_down(-max([0.0, *(g[2] for g in gains.values())]))

    def x(points: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (points - low) / (high - low), 1)

    start = found["start"]
    title = TITLE.format(prompts=start[0]["prompts"])
    height = TOP + ROW * len(gains) + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="DejaVu Sans, Verdana, sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="12" y="22" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]

    floor = TOP + ROW * len(gains)
    for mark in range(low, high + 1, STEP):
        colour = INK if mark == 0 else FAINT
        label = f"{mark:+d}" if mark else "0"
        parts.append(f'<line x1="{x(mark)}" y1="{TOP - 8}" x2="{x(mark)}" y2="{floor}" stroke="{colour}"/>')
        parts.append(f'<text x="{x(mark)}" y="{floor + 16}" text-anchor="middle">{label}</text>')

    for i, (name, (mean, least, most)) in enumerate(gains.items()):
        y = TOP + ROW * i + ROW // 2 - 2
        parts.append(f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        line = f'x1="{x(least)}" y1="{y}" x2="{x(most)}" y2="{y}"'
        parts.append(f'<line {line} stroke="{BLUE}" stroke-width="2"/>')
        parts.append(f'<circle cx="{x(mean)}" cy="{y}" r="4.5" fill="{BLUE}"/>')

    note = NOTE.format(seeds=len(start), date=found["date"][:10])
    parts.append(f'<text x="12" y="{height - 8}" font-size="11" fill="#666666">{escape(note)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _down(points: float) -> int:
    """The axis mark at or below a value."""
    return int(points // STEP) * STEP
