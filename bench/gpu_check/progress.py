"""What a GPU check has done so far: one JSON line an event, written as it happens, so that a check that is
stopped loses nothing and the next one continues.

Events hold for one state of the sources on one device: `Progress.open` starts anew when either differs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "progress.jsonl"
SOURCES = ("kernels", "csrc", "fastrl", "bench", "tests")
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh")
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"

Event = dict[str, Any]


@dataclass(slots=True)
class Progress:
    """The events of one check, in the order in which they happened."""

    path: Path
    header: Event
    events: list[Event] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, header: Event, earlier: Path | None = None) -> Progress:
        """Continue the events of `earlier` (default: of `folder`) where they have the same header.

        A line that was cut off by a kill is dropped.
        """
        path = folder / FILE
        known, *events = [*read((earlier or folder) / FILE)] or [{}]
        same = {k: known.get(k) for k in header} == header
        progress = cls(path, header)
        if same:
            progress.events = events
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(e) for e in (header, *progress.events)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return progress

    def add(self, **event: Any) -> None:
        """Append an event."""
        self.events.append(event)
        append(self.path, event)

    def reload(self) -> None:
        """Read what child processes appended."""
        _, *self.events = read(self.path)

    @property
    def tests(self) -> dict[str, Event]:
        """The last outcome of every test, by its id."""
        return outcomes(self.events)

    def stage(self, name: str) -> Event | None:
        """The last event of a stage."""
        found = [e for e in self.events if e["kind"] == "stage" and e["name"] == name]
        return found[-1] if found else None


def outcomes(events: list[Event]) -> dict[str, Event]:
    """The last event of every test, by its id."""
    return {e["test"]: e for e in events if e["kind"] == "test"}


def read(path: Path) -> Iterator[Event]:
    """The events of a file; none where there is no file."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off by a kill


def append(path: Path, event: Event) -> None:
    """Add a line, whole or not at all: several processes write."""
    line = (json.dumps(event) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line)
    finally:
        os.close(handle)


def digest(root: Path) -> str:
    """A hash of everything that the tests and benchmarks run."""
    total = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted(p for p in (root / folder).rglob("*") if p.suffix in SUFFIXES):
            total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:12]
