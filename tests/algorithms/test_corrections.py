"""Corrections of the sampler against the trainer: their bounds, and what counts of the tokens they reject."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from configs import configured
from runs import decoder, on_policy

from fastrl.algorithms import Algorithm
from fastrl.algorithms.correction import CORRECTIONS, Correction, merge_mismatch, mismatch
from fastrl.algorithms.presets import DROPS, SEMANTICS
from fastrl.batch.types import Batch, Tokens
from fastrl.config import Grpo
from fastrl.errors import UserError
from fastrl.methods.grpo.options import choose_algorithm
from fastrl.parallel.world import World
from fastrl.train.weighting import correct, weigh, without_rejected

MASKS = ("token_mask", "sequence_mask", "geometric_mask")
LENGTHS = (10, 14, 14)
ENDS = torch.tensor([0, 10, 24, 38], dtype=torch.int32)
ADVANTAGE = torch.tensor([0.7, -1.2, 0.5])


# --- bounds -----------------------------------------------------------------------------------------
def weights(correction: Correction, ratios: list[float], lengths: list[int]) -> list[float]:
    """The correction's weights of tokens whose trainer-to-sampler ratios these are."""
    n = len(ratios)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tokens = Tokens(
        old_logp=torch.zeros(n, dtype=torch.float64),
        advantage=torch.ones(n),
        weight=torch.ones(n),
        cu_seqlens=ends,
        live=n,
        logp=torch.tensor(ratios, dtype=torch.float64).log(),
    )
    found = correction(tokens).correction
    assert found is not None
    return found.tolist()


@pytest.mark.parametrize("name", ["token_mask", "sequence_mask", "geometric_mask"])
def test_both_bounds_of_a_mask_are_inside(name):
    """Wrong implementations: w < high, low < w.  A ratio of 1 is exactly both bounds in turn."""
    correction = CORRECTIONS[name]
    assert weights(replace(correction, low=0.5, high=1.0), [1.0, 1.0], [2]) == [1.0, 1.0]
    assert weights(replace(correction, low=1.0, high=2.0), [1.0, 1.0], [2]) == [1.0, 1.0]
    assert weights(replace(correction, low=0.5, high=0.75), [1.0, 1.0], [2]) == [0.0, 0.0]


def test_a_kept_sequences_tokens_are_truncated_at_2():
    """Wrong implementation: geometric_mask without the cap of 2 on each token's own weight."""
    mask = replace(CORRECTIONS["geometric_mask"], low=0.9, high=1.1)
    found = weights(mask, [4.0, 0.25, 1.0, 4.0, 4.0], [3, 2])
    assert found == pytest.approx([2.0, 0.25, 1.0, 0.0, 0.0])


# --- what counts ------------------------------------------------------------------------------------
def batch_of(drift: torch.Tensor) -> tuple[Batch, torch.Tensor]:
    """38 tokens of three sequences, and the trainer's log-probs of them."""
    draw = torch.Generator().manual_seed(0)
    trainer = -2 * torch.rand(38, generator=draw)
    sequence = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    batch = Batch(
        tokens=torch.zeros(38, dtype=torch.int64),
        cu_seqlens=ENDS,
        mask=torch.arange(38) > 0,
        advantage=ADVANTAGE[sequence],
        old_logp=trainer - drift,
        weight=torch.zeros(38),
    )
    return replace(batch, mask=torch.ones(38, dtype=torch.bool)), trainer


def loss_of(semantics: str, name: str, algorithm: str, drift: torch.Tensor, logp: torch.Tensor) -> float:
    """The step's loss as a run has it."""
    row = chosen(semantics, name, algorithm)
    batch, trainer = batch_of(drift)
    assert row.correction is not None
    batch = correct(batch, row.correction, trainer)
    if row.correction.drops:
        batch, _ = without_rejected(batch, World())
    batch = weigh(batch, row, World(), max_length=16)

    rows = batch.mask.nonzero().squeeze(1)
    names = ("old_logp", "advantage", "weight", "correction", "sampler_logp")
    columns = {column: getattr(batch, column)[rows] for column in names}
    tokens = Tokens(**columns, cu_seqlens=batch.live_ends, live=len(rows))
    return float(row.loss(tokens.with_(logp[rows], None)))


def chosen(semantics: str, name: str, algorithm: str = "grpo") -> Algorithm:
    options = {"correction": name, "correction_min": 0.9, "correction_max": 1.1}
    return choose_algorithm(configured(Grpo, model="m", algorithm=algorithm, semantics=semantics, **options))


