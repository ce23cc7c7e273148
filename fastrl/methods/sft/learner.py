"""The options of supervised fine-tuning that reach past a token's log-prob: label smoothing, z-loss, and
noise on the embeddings.

Label smoothing and z-loss are about all logits of a row, so that their rows go through
`ops.linear_cross_entropy`; noise alone leaves the loss what it is, and every other run is the plain
learner's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastrl import ops
from fastrl.algorithms.row import PolicyRow
from fastrl.batch.types import Batch, Tokens
from fastrl.methods.sft.options import SupervisedAlgorithm
from fastrl.train.learner import Learner, token_columns


class SupervisedLearner(Learner):
    """The learner of `fastrl sft`."""

    step = 0

    def update(self, batch: Batch, step: int) -> dict[str, float]:
        self.step = step
        return super().update(batch, step)

    def forward(
        self, batch: Batch, algorithm: PolicyRow | None = None
    ) -> tuple[Tensor, ops.TokenStats, Tokens, Tensor]:
        """As the plain learner's; the loss holds the smoothing and the z-loss, the statistics do not."""
        row = algorithm or self.algorithm
        if not isinstance(row, SupervisedAlgorithm) or not (
            row.label_smoothing or row.z_loss or row.neftune_alpha
        ):
            return super().forward(batch, algorithm)
        rows = batch.mask[1:].nonzero().squeeze(1)
        tokens, target, model = token_columns(batch, rows), batch.tokens[1:], self.model
        hidden = model(
            batch.tokens, batch.cu_seqlens, embeds=self._embeds(batch, row) if row.neftune_alpha else None
        )[:-1]
        if not (row.label_smoothing or row.z_loss):

            def share(logp: Tensor, entropy: Tensor | None, some: Tensor) -> Tensor:
                return row.loss(tokens[some].with_(logp, entropy))

            loss, stats = ops.linear_loss(
                hidden,
                model.head_weight,
                target,
                share,
                mask=rows,
                bias=model.head_bias,
                temperature=self.temperature,
                entropy=True,
            )
            return loss, stats, tokens, rows
        each = ops.linear_cross_entropy(
            hidden,
            model.head_weight,
            target,
            mask=rows,
            bias=model.head_bias,
            reduction="none",
            label_smoothing=row.label_smoothing,
            z_loss=row.z_loss,
        )
        with torch.no_grad():
            seen = ops.linear_logp(
                hidden[rows], model.head_weight, target[rows], bias=model.head_bias, entropy=True
            )
            blank = torch.zeros(target.shape, dtype=seen.logp.dtype, device=target.device)
            spread: list[Any] = [None if x is None else blank.index_copy(0, rows, x) for x in seen]
        return (each * tokens.weight).sum(), ops.TokenStats(*spread), tokens, rows

    def _embeds(self, batch: Batch, row: SupervisedAlgorithm) -> Tensor:
        """(T, D) embeddings with noise, which depends on seed, step and the sequence's place in the step: any
        micro-batch has the same.
        """
        embed = self.model.embed if hasattr(self.model, "embed") else self.model.lm.get_input_embeddings()
        x: Tensor = embed(batch.tokens)
        if batch.number is None:
            raise ValueError(
                "number: expected each sequence's place in the step, got None; NEFTune's noise is keyed by it"
            )
        lengths, places = (
            batch.cu_seqlens.diff().tolist(),
            batch.number[batch.cu_seqlens[:-1].long()].tolist(),
        )
        noise = [
            neftune_noise(length, x.shape[1], row.neftune_alpha, (row.seed, self.step, place), x.device)
            for length, place in zip(lengths, places, strict=True)
        ]
        return x + torch.cat(noise).to(x.dtype)


def neftune_noise(
    length: int, width: int, alpha: float, key: tuple[int, int, int], device: torch.device
) -> Tensor:
    """(L, D) fp32, uniform in +-alpha / sqrt(L D) for a sequence of L tokens, a function of `key` on one kind
    of device.

    Source:  Jain et al. 2023 (2310.05914); L counts real tokens, prompt included.
    """
    number = 0
    for part in key:
        number = (number * 1_000_003 + part) % 2**63
    generator = torch.Generator(device).manual_seed(number)
    bound = alpha / math.sqrt(max(length * width, 1))
    return torch.rand(length, width, generator=generator, device=device).mul_(2 * bound).sub_(bound)
