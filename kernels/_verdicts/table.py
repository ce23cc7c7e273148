"""What is known about the kernels on each device: passed, failed with a reason, or nothing yet.

A verdict is of one (op, backend, dtype, device).  The choice of `_backend` reads `TABLE.runs`, a dict: an
implementation that has passed is there, with its parts behind a guard of variants (`variant.py`); one that is
unknown or has failed is not.  `generation` counts the changes, so that whoever keeps a choice, as a captured
graph does, can tell that it is no longer the present one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

Run = Callable[..., Any]
Key = tuple[str, str, torch.dtype, int | None]  # op, backend, dtype, device index


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found.

    worst     the largest error as a fraction of its budget
    variants  the compiled forms that were run, as text
    widths    the sizes of models that were run, as text; "" for the fixed cases
    """

    passed: bool
    reason: str = ""
    cases: int = 0
    worst: float = 0.0
    date: str = ""
    variants: frozenset[str] = frozenset()
    widths: frozenset[str] = frozenset()

    @property
    def void(self) -> bool:
        """Whether the implementation takes no case on this device: neither passed nor failed."""
        return not self.passed and not self.reason


@dataclass(slots=True)
class Table:
    """The verdicts of this process.

    runs        what may be chosen: the parts of implementations that have passed
    asked       (device, dtype) for which a check was made or refused: an unknown verdict there is final
    generation  how many changes there were
    """

    verdicts: dict[Key, Verdict] = field(default_factory=dict)
    runs: dict[Key, Mapping[str, Run]] = field(default_factory=dict)
    asked: set[tuple[int | None, torch.dtype]] = field(default_factory=set)
    generation: int = 0

    def put(self, key: Key, verdict: Verdict, parts: Mapping[str, Run]) -> None:
        """Record a verdict; `parts` may be chosen from now on if it has passed."""
        self.verdicts[key] = verdict
        if verdict.passed:
            self.runs[key] = parts
        else:
            self.runs.pop(key, None)
        self.generation += 1

    def add_variant(self, key: Key, variant: str) -> None:
        """Record that one more compiled form has passed."""
        found = self.verdicts[key]
        self.verdicts[key] = replace(found, variants=found.variants | {variant})
        self.generation += 1

    def reason(self, key: Key) -> str:
        """Why the implementation may not be chosen; empty where it may."""
        if key in self.runs:
            return ""
        found = self.verdicts.get(key)
        if found is None:
            return "it is not checked on this device"
        return "it takes no case on this device" if found.void else f"it failed its check: {found.reason}"

    def has_passed(self, op: str, backend: str, index: int | None) -> bool:
        """Whether it has passed on this device in every dtype that was checked."""
        at = op, backend, index
        found = [v.passed for k, v in self.verdicts.items() if (k[0], k[1], k[3]) == at and not v.void]
        return bool(found) and all(found)

    def failed(self, key: Key) -> bool:
        found = self.verdicts.get(key)
        return found is not None and bool(found.reason)

    def clear(self) -> None:
        self.verdicts.clear()
        self.runs.clear()
        self.asked.clear()
        self.generation += 1


TABLE = Table()
