"""Advantage estimators: rewards of groups of samples in, one number per sample out.  A variant is a row.

Rows are choices of `ops.group_advantage`'s columns; the methods that use them are in objective.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from fastrl import ops

Advantage = Callable[[Tensor, int], Tensor]  # reward (S,) of contiguous groups of G -> (S,)

ADVANTAGES: dict[str, Advantage] = {
    "zscore": partial(ops.group_advantage, baseline="mean", scale="std"),
    "center": partial(ops.group_advantage, baseline="mean", scale="none"),
    "rloo": partial(ops.group_advantage, baseline="leave_one_out", scale="none"),
    "batch_std": partial(ops.group_advantage, baseline="mean", scale="batch_std"),
    "best": partial(ops.group_advantage, baseline="max", scale="none"),
    "best_range": partial(ops.group_advantage, baseline="max", scale="range"),
    "rank": partial(ops.group_advantage, shape="rank"),
    "softmax": partial(ops.group_advantage, shape="softmax"),
}
