"""The token weights and importance weights (`weight` and `correction` of a batch) of an optimizer step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastrl.algorithms import Algorithm, Totals
from fastrl.algorithms.correction import Correction
from fastrl.batch.transfer import send
from fastrl.batch.types import Batch, Tokens
from fastrl.kernels._rows import put_rows
from fastrl.parallel.world import World


def correct(batch: Batch, correction: Correction, logp: Tensor) -> Batch:
    """The batch with the trainer's log-probs (T,) as its old ones, and the weights that make up for the
    difference to the recorded.
    """
    (rows,) = send([batch.host.mask.nonzero().squeeze(1)], batch.mask.device)
    tokens = Tokens(
        old_logp=batch.old_logp[rows],
        advantage=batch.advantage[rows],
        weight=batch.weight[rows],
        cu_seqlens=batch.live_ends,
        live=rows.numel(),
    )
    weight = correction(tokens.with_(logp[rows], None)).correction
    assert weight is not None
    spread_out = torch.ones_like(logp)
    put_rows(spread_out, rows, weight)
    return replace(batch, old_logp=logp, sampler_logp=batch.old_logp, correction=spread_out)


def without_rejected(batch: Batch, world: World) -> tuple[Batch, float]:
    """The batch without the tokens whose correction is 0, and the share of tokens that these were, over all
    processes.  Before `weigh`, so that no denominator counts them.
    """
    assert batch.correction is not None
    kept = batch.mask & (batch.correction != 0)
    tokens, left = world.sum(float(batch.mask.sum()), float(kept.sum()))
    return replace(batch, mask=kept).with_known(), 1 - left / tokens if tokens else 0.0


def weigh(batch: Batch, algorithm: Algorithm, world: World, *, max_length: int) -> Batch:
    """The batch with its tokens' weights: the algorithm's aggregate over the whole optimizer step, all
    processes included.
    """
    batch = batch.with_known()
    known = batch.host.live_ends.diff()
    tokens, samples = world.sum(float(known.sum()), float((known > 0).sum()))
    totals = Totals(tokens=int(tokens), samples=int(samples), max_length=max_length)
    live = batch.live_ends.diff()
    return replace(batch, weight=batch.per_token(algorithm.aggregate(live.to(torch.float32), totals)))


def reweigh(batch: Batch, share: Tensor, world: World) -> Batch:
    """The batch with its tokens' weights multiplied by `share` (T,), and scaled so that they sum to what they
    did over all processes.
    """
    weight, live = batch.weight.double(), batch.mask.double()
    before, after = world.sum(float((weight * live).sum()), float((weight * share * live).sum()))
    return replace(batch, weight=(weight * share * (before / after if after else 0.0)).to(batch.weight.dtype))