def restated(name: str, drift: torch.Tensor, logp: torch.Tensor, mode: str, *, counts_all: bool) -> float:
    """Dual clip on tokens times min(w, 2) or w, averaged over what is kept (verl's rollout_rs changes the
    response mask, which `agg_loss` averages over) or over all tokens.
    """
    trainer = batch_of(drift)[1]
    loss, kept, sequences = [], [], []
    for i, (start, end) in enumerate(zip(ENDS[:-1].tolist(), ENDS[1:].tolist(), strict=True)):
        d, a = drift[start:end], float(ADVANTAGE[i])
        level = {"token_mask": d, "sequence_mask": d.sum().expand_as(d)}.get(name, d.mean().expand_as(d))
        inside = (level.exp() >= 0.9) & (level.exp() <= 1.1)
        w = d.exp().clamp(max=2.0) if name == "geometric_mask" else level.exp()
        r = (logp - trainer)[start:end].exp()
        clipped = torch.maximum(-a * r, -a * r.clamp(0.8, 1.2))
        clipped = torch.minimum(clipped, torch.tensor(-a * 3.0)) if a < 0 else clipped
        x = torch.where(inside, w * clipped, 0)
        count = len(d) if counts_all else int(inside.sum())
        loss.append(float(x.sum()))
        kept.append(count)
        sequences.append(float(x.sum()) / max(count, 1))
    if mode == "tokens":
        return sum(loss) / max(sum(kept), 1)
    return sum(sequences) / max(sum(k > 0 for k in kept), 1)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("semantics", ["verl", "paper", "nemo", "trl"])
def test_rejected_tokens_count_where_they_do_in_the_other_trainer(semantics, name):
    """Wrong implementation: one rule for all: verl averages over what it keeps (14 of these 38 tokens, under
    geometric_mask), the others multiply by 0 and count everything.
    """
    draw = torch.Generator().manual_seed(1)
    drift = 0.05 * torch.randn(38, generator=draw) + torch.repeat_interleave(
        torch.tensor([0.2, 0.0, -0.2]), torch.tensor(LENGTHS)
    )
    if name == "sequence_mask":
        drift = drift - torch.where(torch.arange(38) == 10, drift[10:24].sum(), 0.0)
    logp = batch_of(drift)[1] + 0.3 * torch.randn(38, generator=draw)

    verl = semantics == "verl"
    by_token = verl or semantics == "nemo"
    expected = restated(name, drift, logp, "tokens" if by_token else "sequences", counts_all=not verl)
    if not verl:  # their clip has no cap on negative advantages; no ratio here is beyond verl's
        assert float((logp - batch_of(drift)[1]).exp().max()) < 3
    assert loss_of(semantics, name, "grpo", drift, logp) == pytest.approx(expected, rel=1e-5)
    if name == "geometric_mask" and verl:
        everything = restated(name, drift, logp, "tokens", counts_all=True)
        assert everything / expected == pytest.approx(14 / 38)


@pytest.mark.parametrize("semantics", ["paper", *SEMANTICS])
def test_only_masks_drop_and_only_where_the_trainer_does(semantics):
    """Wrong implementations: truncated weights that cost a forward pass; a preset that is not asked."""
    for name in CORRECTIONS:
        row = chosen(semantics, name)
        assert row.correction is not None
        assert row.correction.drops == (semantics in DROPS and name in MASKS), name


def test_a_step_without_any_kept_token_has_no_gradient_and_no_nan():
    drift = torch.full((38,), 0.5)
    assert loss_of("verl", "geometric_mask", "grpo", drift, batch_of(drift)[1]) == 0.0


def test_a_run_drops_what_its_one_update_rejects():
    """Wrong implementation: the correction left to the only update's own forward pass, whose denominators are
    fixed by then.
    """
    row = chosen("verl", "token_mask", "dapo")
    source = on_policy(decoder(), algorithm=row, trainer=lambda batch: batch.old_logp)
    whole = source.collect(0, 0)
    assert whole.metrics["sampler/rejected"] == 0.0

    shifted = on_policy(decoder(), algorithm=row, trainer=lambda batch: batch.old_logp + 0.5).collect(0, 0)
    assert shifted.metrics["sampler/rejected"] == 1.0
    assert sum(int(batch.mask.sum()) for batch in shifted.batches) == 0
    assert not math.isnan(float(sum(batch.weight.sum() for batch in shifted.batches)))


def test_bounds_that_are_none_are_refused():
    with pytest.raises(UserError, match="--correction-min, --correction-max: expected 0 <= min < max"):
        replace(CORRECTIONS["token_mask"], low=2.0, high=1.0)


def test_the_logged_kl_is_estimated_on_the_samplers_tokens():
    """k3 of KL(sampler || trainer).  Wrong implementation: exp(-s) - 1 + s, which is that of another KL."""
    zeros = torch.zeros(2)
    tokens = Tokens(old_logp=torch.tensor([-1.5, -1.0]), advantage=zeros, weight=zeros, live=2)
    found = merge_mismatch(mismatch(tokens.with_(torch.tensor([-1.0, -2.0]), None))[None])
    expected = (math.exp(0.5) - 1 - 0.5 + math.exp(-1) - 1 + 1) / 2
    assert found["sampler_kl"] == pytest.approx(expected, rel=1e-6)
