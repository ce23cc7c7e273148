"""Sums and means over whole sequences, for each of their tokens: packed vectors of N tokens, with the ends of
the sequences in `cu_seqlens` (S+1,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.batch.types import Tokens


def totals(x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The sum of x over each token's sequence and its number of tokens, both (N,) and constant, summed in
    float64.
    """
    if tokens.cu_seqlens is None:
        raise ValueError(
            "cu_seqlens: expected the ends of whole sequences, got None; "
            'evaluate the loss with level="sequence"'
        )
    ends = tokens.cu_seqlens.long()
    of = torch.searchsorted(ends[1:], torch.arange(x.numel(), device=x.device), right=True)
    total = torch.segment_reduce(x.detach().double(), "sum", offsets=ends, unsafe=True)
    return total[of].to(x.dtype), ends.diff()[of].to(x.dtype)


def mean(x: Tensor, tokens: Tokens) -> Tensor:
    """The mean of x over each token's sequence, (N,), constant."""
    total, count = totals(x, tokens)
    return total / count
