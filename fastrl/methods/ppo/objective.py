"""PPO's losses: the policy's, with a value head's beside it where the two share an optimizer, and the
critic's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastrl.algorithms.ppo import VALUE_SUMS, ActorCriticAlgorithm, value_loss
from fastrl.batch.pack import micro_batches, plan
from fastrl.batch.transfer import send
from fastrl.batch.types import Batch
from fastrl.kernels._rows import put_rows, take_rows
from fastrl.model.critic import Critic, ValueHead
from fastrl.report.metric import ratios
from fastrl.report.metrics import CRITIC_METRICS
from fastrl.train.objective import PartNumbers, PolicyObjective
from fastrl.train.source import Metrics


@dataclass(frozen=True, slots=True)
class ActorCriticBatch:
    """One optimizer step's tokens, and the weight of the KL in its policy loss, which is adapted from step to
    step.
    """

    tokens: Batch
    kl_coef: float


@dataclass(frozen=True, slots=True)
class Values:
    """A critic's values of a batch, in the reward's unit.

    before  (T,) before each token that counts, 0 elsewhere
    last    (S,) after the last token
    """

    before: Tensor
    last: Tensor


@torch.no_grad()
def values_of(after: Callable[[Batch], Tensor], batch: Batch, micro_tokens: int) -> Values:
    """The values of a batch, from `after(micro-batch)` -> (T,) values after each of its tokens."""
    before = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
    last = torch.zeros(len(batch), device=before.device)
    batch = batch.with_known()
    for samples in plan(batch.host.cu_seqlens.diff().tolist(), micro_tokens):
        micro = batch.select(samples)
        value = after(micro)
        before, last = before.to(value.dtype), last.to(value.dtype)

        live = micro.host.mask.nonzero().squeeze(1)
        places = batch.host.rows(samples)[live]
        rows, places, sequences = send([live, places, torch.tensor(samples)], before.device)
        put_rows(before, places, value[rows - 1])
        put_rows(last, sequences, value[micro.cu_seqlens[1:].long() - 1])
    return Values(before, last)


@dataclass(frozen=True, slots=True)
class HeadedPolicy:
    """The policy loss, and `vf_coef` times the loss of a value head on the policy's hidden states.

    head          None where the critic is a model of its own
    moves_policy  whether the head's loss trains the policy's weights too
    """

    policy: PolicyObjective
    algorithm: ActorCriticAlgorithm
    head: ValueHead | None = None
    moves_policy: bool = False

    def split(self, batch: ActorCriticBatch, budget: int) -> Iterator[ActorCriticBatch]:
        """Micro-batches of whole sequences."""
        for micro in micro_batches(batch.tokens, budget):
            yield ActorCriticBatch(micro, batch.kl_coef)

    def loss(self, part: ActorCriticBatch) -> tuple[Tensor, Tensor]:
        """The micro-batch's share of the loss; the policy's numbers, then VALUE_SUMS of a head."""
        weighed = replace(self.algorithm.policy, kl_coef=part.kl_coef)
        policy = replace(self.policy, algorithm=weighed)
        scored = policy.score(part.tokens)
        if self.head is None:
            return scored.loss, policy.measure(scored.loss, scored.live_tokens)

        hidden = scored.live_hidden if self.moves_policy else scored.live_hidden.detach()
        value, sums = _value_loss(self.head(hidden), part.tokens, scored.rows + 1, self.algorithm)
        loss = scored.loss + self.algorithm.vf_coef * value
        return loss, torch.cat([policy.measure(loss, scored.live_tokens), sums])

    def metrics(self, rows: PartNumbers) -> Metrics:
        """The step's metrics, the head's among them."""
        if self.head is None:
            metrics = self.policy.metrics(rows)
            return metrics | {"policy_loss": metrics["loss"]}

        count = len(VALUE_SUMS)
        metrics = self.policy.metrics([row[:-count] for row in rows])
        value = merge_values([row[-count:] for row in rows])
        alone = metrics["loss"] - self.algorithm.vf_coef * value["vf_loss"]
        return metrics | named(value) | {"policy_loss": alone}


@dataclass(frozen=True, slots=True)
class ValueObjective:
    """The value loss of a critic of its own."""

    critic: Critic
    algorithm: ActorCriticAlgorithm

    def split(self, batch: Batch, budget: int) -> Iterator[Batch]:
        """Micro-batches of whole sequences."""
        return micro_batches(batch, budget)

    def loss(self, part: Batch) -> tuple[Tensor, Tensor]:
        """The micro-batch's share of the loss, and VALUE_SUMS."""
        live = part.host.mask.nonzero().squeeze(1)
        (rows,) = send([live], part.tokens.device)
        value = take_rows(self.critic(part.tokens, part.cu_seqlens), rows - 1)
        return _value_loss(value, part, rows, self.algorithm)

    def metrics(self, rows: PartNumbers) -> Metrics:
        """The step's metrics."""
        merged = merge_values(rows)
        return merged | {"loss": merged["vf_loss"]}


def _value_loss(
    value: Tensor, batch: Batch, rows: Tensor, algorithm: ActorCriticAlgorithm
) -> tuple[Tensor, Tensor]:
    """The value loss of the tokens `rows`, whose values are given, and its VALUE_SUMS."""
    if batch.value is None or batch.returns is None:
        raise ValueError("value, returns: expected (T,) each, got None; PPO's batches have them")
    columns = batch.value[rows], batch.returns[rows], batch.weight[rows]
    return value_loss(value, *columns, algorithm.value_clip)


def merge_values(rows: PartNumbers) -> Metrics:
    """The step's metrics from the VALUE_SUMS of every micro-batch of every process."""
    columns = list(zip(*rows, strict=True)) or [(0.0,)] * len(VALUE_SUMS)
    sums = dict(zip(VALUE_SUMS, map(sum, columns), strict=True))
    return {"vf_loss": sums["loss"], "num_tokens": sums["tokens"]} | ratios(CRITIC_METRICS, sums)


def named(metrics: Metrics) -> Metrics:
    """Those of CRITIC_METRICS, under the learner's keys."""
    keys = [row.key for row in CRITIC_METRICS if row.key is not None]
    return {key: metrics[key] for key in keys if key in metrics}
