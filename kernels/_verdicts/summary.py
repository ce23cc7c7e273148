"""The verdicts as text: a line at the start of a run, a line per op for `fastrl env` and `fastrl check`, and
the table that a checkpoint keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fastrl.kernels._registry import unproven
from fastrl.kernels._verdicts import cache
from fastrl.kernels._verdicts.first_use import mode, number_of, table_index
from fastrl.kernels._verdicts.machine import machine
from fastrl.kernels._verdicts.table import TABLE, Verdict

NOT_CHECKED = "not checked: about a minute at first use, or now: fastrl check"
UNUSED = "not checked (FASTRL_CHECK=0)"


@dataclass(frozen=True, slots=True)
class Row:
    """An implementation on one device: its verdicts by dtype."""

    op: str
    backend: str
    verdicts: Mapping[str, Verdict]

    @property
    def failed(self) -> bool:
        return any(v.reason for v in self.verdicts.values())

    @property
    def passed(self) -> bool:
        return not self.failed and any(v.passed for v in self.verdicts.values())


def rows(device: torch.device) -> list[Row]:
    """Every kernel that can be checked on this device, known or not; none on a device that has none."""
    index = number_of(device)
    if index is None:
        return []
    found = []
    for op, backend, _ in unproven():
        if backend not in machine().backends:
            continue
        at = op, backend, table_index(index)
        known = {
            str(k[2]).removeprefix("torch."): v
            for k, v in TABLE.verdicts.items()
            if (k[0], k[1], k[3]) == at and not v.void
        }
        found.append(Row(op, backend, known))
    return found


def where(device: torch.device) -> str:
    """As in NVIDIA H200, driver 580.159, triton 3.6.0."""
    index = number_of(device)
    if index is None:
        return str(device)
    named = machine().identity(index)
    return f"{named['gpu']}, driver {named['driver']}, triton {cache.version('triton') or 'none'}"


def text(row: Row, place: str) -> str:
    """What is known of a row, in one line, without the name of what runs."""
    if not row.verdicts:
        return UNUSED if mode() == "0" else NOT_CHECKED
    for dtype, v in row.verdicts.items():
        if v.reason:
            return f"{row.backend} FAILED {v.date} ({dtype}): {v.reason}"
    cases = sum(v.cases for v in row.verdicts.values())
    worst = max(v.worst for v in row.verdicts.values())
    date = max(v.date for v in row.verdicts.values())
    return f"checked {date}, {place}: {cases} cases, worst {worst:.2g} of budget"


def table(device: torch.device, chosen: Mapping[str, str]) -> str:
    """A line for every kernel, with what runs where it failed; empty where the device has none."""
    found, place = rows(device), where(device)
    width = max((len(r.op) for r in found), default=0)
    lines = []
    for row in found:
        runs = chosen[row.op] if row.failed else row.backend
        lines.append(f"{row.op:<{width}}  {runs:<9}  {text(row, place)}")
    return "\n".join(lines)


def sentence(device: torch.device, chosen: Mapping[str, str]) -> str:
    """Which table runs, in one line: `chosen` maps each op to its implementation."""
    index = number_of(device)
    if index is None:
        return ""
    checked = sum(1 for r in rows(device) if r.verdicts)
    gpu = machine().identity(index)["gpu"]
    kernels = [f"{op} {name}" for op, name in chosen.items() if name in machine().backends]
    others = [f"{op} {name}" for op, name in chosen.items() if name not in (*machine().backends, "reference")]
    plain = [op for op, name in chosen.items() if name == "reference"]
    parts = [", ".join(kernels) or "none", f"others: {' '.join(others)}" if others else ""]
    parts += [f"reference: {' '.join(plain)}" if plain else ""]
    head = f"kernels: {checked} checked on {gpu} (triton {cache.version('triton') or 'none'})"
    return f"{head}: {'; '.join(filter(None, parts))}"


def difference(was: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The ops that two tables run differently, as text; empty where there are none."""
    ops = [op for op in {**was, **now} if was.get(op) != now.get(op)]
    return ", ".join(f"{op} {now.get(op, 'none')}, which was {was.get(op, 'none')}" for op in ops)
