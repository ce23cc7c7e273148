"""The loss of a reward model: scores of whole groups, compared or judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.algorithms.reward import MEASURES, Judged, RewardLoss
from fastrl.batch.pack import plan
from fastrl.data.comparisons import Group
from fastrl.data.packing import Packed, pack
from fastrl.model.reward import RewardModel
from fastrl.parallel.device import memory_limited_by
from fastrl.report.metric import ratios
from fastrl.report.metrics import SCORE_METRICS
from fastrl.train.objective import PartNumbers
from fastrl.train.source import Metrics


@dataclass(frozen=True, slots=True)
class RewardBatch:
    """This process's groups of one optimizer step.

    total  the step's units over all processes (see `RewardLoss.units`)
    """

    groups: Sequence[Group]
    total: float


@dataclass(frozen=True, slots=True)
class RewardPart:
    """Some of a batch's groups in one forward pass; `total` is the whole step's."""

    packed: Packed
    total: float


def judged(packed: Packed, score: Tensor, total: float) -> Judged:
    """The groups of `packed` with their (N,) scores; `total` counts the units of the whole optimizer step."""
    groups = packed.groups
    target = [t for g in groups for t in g.target]
    margin = [g.margin for g in groups]
    labels, margins = (torch.tensor(x, dtype=score.dtype) for x in (target, margin))
    sizes = [len(g.target) for g in groups]
    host = Judged(score=torch.zeros_like(labels), target=labels, sizes=sizes, margin=margins, total=total)
    return host.to(score)


def packs(
    groups: Sequence[Group], budget: int, device: torch.device | str
) -> Iterator[tuple[list[int], Packed]]:
    """The groups in packs of at most `budget` tokens, with their places; a group, whose completions are
    compared, is never cut.
    """
    for some in plan([g.length for g in groups], budget):
        yield some, pack([groups[i] for i in some], device)


@torch.no_grad()
def group_scores(model: RewardModel, groups: Sequence[Group], micro_tokens: int) -> list[list[float]]:
    """The scores of every group."""
    out: list[list[float]] = [[] for _ in groups]
    with memory_limited_by("--micro-tokens", micro_tokens):
        for some, packed in packs(groups, micro_tokens, model.device):
            scores = model(packed.tokens, packed.cu_seqlens, packed.at).cpu()
            each = scores.split([len(groups[i].target) for i in some])
            for i, own in zip(some, each, strict=True):
                out[i] = own.tolist()
    return out


@dataclass(frozen=True, slots=True)
class ScoreObjective:
    """A loss of REWARD_LOSSES over the scores of whole groups."""

    model: RewardModel
    algorithm: RewardLoss

    def split(self, batch: RewardBatch, budget: int) -> Iterator[RewardPart]:
        """Packs of whole groups."""
        for _, packed in packs(batch.groups, budget, self.model.device):
            yield RewardPart(packed, batch.total)

    def loss(self, part: RewardPart) -> tuple[Tensor, Tensor]:
        """The groups' share of the loss; MEASURES, the lowest and the highest reward, and the tokens."""
        packed = part.packed
        scores = self.model(packed.tokens, packed.cu_seqlens, packed.at)
        loss, sums = self.algorithm.measure(judged(packed, scores, part.total))

        score = scores.detach().double()
        tokens = score.new_full((), packed.tokens.numel())
        return loss, torch.cat([sums, torch.stack([score.amin(), score.amax(), tokens])])

    def metrics(self, rows: PartNumbers) -> Metrics:
        """The step's metrics, under TRL's names."""
        return merge(rows)


def merge(rows: Sequence[Sequence[float]]) -> Metrics:
    """The step's metrics from the numbers of every micro-batch of every process, under TRL's names."""
    if not rows:
        return {"loss": 0.0, "num_tokens": 0.0}

    table = torch.tensor(rows, dtype=torch.float64)
    n = len(MEASURES)
    sums = dict(zip(MEASURES, table[:, :n].sum(0).tolist(), strict=True))
    lowest, highest, tokens = table[:, n:].unbind(1)

    ends = {"min_reward": float(lowest.min()), "max_reward": float(highest.max())}
    total = {"loss": sums["loss"], "centering": sums["center"], "num_tokens": float(tokens.sum())}
    return total | ratios(SCORE_METRICS, sums) | ends
