"""Edges of the ops that a mistake of one sign or one unit crosses: bounds that are exactly met, probabilities
that are exactly 0, budgets that are exactly full.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastrl import ops
from fastrl.kernels._backend import extension, use_backend
from fastrl.kernels._chunks import chunk_rows
from fastrl.kernels.sample import mass_bits, sample
from fastrl.kernels.surrogates import SURROGATES

CPU = torch.device("cpu")
BUILT = hasattr(extension(), "sample_forward_cpu")
BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(not BUILT, reason="no fastrl._C"))]


# --- sample -----------------------------------------------------------------------------------------
def draw(logits, sequence, backend, **filters):
    with use_backend(backend, "sample"):
        return sample(logits, seed=5, sequence=sequence, position=torch.zeros_like(sequence), **filters)


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_p_that_is_met_exactly_lets_nothing_more_in(backend):
    """Wrong implementation: `before <= limit`, which keeps the next token where the mass before it is exactly
    the limit.  64 tokens hold it to the last of 2^54 parts; 64 others are not needed.
    """
    logits = torch.cat([torch.zeros(64), torch.full((64,), -1.0)])
    unit = 2.0 ** mass_bits(128)
    less = int(torch.tensor(-1.0, dtype=torch.float64).exp() * unit)
    total, wanted = float(64 * int(unit) + 64 * less), 64 * int(unit)
    share = wanted / total
    near = [share]
    for towards in (0.0, 1.0):
        step = share
        for _ in range(8):
            step = math.nextafter(step, towards)
            near.append(step)
    exact = [p for p in near if int(p * total) == wanted]
    assert exact, "a share of the mass that is met exactly"

    rows = logits.expand(50, 128).contiguous()
    for top_p in exact:
        found = draw(rows, torch.arange(50), backend, top_p=top_p)
        torch.testing.assert_close(found.behaviour_logp, torch.full((50,), -math.log(64)))
        assert int(found.token.max()) < 64
    more = draw(rows, torch.arange(50), backend, top_p=math.nextafter(max(exact), 1.0) + 1e-12)
    torch.testing.assert_close(more.logp, more.behaviour_logp)


# sequences whose winner among equal logits comes late, and beats an early token by less than 4 in 10,000
CLOSE = (8673, 15206, 19870, 26126, 37712)


@pytest.mark.skipif(not BUILT, reason="no fastrl._C")
def test_a_race_that_is_won_by_a_hair_is_won():
    """Wrong implementation: a bound of the race that is too tight by 1e-3, so that a token which would win is
    never scored.  Frequencies cannot show it: it is one draw in ten thousand.
    """
    rows, sequence = torch.zeros(len(CLOSE), 2048), torch.tensor(CLOSE)
    expected = draw(rows, sequence, "reference").token
    assert draw(rows, sequence, "cpu").token.tolist() == expected.tolist()


# --- token_logp -------------------------------------------------------------------------------------
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_probability_that_underflows_has_no_gradient_at_all(dtype, entropy):
    """Wrong implementation: exp of a distance held at -87, 1e-38 times the slope instead of 0; a sum of
    a hundred thousand of them, or a large upstream gradient, makes it visible.
    """
    logits = torch.randn(3, 203).to(dtype)
    logits[:, 7::5] = -300.0
    logits[1, 3] = -torch.inf
    logits.requires_grad_()
    stats = ops.token_logp(logits, torch.tensor([0, 1, 2]), entropy=entropy)
    total = stats.logp.sum() + (stats.entropy.sum() if entropy else 0)
    (1e30 * total).backward()
    assert (logits.grad[:, 7::5] == 0).all() and logits.grad[1, 3] == 0
    assert (logits.grad[0, :5] != 0).all()


# --- policy_loss ------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_bound_holds_a_token_without_advantage(backend):
    """Wrong implementation: `A <= 0` in the gate of the clip: tokens without advantage counted as clipped."""
    ratio = torch.tensor([0.1, 0.5, 1.0, 2.0, 9.0])
    surrogate = SURROGATES["clip"].with_params(low=0.2, high=0.2, cap=3.0)
    for advantage, expected in ((0.0, (0, 0, 0)), (-0.0, (0, 0, 0)), (-1.0, (2, 0, 1)), (1.0, (0, 2, 0))):
        with use_backend(backend, "policy_loss"):
            columns = ratio.log(), torch.zeros(5), torch.full((5,), advantage)
            _, metrics = ops.policy_loss(*columns, token_weight=torch.ones(5), surrogate=surrogate)
        found = [5 * float(metrics[name]) for name in ("clip_low", "clip_high", "clip_cap")]
        assert found == pytest.approx(expected), advantage


# --- chunks -----------------------------------------------------------------------------------------
def test_a_chunk_is_as_large_as_its_budget_and_no_row_larger():
    """Wrong implementations: one row more than logits_bytes; one less where the budget is exactly full."""
    for rows, V, itemsize in itertools.product((1, 2, 7, 128, 129), (5, 16, 50_257), (2, 4)):
        full = rows * V * itemsize
        assert chunk_rows(V, itemsize, CPU, full) == rows
        assert chunk_rows(V, itemsize, CPU, full + V * itemsize - 1) == rows
        if rows > 1:
            assert chunk_rows(V, itemsize, CPU, full - 1) == rows - 1
    assert chunk_rows(50_257, 4, CPU, 1) == 1, "a row larger than the budget is a chunk"
