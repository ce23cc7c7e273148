"""Sampler against trainer: how far their log-probs are apart, and the importance weights that make up for it.

The log-prob recorded while sampling is the old log-prob, so the ratio of a row already contains the whole way
from the sampler to the policy, carried-over tokens included.  A correction splits that way in two: the old
log-prob becomes the trainer's own, under the weights before the first update on the batch, and the rest, w =
exp(trainer - recorded), becomes a constant weight of the policy term (never of the KL), bounded by a row of
CORRECTIONS.

Where a batch is used for one update the pass's own log-probs are the trainer's, and nothing is computed
twice.  Several minibatches or epochs take one forward of the whole batch before the first update
(`OnPolicy.collect`), because later passes see moved weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fastrl.algorithms.sequence import mean, totals
from fastrl.batch.types import Tokens
from fastrl.errors import UserError
from fastrl.kernels.surrogates import bounded

LEVELS: dict[
    str, Callable[[Tensor, Tokens], Tensor]
] = {  # log weight of each token -> what the bounds look at, (N,)
    "token": lambda s, tokens: s,
    "sequence": lambda s, tokens: totals(s, tokens)[0],
    "geometric": mean,
}


def _truncate(w: Tensor, token: Tensor, low: float, high: float) -> Tensor:
    return w.clamp(low, high)


def _mask(w: Tensor, token: Tensor, low: float, high: float) -> Tensor:
    return torch.where((w >= low) & (w <= high), w, 0)


def _reject(w: Tensor, token: Tensor, low: float, high: float) -> Tensor:
    return torch.where((w >= low) & (w <= high), token.clamp(max=2.0), 0)


@dataclass(frozen=True, slots=True)
class Correction:
    """One way to bound w: `level` says of what (a row of LEVELS), `rule(w, token's own w, low, high)` how."""

    level: Literal["token", "sequence", "geometric"]
    rule: Callable[[Tensor, Tensor, float, float], Tensor]
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise UserError(
                "--correction-min, --correction-max: expected 0 <= min < max, "
                f"got {self.low:g} and {self.high:g}; both bound the ratio"
            )

    def __call__(self, tokens: Tokens) -> Tokens:
        """Tokens whose logp is the trainer's before any update, with that as old_logp, the recorded one kept,
        and their weights.
        """
        trainer = tokens.logp.detach()
        s = bounded(trainer - tokens.old_logp)
        w = bounded(LEVELS[self.level](s, tokens)).exp()
        return replace(
            tokens,
            old_logp=trainer,
            sampler_logp=tokens.old_logp,
            correction=self.rule(w, s.exp(), self.low, self.high),
        )


CORRECTIONS: dict[str, Correction] = {  # TRL's names, where it has them
    "token_truncate": Correction("token", _truncate, 0.0, 2.0),  # TIS: min(w, 2)
    "token_mask": Correction("token", _mask, 0.5, 2.0),  # IcePop, MIS: 0 outside
    "sequence_truncate": Correction("sequence", _truncate, 0.0, 2.0),  # the product over the sequence
    "sequence_mask": Correction("sequence", _mask, 0.0, 3.0),
    "geometric_mask": Correction(
        "geometric", _reject, 0.999, 1.001
    ),  # min(w, 2), 0 where the sequence's geometric mean is outside
}


# --- metrics ----------------------------------------------------------------------------------------
def mismatch(tokens: Tokens) -> Tensor:
    """(9,) float64: tokens, and sums and extremes of s = logp - recorded and of the correction, for
    `merge_mismatch`.
    """
    recorded = tokens.old_logp if tokens.sampler_logp is None else tokens.sampler_logp
    s = (tokens.logp - recorded).double()
    w, k = bounded(s).exp(), torch.ones_like(s) if tokens.correction is None else tokens.correction.double()
    if not s.numel():
        return torch.tensor(
            [0, 0, -torch.inf, 0, 0, 0, torch.inf, 0, -torch.inf], dtype=torch.float64, device=s.device
        )
    sums = torch.stack([s.abs(), torch.expm1(bounded(s)) - s, w, w.square(), k]).sum(1)
    ends = torch.stack([s.abs().amax(), k.amin(), k.amax()])
    n = s.new_full((1,), s.numel())
    return torch.cat([n, sums[:1], ends[:1], sums[1:4], ends[1:2], sums[4:], ends[2:]])


def merge_mismatch(rows: Tensor) -> dict[str, float]:
    """The step's metrics, from the rows (M, 9) of its micro-batches and processes; none without tokens."""
    rows = rows.cpu()
    n, diff, _, k3, w, w2, _, k, _ = rows.sum(0).tolist()
    if not n:
        return {}
    return {
        "sampler_diff_mean": diff / n,
        "sampler_diff_max": float(rows[:, 2].max()),
        "sampler_kl": k3 / n,
        "sampler_ess": w * w / (n * w2),
        "correction_min": float(rows[:, 6].min()),
        "correction_mean": k / n,
        "correction_max": float(rows[:, 8].max()),
    }
