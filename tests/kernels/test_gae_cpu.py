"""gae's C++ kernel against a loop over time in float64, on every instruction set this processor has."""

from __future__ import annotations

import math

import pytest
import torch
from advantage_loops import gae_loop as loop
from support import within_budget

from fastrl import ops
from fastrl.kernels._backend import extension
from fastrl.kernels.gae import gae

C = extension()
pytestmark = pytest.mark.skipif(
    C is None, reason="fastrl._C is not built: pip install -e . (or python setup.py build_ext --inplace)"
)


@pytest.fixture(autouse=True)
def cpu():
    with ops.use_backend("cpu", "gae"):
        yield


def case(dtype=torch.float32, T=2000, S=40):
    ends = torch.randint(T + 1, (S - 1,)).sort().values
    cu = torch.cat([torch.tensor([0]), ends, torch.tensor([T])]).int()
    return torch.randn(T).to(dtype), torch.randn(T).to(dtype), cu, torch.rand(T) > 0.3


# --- values -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0)])
def test_values(isa, gamma, lam, masked, dtype):
    """Wrong: a carry over a sequence's end, or one that an observation discounts; sums in fp32, which drift
    over a long sequence.
    """
    reward, value, cu, mask = case(dtype)
    mask = mask if masked else torch.ones_like(mask)
    ours = gae(reward, value, cu, gamma=gamma, lam=lam, mask=mask if masked else None)
    wide = [x.to(ours.advantage.dtype) for x in (reward, value)]
    exact = loop(*(x.double() for x in wide), cu.tolist(), mask, gamma, lam)
    if dtype == torch.float64:  # the loop is the truth itself
        torch.testing.assert_close(ours.advantage, exact, atol=1e-13, rtol=1e-13)
    else:
        within_budget(ours.advantage, loop(*wide, cu.tolist(), mask, gamma, lam), exact, factor=1)
    right = torch.where(mask, exact + wide[1].double(), 0)
    assert (ours.returns - right).abs().max() <= 1e-6 * right.abs().max()


@pytest.mark.parametrize("lam", [1.0, 0.0])
def test_a_nan_stays_in_its_sequence_and_before_its_token(isa, lam):
    """Wrong: 0 * NaN, by which with lam = 0 a bad reward spoils every token before it; a masked token that is
    read.
    """
    reward, value, _, _ = case(T=90)
    cu, mask = torch.tensor([0, 30, 67, 90]), torch.ones(90, dtype=torch.bool)
    mask[40] = False
    clean, _ = gae(reward, value, cu, gamma=1.0, lam=lam, mask=mask)
    reward[50] = reward[40] = math.nan
    spoiled, _ = gae(reward, value, cu, gamma=1.0, lam=lam, mask=mask)
    bad = torch.zeros(90, dtype=torch.bool)
    bad[30 if lam else 50 : 51] = True
    bad[40] = False
    assert torch.equal(spoiled.isnan(), bad) and torch.equal(spoiled[~bad], clean[~bad])


# --- layout, threads, choice ------------------------------------------------------------------------
def test_the_same_bits_for_every_thread_count(isa):
    """Wrong: a sequence cut where a thread's share ends."""
    reward, value, cu, mask = case(T=100_000, S=300)
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(gae(reward, value, cu, gamma=0.99, lam=0.95, mask=mask))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_strided_and_chosen_by_default():
    """Wrong: a stride of 1 assumed; a kernel that is built and never runs."""
    reward, value, cu, mask = case()
    want = gae(reward, value, cu, gamma=0.9, lam=0.9, mask=mask)
    both, masks = torch.stack([reward, value], 1), torch.stack([mask, ~mask], 1)
    again = gae(both[:, 0], both[:, 1], cu.long(), gamma=0.9, lam=0.9, mask=masks[:, 0])
    assert all(torch.equal(a, b) for a, b in zip(want, again, strict=True))
    assert ops.implementations()["gae"]["cpu"] == "ready" and ops.backend("cpu")["gae"] == "cpu"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"T": -1}, "T: expected at least 0, got -1"),
        ({"S": -1}, "S: expected at least 0, got -1"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"cu_seqlens": 0}, "cu_seqlens: expected an address, got 0"),
        ({"value": 0}, "reward, value, advantage, returns: expected addresses, got 0"),
    ],
)
def test_bad_arguments_are_value_errors(changes, message):
    given = {
        "reward": 8,
        "value": 8,
        "is_double": False,
        "cu_seqlens": 8,
        "mask": 0,
        "gamma": 1.0,
        "lam": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        C.gae_cpu(*(given | {"advantage": 8, "returns": 8, "T": 3, "S": 1, "threads": 1} | changes).values())


@pytest.mark.parametrize("ends", [[0, 2, 4], [0, -1, 3], [0, 3, 1], [-1, 2, 3], [0, 2**62, 3]])
def test_ends_that_lead_outside_are_not_followed(ends):
    """Wrong: memory before or after the rewards, read and written, by a caller of the module itself."""
    cu, x = torch.tensor(ends), torch.zeros(3)
    at = x.data_ptr()
    with pytest.raises(ValueError, match=r"cu_seqlens: expected non-decreasing ends, 0 to 3, got"):
        C.gae_cpu(at, at, False, cu.data_ptr(), 0, 1.0, 1.0, at, at, 3, 2, 1)
