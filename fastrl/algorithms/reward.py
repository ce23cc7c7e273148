"""The table of reward-model losses.  A row names the data it learns from and turns the scores of a group into
a loss; nothing branches on a name.

A group is one line of data: the completions of one prompt, better and worse ones; a single completion with
its verdict; or one completion with a verdict for each of its steps.  Everything here is plain PyTorch on the
(N,) scores of G groups.  Denominators count the whole optimizer step, and a group is never cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.algorithms.row import WithoutKl
from fastrl.batch.transfer import send
from fastrl.kernels._rows import spread_rows

# the sums of `measure`, in order
MEASURES = (
    "loss",
    "center",
    "units",
    "compared",
    "agreed",
    "margin",
    "scores",
    "reward",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The scores of G groups, one group after the other, with their labels.

    score   (N,)  rewards, which the loss is differentiated by
    target  (N,)  compared groups: higher is better, equal is a tie.  Verdicts: 1 right, 0 wrong, or the
            probability of right
    sizes         scores of each group, G numbers that sum to N
    margin  (G,)  the least difference that a group's rewards should have
    total         units of the whole optimizer step (see `RewardLoss.units`)
    slots   (N,)  int64 the place of each score in a table (G, K) of the groups, each padded to the largest
    pairs   (M,)  int64 the places in `gaps` of the pairs of which the first is better

    The last two follow from the others.  Without them they are worked out where they are needed, which waits
    for a device.
    """

    score: Tensor
    target: Tensor
    sizes: Sequence[int]
    margin: Tensor
    total: float
    slots: Tensor | None = None
    pairs: Tensor | None = None

    def to(self, score: Tensor) -> Judged:
        """The groups with scores on a device; the labels are on the host, and are sent by one copy."""
        host = [self.target, self.margin, self._slots(), self.better()]
        target, margin, slots, pairs = send(host, score.device)
        return replace(self, score=score, target=target, margin=margin, slots=slots, pairs=pairs)

    def _slots(self) -> Tensor:
        if self.slots is not None:
            return self.slots
        K = max(self.sizes, default=0)
        slots = [g * K + k for g, size in enumerate(self.sizes) for k in range(size)]
        return torch.tensor(slots, dtype=torch.int64, device=self.target.device)

    def better(self) -> Tensor:
        """See `pairs`."""
        return self.beats().flatten().nonzero().squeeze(1) if self.pairs is None else self.pairs

    def padded(self, values: Tensor) -> Tensor:
        """(N,) values as (G, K), zeros behind."""
        G, K = len(self.sizes), max(self.sizes, default=0)
        return spread_rows(values, self._slots(), G * K).view(G, K)

    def beats(self) -> Tensor:
        """(G, K, K) bool: completion i of the group is strictly better than its completion j."""
        target = self.padded(self.target)
        real = self.padded(torch.ones_like(self.target)) > 0
        better = target[:, :, None] > target[:, None, :]
        return better & real[:, :, None] & real[:, None, :]

    def gaps(self) -> Tensor:
        """(G, K, K): score of completion i less that of completion j."""
        score = self.padded(self.score)
        return score[:, :, None] - score[:, None, :]


Loss = Callable[[Judged], Tensor]  # scores of G groups -> (G,) the loss of each, its own denominators inside


def bradley_terry(judged: Judged) -> Tensor:
    """-log sigmoid(r_i - r_j - margin), averaged over the group's pairs in which i is better than j; ties are
    left out.

    Source:  Ouyang et al. 2022 (arXiv 2203.02155), all pairs of a prompt together; margin: Touvron et al.
             2023 (arXiv 2307.09288).
    """
    beats = judged.beats()
    loss = -F.logsigmoid(judged.gaps() - judged.margin[:, None, None])
    return torch.where(beats, loss, 0).sum((1, 2)) / beats.sum((1, 2)).clamp_min(1)


