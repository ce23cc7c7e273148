"""Figures for reports: lines over steps, and points with intervals.  Matplotlib's object interface only; no
display, no global state.

Every figure is saved as a PNG for people and returned as an image URI (SVG) with a description in words for
the page.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from fastrl.report.stats import Bin, Estimate

# Okabe & Ito's colours, told apart with every common form of colour blindness; yellow is left out on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D")
DASHES = ("-", "--", ":", "-.")
INK, FAINT = "#333333", "#dddddd"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "fastrl",
    "figure.facecolor": "white",
}
BINS = 24  # of a histogram
SMOOTH_FROM = 40  # points; a shorter curve is drawn as it is
SMOOTH_ENOUGH = (
    0.03  # of a curve's range: a mean that moves no point further than this would only round its corners
)
BARS_UP_TO = 2  # curves in a figure; the intervals of more would hide each other


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve: y over x (optimizer steps), with the ends of its intervals or without.

    name          for the legend; empty for a figure of one curve, which its title names
    colour, dash  which of COLOURS and of DASHES, so that a run keeps its colour from figure to figure
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    lo: Sequence[float] | None = None
    hi: Sequence[float] | None = None
    colour: int = 0
    dash: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalRow:
    """One line of an interval plot: a label, an estimate per kind, and single values (seeds) drawn faintly
    behind it.
    """

    label: str
    estimates: dict[str, Estimate]
    singles: dict[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawn figure: its image as a data: URI, and what it shows in words."""

    uri: str
    alt: str
    note: str = ""


def lines(series: Sequence[Series], *, title: str, unit: str, path: Path, percent: bool = False) -> Picture:
    """Curves over optimizer steps, saved to `path` (PNG); long ones as their running mean over faint single
    steps.
    """
    window = max((_window(s) for s in series), default=1)
    bars = len(series) <= BARS_UP_TO and any(s.lo is not None for s in series)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for s in series:
            _curve(axes, s, window, bars)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.margins(x=0.02, y=0.08)
        # room below zero for what cannot be below it
        if all(v >= 0 for s in series for v in s.y) and axes.get_ylim()[0] < 0:
            axes.set_ylim(bottom=0)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        elif max(abs(v) for s in series for v in s.y) >= 10_000:
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if any(s.name for s in series):
            figure.legend(
                loc="outside upper left",
                ncols=_columns([s.name for s in series]),
                handlelength=2.0,
                columnspacing=1.2,
            )
        uri = _save(figure, path)
    notes = [f"bold: mean over {window} steps, faint: single steps"] * (window > 1) + [
        "bars: 95% interval"
    ] * bars
    return Picture(uri, f"{title}, {unit}. " + " ".join(_words(s, percent) for s in series), "; ".join(notes))


def intervals(rows: Sequence[IntervalRow], *, title: str, unit: str, path: Path) -> Picture:
    """Fractions with their 95% intervals, one row per label and one mark per kind, saved to `path` (PNG)."""
    kinds = list(dict.fromkeys(k for row in rows for k in row.estimates))
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(4.6, 0.75 + 0.3 * len(rows) * max(1, len(kinds))), layout="constrained")
        axes = figure.add_subplot()
        for k, kind in enumerate(kinds):
            offset = ((len(kinds) - 1) / 2 - k) * 0.3
            axes.plot([], [], label=kind, color=COLOURS[k], marker=MARKERS[k], linestyle="none")
            for y, row in enumerate(reversed(rows)):
                if kind in row.estimates:
                    _estimate(
                        axes,
                        y + offset,
                        row.estimates[kind],
                        row.singles.get(kind, ()),
                        COLOURS[k],
                        MARKERS[k],
                    )
        axes.set_yticks(range(len(rows)), [row.label for row in reversed(rows)])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.margins(x=0.12)
        if len(kinds) > 1:
            figure.legend(loc="outside upper left", ncols=len(kinds), handlelength=1.0)
        uri = _save(figure, path)
    said = [
        f"{row.label}, {kind}: {e.mean:.1%} [{e.lo:.1%}, {e.hi:.1%}]."
        for row in rows
        for kind, e in row.estimates.items()
    ]
    note = "faint: single seeds" if any(values for row in rows for values in row.singles.values()) else ""
    return Picture(uri, f"{title}, {unit}. " + " ".join(said), note)


def reliability(bins: Sequence[Bin], *, title: str, path: Path) -> Picture:
    """Share of predictions that came true over what was predicted, a mark per bin as large as its share of
    them; saved to `path` (PNG).
    """
    total = sum(b.size for b in bins)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=DASHES[1], label="calibrated")
        axes.plot(
            [b.predicted for b in bins],
            [b.observed for b in bins],
            color=COLOURS[0],
            linewidth=1.4,
            label="model",
        )
        axes.scatter(
            [b.predicted for b in bins],
            [b.observed for b in bins],
            [12 + 160 * b.size / total for b in bins],
            color=COLOURS[0],
        )
        axes.set(xlabel="predicted probability", ylabel="came true", xlim=(-0.03, 1.03), ylim=(-0.05, 1.05))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        figure.legend(loc="outside upper left", ncols=2)
        uri = _save(figure, path)
    said = [f"Predicted {b.predicted:.1%}: {b.observed:.1%} of {b.size} came true." for b in bins]
    return Picture(
        uri,
        f"{title}. " + " ".join(said),
        "marks: one per tenth of probability, as large as its share of the predictions",
    )


