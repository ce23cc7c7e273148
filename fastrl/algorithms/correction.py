"""Sampler against trainer: how far their log-probs are apart, and importance weights that correct for it.

The log-prob recorded while sampling is the old log-prob, so the ratio of a row already covers the whole
distance from the sampler to the policy, carried-over tokens included.  A correction splits it in two: the old
log-prob becomes the trainer's own, under the weights before the first update on the batch, and the rest, w =
exp(trainer - recorded), becomes a constant weight of the policy term (never of the KL), bounded by a row of
CORRECTIONS.

For a batch of one update, the forward pass of that update gives the trainer's log-probs, and nothing is
computed twice.  Several minibatches or epochs need one forward of the whole batch before the first update,
because later passes see changed weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fastrl.algorithms.sequence import mean, totals
from fastrl.batch.transfer import send
from fastrl.batch.types import Tokens
from fastrl.errors import UserError
from fastrl.kernels.surrogates import bounded

# log weight of each token -> the log weight that is bounded, (N,)
LEVELS: dict[str, Callable[[Tensor, Tokens], Tensor]] = {
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
    """One way to bound w.

    level      whether w is that of each token, or of its whole sequence: a row of LEVELS
    rule       (w, the token's own w, low, high) -> its weight
    low, high  the bounds
    drops      whether tokens with a weight of 0 leave the batch, and with it every term of the loss and all
               denominators (verl); else they count there, and only the policy term loses them
    """

    level: Literal["token", "sequence", "geometric"]
    rule: Callable[[Tensor, Tensor, float, float], Tensor]
    low: float
    high: float
    drops: bool = False

    @property
    def masks(self) -> bool:
        """Whether it gives a weight of 0 to what is outside its bounds."""
        return self.rule is not _truncate

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise UserError(
                "--correction-min, --correction-max: expected 0 <= min < max, "
                f"got {self.low:g} and {self.high:g}; both bound the ratio"
            )

    def __call__(self, tokens: Tokens) -> Tokens:
        """The tokens with their weights, `logp` as old_logp, and the recorded log-prob as sampler_logp.

        `logp` must be the trainer's before any update on the batch.
        """
        trainer = tokens.logp.detach()
        s = bounded(trainer - tokens.old_logp)
        w = bounded(LEVELS[self.level](s, tokens)).exp()

        weight = self.rule(w, s.exp(), self.low, self.high)
        return replace(tokens, old_logp=trainer, sampler_logp=tokens.old_logp, correction=weight)


CORRECTIONS: dict[str, Correction] = {  # TRL's names, where it has them
    "token_truncate": Correction("token", _truncate, 0.0, 2.0),  # TIS: min(w, 2)
    "token_mask": Correction("token", _mask, 0.5, 2.0),  # IcePop, MIS: 0 outside
    "sequence_truncate": Correction("sequence", _truncate, 0.0, 2.0),  # the product over the sequence
    "sequence_mask": Correction("sequence", _mask, 0.0, 3.0),
    # the token's own min(w, 2); 0 where the sequence's geometric mean is outside
    "geometric_mask": Correction("geometric", _reject, 0.999, 1.001),
}


# --- metrics ----------------------------------------------------------------------------------------
NO_TOKENS = (0.0, 0.0, -torch.inf, 0.0, 0.0, 0.0, torch.inf, 0.0, -torch.inf)


def mismatch(tokens: Tokens) -> Tensor:
    """(9,) float64 for `merge_mismatch`: the number of tokens, and sums and extremes of s = logp - recorded
    and of the correction.
    """
    recorded = tokens.old_logp if tokens.sampler_logp is None else tokens.sampler_logp
    s = (tokens.logp - recorded).double()
    if not s.numel():
        return send([torch.tensor(NO_TOKENS, dtype=s.dtype)], s.device)[0]

    w = bounded(s).exp()
    k = torch.ones_like(s) if tokens.correction is None else tokens.correction.double()
    kl = torch.expm1(bounded(s)) - s
    sums = torch.stack([s.abs(), kl, w, w.square(), k]).sum(1)
    ends = torch.stack([s.abs().amax(), k.amin(), k.amax()])
    n = s.new_full((1,), s.numel())
    return torch.cat([n, sums[:1], ends[:1], sums[1:4], ends[1:2], sums[4:], ends[2:]])


def merge_mismatch(rows: Tensor) -> dict[str, float]:
    """The step's metrics, from the rows (M, 9) of its micro-batches and processes; none without tokens."""
    rows = rows.cpu()
    n, diff, _, k3, w, w2, _, k, _ = rows.sum(0).tolist()
    if not n:
        return {}
    largest, smallest = rows.amax(0).tolist(), rows.amin(0).tolist()
    return {
        "sampler_diff_mean": diff / n,
        "sampler_diff_max": largest[2],
        "sampler_kl": k3 / n,
        "sampler_ess": w * w / (n * w2),
        "correction_min": smallest[6],
        "correction_mean": k / n,
        "correction_max": largest[8],
    }
