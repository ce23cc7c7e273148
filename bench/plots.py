"""A plot of a run's headline cases: how many times faster than eager PyTorch each provider is, and the limit.

There is one panel for each case and mode, as PNG and SVG.  It shows ratios only: on a shared CPU times mean
little.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from fastrl.bench.common import EAGER, PRODUCTS
from fastrl.bench.ledger import Results, Row
from fastrl.bench.table import group, named, ratio
from fastrl.report.plots import COLOURS, INK, STYLE

DEFAULT, OURS, PEERS, BOUND = COLOURS[0], COLOURS[5], "#b8b8b8", "#e6e6e6"
COLUMNS = 2  # panels beside each other
INCHES, BAR, FRAME = 5.2, 0.2, 0.85  # of a panel's width, a bar's height, and the height around the bars


def draw(results: Results, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg; returns the files.

    There are none when no headline case has the numbers of both eager and another provider.
    """
    panels = [m for _, m in group([r for r in results.rows if r.headline]) if len(_bars(m)) > 0]
    if not panels:
        return []
    rows = [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]
    heights = [FRAME + BAR * max(len(_bars(p)) for p in row) for row in rows]
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x", "font.size": 8}):
        figure = Figure(figsize=(INCHES * COLUMNS, sum(heights) + 0.4), layout="constrained")
        grid = figure.add_gridspec(len(rows), COLUMNS, height_ratios=heights)
        for i, row in enumerate(rows):
            for j, members in enumerate(row):
                _panel(figure.add_subplot(grid[i, j]), results, members)
        figure.suptitle(_title(results), fontsize=9)
        files = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
        figure.savefig(files[0], dpi=140)
        figure.savefig(files[1], metadata={"Date": None})
    return files


def _bars(members: Sequence[Row]) -> list[tuple[Row, float]]:
    """(provider, times faster than eager), the slowest first, which is at the bottom of its panel."""
    eager = named(members, EAGER)
    found = [(r, ratio(r, eager)) for r in members if r.provider != EAGER]
    return sorted(((r, x) for r, x in found if x is not None), key=lambda pair: pair[1])


def _panel(axes: Axes, results: Results, members: Sequence[Row]) -> None:
    bars = _bars(members)
    for y, (row, x) in enumerate(bars):
        colour = DEFAULT if row.default else OURS if row.own else BOUND if row.provider == PRODUCTS else PEERS
        axes.barh(y, x - 1, left=1, height=0.7, color=colour)
        axes.annotate(
            f"{x:.3g}x", (max(x, 1), y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7
        )
    axes.set_yticks(range(len(bars)), [r.provider for r, _ in bars])
    for label, (row, _) in zip(axes.get_yticklabels(), bars, strict=True):
        label.set_fontweight("bold" if row.default else "normal")
    axes.axvline(1, color=INK, linewidth=0.8)
    eager = named(members, EAGER)
    share = None if eager is None else results.share_of_limit(eager)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    if share:
        axes.axvline(1 / share, color=COLOURS[1], linestyle="--", linewidth=1)
        axes.annotate(
            "limit",
            (1 / share, 0),
            xycoords=("data", "axes fraction"),
            xytext=(2, 2),
            textcoords="offset points",
            fontsize=7,
        )
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", length=0)
    first = members[0]
    axes.set_title(f"{first.op}   {first.case}   {first.dtype}   {first.mode}", loc="left", fontsize=8)


def _title(results: Results) -> str:
    who = results.identity
    threads = f"{who['threads']} thread{'s' * (who['threads'] != 1)}"
    where = who["device"] if who["kind"] == "cuda" else f"{who['device']}, {threads}"
    return (
        f"Times faster than eager PyTorch ({where}, torch {who['packages']['torch']}, "
        f"{who['date'][:10]}); dashed: the measured limit"
    )
