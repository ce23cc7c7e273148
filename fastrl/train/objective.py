"""What an optimizer step minimises: the protocol of an objective, and the policy loss.

An objective cuts a batch into parts that fit a token budget, turns each part into its share of the step's
loss, and merges the numbers of all parts into the step's metrics.  Objectives compose: one holds another, or
several.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fastrl import ops
from fastrl.algorithms.correction import merge_mismatch, mismatch
from fastrl.algorithms.row import LossRow, PolicyRow
from fastrl.batch.pack import micro_batches, plan
from fastrl.batch.prefix import Prefix, shared
from fastrl.batch.transfer import send
from fastrl.batch.types import Batch, Tokens, token_columns
from fastrl.kernels._rows import put_rows, spread_rows, take_rows
from fastrl.kernels.policy_loss import METRICS, merge_metrics
from fastrl.model.language import LanguageModel
from fastrl.train.source import Metrics

PartNumbers = list[list[float]]  # the numbers of every part of a step, of one process or of all
B_contra = TypeVar("B_contra", contravariant=True)
P = TypeVar("P")  # a part of a batch


class Objective(Protocol[B_contra, P]):
    """A loss over one optimizer step, in parts that fit into memory."""

    def split(self, batch: B_contra, budget: int) -> Iterable[P]:
        """The parts of a batch, each of at most `budget` tokens."""

    def loss(self, part: P) -> tuple[Tensor, Tensor]:
        """This part's share of the step's loss, differentiable; its numbers, (K,) float64, for `metrics`."""

    def metrics(self, rows: PartNumbers) -> Metrics:
        """The step's metrics, "loss" and "num_tokens" among them, from the numbers of all parts of all
        processes.
        """


@dataclass(frozen=True, slots=True)
class TokenScores:
    """One forward pass over a micro-batch of T tokens.

    loss    scalar: these tokens' share of the step's loss
    stats   (T-1,) log-prob and entropy of each predicted token, nats; 0 where the token does not count
    tokens  the predicted tokens as an algorithm sees them
    rows    (N,) int64: which of the T-1 predicted tokens count in the loss; row t predicts token t + 1
    hidden  (T-1, D), one per predicted token; or (N, D), those of `rows`, where a prompt was forwarded once
    live    (N,) int64 places in `hidden` of the predictions in `rows`; None where `hidden` is (N, D)
    """

    loss: Tensor
    stats: ops.TokenStats
    tokens: Tokens
    rows: Tensor
    hidden: Tensor
    live: Tensor | None

    @property
    def live_hidden(self) -> Tensor:
        """(N, D): the hidden states that predict the tokens of `rows`."""
        return self.hidden if self.live is None else take_rows(self.hidden, self.live)

    @property
    def live_tokens(self) -> Tokens:
        """The N tokens that count, under the policy as it is."""
        entropy = None if self.stats.entropy is None else self.stats.entropy[self.rows]
        return self.tokens[self.rows].with_(self.stats.logp[self.rows], entropy)


def score_tokens(model: LanguageModel, batch: Batch, algorithm: LossRow, temperature: float) -> TokenScores:
    """Run the model over a micro-batch and evaluate the algorithm's loss of its tokens.

    Position t predicts token t + 1: `rows` index the T-1 predictions, so entry t is of token t + 1 of the
    batch.  Nothing outside this module and `token_columns` shifts.  Prompts that neighbouring sequences share
    are forwarded once.
    """
    rows, prefix = predictions(model, batch)
    tokens = token_columns(batch, rows)

    if prefix is None:
        hidden = model(batch.tokens, batch.cu_seqlens)[:-1]
        target, live = batch.tokens[1:], rows
    else:
        hidden = prefix.hidden(model)
        target, live = batch.tokens[1:][rows], None

    def share(logp: Tensor, entropy: Tensor | None, some: Tensor) -> Tensor:
        at = some if prefix is None else rows[some]
        return algorithm.loss(tokens[at].with_(logp, entropy))

    loss, stats = ops.linear_loss(
        hidden,
        model.head_weight,
        target,
        share,
        mask=live,
        bias=model.head_bias,
        temperature=temperature,
        entropy=True,
        level=algorithm.level,
    )
    if prefix is not None:
        stats = spread(stats, rows, like=tokens.weight)
    return TokenScores(loss, stats, tokens, rows, hidden, live)


def predictions(model: LanguageModel, batch: Batch) -> tuple[Tensor, Prefix | None]:
    """The rows (N,) whose next tokens count in the loss; and, where that spares the model enough tokens, the
    batch with common prefixes taken once.

    Both are worked out on the host, and sent to the batch's device by one copy for which nobody waits.
    """
    host, device = batch.host, batch.tokens.device
    rows = host.mask[1:].nonzero().squeeze(1)
    found = shared(host) if model.supports_cache else None
    if found is not None:
        prefix, rows = found.place(rows, device)
        return rows, prefix
    (rows,) = send([rows], device)
    return rows, None


def spread(stats: ops.TokenStats, rows: Tensor, like: Tensor) -> ops.TokenStats:
    """Statistics of the tokens `rows` (N,) as vectors of the shape of `like`, 0 elsewhere."""
    logp, entropy, lse = (None if x is None else spread_rows(x, rows, len(like)) for x in stats)
    assert logp is not None and lse is not None
    return ops.TokenStats(logp, entropy, lse)


@torch.no_grad()
def batch_logp(model: LanguageModel, batch: Batch, *, micro_tokens: int, temperature: float) -> Tensor:
    """(T,) log-probs of the batch's loss tokens under `model`, nats; 0 elsewhere."""
    out = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
    batch = batch.with_known()
    for samples in plan(batch.host.cu_seqlens.diff().tolist(), micro_tokens):
        micro = batch.select(samples)
        rows, prefix = predictions(model, micro)

        if prefix is None:
            hidden = model(micro.tokens, micro.cu_seqlens)[rows]
        else:
            hidden = prefix.hidden(model)

        stats = ops.linear_logp(
            hidden,
            model.head_weight,
            micro.tokens[rows + 1],
            bias=model.head_bias,
            temperature=temperature,
        )
        (places,) = send([batch.host.rows(samples)], out.device)
        put_rows(out, places[rows + 1], stats.logp.float())
    return out