def histogram(values: Mapping[str, Sequence[float]], *, title: str, unit: str, path: Path) -> Picture:
    """How often values occur, one outline per name over the same bins, saved to `path` (PNG); a name without
    values is left out.
    """
    there = {name: v for name, v in values.items() if v}
    low, high = min(map(min, there.values())), max(map(max, there.values()))
    edges = [low + (high - low or 1.0) * i / BINS for i in range(BINS + 1)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for i, (name, v) in enumerate(there.items()):
            style: dict[str, Any] = {"color": COLOURS[i], "linestyle": DASHES[i], "label": name}
            axes.hist(v, edges, histtype="stepfilled", alpha=0.15, color=COLOURS[i])
            axes.hist(v, edges, histtype="step", linewidth=1.4, **style)
        axes.set(xlabel=unit, ylabel="answers")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        figure.legend(loc="outside upper left", ncols=_columns(list(there)), handlelength=2.0)
        uri = _save(figure, path)
    said = [
        f"{name}: {len(v)} values from {min(v):.4g} to {max(v):.4g}, mean {sum(v) / len(v):.4g}."
        for name, v in there.items()
    ]
    return Picture(uri, f"{title}, {unit}. " + " ".join(said))


def smooth(y: Sequence[float], window: int) -> list[float]:
    """Centred running mean over `window` values, over fewer at the ends."""
    half = window // 2
    spans = [y[max(0, i - half) : i + half + 1] for i in range(len(y))]
    return [sum(span) / len(span) for span in spans]


def _curve(axes: Axes, s: Series, window: int, bars: bool) -> None:
    style: dict[str, Any] = {
        "color": COLOURS[s.colour % len(COLOURS)],
        "linestyle": DASHES[s.dash % len(DASHES)],
    }
    if bars and s.lo is not None:
        axes.errorbar(
            s.x,
            s.y,
            yerr=_errors(s),
            marker=MARKERS[s.dash % len(MARKERS)],
            markersize=4,
            elinewidth=1.0,
            capsize=2,
            label=s.name,
            **style,
        )
    elif _window(s) > 1:
        axes.plot(s.x, s.y, linewidth=0.6, alpha=0.3, color=style["color"])
        axes.plot(s.x, smooth(s.y, window), linewidth=1.8, label=s.name, **style)
    else:
        marker = MARKERS[s.dash % len(MARKERS)] if len(s.y) < SMOOTH_FROM else ""
        axes.plot(s.x, s.y, linewidth=1.4, marker=marker, markersize=3, label=s.name, **style)


def _estimate(axes: Axes, y: float, e: Estimate, singles: Sequence[float], colour: str, marker: str) -> None:
    lo, hi = (v if math.isfinite(v) else e.mean for v in (e.lo, e.hi))
    axes.plot(
        singles, [y] * len(singles), color=colour, marker=marker, linestyle="none", alpha=0.35, markersize=4
    )
    axes.plot([lo, hi], [y, y], color=colour, linewidth=1.8)
    axes.plot([e.mean], [y], color=colour, marker=marker)
    right = max([hi, *singles])
    axes.annotate(
        f"{e.mean:.1%}", (right, y), xytext=(6, 0), textcoords="offset points", va="center", color=colour
    )


def _columns(names: Sequence[str]) -> int:
    """Columns of a legend over a plot of 331 points: about 5 points a letter, and 42 for the mark and the
    gap.
    """
    return max(1, min(len(names), int(331 / (5 * max(map(len, names)) + 42))))


def _errors(s: Series) -> list[list[float]]:
    lo, hi = s.lo or s.y, s.hi or s.y
    return [
        [max(0.0, y - a) for y, a in zip(s.y, lo, strict=True)],
        [max(0.0, b - y) for y, b in zip(s.y, hi, strict=True)],
    ]


def _window(s: Series) -> int:
    """Odd number of steps a curve is averaged over, a twentieth of it; 1 where it is short, smooth already,
    or has intervals.
    """
    if s.lo is not None or len(s.y) < SMOOTH_FROM:
        return 1
    window = 2 * max(1, len(s.y) // 40) + 1
    moved = max(abs(a - b) for a, b in zip(s.y, smooth(s.y, window), strict=True))
    return window if moved > SMOOTH_ENOUGH * (max(s.y) - min(s.y)) else 1


def _words(s: Series, percent: bool) -> str:
    form = ".1%" if percent else ".4g"
    low, high = min(s.y), max(s.y)
    ends = f"from {s.y[0]:{form}} at step {s.x[0]:g} to {s.y[-1]:{form}} at step {s.x[-1]:g}"
    return f"{s.name + ': ' if s.name else ''}{ends}, lowest {low:{form}}, highest {high:{form}}."


def _save(figure: Figure, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, format="png", metadata={"Software": None})
    svg = io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode("ascii")
