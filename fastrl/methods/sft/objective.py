"""The losses of supervised fine-tuning that reach past a token's log-prob: label smoothing, z-loss, and noise
on the embeddings.

Label smoothing and z-loss are functions of all logits of a row, so their rows go through
`ops.linear_cross_entropy`.  With noise alone the loss is the plain one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl import ops
from fastrl.batch.transfer import send
from fastrl.batch.types import Batch, Tokens, token_columns
from fastrl.methods.sft.options import SupervisedAlgorithm
from fastrl.train.objective import PartNumbers, PolicyObjective, TokenScores, spread
from fastrl.train.source import Metrics


@dataclass(frozen=True, slots=True)
class SupervisedObjective:
    """The supervised loss with the algorithm's options; its metrics are the plain loss's."""

    policy: PolicyObjective
    algorithm: SupervisedAlgorithm

    def split(self, batch: Batch, budget: int) -> Iterable[Batch]:
        """Micro-batches of whole sequences."""
        return self.policy.split(batch, budget)

    def loss(self, part: Batch) -> tuple[Tensor, Tensor]:
        """The micro-batch's share of the loss, smoothing and z-loss included, and its numbers."""
        scored = self.score(part)
        return scored.loss, self.policy.measure(scored.loss, scored.live_tokens)

    def metrics(self, rows: PartNumbers) -> Metrics:
        """The step's metrics."""
        return self.policy.metrics(rows)

    def score(self, part: Batch) -> TokenScores:
        """A forward pass; the loss holds the smoothing and the z-loss, the statistics do not."""
        model = self.policy.model
        (rows,) = send([part.host.mask[1:].nonzero().squeeze(1)], part.tokens.device)
        embeds = self._noisy_embeddings(part) if self.algorithm.neftune_alpha else None
        hidden = model(part.tokens, part.cu_seqlens, embeds=embeds)[:-1]

        smoothed = self.algorithm.label_smoothing or self.algorithm.z_loss
        score = self._cross_entropy if smoothed else self._likelihood
        loss, stats, tokens = score(hidden, part, rows)
        return TokenScores(loss, stats, tokens, rows, hidden, rows)

    def _likelihood(self, hidden: Tensor, part: Batch, rows: Tensor) -> tuple[Tensor, ops.TokenStats, Tokens]:
        """The plain loss of the tokens `rows`."""
        tokens = token_columns(part, rows)

        def share(logp: Tensor, entropy: Tensor | None, some: Tensor) -> Tensor:
            return self.policy.algorithm.loss(tokens[some].with_(logp, entropy))

        model = self.policy.model
        loss, stats = ops.linear_loss(
            hidden,
            model.head_weight,
            part.tokens[1:],
            share,
            mask=rows,
            bias=model.head_bias,
            temperature=self.policy.temperature,
            entropy=True,
        )
        return loss, stats, tokens

    def _cross_entropy(
        self, hidden: Tensor, part: Batch, rows: Tensor
    ) -> tuple[Tensor, ops.TokenStats, Tokens]:
        """The smoothed loss of the tokens `rows`, and the plain statistics beside it."""
        model, target, tokens = self.policy.model, part.tokens[1:], token_columns(part, rows)
        each = ops.linear_cross_entropy(
            hidden,
            model.head_weight,
            target,
            mask=rows,
            bias=model.head_bias,
            reduction="none",
            label_smoothing=self.algorithm.label_smoothing,
            z_loss=self.algorithm.z_loss,
        )

        with torch.no_grad():
            live = hidden[rows], model.head_weight, target[rows]
            stats = ops.linear_logp(*live, bias=model.head_bias, entropy=True)
        return (each * tokens.weight).sum(), spread(stats, rows, like=target), tokens

    def _noisy_embeddings(self, part: Batch) -> Tensor:
        """(T, D) embeddings with noise that any cut into micro-batches gives a sequence alike."""
        if part.number is None:
            raise ValueError("number: expected a key of each sequence's noise, got None; NEFTune draws by it")
        x = self.policy.model.embed(part.tokens)

        host = part.host
        assert host.number is not None
        lengths = host.cu_seqlens.diff().tolist()
        keys = host.number[host.cu_seqlens[:-1].long()].tolist()
        noise = [
            neftune_noise(length, x.shape[1], self.algorithm.neftune_alpha, key, x.device)
            for length, key in zip(lengths, keys, strict=True)
        ]
        return x + torch.cat(noise).to(x.dtype)


def noise_key(*parts: int) -> int:
    """One key in [0, 2^63) from several numbers: of NEFTune's noise, from seed, step and place in it."""
    key = 0
    for part in parts:
        key = (key * 1_000_003 + part) % 2**63
    return key


def neftune_noise(length: int, width: int, alpha: float, key: int, device: torch.device) -> Tensor:
    """(L, D) fp32, uniform in +-alpha / sqrt(L D) for a sequence of L tokens: a function of `key` on one kind
    of device.

    Source:  Jain et al. 2023 (2310.05914); L counts real tokens, the prompt's included.
    """
    generator = torch.Generator(device).manual_seed(key)
    bound = alpha / math.sqrt(max(length * width, 1))
    return torch.rand(length, width, generator=generator, device=device).mul_(2 * bound).sub_(bound)
