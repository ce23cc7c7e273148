"""The table of reward-model losses.  A row says what it learns from and how scores of a group become a loss;
nothing branches on a name.

A group is what one line of data says together: the completions of one prompt, better and worse ones; a single
completion with its verdict; or one completion with a verdict for each of its steps.  Everything here is plain
PyTorch on the (N,) scores of G groups.  Denominators count the whole optimizer step, and a group is never
cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# what `measure` adds up, in its order
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
    """The scores of G groups, one group after the other, and what is known of them.

    score   (N,)  rewards; what the loss is differentiated by
    target  (N,)  compared groups: higher is better, equal is a tie.  Verdicts: 1 right, 0 wrong, or the
            probability of right
    sizes         scores of each group, G numbers that sum to N
    margin  (G,)  how far apart a group's rewards are to be at least, reward units
    total         units of the whole optimizer step (see `RewardLoss.units`)
    """

    score: Tensor
    target: Tensor
    sizes: Sequence[int]
    margin: Tensor
    total: float

    def padded(self, values: Tensor) -> Tensor:
        """(N,) values as (G, K), zeros behind a group's own; without duplicate indices, so its gradient is
        deterministic.
        """
        K = max(self.sizes, default=0)
        slots = [g * K + k for g, size in enumerate(self.sizes) for k in range(size)]
        flat = values.new_zeros(len(self.sizes) * K)
        return flat.index_copy(0, torch.tensor(slots, dtype=torch.int64, device=values.device), values).view(
            len(self.sizes), K
        )

    def beats(self) -> Tensor:
        """(G, K, K) bool: completion i of the group is strictly better than its completion j."""
        target, real = self.padded(self.target), self.padded(torch.ones_like(self.target)) > 0
        return (target[:, :, None] > target[:, None, :]) & real[:, :, None] & real[:, None, :]

    def gaps(self) -> Tensor:
        """(G, K, K): score of completion i less that of completion j."""
        score = self.padded(self.score)
        return score[:, :, None] - score[:, None, :]


Loss = Callable[[Judged], Tensor]  # scores of G groups -> (G,) the loss of each, its own denominators inside


def bradley_terry(judged: Judged) -> Tensor:
    """-log sigmoid(r_i - r_j - margin), averaged over the group's pairs in which i is better than j; tied
    pairs say nothing.

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
    """Binary cross-entropy of sigmoid(score) against the verdicts, summed over the group's.

    Source:  Cobbe et al. 2021 (arXiv 2110.14168) for outcomes; Lightman et al. 2023 (arXiv 2305.20050) for
             steps; verdicts between 0 and 1: Wang et al. 2023 (arXiv 2312.08935).
    """
    score, target = judged.score, judged.target
    return judged.padded(-(target * F.logsigmoid(score) + (1 - target) * F.logsigmoid(-score))).sum(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardLoss:
    """One loss.

    loss    scores of a group -> its loss
    data    what it learns from: completions "compared" with each other, a "verdict" on each, or a verdict on
            each of its "steps"
    margin  whether it takes a margin
    center  weight of (r_w + r_l)^2, or (twice the group's mean reward)^2: what keeps rewards near 0, where
            the loss itself does not see a constant added to them (Eisenstein et al. 2023, arXiv 2312.09244)
    """

    loss: Loss
    data: Literal["compared", "verdict", "steps"]
    margin: bool = False
    center: float = 0.0
    kl_coef: ClassVar[float] = (
        0.0  # no reference model, no rollouts to correct: what the trainer asks of any row
    )
    correction: ClassVar[None] = None

    @property
    def compares(self) -> bool:
        """Whether it sees differences of rewards only."""
        return self.data == "compared"

    def units(self, target: Sequence[float]) -> int:
        """What a group counts in the denominator: 1 if any of its completions is better than another; its
        number of verdicts.
        """
        return int(max(target) > min(target)) if self.compares else len(target)

    def measure(self, judged: Judged) -> tuple[Tensor, Tensor]:
        """These groups' share of the step's loss, differentiable in the scores; and the sums that MEASURES
        names, float64.
        """
        beats = judged.beats() if self.compares else None
        live = torch.ones_like(judged.margin) if beats is None else beats.any(2).any(1).to(judged.score.dtype)
        count = judged.padded(torch.ones_like(judged.score)).sum(1).clamp_min(1)
        squared = live * (2 * judged.padded(judged.score).sum(1) / count).square()
        loss = self.loss(judged).sum() / judged.total
        if self.center:
            loss = loss + self.center * squared.sum() / judged.total
        with torch.no_grad():
            logits = (
                judged.gaps()[beats]
                if beats is not None
                else judged.score * torch.where(judged.target >= 0.5, 1, -1)
            )
            units = live.sum() if beats is not None else count.sum()
            sums = (
                loss,
                squared.sum() / judged.total,
                units,
                logits.new_tensor(logits.numel()),
                (logits > 0).sum(),
                logits.sum(),
                logits.new_tensor(judged.score.numel()),
                judged.score.sum(),
            )
            return loss, torch.stack([x.detach().double() for x in sums])


REWARD_LOSSES: dict[str, RewardLoss] = {
    "bradley_terry": RewardLoss(loss=bradley_terry, data="compared", margin=True),
    "plackett_luce": RewardLoss(loss=plackett_luce, data="compared"),
    "outcome": RewardLoss(loss=cross_entropy, data="verdict"),
    "process": RewardLoss(loss=cross_entropy, data="steps"),
}
