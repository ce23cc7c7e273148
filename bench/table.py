"""Rows as text: what a run shows while it goes on."""

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
    """The rows of one case after another, each under a title."""
    found: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.op, row.case, row.dtype, row.mode), []).append(row)
    for key, members in found.items():
        yield "  ".join(key), members


def ratio(row: Row, other: Row | None) -> float | None:
    """How many times faster `row` is than `other`."""
    return None if other is None or row.best is None or other.best is None else other.best / row.best


def named(rows: Sequence[Row], provider: str) -> Row | None:
    """The row of a provider, if there is one."""
    return next((r for r in rows if r.provider == provider), None)


def cells(results: Results, row: Row, eager: Row | None) -> list[str]:
    """A row's texts under COLUMNS."""
    best = row.best
    if row.status != OK or best is None:
        return [row.provider, f"{row.status}: {row.reason}"]
    low, _, high = row.ms.get("cold") or row.ms["warm"]
    warm = row.ms["warm"][1] if "cold" in row.ms else None
    rate = f"{row.tokens / best * 1e3:,.0f} tok/s" if row.tokens else f"{row.bytes / best * 1e-6:,.1f} GB/s"
    if row.flops and not row.tokens:
        rate = f"{row.flops / best * 1e-9:,.3g} TFLOP/s"
    return [
        row.provider + ("*" if row.default else ""),
        f"{best:.4g}",
        f"{low:.4g}..{high:.4g}",
        _number(warm, ".4g"),
        _number(ratio(row, eager), ".2f", "x"),
        _number(results.share_of_limit(row), ".0%"),
        rate,
        _number(None if row.peak_bytes is None else row.peak_bytes / 2**20, ".1f"),
        _number(row.error, ".1e"),
        _number(row.relative_error, ".1e"),
    ]


def details(row: Row) -> str:
    """What only this benchmark measures, as one line; empty without any."""
    return ", ".join(f"{name} {value:,.4g}" for name, value in row.details.items())


def _number(x: float | None, form: str, unit: str = "") -> str:
    return "" if x is None else f"{x:{form}}{unit}"


def text(results: Results, rows: Sequence[Row]) -> str:
    """The rows as aligned text, a block per case."""
    blocks = []
    for title, members in group(rows):
        lines = [list(COLUMNS)]
        for row in members:
            lines += [
                cells(results, row, named(members, EAGER)),
                *([["", details(row)]] if row.details else []),
            ]
        full = [x for x in lines if len(x) == len(COLUMNS)]
        widths = [max(len(x[i]) for x in full) for i in range(len(COLUMNS))]
        widths[0] = max(len(x[0]) for x in lines)
        blocks.append("\n".join([title, *(f"  {_aligned(x, widths)}" for x in lines)]))
    return "\n\n".join(blocks)


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    """The provider left, its numbers right; a line without numbers is as long as its reason."""
    first, *rest = line
    if len(rest) == 1:
        return f"{first.ljust(widths[0])}  {rest[0]}"
    return "  ".join(
        [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]
    ).rstrip()


def show(results: Results, rows: Sequence[Row]) -> None:
    """Print the rows: as a table where rich is installed and somebody looks at a terminal, else as aligned
    text.
    """
    rich = _rich() if sys.stdout.isatty() else None
    if rich is None:
        print(text(results, rows) + "\n", flush=True)
        return
    console, table_type = rich
    for title, members in group(rows):
        table = table_type(*COLUMNS, title=title, title_justify="left", expand=False)
        for row in members:
            line = cells(results, row, named(members, EAGER))
            table.add_row(*line, style="dim" if row.status != OK else "bold" if row.default else None)
        console.print(
            table, *(f"  {row.provider}: {details(row)}" for row in members if row.details), sep="\n"
        )


def _rich() -> tuple[Any, Any] | None:
    try:
        return importlib.import_module("rich.console").Console(), importlib.import_module("rich.table").Table
    except ImportError:
        return None
