"""Preference losses restated: padded (N, L) float64 matrices, one equation per row, and random pairs for both
sides.

Nothing here is shared with the code under test: sequences are rows of a matrix, sums are written out,
constants are typed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.algorithms.preference import Preference
from fastrl.batch.types import Tokens


@dataclass
class Side:
    """N completions of up to L tokens: log-probs, the reference's, and which tokens there are; each (N,
    L).
    """

    logp: Tensor
    ref: Tensor
    mask: Tensor

    @property
    def s(self) -> Tensor:
        return torch.where(self.mask, self.logp, 0).sum(1)

    @property
    def rho(self) -> Tensor:
        return torch.where(self.mask, self.logp - self.ref, 0).sum(1)

    @property
    def n(self) -> Tensor:
        return self.mask.sum(1)

    def ld(self, shorter: Tensor) -> Tensor:
        """The log-ratio with half the weight on tokens after the first `shorter`."""
        place = torch.arange(self.mask.shape[1])[None]
        return (
            torch.where(self.mask, self.logp - self.ref, 0) * torch.where(place < shorter[:, None], 1.0, 0.5)
        ).sum(1)


def nls(x: Tensor) -> Tensor:
    """-log sigmoid(x) = log(1 + exp(-x))."""
    return torch.logaddexp(torch.zeros_like(x), -x)


def sig(x: Tensor) -> Tensor:
    return (1 + torch.tanh(x / 2)) / 2


def log_odds(x: Tensor) -> Tensor:
    p = x.exp()
    return (p / (1 - p)).log()


def mean_nll(w: Side) -> Tensor:
    return -w.s / w.n


def _exo(w: Side, r: Side) -> Tensor:
    q, e = sig(0.1 * (w.rho - r.rho)), 1e-3
    return q * (q.log() - math.log(1 - e)) + (1 - q) * ((1 - q).log() - math.log(e))


def _discopop(w: Side, r: Side) -> Tensor:
    x = 0.05 * (w.rho - r.rho)
    g = sig(x / 0.05)
    return (1 - g) * nls(x) + g * (-x).exp()


EQUATIONS: dict[str, Callable[[Side, Side], Tensor]] = {  # (chosen, rejected) -> loss of each pair
    "dpo": lambda w, r: nls(0.1 * (w.rho - r.rho)),
    "cdpo": lambda w, r: 0.9 * nls(0.1 * (w.rho - r.rho)) + 0.1 * nls(-0.1 * (w.rho - r.rho)),
    "robust": lambda w, r: (0.9 * nls(0.1 * (w.rho - r.rho)) - 0.1 * nls(-0.1 * (w.rho - r.rho))) / 0.8,
    "hinge": lambda w, r: torch.clamp(1 - 0.1 * (w.rho - r.rho), min=0),
    "ipo": lambda w, r: (w.rho / w.n - r.rho / r.n - 5.0) ** 2,
    "dpo_norm": lambda w, r: nls(5 * (w.rho / w.n - r.rho / r.n)),
    "ld_dpo": lambda w, r: nls(0.1 * (w.ld(torch.minimum(w.n, r.n)) - r.ld(torch.minimum(w.n, r.n)))),
    "dpop": lambda w, r: nls(0.3 * (w.rho - r.rho - 50 * torch.relu(-w.rho))),
    "rpo": lambda w, r: nls(0.1 * (w.rho - r.rho)) + mean_nll(w),
    "exo": _exo,
    "nca": lambda w, r: nls(0.01 * w.rho) + 0.5 * nls(-0.01 * w.rho) + 0.5 * nls(-0.01 * r.rho),
    "bco": lambda w, r: nls(0.01 * w.rho) + nls(-0.01 * r.rho),
    "sppo": lambda w, r: (w.rho - 500) ** 2 + (r.rho + 500) ** 2,
    "apo_zero": lambda w, r: 1 - sig(0.1 * w.rho) + sig(0.1 * r.rho),
    "apo_down": lambda w, r: sig(0.1 * w.rho) + 1 - sig(0.1 * (w.rho - r.rho)),
    "discopop": _discopop,
    "dpo_forward_kl": lambda w, r: nls(0.1 * ((1 - (-w.rho).exp()) - (1 - (-r.rho).exp()))),
    "dpo_js": lambda w, r: nls(0.1 * ((2 * sig(w.rho)).log() - (2 * sig(r.rho)).log())),
    "dpo_alpha": lambda w, r: nls(
        0.1 * (((-0.5 * w.rho).exp() - 1) / -0.5 - ((-0.5 * r.rho).exp() - 1) / -0.5)
    ),
    "simpo": lambda w, r: nls(2 * (w.s / w.n - r.s / r.n) - 1),
    "cpo": lambda w, r: nls(0.1 * (w.s - r.s)) + mean_nll(w),
    "orpo": lambda w, r: 0.1 * nls(log_odds(w.s / w.n) - log_odds(r.s / r.n)) + mean_nll(w),
}
BASELINE = 0.3
LABELLED: dict[str, Callable[[Side, Tensor], Tensor]] = {  # (examples, which are good) -> loss of each
    "kto": lambda x, good: torch.where(
        good, 1 - sig(0.1 * (x.rho - BASELINE)), 1 - sig(0.1 * (BASELINE - x.rho))
    ),
    "apo_zero_unpaired": lambda x, good: torch.where(good, 1 - sig(0.1 * x.rho), sig(0.1 * x.rho)),
}


def random_side(lengths: Sequence[int], spread: float, dtype: torch.dtype = torch.float64) -> Side:
    """Log-probs of completions of these lengths, which differ from the reference's by about `spread` nats a
    token.
    """
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ref = -torch.rand(mask.shape, dtype=dtype) * 2 - 0.05
    return Side((ref + spread * torch.randn(mask.shape, dtype=dtype)).clamp(max=-1e-3), ref, mask)


def packed(sides: Sequence[Side], good: Sequence[bool], count: int) -> tuple[Tokens, Tensor]:
    """The completions sides[0][0], sides[1][0], sides[0][1], ... end to end, and their log-probs (N,)."""
    N = len(sides[0].logp)
    order = [(side, i) for i in range(N) for side in sides]
    of = [good[k % len(sides)] if len(sides) > 1 else good[k] for k in range(len(order))]
    logp, ref = (
        torch.cat([getattr(side, name)[i][side.mask[i]] for side, i in order]) for name in ("logp", "ref")
    )
    lengths = torch.tensor([int(side.n[i]) for side, i in order])
    sign = torch.tensor([1.0 if g else -1.0 for g in of]).repeat_interleave(lengths)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    tokens = Tokens(
        old_logp=torch.zeros_like(logp),
        advantage=sign,
        weight=torch.full_like(logp, 1 / count),
        ref_logp=ref,
        cu_seqlens=ends,
        live=logp.numel(),
    )
    return tokens, logp


def ours(
    row: Preference, sides: Sequence[Side], good: Sequence[bool] = (True, False)
) -> tuple[Tensor, Tensor]:
    """The row's mean loss over these units, and its gradient by every log-prob, packed."""
    tokens, logp = packed(sides, good, len(sides[0].logp))
    leaf = logp.detach().clone().requires_grad_()
    loss = row.loss(tokens.with_(leaf, None))
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def restated(equation: Callable[..., Tensor], sides: Sequence[Side], *more: Tensor) -> tuple[Tensor, Tensor]:
    """The same of an equation of padded sides."""
    leaves = [side.logp.detach().clone().requires_grad_() for side in sides]
    loss = equation(
        *(Side(leaf, side.ref, side.mask) for leaf, side in zip(leaves, sides, strict=True)), *more
    ).mean()
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    rows = [
        g[i][side.mask[i]] for i in range(len(sides[0].logp)) for g, side in zip(grads, sides, strict=True)
    ]
    return loss.detach(), torch.cat(rows)
