"""The table at the end of a GPU check: stages, tests by file, failures, and the headline benchmark rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastrl.bench.common import PRODUCTS
from fastrl.bench.gpu_check.progress import FAILED, PASSED, SKIPPED, Progress
from fastrl.bench.gpu_check.stages import Stage
from fastrl.bench.ledger import OK, Results, Row

DONE = "done"
SHOWN_FAILURES = 12
WIDTH = 110


def table(progress: Progress, out: Path) -> str:
    """Everything a reader needs to know first."""
    head = f"GPU check of sources {progress.header['sources']} on {progress.header['device']}"
    parts = [[head, "=" * len(head)], _stages(progress), _tests(progress), _failures(progress), _rows(out)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def exit_code(progress: Progress, out: Path, stages: Sequence[Stage]) -> int:
    """0 when every stage is done and no test and no kernel of ours failed."""
    ended = [progress.stage(stage.name) for stage in stages]
    complete = all(event is not None and event["status"] == DONE for event in ended)
    failed = any(event["outcome"] == FAILED for event in progress.tests.values())
    kernels = any(results.exit_code for results in _results(out))
    return int(not complete or failed or kernels)


def _stages(progress: Progress) -> list[str]:
    lines = [f"{'stage':12} {'ended':12} {'seconds':>8}"]
    last = {event["name"]: event for event in progress.events if event["kind"] == "stage"}
    return lines + [f"{name:12} {event['status']:12} {event['seconds']:8.1f}" for name, event in last.items()]


def _tests(progress: Progress) -> list[str]:
    files: dict[str, Counter[str]] = defaultdict(Counter)
    for test, event in progress.tests.items():
        files[test.partition("::")[0]][event["outcome"]] += 1
    if not files:
        return []
    outcomes = (PASSED, FAILED, SKIPPED)
    lines = [f"{'tests':44} " + " ".join(f"{o:>8}" for o in outcomes)]
    for name, found in files.items():
        lines.append(f"{name:44} " + " ".join(f"{found[o]:8}" for o in outcomes))
    total = sum(files.values(), Counter())
    return [*lines, f"{'all':44} " + " ".join(f"{total[o]:8}" for o in outcomes)]


def _failures(progress: Progress) -> list[str]:
    failed = [(t, e) for t, e in progress.tests.items() if e["outcome"] == FAILED]
    lines = []
    for test, event in failed[:SHOWN_FAILURES]:
        reason = [line for line in event.get("message", "").splitlines() if line.startswith("E ")]
        lines += [f"FAILED {test}", f"    {' '.join(reason)[:WIDTH]}"]
    more = len(failed) - SHOWN_FAILURES
    return lines + [f"and {more} more"] * (more > 0)


# --- benchmarks -------------------------------------------------------------------------------------
def _results(out: Path) -> Iterator[Results]:
    for path in sorted(out.glob("*.json")):
        yield Results.load(path)


def _rows(out: Path) -> list[str]:
    lines = [f"{'op':22} {'case':34} {'ours':24} {'ms':>9} {'best peer':18} {'ratio':>6} {'of limit':>8}"]
    for results in _results(out):
        for case in dict.fromkeys((r.op, r.case, r.mode) for r in results.rows):
            rows = [r for r in results.rows if (r.op, r.case, r.mode) == case]
            lines.append(_line(results, rows))
    return lines if len(lines) > 1 else []


def _line(results: Results, rows: list[Row]) -> str:
    """One case: the fastest of ours, and the fastest of the others."""
    first = rows[0]
    name = (
        f"{first.op:22} {first.case + ' ' + first.mode.replace('forward', 'f').replace('backward', 'b'):34}"
    )
    ours = _fastest([r for r in rows if r.own])
    if ours is None or ours.best is None:
        return f"{name} {'; '.join(f'{r.provider}: {r.reason or r.status}' for r in rows if r.own)[:WIDTH]}"

    peer = _fastest([r for r in rows if not r.own and r.provider != PRODUCTS])
    share = results.share_of_limit(ours)
    limit = "" if share is None else f"{share:8.0%}"
    if peer is None or peer.best is None:
        return f"{name} {ours.provider:24} {ours.best:9.3f} {'':18} {'':6} {limit}"
    ratio = peer.best / ours.best
    return f"{name} {ours.provider:24} {ours.best:9.3f} {peer.provider:18} {ratio:6.2f} {limit}"


def _fastest(rows: list[Row]) -> Row | None:
    measured = [r for r in rows if r.status == OK and r.best is not None]
    return min(measured, key=lambda r: r.best or 0.0, default=None)
