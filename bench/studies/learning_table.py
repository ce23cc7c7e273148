"""What each method learned: results of single runs to one JSON file, and that file to docs/results.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastrl.bench.results_page import LEARNING, marks, write_block
from fastrl.bench.studies.demo import pooled
from fastrl.bench.studies.learning_plot import draw
from fastrl.errors import UserError
from fastrl.report.stats import Estimate, mean_interval, paired_interval, wilson

RESULT, START, NAME = "result.json", "start", "learning"
INTERVALS = (
    "95%, Student's t. over_prompts: differences paired by prompt, averaged over the seeds first; "
    "over_seeds: of the seeds' mean differences."
)


# --- from the runs to one file ----------------------------------------------------------------------
def gather(folder: Path, commands: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Every result in `folder`, with its differences to the start.

    commands  each method's command line, in the table's order
    """
    files = sorted(folder.glob(f"*/seed*/{RESULT}"))
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    start = {r["seed"]: r for r in runs if r["method"] == START}
    methods = {}
    for name, command in commands.items():
        seeds = [r for r in runs if r["method"] == name]
        if seeds:
            methods[name] = {"command": list(command), **_row(seeds, start)}

    identities = [r["identity"] for r in runs]
    commits = {f"{i['commit']}{' with changes' if i['dirty'] else ''}" for i in identities}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commits": sorted(commits),
        "torch": sorted({i["packages"]["torch"] for i in identities}),
        "threads": sorted({i["threads"] for i in identities}),
        "intervals": INTERVALS,
        "start": [_answers(r, None) for r in start.values()],
        "methods": methods,
    }


