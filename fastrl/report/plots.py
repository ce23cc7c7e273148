"""Figures for reports, with Matplotlib's object interface: no display, no global state.

Every figure is saved as a PNG file, and returned as an SVG image URI with a description in words.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from fastrl.report.stats import Bin, Estimate

# Okabe & Ito's colours, distinct under every common form of colour blindness; without yellow, on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D")
DASHES = ("-", "--", ":", "-.")
INK, FAINT = "#333333", "#dddddd"
STYLE: dict[Any, Any] = {  # Matplotlib's type for it asks for literal keys
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
MIN_SMOOTHED_POINTS = 40  # a shorter curve is not smoothed
# share of a curve's range: a running mean that moves no point further than this only rounds corners
MIN_SMOOTHING = 0.03
MAX_BAR_CURVES = 2  # the intervals of more curves would hide each other
LEGEND_POINTS = 331  # width of the plot below the legend


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve: y over x (optimizer steps), with or without the ends of its intervals.

    name          for the legend; empty for the only curve of a figure
    colour, dash  indices into COLOURS and DASHES, so that a run keeps its colour from figure to figure
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
    """One line of an interval plot: a label, and an estimate per kind.

    singles  single values (seeds) of each kind, drawn faintly behind the estimate
    """

    label: str
    estimates: dict[str, Estimate]
    singles: Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawn figure: its image as a data: URI, its description in words, and a note for the caption."""

    uri: str
    alt: str
    note: str = ""


class LineStyle(TypedDict):
    """Matplotlib's arguments for the look of a curve."""

    color: str
    linestyle: str


@contextmanager
def _axes(style: Mapping[str, object] | None = None, height: float = 2.9) -> Iterator[tuple[Figure, Axes]]:
    """An empty figure with one plot, in our style."""
    with matplotlib.rc_context(STYLE | dict(style or {})):
        figure = Figure(figsize=(4.6, height), layout="constrained")
        yield figure, figure.add_subplot()


def lines(
    series: Sequence[Series],
    *,
    title: str,
    unit: str,
    path: Path,
    percent: bool = False,
) -> Picture:
    """Curves over optimizer steps, saved to `path` (PNG).

    Long curves are drawn as their running means over faint single steps.
    """
    window = max((_window(s) for s in series), default=1)
    bars = len(series) <= MAX_BAR_CURVES and any(s.lo is not None for s in series)
    with _axes() as (figure, axes):
        for s in series:
            _curve(axes, s, window, bars)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.margins(x=0.02, y=0.08)

        values = [v for s in series for v in s.y]
        # no margin below zero for what cannot be negative
        if all(v >= 0 for v in values) and axes.get_ylim()[0] < 0:
            axes.set_ylim(bottom=0)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        elif max(map(abs, values)) >= 10_000:
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))

        names = [s.name for s in series]
        if any(names):
            figure.legend(
                loc="outside upper left", ncols=_columns(names), handlelength=2.0, columnspacing=1.2
            )
        uri = _save(figure, path)

    notes = []
    if window > 1:
        notes.append(f"bold: mean over {window} steps, faint: single steps")
    if bars:
        notes.append("bars: 95% interval")
    description = " ".join(_words(s, percent) for s in series)
    return Picture(uri, f"{title}, {unit}. {description}", "; ".join(notes))


