"""Dynamic sampling: groups whose rewards are all equal are dropped, and further prompts are sampled until the
batch is full.

Everything here is a pure function of the step's number and of the rewards, so that a resumed run, and any
number of processes, draw the same prompts with the same noise; see `prompt_block` of sampling.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

G = TypeVar("G")  # the groups of a round


def fill(
    sample: Callable[[int, int, int], G], useful: Callable[[G], list[bool]], *, prompts: int, rounds: int
) -> tuple[list[G], list[int]]:
    """Every round of a step, and the places of the groups that make its batch.

    sample(index, count, before)  groups of `count` prompts; `before` groups were sampled in earlier rounds
    useful(groups)                which of them, of all processes, have rewards that differ
    prompts                       groups that the batch needs
    rounds                        further rounds after the first, at most
    """
    drawn = [sample(0, prompts, 0)]
    flags = useful(drawn[0])

    while sum(flags) < prompts and len(drawn) <= rounds:
        count = next_round_size(sum(flags), len(flags), prompts)
        drawn.append(sample(len(drawn), count, len(flags)))
        flags += useful(drawn[-1])
    return drawn, first_useful(flags, prompts)


def next_round_size(kept: int, drawn: int, prompts: int) -> int:
    """Prompts of the next round: what is missing over the share kept so far, at most a whole batch."""
    return min(prompts, math.ceil((prompts - kept) * drawn / max(kept, 1)))


def first_useful(useful: Sequence[bool], prompts: int) -> list[int]:
    """Which groups make the batch: the first `prompts` useful ones, in the order they were drawn."""
    return [i for i, ok in enumerate(useful) if ok][:prompts]
