"""The learner of reward models: scores of whole groups in, one optimizer step out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.algorithms.reward import MEASURES, Judged, RewardLoss
from fastrl.batch.pack import plan
from fastrl.data.comparisons import Group, Packed, pack
from fastrl.parallel.device import memory_limited_by
from fastrl.report.metric import ratios
from fastrl.report.metrics import SCORE_METRICS
from fastrl.train.learner import Learner


@dataclass(frozen=True, slots=True)
class RewardBatch:
    """This process's groups of one optimizer step, and the step's units over all processes (see
    `RewardLoss.units`).
    """

    groups: Sequence[Group]
    total: float


def judged(packed: Packed, score: Tensor, total: float) -> Judged:
    """The groups of `packed` with their (N,) scores; `total` counts the units of the whole optimizer step."""
    groups = packed.groups
    target = [t for g in groups for t in g.target]
    return Judged(
        score=score,
        target=torch.tensor(target, dtype=score.dtype, device=score.device),
        sizes=[len(g.target) for g in groups],
        margin=torch.tensor([g.margin for g in groups], dtype=score.dtype, device=score.device),
        total=total,
    )


def micro_batches(
    groups: Sequence[Group], budget: int, device: torch.device | str
) -> Iterator[tuple[list[int], Packed]]:
    """The groups in packs of at most `budget` tokens, with their places; a group is never cut, whose
    completions are compared.
    """
    for some in plan([g.length for g in groups], budget):
        yield some, pack([groups[i] for i in some], device)


class RewardLearner(Learner):
    """Trains a `RewardModel` with a row of REWARD_LOSSES; optimizer, schedule and master weights are
    `Learner`'s.
    """

    algorithm: RewardLoss  # type: ignore[assignment]

    def judge(self, packed: Packed, total: float) -> Judged:
        """The groups with the model's scores."""
        return judged(packed, self.model(packed.tokens, packed.cu_seqlens, packed.at), total)

    @torch.no_grad()
    def scores(self, groups: Sequence[Group]) -> list[list[float]]:
        """The scores of every group."""
        out: list[list[float]] = [[] for _ in groups]
        with memory_limited_by("--micro-tokens", self.micro_tokens):
            for some, packed in micro_batches(groups, self.micro_tokens, self.model.device):
                parts = self.judge(packed, 1.0).score.cpu().split([len(groups[i].target) for i in some])
                for i, part in zip(some, parts, strict=True):
                    out[i] = part.tolist()
        return out

    def _gradients(self, batch: RewardBatch) -> dict[str, float]:  # type: ignore[override]
        """Leave the whole step's gradient, all processes included, in the masters; the step's metrics."""
        rows: list[Tensor] = []  # of each micro-batch: its sums, its lowest and its highest reward
        with memory_limited_by("--micro-tokens", self.micro_tokens):
            for _, packed in micro_batches(batch.groups, self.micro_tokens, self.model.device):
                judged = self.judge(packed, batch.total)
                loss, sums = self.algorithm.measure(judged)
                loss.backward()
                score = judged.score.detach().double()
                rows.append(torch.cat([sums, torch.stack([score.amin(), score.amax()])]))
        self.world.sum_gradients(self.masters)
        every = self.world.gather(torch.stack(rows).tolist() if rows else [])
        tokens = self.world.sum(float(sum(g.length for g in batch.groups)))[0]
        return merge(every) | {"num_tokens": tokens}


def merge(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    """The step's metrics from the sums of every micro-batch of every process, under TRL's names."""
    if not rows:
        return {"loss": 0.0}
    table = torch.tensor(rows, dtype=torch.float64)
    n = len(MEASURES)
    sums = dict(zip(MEASURES, table[:, :n].sum(0).tolist(), strict=True))
    ends = {"min_reward": float(table[:, n].min()), "max_reward": float(table[:, n + 1].max())}
    return {"loss": sums["loss"], "centering": sums["center"]} | ratios(SCORE_METRICS, sums) | ends
