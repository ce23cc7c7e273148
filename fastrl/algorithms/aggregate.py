"""How per-token losses are averaged: the weight of each sample's tokens, with denominators of the whole
optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Counts over the whole optimizer step: every micro-batch of every process.

    tokens      tokens that count in the loss
    samples     sequences with at least one such token
    max_length  the generation budget, tokens
    """

    tokens: int
    samples: int
    max_length: int


# loss tokens of each sample (S,), totals -> weight of its tokens (S,)
Aggregate = Callable[[Tensor, Totals], Tensor]


def token_mean(length: Tensor, totals: Totals) -> Tensor:
    """Every token has the same weight, so long samples weigh more."""
    return torch.full_like(
        length, 1 / max(totals.tokens, 1), dtype=torch.promote_types(length.dtype, torch.float32)
    )


def sequence_mean(length: Tensor, totals: Totals) -> Tensor:
    """Every sample has the same weight, whatever its length."""
    return 1 / (length.clamp_min(1) * max(totals.samples, 1))


def sequence_sum(length: Tensor, totals: Totals) -> Tensor:
    """Samples are averaged, the tokens of each summed."""
    return torch.full_like(
        length, 1 / max(totals.samples, 1), dtype=torch.promote_types(length.dtype, torch.float32)
    )


def fixed_length(length: Tensor, totals: Totals) -> Tensor:
    """Tokens are divided by a constant, the generation budget: no length bias (Dr. GRPO)."""
    return torch.full_like(
        length,
        1 / (max(totals.samples, 1) * totals.max_length),
        dtype=torch.promote_types(length.dtype, torch.float32),
    )
