"""Philox4x32-10 (Salmon et al. 2011), the counter-based generator behind every random number of the ops.

A word depends on its counter and key alone, never on the batch it was drawn in, and integer arithmetic gives
the same bits on every device.  A 32-bit word lives in an int64 tensor here.

Each op that draws owns a part of the counter space:

    sample         counter (v // 4, position, sequence low, sequence high), word v % 4;  key (seed low, seed
                   high)
    perturb_init   counter (i // 4 low, i // 4 high, 0, 0x70657274), word i % 4, for flat element i;  key
                   (seed low, seed high)
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_BUMP = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

Word = Tensor | int
Counter = tuple[Word, Word, Word, Word]


def philox(counter: Counter, key: tuple[Word, Word]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of each counter under each key; counters and keys in [0, 2^32) broadcast, the
    first counter is a tensor.
    """
    a, b, c, d = counter
    k0, k1 = key
    for i in range(ROUNDS):
        # int64 products wrap, which keeps all 64 bits; bits above 31 left by shifts and sums are masked away
        p, q = a * _MULTIPLY[0], c * _MULTIPLY[1]
        a, b = ((q >> 32) ^ b ^ (k0 + i * _BUMP[0])) & MASK, q & MASK
        c, d = ((p >> 32) ^ d ^ (k1 + i * _BUMP[1])) & MASK, p & MASK
    a, b, c, d = torch.broadcast_tensors(a, b, c, d)
    return a, b, c, d


def split(x: Word) -> tuple[Word, Word]:
    """The low and the high 32-bit word of a 64-bit integer."""
    return x & MASK, (x >> 32) & MASK


def interleave(words: tuple[Tensor, Tensor, Tensor, Tensor], n: int) -> Tensor:
    """The first n words along the last axis, in order: word j of counter i is number 4 i + j."""
    return torch.stack(words, dim=-1).flatten(-2)[..., :n]


def uniform(words: Tensor) -> Tensor:
    """(x + 1/2) 2^-32 for each word x: strictly between 0 and 1, exact in float64."""
    return words.double().add_(0.5).mul_(2.0**-32)