@dataclass(frozen=True, slots=True)
class PolicyObjective:
    """The loss of an algorithm over packed tokens, and what ops.policy_loss reports of them."""

    model: LanguageModel
    algorithm: PolicyRow
    temperature: float = 1.0

    def split(self, batch: Batch, budget: int) -> Iterable[Batch]:
        """Micro-batches of whole sequences."""
        return micro_batches(batch, budget)

    def loss(self, part: Batch) -> tuple[Tensor, Tensor]:
        """The micro-batch's share of the loss, and its numbers."""
        scored = self.score(part)
        return scored.loss, self.measure(scored.loss, scored.live_tokens)

    def score(self, part: Batch) -> TokenScores:
        """A forward pass over a micro-batch."""
        return score_tokens(self.model, part, self.algorithm, self.temperature)

    @torch.no_grad()
    def measure(self, loss: Tensor, tokens: Tokens) -> Tensor:
        """The loss, METRICS and the mismatch of sampler and trainer, float64."""
        measured = self.algorithm.metrics(tokens)
        numbers = torch.stack([loss.detach(), *(measured[name] for name in METRICS)])
        return torch.cat([numbers.double(), mismatch(self.algorithm.corrected(tokens))])

    def metrics(self, rows: PartNumbers) -> Metrics:
        """The step's metrics; for a step without loss tokens only "loss" and "num_tokens"."""
        return merge_policy(rows)


def merge_policy(rows: Sequence[Sequence[float]]) -> Metrics:
    """The step's metrics from what `PolicyObjective.measure` returned for every part of every process."""
    tokens = 1 + METRICS.index("tokens")
    if not any(row[tokens] for row in rows):  # a ratio of 0 would look like a result
        return {"loss": math.fsum(row[0] for row in rows), "num_tokens": 0.0}

    table = torch.tensor(rows, dtype=torch.float64)
    policy, drift = table[:, 1 : 1 + len(METRICS)], table[:, 1 + len(METRICS) :]
    each = [dict(zip(METRICS, row.unbind(), strict=True)) for row in policy]

    merged = {name: float(value) for name, value in merge_metrics(each).items()} | merge_mismatch(drift)
    clipped = merged["clip_low"] + merged["clip_high"] + merged["clip_cap"]
    total = {"loss": float(table[:, 0].sum()), "num_tokens": merged["tokens"]}
    return merged | total | {"clip_region": clipped}
