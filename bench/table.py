"""Rows as text: what a run shows as it proceeds."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from fastrl.bench.common import EAGER
from fastrl.bench.ledger import OK, Results, Row

COLUMNS = (
    "provider",
    "ms",
    "20%..80%",
    "warm ms",
    "vs eager",
    "of limit",
    "rate",
    "MiB",
    "error",
    "relative",
)


def group(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """The rows of each case, with its title."""
    found: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.op, row.case, row.dtype, row.mode), []).append(row)
    for key, members in found.items():
        yield "  ".join(key), members


def ratio(row: Row, other: Row | None) -> float | None:
    """How many times faster `row` is than `other`."""
    return None if other is None or row.best is None or other.best is None else other.best / row.best


def named(rows: Sequence[Row], provider: str) -> Row | None:
    """The row of a provider, or None."""
    return next((r for r in rows if r.provider == provider), None)


def cells(results: Results, row: Row, eager: Row | None) -> list[str]:
    """The texts of a row under COLUMNS."""
    best = row.best
    if row.status != OK or best is None:
        return [row.provider, f"{row.status}: {row.reason}"]
    low, _, high = row.ms.get("cold") or row.ms["warm"]
    warm = row.ms["warm"][1] if "cold" in row.ms else None
    times = [f"{best:.4g}", f"{low:.4g}..{high:.4g}", _number(warm, ".4g")]
    ratios = [_number(ratio(row, eager), ".2f", "x"), _number(results.share_of_limit(row), ".0%")]
    peak = None if row.peak_bytes is None else row.peak_bytes / 2**20
    errors = [_number(row.error, ".1e"), _number(row.relative_error, ".1e")]
    name = row.provider + ("*" if row.default else "")
    return [name, *times, *ratios, _rate(row, best), _number(peak, ".1f"), *errors]


def _rate(row: Row, ms: float) -> str:
    """What the case yields per second: tokens, else FLOPs, else bytes."""
    if row.tokens:
        return f"{row.tokens / ms * 1e3:,.0f} tok/s"
    if row.flops:
        return f"{row.flops / ms * 1e-9:,.3g} TFLOP/s"
    return f"{row.bytes / ms * 1e-6:,.1f} GB/s"


def details(row: Row) -> str:
    """The numbers that only this benchmark measures, as one line; empty without any."""
    return ", ".join(f"{name} {value:,.4g}" for name, value in row.details.items())


def _number(x: float | None, form: str, unit: str = "") -> str:
    return "" if x is None else f"{x:{form}}{unit}"


def text(results: Results, rows: Sequence[Row]) -> str:
    """The rows as aligned text, a block per case."""
    blocks = []
    for title, members in group(rows):
        lines = [list(COLUMNS)]
        for row in members:
            lines.append(cells(results, row, named(members, EAGER)))
            if row.details:
                lines.append(["", details(row)])
        full = [x for x in lines if len(x) == len(COLUMNS)]
        widths = [max(len(x[i]) for x in full) for i in range(len(COLUMNS))]
        widths[0] = max(len(x[0]) for x in lines)
        blocks.append("\n".join([title, *(f"  {_aligned(x, widths)}" for x in lines)]))
    return "\n\n".join(blocks)


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    """The provider left, its numbers right; a line without numbers ends with its reason."""
    first, *rest = line
    if len(rest) == 1:
        return f"{first.ljust(widths[0])}  {rest[0]}"
    numbers = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
    return "  ".join([first.ljust(widths[0]), *numbers]).rstrip()


def show(results: Results, rows: Sequence[Row]) -> None:
    """Print the rows: as a table of rich on a terminal where it is installed, else as aligned text."""
    rich = _rich() if sys.stdout.isatty() else None
    if rich is None:
        print(text(results, rows) + "\n", flush=True)
        return
    console, table_type = rich
    for title, members in group(rows):
        table = table_type(*COLUMNS, title=title, title_justify="left", expand=False)
        for row in members:
            line = cells(results, row, named(members, EAGER))
            style = "bold" if row.default else None
            table.add_row(*line, style=style if row.status == OK else "dim")
        notes = [f"  {row.provider}: {details(row)}" for row in members if row.details]
        console.print(table, *notes, sep="\n")


def _rich() -> tuple[Any, Any] | None:
    try:
        return importlib.import_module("rich.console").Console(), importlib.import_module("rich.table").Table
    except ImportError:
        return None