def intervals(
    rows: Sequence[IntervalRow],
    *,
    title: str,
    unit: str,
    path: Path,
) -> Picture:
    """Fractions with their 95% intervals, saved to `path` (PNG): one row per label, one mark per kind."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.estimates))
    height = 0.75 + 0.3 * len(rows) * max(1, len(kinds))
    with _axes({"axes.grid.axis": "x"}, height) as (figure, axes):
        for k, kind in enumerate(kinds):
            offset = ((len(kinds) - 1) / 2 - k) * 0.3
            colour = COLOURS[k]
            marker = MARKERS[k]
            axes.plot([], [], label=kind, color=colour, marker=marker, linestyle="none")
            for y, row in enumerate(reversed(rows)):
                if kind in row.estimates:
                    singles = row.singles.get(kind, ())
                    _estimate(axes, y + offset, row.estimates[kind], singles, colour, marker)

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

    words = []
    for row in rows:
        for kind, e in row.estimates.items():
            words.append(f"{row.label}, {kind}: {e.mean:.1%} [{e.lo:.1%}, {e.hi:.1%}].")
    has_singles = any(values for row in rows for values in row.singles.values())
    note = "faint: single seeds" if has_singles else ""
    return Picture(uri, f"{title}, {unit}. {' '.join(words)}", note)


def reliability(bins: Sequence[Bin], *, title: str, path: Path) -> Picture:
    """Observed over predicted probability, a mark per bin, saved to `path` (PNG).

    The size of a mark is the bin's share of the predictions.
    """
    total = sum(b.size for b in bins)
    predicted = [b.predicted for b in bins]
    observed = [b.observed for b in bins]
    sizes = [12 + 160 * b.size / total for b in bins]
    with _axes() as (figure, axes):
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=DASHES[1], label="calibrated")
        axes.plot(predicted, observed, color=COLOURS[0], linewidth=1.4, label="model")
        axes.scatter(predicted, observed, sizes, color=COLOURS[0])
        axes.set(xlabel="predicted probability", ylabel="came true", xlim=(-0.03, 1.03), ylim=(-0.05, 1.05))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        figure.legend(loc="outside upper left", ncols=2)
        uri = _save(figure, path)

    words = [f"Predicted {b.predicted:.1%}: {b.observed:.1%} of {b.size} came true." for b in bins]
    note = "marks: one per tenth of probability, as large as its share of the predictions"
    return Picture(uri, f"{title}. {' '.join(words)}", note)


def histogram(
    values: Mapping[str, Sequence[float]],
    *,
    title: str,
    unit: str,
    path: Path,
) -> Picture:
    """Histograms over the same bins, one outline per name that has values, saved to `path` (PNG)."""
    present = {name: v for name, v in values.items() if v}
    low = min(map(min, present.values()))
    high = max(map(max, present.values()))
    width = (high - low) or 1.0
    edges = [low + width * i / BINS for i in range(BINS + 1)]
    with _axes() as (figure, axes):
        for i, (name, v) in enumerate(present.items()):
            colour = COLOURS[i]
            dash = DASHES[i]
            axes.hist(v, edges, histtype="stepfilled", alpha=0.15, color=colour)
            axes.hist(
                v,
                edges,
                histtype="step",
                linewidth=1.4,
                color=colour,
                linestyle=dash,
                label=name,
            )
        axes.set(xlabel=unit, ylabel="answers")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        figure.legend(loc="outside upper left", ncols=_columns(list(present)), handlelength=2.0)
        uri = _save(figure, path)

    words = []
    for name, v in present.items():
        mean = sum(v) / len(v)
        words.append(f"{name}: {len(v)} values from {min(v):.4g} to {max(v):.4g}, mean {mean:.4g}.")
    return Picture(uri, f"{title}, {unit}. {' '.join(words)}")


def smooth(y: Sequence[float], window: int) -> list[float]:
    """Centred running mean over `window` values, over fewer at the ends."""
    half = window // 2
    means = []
    for i in range(len(y)):
        span = y[max(0, i - half) : i + half + 1]
        means.append(sum(span) / len(span))
    return means


def _curve(
    axes: Axes,
    s: Series,
    window: int,
    bars: bool,
) -> None:
    colour = COLOURS[s.colour % len(COLOURS)]
    dash = DASHES[s.dash % len(DASHES)]
    marker = MARKERS[s.dash % len(MARKERS)]
    style = LineStyle(color=colour, linestyle=dash)
    if bars and s.lo is not None:
        errors = _errors(s)
        axes.errorbar(
            s.x, s.y, errors, marker=marker, markersize=4, elinewidth=1.0, capsize=2, label=s.name, **style
        )
    elif _window(s) > 1:
        axes.plot(s.x, s.y, linewidth=0.6, alpha=0.3, color=colour)
        axes.plot(s.x, smooth(s.y, window), linewidth=1.8, label=s.name, **style)
    else:
        if len(s.y) >= MIN_SMOOTHED_POINTS:
            marker = ""
        axes.plot(
            s.x,
            s.y,
            linewidth=1.4,
            marker=marker,
            markersize=3,
            label=s.name,
            **style,
        )


def _estimate(
    axes: Axes,
    y: float,
    e: Estimate,
    singles: Sequence[float],
    colour: str,
    marker: str,
) -> None:
    lo = e.lo if math.isfinite(e.lo) else e.mean
    hi = e.hi if math.isfinite(e.hi) else e.mean
    heights = [y] * len(singles)
    axes.plot(
        singles,
        heights,
        color=colour,
        marker=marker,
        linestyle="none",
        alpha=0.35,
        markersize=4,
    )
    axes.plot([lo, hi], [y, y], color=colour, linewidth=1.8)
    axes.plot([e.mean], [y], color=colour, marker=marker)

    text = f"{e.mean:.1%}"
    right = max([hi, *singles])
    axes.annotate(text, (right, y), xytext=(6, 0), textcoords="offset points", va="center", color=colour)


def _columns(names: Sequence[str]) -> int:
    """Columns of a legend: about 5 points a letter, and 42 for the mark and the gap."""
    width = 5 * max(map(len, names)) + 42
    return max(1, min(len(names), int(LEGEND_POINTS / width)))


def _errors(s: Series) -> list[list[float]]:
    lo = s.lo or s.y
    hi = s.hi or s.y
    below = [max(0.0, y - end) for y, end in zip(s.y, lo, strict=True)]
    above = [max(0.0, end - y) for y, end in zip(s.y, hi, strict=True)]
    return [below, above]


def _window(s: Series) -> int:
    """Odd number of steps that a curve is averaged over, a twentieth of its length.

    1 for a curve that is short, smooth already, or has intervals.
    """
    if s.lo is not None or len(s.y) < MIN_SMOOTHED_POINTS:
        return 1
    window = 2 * max(1, len(s.y) // 40) + 1
    moved = max(abs(a - b) for a, b in zip(s.y, smooth(s.y, window), strict=True))
    value_range = max(s.y) - min(s.y)
    return window if moved > MIN_SMOOTHING * value_range else 1


def _words(s: Series, percent: bool) -> str:
    form = ".1%" if percent else ".4g"
    low = min(s.y)
    high = max(s.y)
    name = f"{s.name}: " if s.name else ""
    ends = f"from {s.y[0]:{form}} at step {s.x[0]:g} to {s.y[-1]:{form}} at step {s.x[-1]:g}"
    return f"{name}{ends}, lowest {low:{form}}, highest {high:{form}}."


def _save(figure: Figure, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, format="png", metadata={"Software": None})
    svg = io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    encoded = base64.b64encode(svg.getvalue()).decode("ascii")
    return f"data:image/svg+xml;base64,{encoded}"
