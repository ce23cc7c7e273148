"""Verdicts on disk: `$XDG_CACHE_HOME/fastrl/verdicts.json` (default `~/.cache`), by machine and sources.

A verdict holds for one GPU model, driver, torch, triton and state of the kernels' sources and module.  One
process at a time checks; the others wait for its lock and read what it wrote.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastrl
from fastrl.kernels._registry import extension
from fastrl.kernels._verdicts.table import Verdict

try:
    import fcntl
except ModuleNotFoundError:  # not on Windows: two processes may then check at the same time
    fcntl = None  # type: ignore[assignment]

FILE = "verdicts.json"
KEPT = 16  # machines and source states, the newest
_said: set[str] = set()

Entries = dict[str, Verdict]  # "op/backend/dtype" -> verdict


def say(text: str) -> None:
    """One line on standard error, once a process."""
    if text not in _said:
        _said.add(text)
        print(f"fastrl: {text}", file=sys.stderr)


def folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastrl"


# --- the key ----------------------------------------------------------------------------------------
def identity(of_device: Mapping[str, str]) -> dict[str, str]:
    """All that a verdict depends on; `of_device` is gpu, capability and driver."""
    return {**of_device, "torch": torch.__version__, "triton": version("triton"), "sources": sources()}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def sources() -> str:
    """A digest of kernels/, of csrc/ where it lies beside it, and of the compiled module."""
    root = Path(fastrl.__file__).resolve().parent
    files = sorted((root / "kernels").resolve().rglob("*.py"))
    csrc = root.parent / "csrc"
    files += sorted(p for p in csrc.rglob("*") if p.is_file())
    module = extension()
    files += [Path(module.__file__)] if module is not None else []
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


# --- the file ---------------------------------------------------------------------------------------
@dataclass(slots=True)
class Store:
    """The verdicts of one identity, in a file or (path None) in this process only."""

    path: Path | None
    identity: Mapping[str, str]
    everything: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    def read(self) -> Entries:
        """What is known; nothing, with one line, where the file is damaged."""
        self.everything = {}
        if self.path is None or not self.path.is_file():
            return {}
        try:
            self.everything = dict(json.loads(self.path.read_text(encoding="utf-8")))
            known = self.everything.get(self.name, {"verdicts": {}})["verdicts"]
            return {name: _from_json(row) for name, row in known.items()}
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            self.everything = {}
            say(f"{self.path} is damaged ({type(error).__name__}): the kernels are checked anew")
            return {}

    def write(self, entries: Entries) -> None:
        """Replace the entries of this identity; the file is replaced as a whole."""
        if self.path is None:
            return
        rows = {name: _to_json(verdict) for name, verdict in entries.items()}
        self.everything.pop(self.name, None)
        self.everything[self.name] = {"identity": dict(self.identity), "verdicts": rows}
        for old in list(self.everything)[:-KEPT]:
            del self.everything[old]
        new = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            new.write_text(json.dumps(self.everything, indent=1), encoding="utf-8")
            new.replace(self.path)
        except OSError as error:
            _unwritable(error)


@contextlib.contextmanager
def store(identity: Mapping[str, str]) -> Iterator[Store]:
    """The verdicts of this identity, locked: other processes wait.  A folder that cannot be written is said
    once, and the verdicts then last as long as the process.
    """
    path = folder()
    with contextlib.ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((path / f"{FILE}.lock").open("w"))
        except OSError as error:
            _unwritable(error)
            yield Store(None, identity)
            return
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield Store(path / FILE, identity)


def peek(identity: Mapping[str, str]) -> Entries:
    """What is known, without waiting for anybody."""
    return Store(folder() / FILE, identity).read()


def _unwritable(error: OSError) -> None:
    say(f"{folder()} cannot be written ({error.strerror}): kernels are checked once in every process")


def _to_json(v: Verdict) -> dict[str, Any]:
    return {
        "passed": v.passed,
        "reason": v.reason,
        "cases": v.cases,
        "worst": round(v.worst, 4),
        "date": v.date,
        "variants": sorted(v.variants),
        "widths": sorted(v.widths),
    }


def _from_json(row: Mapping[str, Any]) -> Verdict:
    return Verdict(
        passed=row["passed"] is True,
        reason=str(row["reason"]),
        cases=int(row["cases"]),
        worst=float(row["worst"]),
        date=str(row["date"]),
        variants=frozenset(map(str, row["variants"])),
        widths=frozenset(map(str, row["widths"])),
    )
