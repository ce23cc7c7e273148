"""The token weights and importance weights (`weight` and `correction` of a batch) of an optimizer step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastrl.algorithms import Algorithm, Totals
from fastrl.algorithms.correction import Correction
from fastrl.batch.types import Batch, Tokens
from fastrl.parallel.world import World


def correct(batch: Batch, correction: Correction, logp: Tensor) -> Batch:
    """The batch with the trainer's log-probs (T,) as its old ones, and the weights that make up for the
    difference to the recorded.
    """
    rows = batch.mask.nonzero().squeeze(1)
    tokens = Tokens(
        old_logp=batch.old_logp[rows],
        advantage=batch.advantage[rows],
        weight=batch.weight[rows],
        cu_seqlens=batch.live_ends,
        live=rows.numel(),
    )
    weight = correction(tokens.with_(logp[rows], None)).correction
    assert weight is not None
    spread_out = torch.ones_like(logp).index_put((rows,), weight)
    return replace(batch, old_logp=logp, sampler_logp=batch.old_logp, correction=spread_out)


def weigh(batch: Batch, algorithm: Algorithm, world: World, *, max_length: int) -> Batch:
    """The batch with its tokens' weights: the algorithm's aggregate over the whole optimizer step, all
    processes included.
    """
    live = batch.live_ends.diff()
    tokens, samples = world.sum(float(live.sum()), float((live > 0).sum()))
    totals = Totals(tokens=int(tokens), samples=int(samples), max_length=max_length)
    per_sample = algorithm.aggregate(live.to(torch.float32), totals)
    return replace(batch, weight=torch.repeat_interleave(per_sample, batch.cu_seqlens.diff().long()))


def reweigh(batch: Batch, share: Tensor, world: World) -> Batch:
    """The batch with its tokens' weights multiplied by `share` (T,), and scaled so that they sum to what they
    did over all processes.
    """
    weight, live = batch.weight.double(), batch.mask.double()
    before, after = world.sum(float((weight * live).sum()), float((weight * share * live).sum()))
    return replace(batch, weight=(weight * share * (before / after if after else 0.0)).to(batch.weight.dtype))
