"""The policy's own shaping of rollouts: advantages from rewards, weights from the algorithm's aggregate."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.algorithms import Algorithm
from fastrl.algorithms.advantage import COMBINE
from fastrl.batch.types import Batch
from fastrl.config import GroupRelative
from fastrl.methods.grpo.groups import SampledGroups
from fastrl.methods.grpo.rollouts import Shaping
from fastrl.parallel.world import World
from fastrl.train.source import Metrics
from fastrl.train.weighting import weigh


def policy_shaping(config: GroupRelative, algorithm: Algorithm, world: World) -> Shaping:
    """Every sample of a group is trained on with its advantage."""

    def credit(groups: SampledGroups, samples: list[int]) -> tuple[list[int], Tensor]:
        return samples, group_advantages(groups, samples, config, algorithm, world)

    def weighed(part: Batch) -> Batch:
        return weigh(part, algorithm, world, max_length=config.max_new_tokens)

    def pruned(part: Batch) -> Batch:
        # With a KL or an entropy term a sample without advantage still has a gradient.
        return part if algorithm.kl_coef or algorithm.entropy_coef else prune(part)

    return Shaping(extend=unchanged, credit=credit, columns=no_columns, weigh=weighed, prune=pruned)


def unchanged(groups: SampledGroups, step: int, version: int) -> tuple[SampledGroups, Metrics]:
    """The groups as they were sampled."""
    return groups, {}


def no_columns(
    batch: Batch, groups: SampledGroups, samples: list[int], credit: Tensor
) -> tuple[Batch, Metrics]:
    """The batch as it is."""
    return batch, {}


def prune(batch: Batch) -> Batch:
    """Drop the samples whose advantage is 0, or that have no loss token: their gradient is 0.  Weights were
    computed before, so these samples still count in the denominators.
    """
    # The advantage is constant over a sequence, so its first token tells.
    host = batch.host
    first = host.cu_seqlens[:-1].long()
    moves = (host.advantage[first] != 0) & (host.live_ends.diff() > 0)
    return keep(batch, moves)


def keep(batch: Batch, kept: Tensor) -> Batch:
    """The batch of the sequences where `kept` (S,), on the host, is True."""
    return batch if bool(kept.all()) else batch.select(kept.nonzero().squeeze(1).tolist())


def group_advantages(
    groups: SampledGroups, samples: list[int], config: GroupRelative, algorithm: Algorithm, world: World
) -> Tensor:
    """(len(samples),) fp32 advantages of this process's `samples`, in ascending order of place.  Rewards of
    all processes are gathered where the estimator needs statistics of the whole batch.
    """
    advantage, size = algorithm.advantage, groups.size
    assert advantage is not None
    device = groups.rollouts.tokens.device

    # Normalise each reward separately and then combine, or use the weighted sum that the log reports.
    apart = config.multi_objective_aggregation != "sum_then_normalize"
    rewards = (groups.scored.each if apart else {}) or {"reward": (1.0, groups.scored.reward)}
    length = groups.rollouts.lengths.tolist()
    rows = [
        (groups.places[i // size], length[i], *(values[i] for _, values in rewards.values())) for i in samples
    ]

    if advantage.whole_batch or apart:
        rows = sorted(world.gather(rows), key=lambda row: row[0])
    if not samples:  # an empty share knows nothing of the rewards
        return torch.zeros(0, device=device)

    table = torch.tensor(rows, dtype=torch.float32, device=device).view(len(rows), 2 + len(rewards))
    weight = table.new_tensor([w for w, _ in rewards.values()])
    combine = COMBINE[config.multi_objective_aggregation]
    every = combine(table[:, 2:].T.contiguous(), weight, advantage, size, table[:, 1])
    if len(rows) == len(samples):  # nothing was gathered from other processes
        return every

    local = {groups.places[i // size] for i in samples}
    return every[[row[0] in local for row in rows]]