def _row(runs: Sequence[dict[str, Any]], start: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """One method over its seeds."""
    pairs = [(start[r["seed"]], r) for r in runs]
    row: dict[str, Any] = {"seconds": [r["seconds"] for r in runs]}
    if "accuracy" in runs[0]:
        row["pairs"] = []
        for r in runs:
            row["pairs"].append({"seed": r["seed"], "accuracy": r["accuracy"], "kinds": r.get("kinds", {})})
    if "sampled" in runs[0]:
        row["seeds"] = [_answers(r, s) for s, r in pairs]
        row["gain"] = _both([_differences(s["sampled"], r["sampled"]) for s, r in pairs])
    if "margin" in runs[0]:
        row["margins"] = []
        for s, r in pairs:
            row["margins"].append({"seed": r["seed"], "before": _margin(s), "after": _margin(r)})
        row["margin_gain"] = _both([_differences(s["margin"], r["margin"]) for s, r in pairs])
    return row


def _differences(before: Sequence[float], after: Sequence[float]) -> list[float]:
    return [b - a for a, b in zip(before, after, strict=True)]


def _both(gains: Sequence[Sequence[float]]) -> dict[str, Any]:
    over = mean_interval([sum(g) / len(g) for g in gains])
    return {"over_prompts": pooled(gains), "over_seeds": over if len(gains) > 1 else None}


def _answers(run: Mapping[str, Any], start: Mapping[str, Any] | None) -> dict[str, Any]:
    """One seed's accuracies with their intervals, and the difference of the sampled one."""
    right, n = sum(run["greedy"]), len(run["greedy"])
    out = {
        "seed": run["seed"],
        "prompts": n,
        "greedy": [right / n, *wilson(int(right), n)],
        "sampled": mean_interval(run["sampled"]),
    }
    return out if start is None else out | {"gain": paired_interval(start["sampled"], run["sampled"])}


def _margin(run: Mapping[str, Any]) -> dict[str, Any]:
    """Mean margin, nats, and the share of pairs ranked right."""
    right, n = sum(m > 0 for m in run["margin"]), len(run["margin"])
    return {"mean": mean_interval(run["margin"]), "ranked_right": [right / n, *wilson(right, n)]}


def publish(found: Mapping[str, Any], folder: Path, results: Path | None, page: Path | None) -> None:
    """Write learning.json into the runs' folder, learning-<date>.json into `results`, the table into `page`,
    and learning.svg beside it.
    """
    text = json.dumps(found, indent=1) + "\n"
    paths = [folder / f"{NAME}.json"]
    if results:
        paths.append(results / f"{LEARNING}{found['date'][:10]}.json")
    for path in paths:
        path.write_text(text, encoding="utf-8")
    if page is not None:
        begin, end = marks(NAME)
        try:
            write_block(page, f"{begin}\n{as_text(found)}\n{end}", NAME)
            page.with_name(f"{NAME}.svg").write_text(draw(found), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--page: {page}: {error.strerror}") from None


# --- the table --------------------------------------------------------------------------------------
def as_text(found: Mapping[str, Any]) -> str:
    """The results in Markdown."""
    parts = [_policies(found), _pairs(found)]
    return "\n\n".join(part for part in parts if part)


def _policies(found: Mapping[str, Any]) -> str:
    seeds = found["start"]
    head = (
        "method",
        "greedy",
        "sampled",
        "difference to the start, over prompts",
        "over seeds",
        "single seeds",
        "CPU s",
    )
    rows = [("SFT start", _mean(seeds, "greedy"), _mean(seeds, "sampled"), "", "", "", "")]
    for name, row in found["methods"].items():
        if "gain" in row:
            gain = row["gain"]
            single = ", ".join(f"{100 * s['gain'][0]:+.1f}" for s in row["seeds"])
            over = "" if gain["over_seeds"] is None else _ends(gain["over_seeds"])
            # a resumed run knows only the time of its last part
            known = [s for s in row["seconds"] if s is not None]
            seconds = f"{sum(known) / len(known):.0f}" if known else ""
            greedy, sampled = _mean(row["seeds"], "greedy"), _mean(row["seeds"], "sampled")
            points = _points(gain["over_prompts"])
            rows.append((name, greedy, sampled, points, over, single, seconds))
    return _table(head, rows)


def _pairs(found: Mapping[str, Any]) -> str:
    rows = []
    for name, row in found["methods"].items():
        if some := row.get("pairs"):
            kinds = [
                f"{kind.replace('_', ' ')} {_mean([s['kinds'] for s in some], kind)}"
                for kind in some[0]["kinds"]
            ]
            rows.append(
                (
                    name,
                    _mean(some, "accuracy"),
                    ", ".join(_share(s["accuracy"]) for s in some),
                    ", ".join(kinds),
                )
            )
        if some := row.get("margins"):
            before, after = ([s[when] for s in some] for when in ("before", "after"))
            ranked = f"{_mean(before, 'ranked_right')} before, {_mean(after, 'ranked_right')} after"
            was, now = (sum(s["mean"][0] for s in sides) / len(sides) for sides in (before, after))
            lo, hi = row["margin_gain"]["over_prompts"][1:]
            margin = (
                f"margin {was:.1f} nats before, {now:.1f} after: {now - was:+.1f}, {lo:+.1f} to {hi:+.1f}"
            )
            rows.append((name, ranked, ", ".join(_share(s["ranked_right"]) for s in after), margin))
    return (
        _table(("method", "pairs ranked right", "single seeds", "by kind of mistake; margin"), rows)
        if rows
        else ""
    )


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *rows))


def _mean(seeds: Sequence[Mapping[str, Any]], kind: str) -> str:
    return f"{sum(s[kind][0] for s in seeds) / len(seeds):.1%}"


def _points(e: Sequence[float] | Estimate) -> str:
    return f"{100 * e[0]:+.1f} points, {_ends(e)}"


def _ends(e: Sequence[float] | Estimate) -> str:
    return f"{100 * e[1]:+.1f} to {100 * e[2]:+.1f}"


def _share(e: Sequence[float]) -> str:
    return f"{e[0]:.1%} [{e[1]:.1%}, {e[2]:.1%}]"
