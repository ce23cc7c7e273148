"""How the weight of a term changes over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass


def rise_and_fall(step: int, steps: int, *, peak: float, end: float, warmup: float, decay: float) -> float:
    """From 0 to the peak over `warmup` steps, then by half a cosine to `end` over `decay` (0: the rest of
    `steps`).
    """
    if step < warmup:
        return peak * step / warmup

    length = decay or max(steps - warmup, 1)
    progress = min(1.0, (step - warmup) / length)
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return end + (peak - end) * share


@dataclass(frozen=True, slots=True)
class Schedule:
    """From 0 to `peak` over `warmup` steps, then by half a cosine to `end` over `decay` steps (0: the rest of
    the run).
    """

    peak: float = 1.0
    end: float = 0.0
    warmup: int = 0
    decay: int = 0

    def __call__(self, step: int, steps: int) -> float:
        """The weight at `step` (counted from 0) of a run of `steps`."""
        return rise_and_fall(step, steps, peak=self.peak, end=self.end, warmup=self.warmup, decay=self.decay)
