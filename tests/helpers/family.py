"""The GRPO family restated: padded (S, L) float64 matrices, one equation per method, differentiated by
autograd.

Nothing here is shared with the code under test: sequences are rows, means are written out, stops are
detaches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Rect:
    """S sequences of up to L tokens; advantage (S, 1), everything else (S, L); `budget` tokens may be
    generated.
    """

    logp: Tensor
    old: Tensor
    mask: Tensor
    advantage: Tensor
    budget: int
    correction: Tensor | float = 1.0

    @property
    def d(self) -> Tensor:
        return self.logp - self.old

    @property
    def r(self) -> Tensor:
        return self.d.exp()

    @property
    def A(self) -> Tensor:
        return self.advantage.expand_as(self.logp)

    @property
    def length(self) -> Tensor:
        return self.mask.sum(1, keepdim=True)

    def total(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x, 0).sum(1, keepdim=True)

    def by_sequence(self, x: Tensor) -> Tensor:
        there = self.length > 0
        return (self.total(x * self.correction) / self.length.clamp(min=1))[there].sum() / there.sum().clamp(
            min=1
        )

    def by_token(self, x: Tensor) -> Tensor:
        return self.total(x * self.correction).sum() / self.mask.sum().clamp(min=1)

    def by_sample(self, x: Tensor) -> Tensor:
        return self.total(x * self.correction).sum() / (self.length > 0).sum().clamp(min=1)

    def by_budget(self, x: Tensor) -> Tensor:
        return self.by_sample(x) / self.budget


def clipped(b: Rect, ratio: Tensor, low: float, high: float, cap: float = math.inf) -> Tensor:
    return torch.minimum(ratio.clamp(max=cap) * b.A, ratio.clamp(1 - low, 1 + high) * b.A)


def sequence_ratio(b: Rect) -> Tensor:
    return (b.total(b.d) / b.length.clamp(min=1)).exp().expand_as(b.logp)


def gmpo(b: Rect, size: float = 0.4) -> Tensor:
    up, down = b.d.clamp(max=size), b.d.clamp(min=-size)
    d = torch.where(b.A > 0, up, torch.where(b.A < 0, down, b.d))
    return b.by_sequence((b.total(d) / b.length.clamp(min=1)).exp() * b.A)


def vespo(b: Rect) -> Tensor:
    w = (b.total(b.d)).exp().detach()
    phi = torch.where(b.A >= 0, w**2 * (3 * (1 - w)).exp(), w**3 * (2 * (1 - w)).exp())
    return b.by_token(phi * b.A * b.logp)


def sapo(b: Rect) -> Tensor:
    tau = torch.where(b.A > 0, torch.ones_like(b.A), 1.05)
    return b.by_sequence(4 / tau * torch.sigmoid(tau * (b.r - 1)) * b.A)


OBJECTIVES: dict[str, Callable[[Rect], Tensor]] = {  # what each row maximises
    "grpo": lambda b: b.by_sequence(clipped(b, b.r, 0.2, 0.2)),
    "dr_grpo": lambda b: b.by_budget(clipped(b, b.r, 0.2, 0.2)),
    "dapo": lambda b: b.by_token(clipped(b, b.r, 0.2, 0.28)),
    "bnpo": lambda b: b.by_token(clipped(b, b.r, 0.2, 0.2)),
    "lite_ppo": lambda b: b.by_token(clipped(b, b.r, 0.2, 0.2)),
    "two_sided": lambda b: b.by_token(clipped(b, b.r, 0.2, 0.2, 4.0)),
    "gspo": lambda b: b.by_sequence(clipped(b, sequence_ratio(b), 3e-4, 4e-4)),
    "luspo": lambda b: b.by_sample(clipped(b, sequence_ratio(b), 2e-3, 2.5e-3)),
    "gmpo": gmpo,
    "cispo": lambda b: b.by_token(b.r.clamp(0, 5).detach() * b.A * b.logp),
    "sapo": sapo,
    "vespo": vespo,
    "rloo": lambda b: b.by_sample(b.A * b.logp),
    "reinforce++": lambda b: b.by_token(clipped(b, b.r, 0.2, 0.2)),
    "reinforce++_baseline": lambda b: b.by_token(clipped(b, b.r, 0.2, 0.2)),
    "gpg": lambda b: b.by_token(b.A * b.logp),
    "pass_at_k": lambda b: b.by_budget(clipped(b, b.r, 0.2, 0.2)),
    "max_rl": lambda b: b.by_budget(clipped(b, b.r, 0.2, 0.2)),
}


# --- advantages of (P, G) rewards without NaN, and (P, G) lengths -------------------------------------
def _zscore(R: Tensor, L: Tensor) -> Tensor:
    return (R - R.mean(1, keepdim=True)) / (R.std(1, keepdim=True) + 1e-4)


def _center(R: Tensor, L: Tensor) -> Tensor:
    return R - R.mean(1, keepdim=True)


def _whiten(x: Tensor, L: Tensor) -> Tensor:
    # token by token
    every = torch.cat([v.repeat(int(n)) for v, n in zip(x.flatten(), L.flatten(), strict=True)])
    return (x - every.mean()) / (every.var() + 1e-8).sqrt()


def _max_at_k(R: Tensor, L: Tensor, k: int = 0) -> Tensor:
    out = torch.zeros_like(R)
    for g, row in enumerate(R.tolist()):
        n = len(row)
        for chosen in itertools.combinations(range(n), k or n):
            for i in chosen:
                out[g, i] += (
                    max(row[j] for j in chosen) - max(row[j] for j in chosen if j != i)
                ) / math.comb(n, k or n)
    return out


def _others(R: Tensor, L: Tensor) -> Tensor:
    out = torch.zeros_like(R)
    for g, row in enumerate(R):
        for i in range(len(row)):
            rest = torch.cat([row[:i], row[i + 1 :]])
            gap = row[i] - rest.mean()
            out[g, i] = gap / (rest.std() + 1e-6) if rest.max() > rest.min() else gap
    return out


def _gpg(R: Tensor, L: Tensor) -> Tensor:
    alive = sum(len(row) for row in R if row.max() > row.min())
    return _center(R, L) * R.numel() / max(alive, 1)


RESTATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zscore": _zscore,
    "center": _center,
    "rloo": lambda R, L: _center(R, L) * R.shape[1] / (R.shape[1] - 1),
    "batch_std": lambda R, L: _center(R, L) / (R.std() + 1e-4),
    "whiten": _whiten,
    "center_whiten": lambda R, L: _whiten(_center(R, L), L),
    "gpg": _gpg,
    "max_rl": lambda R, L: _center(R, L) / R.mean(1, keepdim=True),
    "max_at_k": _max_at_k,
    "leave_one_out_zscore": _others,
}
ADVANTAGE_OF = {  # the advantage of each method's paper, where it is not GRPO's
    "dr_grpo": "center",
    "lite_ppo": "batch_std",
    "rloo": "rloo",
    "reinforce++": "whiten",
    "reinforce++_baseline": "center_whiten",
    "gpg": "gpg",
    "pass_at_k": "max_at_k",
    "max_rl": "max_rl",
}
