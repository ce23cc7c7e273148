"""The tables of docs/results.md, generated: `python -m fastrl.bench.results_page [results.json ...]` writes
that of the benchmarks.

CPU figures are shown as ratios only: a CPU's name says little about what else its machine was doing.  GPU
figures name the GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastrl.bench.common import COMPILE, EAGER, PRODUCTS
from fastrl.bench.ledger import QUICK, Results, Row
from fastrl.bench.table import group, named, ratio
from fastrl.errors import UserError

# begin the names of results of other kinds: see fastrl.bench.studies.learning, compile_table and sass
LEARNING, COMPILED, COUNTED = "learning-", "compile", "sass"
OTHERS = (LEARNING, COMPILED, COUNTED)


def marks(name: str) -> tuple[str, str]:
    """The lines between which a generated part of the page stands."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


BEGIN, END = marks("bench")
PAGE = Path("docs/results.md")  # from the root of a checkout
RATIOS = ("vs eager", "vs torch.compile", "vs best peer")


def newest(folder: Path) -> list[Path]:
    """The newest results of each device in a folder, without quick ones; names end in a date."""
    found: dict[str, Path] = {}
    for path in sorted(
        p for p in folder.glob("*.json") if QUICK not in p.stem and not p.stem.startswith(OTHERS)
    ):
        found[path.stem[: -len("-0000-00-00")]] = path
    return list(found.values())


def block(results: Sequence[Results]) -> str:
    """Everything between the markers, markers included."""
    return "\n\n".join([BEGIN, *(section(r) for r in results), END])


def replace_block(text: str, new: str, name: str = "bench") -> str:
    """`text` with the block of that name replaced, marks included.  Raises UserError unless there is exactly
    one such block.
    """
    begin, end = marks(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise UserError(f"results page: expected one {begin} followed by one {end}")
    before, _, rest = text.partition(begin)
    return before + new + rest.partition(end)[2]


def write_block(page: Path, new: str, name: str = "bench") -> None:
    """Replace the block of that name in the file."""
    text = page.read_text(encoding="utf-8")
    page.write_text(replace_block(text, new, name), encoding="utf-8")


def section(results: Results) -> str:
    """One run as a Markdown table, a line per headline case."""
    who, cuda = results.identity, results.identity["kind"] == "cuda"
    commit = f"commit {(who['commit'] or 'unknown')[:10]}{' with changes' if who['dirty'] else ''}"
    threads = f"{who['threads']} thread{'s' * (who['threads'] != 1)}"
    device = who["device"] if cuda else f"{who['device']} ({who['cpu_capability']}), {threads}"
    title = (
        f"**{device}**, torch {who['packages']['torch']}, {who['date'][:10]}, {commit}. More than 1x: "
        "ours is faster."
    )
    head = ["op", "case", "mode", *(["ms"] if cuda else []), *RATIOS, "of measured limit", "memory vs eager"]
    lines = [head, ["---"] * len(head)]
    for _, members in group([r for r in results.rows if r.headline]):
        ours = _ours(members)
        if ours is not None and ours.best is not None:
            lines.append(_line(results, ours, members, cuda))
    return "\n".join([title, "", *(f"| {' | '.join(x)} |" for x in lines)])


def _ours(rows: Sequence[Row]) -> Row | None:
    """What runs by default."""
    return next((r for r in rows if r.default), None) or next((r for r in rows if r.own), None)


def _line(results: Results, ours: Row, rows: Sequence[Row], cuda: bool) -> list[str]:
    eager = named(rows, EAGER)
    peers = [
        r for r in rows if not r.own and r.provider not in (EAGER, COMPILE, PRODUCTS) and r.best is not None
    ]
    best = min(peers, key=lambda r: r.best or 0.0, default=None)
    limit = results.share_of_limit(ours)
    memory = (
        ""
        if eager is None or not eager.peak_bytes or ours.peak_bytes is None
        else f"{ours.peak_bytes / eager.peak_bytes:.2f}x"
    )
    return [
        f"`{ours.op}`",
        f"{ours.case} {ours.dtype}",
        ours.mode,
        *([f"{ours.best:.3g}"] if cuda else []),
        _times(ratio(ours, eager)),
        _times(ratio(ours, named(rows, COMPILE))),
        _times(ratio(ours, best)) + (f" ({best.provider})" if best else ""),
        "" if limit is None else f"{limit:.0%}",
        memory,
    ]


def _times(x: float | None) -> str:
    return "" if x is None else f"{x:.2f}x"


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m fastrl.bench.results_page", description="Rewrite the table of benchmarks."
    )
    parser.add_argument(
        "results", nargs="*", type=Path, help="default: the newest of each device in bench/results"
    )
    parser.add_argument("--page", type=Path, default=PAGE, help=f"default: {PAGE}")
    options = parser.parse_args(argv)
    paths = options.results or newest(Path(__file__).parent / "results")
    try:
        if not paths:
            raise UserError("bench/results holds no results yet: run fastrl bench first, or name a file")
        write_block(options.page, block([Results.load(p) for p in paths]))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
