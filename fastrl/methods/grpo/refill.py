"""Dynamic sampling: groups whose rewards are all equal are dropped, and further prompts are sampled until the
batch is full.

Everything here is a pure function of the step's number and of the rewards, so that a resumed run, and any
number of processes, draw the same prompts with the same noise.  A run with R rounds of refill owns 1 + R
blocks of prompts and of sequence numbers per step; a round uses the front of its own block, so that no two
samples of a run have one number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def block(step: int, turn: int, refill: int) -> int:
    """The block of `prompts` prompts, and of prompts x group sequence numbers, that round `turn` of a step
    draws from.
    """
    return step * (1 + refill) + turn


def further(kept: int, drawn: int, prompts: int) -> int:
    """Prompts of the next round: what is missing, divided by the share of groups kept so far, and at most a
    whole batch.
    """
    return min(prompts, math.ceil((prompts - kept) * drawn / max(kept, 1)))


def spread(reward: Tensor, group: int) -> Tensor:
    """(P,) bool: which groups have two different rewards; NaN is none."""
    table = reward.view(-1, group)
    return table.nan_to_num(-torch.inf).amax(1) > table.nan_to_num(torch.inf).amin(1)


def keep(useful: Sequence[bool], prompts: int) -> list[int]:
    """Which groups make the batch: the first `prompts` useful ones, in the order they were drawn."""
    return [i for i, fine in enumerate(useful) if fine][:prompts]