def plackett_luce(judged: Judged) -> Tensor:
    """-log of the probability that each completion is chosen first of itself and all that are strictly worse,
    summed.

    Without ties that is the likelihood of the whole ranking; tied completions are not compared with each
    other.
    Source:  Plackett 1975; Luce 1959.
    """
    beats = judged.beats()
    rivals = beats | torch.eye(beats.shape[-1], dtype=torch.bool, device=beats.device)
    # r_j - r_i: the score itself is never in the exponent, so an offset costs no accuracy
    behind = -judged.gaps()
    return torch.where(rivals, behind, -torch.inf).logsumexp(-1).sum(-1)


def cross_entropy(judged: Judged) -> Tensor:
    """Binary cross-entropy of sigmoid(score) against the verdicts, summed over the group.

    Source:  Cobbe et al. 2021 (arXiv 2110.14168) for outcomes; Lightman et al. 2023 (arXiv 2305.20050) for
             steps; verdicts between 0 and 1: Wang et al. 2023 (arXiv 2312.08935).
    """
    score, target = judged.score, judged.target
    each = -(target * F.logsigmoid(score) + (1 - target) * F.logsigmoid(-score))
    return judged.padded(each).sum(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardLoss(WithoutKl):
    """One loss.

    loss    scores of a group -> its loss
    data    what it learns from: completions "compared" with each other, a "verdict" on each, or a verdict on
            each of its "steps"
    margin  whether it uses a margin
    center  weight of (r_w + r_l)^2, or of (twice the group's mean reward)^2, which keeps rewards near 0: a
            loss of differences does not change when a constant is added to all rewards (Eisenstein et al.
            2023, arXiv 2312.09244)
    """

    loss: Loss
    data: Literal["compared", "verdict", "steps"]
    margin: bool = False
    center: float = 0.0

    @property
    def compares(self) -> bool:
        """Whether the loss depends on differences of rewards alone."""
        return self.data == "compared"

    def units(self, target: Sequence[float]) -> int:
        """How much a group counts in the denominator: 1 if one of its completions is better than another, or
        its number of verdicts.
        """
        return int(max(target) > min(target)) if self.compares else len(target)

    def measure(self, judged: Judged) -> tuple[Tensor, Tensor]:
        """These groups' share of the step's loss, differentiable in the scores, and the sums of MEASURES,
        float64.
        """
        count = judged.padded(torch.ones_like(judged.score)).sum(1).clamp_min(1)
        if self.compares:
            live = judged.beats().any(2).any(1).to(judged.score.dtype)
            units = live.sum()
        else:
            live = torch.ones_like(judged.margin)
            units = count.sum()

        total = judged.padded(judged.score).sum(1)
        squared = live * (2 * total / count).square()
        centering = squared.sum() / judged.total
        loss = self.loss(judged).sum() / judged.total
        if self.center:
            loss = loss + self.center * squared.sum() / judged.total

        with torch.no_grad():
            logits = self._logits(judged)
            sums = (
                loss,
                centering,
                units,
                logits.new_full((), logits.numel()),
                (logits > 0).sum(),
                logits.sum(),
                logits.new_full((), judged.score.numel()),
                judged.score.sum(),
            )
            return loss, torch.stack([x.detach().double() for x in sums])

    def _logits(self, judged: Judged) -> Tensor:
        """Log-odds of each right answer: that the better of a pair wins, or that a verdict is met."""
        if self.compares:
            return judged.gaps().flatten()[judged.better()]
        sign = torch.where(judged.target >= 0.5, 1, -1)
        return judged.score * sign


REWARD_LOSSES: dict[str, RewardLoss] = {
    "bradley_terry": RewardLoss(loss=bradley_terry, data="compared", margin=True),
    "plackett_luce": RewardLoss(loss=plackett_luce, data="compared"),
    "outcome": RewardLoss(loss=cross_entropy, data="verdict"),
    "process": RewardLoss(loss=cross_entropy, data="steps"),
}
