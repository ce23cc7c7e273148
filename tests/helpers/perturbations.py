"""Cases of perturb_step and perturb_init that every implementation is put through, judged against float64."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from support import within_budget
from torch import Tensor

from fastrl.kernels._backend import use_backend
from fastrl.kernels.perturb import NORMS, SCOPES, perturb_init, perturb_step

BALLS = list(product(NORMS, SCOPES))
CU = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
RADIUS = {"l2": 0.5, "linf": 0.2, "l1": 2.0}
GOLDEN = {  # g = [[3, 4], [0, 1], [5, 0]], of which the last token is masked; step and radius 0.5, from 0
    ("l2", "sequence"): [[0.294174, 0.392232], [0, 0.098058], [0, 0]],
    ("l2", "batch"): [[0.294174, 0.392232], [0, 0.098058], [0, 0]],
    ("l2", "token"): [[0.3, 0.4], [0, 0.5], [0, 0]],
    ("linf", "token"): [[0.5, 0.5], [0, 0.5], [0, 0]],
    ("l1", "token"): [[0, 0.5], [0, 0.5], [0, 0]],
    ("l1", "sequence"): [[0, 0.5], [0, 0], [0, 0]],
}


def given(norm: str, scope: str, **changes: Any) -> dict[str, Any]:
    ends = {"cu_seqlens": CU} if scope == "sequence" else {}
    return {"step_size": 0.3, "radius": RADIUS[norm], "norm": norm, "scope": scope, **ends, **changes}


def step(backend: str, delta: Tensor, grad: Tensor, **how: Any) -> Tensor:
    """The result beside an untouched `delta`."""
    with use_backend(backend, "perturb_step"):
        return perturb_step(delta.clone(), grad, **how)


def start(backend: str, embeds: Tensor, **how: Any) -> Tensor:
    with use_backend(backend, "perturb_init"):
        return perturb_init(embeds, **how)


def judge(backend: str, delta: Tensor, grad: Tensor, **how: Any) -> Tensor:
    """One step no further from float64 than the reference's, times 1.5 plus one ulp; inside the ball; masked
    tokens exactly 0.
    """
    ours = step(backend, delta, grad, **how)
    exact = step("reference", delta.double(), grad.double(), **how)
    within_budget(ours, step("reference", delta, grad, **how), exact)
    mask = how.get("mask")
    if mask is not None:
        assert not ours[~mask].any()
    return ours


def size(delta: Tensor, norm: str) -> float:
    return float(
        torch.linalg.vector_norm(delta.double().flatten(), {"l2": 2, "linf": math.inf, "l1": 1}[norm])
    )


# --- the checks -------------------------------------------------------------------------------------
def check_values(backend: str, norm: str, scope: str, D: int, dtype: torch.dtype) -> None:
    """Packed with an empty sequence and with padding, masked, one token's gradient not finite, embeds + delta
    in the same call.
    """
    delta, grad = 0.1 * torch.randn(9, D), torch.randn(9, D).to(dtype)
    grad[7, D // 2] = math.inf
    mask = torch.arange(9) != 2
    grad[2] = math.nan
    embeds, out = torch.randn(9, D).to(dtype), torch.empty(9, D)
    ours = judge(backend, delta, grad, **given(norm, scope, mask=mask))
    both = step(backend, delta, grad, **given(norm, scope, mask=mask, embeds=embeds, out=out))
    assert torch.equal(both, ours) and torch.equal(out, embeds.float() + ours)
    padded = given(norm, scope, cu_seqlens=None)
    judge(backend, delta.view(3, 3, D), grad.view(3, 3, D), **padded)


def check_golden(backend: str, norm: str, scope: str) -> None:
    grad, mask = torch.tensor([[3.0, 4], [0, 1], [5, 0]]), torch.tensor([True, True, False])
    cu = torch.tensor([0, 3]) if scope == "sequence" else None
    ours = step(
        backend,
        torch.zeros(3, 2),
        grad,
        step_size=0.5,
        radius=0.5,
        norm=norm,
        scope=scope,
        mask=mask,
        cu_seqlens=cu,
    )
    torch.testing.assert_close(ours, torch.tensor(GOLDEN[norm, scope]), atol=1e-6, rtol=0)


def check_magnitudes(backend: str, norm: str, scope: str) -> None:
    """Squares beyond fp32's range in either argument, gradients too small to have a direction, rows of both
    kinds in one ball.
    """
    delta, grad = 0.1 * torch.randn(9, 70), torch.randn(9, 70)
    powers = 10.0 ** torch.tensor([0, 5, -5, 25, 30, 37, -12, -20, 20])[:, None]
    for g in (grad * powers, grad * 1e25, grad * 1e-16, grad * 1e-9):
        ours = judge(backend, delta, g, **given(norm, scope))
        for a, b in ((0, 4), (4, 9)):
            if scope == "sequence":
                assert size(ours[a:b], norm) <= RADIUS[norm] * (1 + 1e-6)
    assert (
        torch.equal(step(backend, 1e-3 * delta, grad * 1e-16, **given(norm, scope)), 1e-3 * delta)
        or norm == "linf"
    )
    judge(backend, delta * 1e25, grad, **given(norm, scope))


def check_nothing(backend: str, norm: str, scope: str) -> None:
    """No tokens; radius 0; a gradient of 0; a ball all of whose tokens are masked beside one that moves."""
    for shape, cu in (((0, 3), torch.tensor([0])), ((2, 0, 3), None)):
        how = given(norm, scope, cu_seqlens=cu if scope == "sequence" else None)
        assert step(backend, torch.empty(shape), torch.empty(shape), **how).shape == shape
        assert (
            start(
                backend,
                torch.empty(shape),
                radius=1.0,
                norm=norm,
                scope=scope,
                seed=0,
                cu_seqlens=how["cu_seqlens"],
            ).shape
            == shape
        )
    x = 0.01 * torch.randn(9, 6)
    assert not step(backend, x, torch.randn(9, 6), **given(norm, scope, radius=0.0)).any()
    assert torch.equal(step(backend, x, 0 * x, **given(norm, scope)), x)
    mask = torch.arange(9) >= 4
    ours = judge(backend, x, torch.randn(9, 6), **given(norm, scope, mask=mask))
    assert not ours[:4].any() and ours[4:].any()
    assert not step(backend, x, torch.randn(9, 6), **given(norm, scope, mask=mask & False)).any()


def check_layouts(backend: str, norm: str, scope: str) -> None:
    """Rows with gaps, columns with gaps, out over embeds."""
    x, g = 0.1 * torch.randn(9, 24), torch.randn(9, 24)
    want = step(backend, x, g, **given(norm, scope))
    rows = torch.zeros(9, 40)[:, 3:27].copy_(x)
    columns = torch.zeros(24, 9).t().copy_(x)
    for delta, grad in ((rows, g.t().contiguous().t()), (columns, torch.zeros(9, 2, 24)[:, 1].copy_(g))):
        embeds = torch.ones(24, 9).t() if delta is columns else torch.ones(9, 30)[:, :24]
        with use_backend(backend, "perturb_step"):
            assert perturb_step(delta, grad, embeds=embeds, out=embeds, **given(norm, scope)) is delta
        assert torch.equal(delta, want) and torch.equal(embeds, 1 + want)


def check_close_magnitudes(backend: str, scope: str, radii: tuple[float, ...] = (1e-3, 0.02, 3.0)) -> None:
    """l1 where the threshold takes all but 1e-4 of every number: wrong with a threshold rounded to fp32."""
    x = (1 + 1e-4 * torch.rand(9, 500)) * (2 * torch.randint(2, (9, 500)) - 1)
    for radius in radii:
        ours = judge(backend, x, torch.zeros_like(x), **given("l1", scope, radius=radius))
        parts = {"token": ours.split(1), "sequence": (ours[:4], ours[4:]), "batch": (ours,)}[scope]
        for part in parts:
            assert abs(size(part, "l1") / radius - 1) <= 1e-6


def check_spread_magnitudes(backend: str, scope: str, radius: float) -> None:
    """l1 with magnitudes over many orders: wrong with too few passes."""
    x = torch.randn(9, 50) * 10 ** (6 * torch.rand(9, 50) - 4)
    judge(backend, x, torch.randn(9, 50), **given("l1", scope, radius=radius))


def check_start(backend: str, norm: str, scope: str) -> None:
    """Bit for bit the reference's, for seeds of 64 bits and counters that straddle rows; catches tokens
    counted although masked.
    """
    mask = torch.arange(9) != 5
    for D, seed in ((1, 0), (7, 2**63 - 1), (300, 1 + 2**32)):
        embeds = torch.empty(9, D, dtype=torch.bfloat16)
        for live in (None, mask):
            how = {"radius": 0.7, "norm": norm, "scope": scope, "seed": seed, "mask": live, "cu_seqlens": CU}
            assert torch.equal(start(backend, embeds, **how), start("reference", embeds, **how))
        how = {"radius": 0.7, "norm": norm, "scope": scope, "seed": seed}
        assert torch.equal(
            start(backend, embeds.view(3, 3, D), **how), start("reference", embeds.view(3, 3, D), **how)
        )
