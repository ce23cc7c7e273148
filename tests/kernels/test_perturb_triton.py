"""The Triton kernels of perturb under the interpreter; what each check catches is said in
tests/helpers/perturbations.py.
"""

from __future__ import annotations

import perturbations as p
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
import triton
import triton.language as tl

from fastrl.kernels._philox import philox
from fastrl.kernels._triton import _tiles as tiles
from fastrl.kernels._triton import perturb_l1, perturb_step, perturb_token
from fastrl.kernels._triton._philox import philox4

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has these on a GPU")
BACKEND = "triton"
balls = pytest.mark.parametrize(("norm", "scope"), p.BALLS)
# l1 takes 20 launches
cheap = pytest.mark.parametrize(("norm", "scope"), [b for b in p.BALLS if b[0] != "l1" or b[1] == "token"])
most = pytest.mark.parametrize(("norm", "scope"), [b for b in p.BALLS if b != ("l1", "batch")])
scopes = pytest.mark.parametrize("scope", p.SCOPES)


@pytest.mark.parametrize(
    ("D", "dtype"), [(1, torch.float32), (37, torch.bfloat16), (1500, torch.float16)], ids=str
)
@cheap
def test_values(norm, scope, D, dtype):
    """Wrong: a tail of a row or of a ball that is dropped, 0 * NaN of masked tokens, an embedding added
    before the projection.
    """
    p.check_values(BACKEND, norm, scope, D, dtype)


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_values_of_l1_balls(scope):
    """Wrong: a row's columns beyond the first block that are left out of a pass; ties counted per tile."""
    p.check_values(BACKEND, "l1", scope, 37, torch.bfloat16)
    x = 0.1 * torch.randn(9, 1100)
    p.judge(BACKEND, x * 1e25, 1e30 * torch.randn(9, 1100), **p.given("l1", scope))
    ties = p.step(BACKEND, 0 * x, torch.ones(9, 1100), **p.given("l1", "batch", radius=1.0))
    torch.testing.assert_close(ties, torch.full((9, 1100), 0.3 / 9900))


@pytest.mark.parametrize(("norm", "scope"), list(p.GOLDEN))
def test_golden(norm, scope):
    p.check_golden(BACKEND, norm, scope)


@cheap
def test_magnitudes(norm, scope):
    """Wrong: squares in fp32 alone, by which a large gradient counts as not finite, or a step that is less
    than fp32 can hold.
    """
    p.check_magnitudes(BACKEND, norm, scope)


@most
def test_nothing_to_do(norm, scope):
    p.check_nothing(BACKEND, norm, scope)


@cheap
def test_layouts(norm, scope):
    """Wrong: a row stride taken to be D, a copy that is updated instead of the argument."""
    p.check_layouts(BACKEND, norm, scope)


@scopes
def test_l1_close_magnitudes(scope):
    p.check_close_magnitudes(BACKEND, scope, (0.02,))


@pytest.mark.parametrize("radius", [1e-3, 3.0])
@scopes
def test_l1_spread_magnitudes(scope, radius):
    p.check_spread_magnitudes(BACKEND, scope, radius)


@balls
def test_start(norm, scope):
    p.check_start(BACKEND, norm, scope)


@pytest.mark.parametrize("norm", p.NORMS)
def test_tokens_too_long_for_registers(norm, monkeypatch):
    """Wrong: the kernels of larger balls taking a token's ball, or linf's, to be a sequence."""
    monkeypatch.setitem(perturb_token.MAX_ROW_IN_REGISTERS, norm, 64)
    grad = torch.randn(5, 70)
    grad[3, 9] = torch.nan
    p.judge(BACKEND, 0.1 * torch.randn(5, 70), grad, **p.given(norm, "token", mask=torch.arange(5) != 1))


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_many_tiles_and_many_balls(norm, monkeypatch):
    """Wrong: sums of a ball's first tiles only; a search among the first sequences only."""
    for module, name in (
        (tiles, "TILES_AT_ONCE"),
        (tiles, "BALLS_AT_ONCE"),
        (perturb_l1, "TILES_AT_ONCE"),
    ):
        monkeypatch.setattr(module, name, tl.constexpr(2))
    monkeypatch.setattr(perturb_l1, "PROBED_AT_ONCE", 2)
    for module in (perturb_step, perturb_l1):
        monkeypatch.setattr(module, "TILE", 16)
    x, g = 0.1 * torch.randn(9, 16), torch.randn(9, 16)
    cu = torch.tensor([0, 1, 2, 2, 2, 6, 6, 9], dtype=torch.int32)
    p.judge(BACKEND, x, g, **p.given(norm, "sequence", cu_seqlens=cu))


def test_a_ball_owns_enough_tiles():
    """Every token in one tile of its own ball, whatever the lengths: wrong with tiles that cross from ball to
    ball.
    """
    generator = torch.Generator().manual_seed(0)
    for R in (1, 2, 8):
        lengths = torch.randint(0, 20, (30,), generator=generator)
        cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        own = [*(cu[:-1] // R + torch.arange(30)).tolist(), int(cu[-1]) // R + 30]
        assert tiles.Tiles.over(int(cu[-1]), 30, 0, cu, R).programs == own[-1]
        assert all((own[u + 1] - own[u]) * R >= int(lengths[u]) for u in range(30))


@cheap
def test_two_runs_give_the_same_bits(norm, scope):
    x, g = 0.1 * torch.randn(9, 40), torch.randn(9, 40)
    assert torch.equal(*(p.step(BACKEND, x, g, **p.given(norm, scope)) for _ in range(2)))


# --- Philox -----------------------------------------------------------------------------------------
@triton.jit
def words_kernel(counter, key, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b, c, d = philox4(
        tl.load(counter + i),
        tl.load(counter + N + i),
        tl.load(counter + 2 * N + i),
        tl.load(counter + 3 * N + i),
        tl.load(key),
        tl.load(key + 1),
    )
    tl.store(out + i, a.to(tl.int64))
    tl.store(out + N + i, b.to(tl.int64))
    tl.store(out + 2 * N + i, c.to(tl.int64))
    tl.store(out + 3 * N + i, d.to(tl.int64))


def test_philox_words_are_the_references():
    """Wrong: a signed high product, a key that is not raised;
    the first counter is Random123's known answer.
    """
    counter, key = torch.randint(2**32, (4, 64)), torch.randint(2**32, (2,))
    counter[:, 1] = 2**32 - 1
    out = torch.empty(4, 64, dtype=torch.int64)
    words_kernel[(1,)](counter, key, out, 64)
    assert torch.equal(out, torch.stack(philox(tuple(counter), (int(key[0]), int(key[1])))))
    words_kernel[(1,)](0 * counter, 0 * key, out, 64)
    assert out[:, 0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
