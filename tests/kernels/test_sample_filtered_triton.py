"""The floor under sample's filters in Triton, under the interpreter: the definition's to the bit, on the way
without fp64 and by what it falls back to.
"""

from __future__ import annotations

import os

import draws
import pytest
import torch

from fastrl import ops
from fastrl.kernels import sample as sample_file

kernels = pytest.importorskip(
    "fastrl.kernels._triton.sample_filtered", reason="triton is not installed", exc_type=ImportError
)
floor_file = pytest.importorskip(
    "fastrl.kernels._triton.sample_floor", reason="triton is not installed", exc_type=ImportError
)
fixed = pytest.importorskip(
    "fastrl.kernels._triton._fixed_mass", reason="triton is not installed", exc_type=ImportError
)
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set where there is no GPU"
)
mass_of, distance_of = fixed.mass, fixed.distance


@triton.jit
def mass_kernel(d, out, bits, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(out + lane, mass_of(tl.load(d + lane), bits))


@triton.jit
def distance_kernel(x, tau, out, top, N: tl.constexpr):
    lane = tl.arange(0, N)
    t = tl.load(tau + lane)
    tl.store(out + lane, distance_of(tl.load(x + lane), top, t, tl.div_rn(1.0, t)))


@triton.jit
def misleading_window(tops, masses, counts, tau, b, chunks, top_k, p, MASS, COUNT, CHUNKS):
    return tl.load(tops + b * chunks), tl.full((), -1.0, tl.float32), tl.full((), -1.5, tl.float32)


@pytest.fixture
def falls_back(monkeypatch):
    """The rows whose floor was found by the definition."""
    rows, found = [], floor_file.exact_floor

    def counted(row, *arguments):
        rows.append(row)
        return found(row, *arguments)

    monkeypatch.setattr(floor_file, "exact_floor", counted)
    return rows


def check(logits, tau=None, key=None, **filters):
    """The floor is the definition's, and the draw the best of its survivors."""
    B = logits.shape[0]
    tau = torch.ones(B) if tau is None else tau
    key = draws.keys(B) if key is None else key
    options = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    _, floor = kernels.forward(logits, *key.values(), tau, *options.values())
    want = sample_file._floor(draws.distances(logits, tau), *options.values())[:, 0]
    assert torch.equal(floor, torch.where(tau == 0, -torch.inf, want))
    with ops.use_backend("triton", "sample"):
        return draws.judge(logits, tau, key, **filters)


# --- the parts --------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [44, 59])
def test_masses_are_within_their_slack(bits):
    """Wrong: exp2 in fp32, off by 2^-22; a range reduction in one part; a shift that wraps below 2^-63."""
    d = torch.cat(
        [torch.tensor([0.0, -0.0, -1e-30, -44.0, -45.0, -1e4, -torch.inf]), -44 * torch.rand(16377)]
    )
    out = torch.empty(16384, dtype=torch.int64)
    mass_kernel[(1,)](d, out, bits, N=16384)
    exact = d.double().exp() * 2.0**bits
    assert ((out - exact.long()).abs() <= 1 + exact * 2.0**-29).all()
    assert out[0] == 2**bits and not out[4:7].any()


def test_distances_are_those_of_a_division():
    """Wrong: a product with 1 / tau; a residual of an infinite quotient, which is NaN."""
    x, tau = -30 * torch.rand(16384), torch.rand(16384) + 0.1
    x[:3] = torch.tensor([0.5, -torch.inf, -3.4e38])
    out = torch.empty(16384)
    distance_kernel[(1,)](x, tau, out, 0.5, N=16384)
    assert torch.equal(out, (x - 0.5) / tau)


def test_both_files_count_the_same_bits():
    assert all(floor_file.mass_bits(V) == sample_file.mass_bits(V) for V in (1, 7, 2**17, 151936, 2**20))


# --- the floor --------------------------------------------------------------------------------------
@pytest.mark.parametrize("filters", [*draws.FILTERS[1:5], {"top_k": 150, "top_p": 1 - 2**-53}], ids=str)
@pytest.mark.parametrize("kind", ["random", "tied", "bf16", "fp16", "banned"])
def test_the_floor_is_the_definition_s_to_the_bit(kind, filters):
    """Wrong: sums that include the tie, top_p rounded to fp32, -0 below +0, padding that is counted."""
    logits = draws.tied(3, 203) if kind == "tied" else 2 * torch.randn(3, 203)
    logits = logits.to({"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32))
    if kind == "banned":
        logits[:, ::2] = -torch.inf
    tau = torch.rand(3) + 0.5
    tau[0] = 0
    check(logits, tau, **filters)


@pytest.mark.parametrize(
    "filters, offset",
    [
        ({"top_p": 0.9}, 1000.0),
        ({"top_k": 1000, "top_p": 0.7, "min_p": 1e-4}, 0.0),
        pytest.param({"top_p": 0.9}, 0.0, marks=pytest.mark.slow),
        pytest.param({"top_k": 50}, 0.0, marks=pytest.mark.slow),
        pytest.param({"top_k": 50}, 1000.0, marks=pytest.mark.slow),
        pytest.param({"top_k": 1000, "top_p": 0.7, "min_p": 1e-4}, 1000.0, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ordinary_rows_need_no_fp64(filters, offset, falls_back):
    """Wrong: a window that misses the floor, chunks whose grids do not add up, a slack of 1e-6."""
    out = check(3 * torch.randn(2, 17000) + offset, torch.tensor([0.8, 1.3]), **filters)
    assert not falls_back and out.token.shape == (2,)


@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_k": 100}, {"top_k": 150, "top_p": 0.5}], ids=str)
@pytest.mark.parametrize("kind", ["random", "tied"])
def test_a_window_that_no_program_holds(filters, kind, monkeypatch, falls_back):
    """Wrong: a bracket whose lower end is counted, ties that never fit (all of a window have one key)."""
    for module in (kernels, floor_file):
        monkeypatch.setattr(module, "TILE", tl.constexpr(16))
    logits = draws.tied(3, 203) if kind == "tied" else 0.3 * torch.randn(3, 203)
    check(logits, torch.rand(3) + 0.5, **filters)
    assert not falls_back


# --- what it falls back to --------------------------------------------------------------------------
@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_k": 100}, {"top_k": 150, "top_p": 0.5}], ids=str)
def test_more_tokens_than_are_set_aside(filters, monkeypatch, falls_back):
    """Wrong: a list that is believed although it is cut."""
    monkeypatch.setattr(kernels, "ASIDE", 16)
    check(0.1 * torch.randn(3, 203), **filters)
    assert len(falls_back) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["equal", "uniform", "tied"])
def test_flat_rows_of_a_real_vocabulary(kind):
    logits = {
        "equal": torch.zeros(1, 151936, dtype=torch.bfloat16),
        "uniform": torch.rand(1, 151936).bfloat16(),
        "tied": draws.tied(1, 151936).bfloat16(),
    }[kind]
    check(logits, top_p=0.9)


def test_a_limit_that_is_a_sum_is_settled_by_the_definition(falls_back):
    """top_p is what the larger half holds, to a rounding: the masses' errors decide which side it lies on."""
    logits = torch.cat([torch.zeros(64), torch.full((64,), -1.0)])[torch.randperm(128)][None]
    share = 1 / (1 + torch.tensor(-1.0, dtype=torch.float64).exp().item())
    for top_p in (share, share * (1 - 1e-15), share * (1 + 1e-15)):
        check(logits, top_p=top_p)
    assert len(falls_back) >= 3


@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_p": 0.05}, {"top_k": 3}, {"top_k": 150}], ids=str)
def test_a_window_that_misleads_is_noticed(filters, monkeypatch, falls_back):
    """Wrong: believing the survey, whose sums are fp32."""
    monkeypatch.setattr(kernels, "window", misleading_window)
    check(3 * torch.randn(4, 203), **filters)
    assert falls_back
