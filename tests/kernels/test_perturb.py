"""perturb_init and perturb_step against worked values, closed-form maxima and brute-force projections."""

from __future__ import annotations

import contextlib
import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.kernels._backend import use_backend
from fastrl.kernels.perturb import (
    NORMS,
    SCOPES,
    init_op,
    perturb_init,
    perturb_step,
    reference_init,
    reference_step,
    step_op,
)

F64 = torch.float64
GRAD = torch.tensor([[3, 4], [0, 1], [5, 0]], dtype=F64)
MASK = torch.tensor([True, True, False])
CU = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
BALLS = list(product(NORMS, SCOPES))


def size(delta: Tensor, norm: str, scope: str, cu: Tensor | None = None) -> Tensor:
    """The norm of each ball's part of delta (T, D), as PyTorch computes it in float64."""
    T = delta.shape[0]
    ends = {"token": list(range(T + 1)), "batch": [0, T], "sequence": [0, T] if cu is None else cu.tolist()}[
        scope
    ]
    order = {"l2": 2.0, "linf": math.inf, "l1": 1.0}[norm]
    parts = [delta[a:b].double().flatten() for a, b in zip(ends[:-1], ends[1:], strict=True) if a < b]  # noqa: RUF007
    return torch.stack([torch.linalg.vector_norm(p, order) for p in parts])


# --- worked values ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("norm", "scope", "expected"),
    [
        ("l2", "sequence", [[0.294174, 0.392232], [0, 0.098058], [0, 0]]),
        ("l2", "batch", [[0.294174, 0.392232], [0, 0.098058], [0, 0]]),
        ("l2", "token", [[0.3, 0.4], [0, 0.5], [0, 0]]),
        ("linf", "token", [[0.5, 0.5], [0, 0.5], [0, 0]]),
        ("l1", "token", [[0, 0.5], [0, 0.5], [0, 0]]),
        ("l1", "sequence", [[0, 0.5], [0, 0], [0, 0]]),
    ],
)
def test_one_step_from_nothing(norm: str, scope: str, expected: list[list[float]]) -> None:
    """FGM and FGSM: catches a norm that counts masked tokens, and a scope mixed up."""
    cu = torch.tensor([0, 3]) if scope == "sequence" else None
    delta = torch.zeros(3, 2, dtype=F64)
    out = perturb_step(
        delta, GRAD, step_size=0.5, radius=0.5, norm=norm, scope=scope, mask=MASK, cu_seqlens=cu
    )
    assert out is delta
    torch.testing.assert_close(delta, torch.tensor(expected, dtype=F64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("norm", "scope", "expected"),
    [
        ("l2", "token", [[0.3, 0.4], [0.1, 0]]),
        ("l2", "sequence", [[0.298511, 0.398015], [0.049752, 0]]),
        ("linf", "sequence", [[0.5, 0.5], [0.1, 0]]),
        ("l1", "token", [[0.15, 0.35], [0.1, 0]]),
        ("l1", "sequence", [[0.15, 0.35], [0, 0]]),
    ],
)
def test_projection(norm: str, scope: str, expected: list[list[float]]) -> None:
    """Catches an l1 "projection" that rescales: (0.6, 0.8) would go to (0.214, 0.286)."""
    delta = torch.tensor([[0.6, 0.8], [0.1, 0]], dtype=F64)[None]
    perturb_step(delta, torch.zeros_like(delta), step_size=0.5, radius=0.5, norm=norm, scope=scope)
    torch.testing.assert_close(delta[0], torch.tensor(expected, dtype=F64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("scope", "norm", "best"), [("sequence", "l2", 2.549510), ("token", "l2", 3.0), ("token", "linf", 4.0)]
)
def test_one_step_reaches_the_maximum_of_a_linear_loss(scope: str, norm: str, best: float) -> None:
    delta = torch.zeros(1, 3, 2, dtype=F64)
    perturb_step(delta, GRAD[None], step_size=0.5, radius=0.5, norm=norm, scope=scope, mask=MASK[None])
    assert float((delta * GRAD).sum()) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize(("norm", "scope"), BALLS)
def test_no_other_point_of_the_ball_beats_it_on_a_linear_loss(norm: str, scope: str) -> None:
    """The maximum of <c, delta> is radius times the dual norm of c per ball: catches sign(g) for l1, which
    does not reach it.
    """
    c = torch.randn(9, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    dual = {"l2": "l2", "linf": "l1", "l1": "linf"}[norm]
    delta = perturb_step(
        torch.zeros_like(c), c, step_size=0.3, radius=0.3, norm=norm, scope=scope, cu_seqlens=CU
    )
    torch.testing.assert_close((delta * c).sum(), 0.3 * size(c, dual, scope, CU).sum())


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("radius", [1e-3, 0.5, 3.0, 1e4])
def test_l1_projection_is_the_nearest_point(scope: str, radius: float) -> None:
    """Against the sorting algorithm of Duchi et al. in float64, with magnitudes over many orders: catches too
    few Newton steps.
    """
    g = torch.Generator().manual_seed(1)
    x = torch.randn(9, 50, dtype=F64, generator=g) * 10 ** (6 * torch.rand(9, 50, dtype=F64, generator=g) - 4)
    ends = {"token": list(range(10)), "sequence": CU.tolist(), "batch": [0, 9]}[scope]
    expected = x.clone()
    for a, b in zip(ends[:-1], ends[1:], strict=True):  # noqa: RUF007
        part = x[a:b].flatten()
        if part.abs().sum() <= radius:
            continue
        ordered = part.abs().sort(descending=True).values
        excess = (ordered.cumsum(0) - radius) / torch.arange(1, part.numel() + 1)
        threshold = excess[int((ordered > excess).nonzero().max())]
        expected[a:b] = (part.sign() * (part.abs() - threshold).clamp(min=0)).view(b - a, 50)
    delta = perturb_step(
        x.clone(), torch.zeros_like(x), step_size=0.0, radius=radius, norm="l1", scope=scope, cu_seqlens=CU
    )
    torch.testing.assert_close(delta, expected, atol=1e-10, rtol=1e-9)


def test_l1_step_is_shared_by_ties() -> None:
    """Catches a step that grows with the number of ties, and one whose direction depends on their order."""
    grad = torch.tensor([[2.0, -2.0, 1.0, 0.0]])
    delta = perturb_step(torch.zeros(1, 4), grad, step_size=0.5, radius=1.0, norm="l1")
    assert torch.equal(delta, torch.tensor([[0.25, -0.25, 0.0, 0.0]]))


# --- properties -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("norm", "scope"), BALLS)
def test_stays_feasible_and_masked_tokens_stay_zero(norm: str, scope: str) -> None:
    """Random gradients over many magnitudes, NaN and inf rows among them; catches g * mask, by which NaN gets
    into masked tokens.
    """
    g = torch.Generator().manual_seed(2)
    mask = torch.rand(9, generator=g) > 0.3
    cu = CU if scope == "sequence" else None
    given = {"radius": 0.25, "norm": norm, "scope": scope, "cu_seqlens": cu, "mask": mask}
    delta = perturb_step(torch.ones(9, 64), torch.ones(9, 64), step_size=1.0, **given)
    for step in range(60):
        assert not delta[~mask].any() and float(size(delta, norm, scope, cu).max()) <= 0.25 * (1 + 1e-6)
        grad = torch.randn(9, 64, generator=g) * 10.0 ** (step % 21 - 10)
        grad[step % 9, 5] = (math.nan, math.inf, -math.inf)[step % 3]
        perturb_step(delta, grad, step_size=10.0 ** (step % 5 - 3), **given)
    assert float(size(perturb_init(delta, seed=3, **given), norm, scope, cu).max()) <= 0.25 * (1 + 1e-6)


@pytest.mark.parametrize(("norm", "scope"), BALLS)
def test_rows_that_are_not_finite_count_as_zero(norm: str, scope: str) -> None:
    g = torch.randn(9, 3, generator=torch.Generator().manual_seed(4))
    clean, dirty = g.clone(), g.clone()
    clean[2], dirty[2, 1] = 0.0, math.inf
    results = [
        perturb_step(torch.zeros(9, 3), x, step_size=0.1, radius=1.0, norm=norm, scope=scope, cu_seqlens=CU)
        for x in (clean, dirty)
    ]
    assert torch.equal(*results) and not results[0][2].any() and results[0].any()


@pytest.mark.parametrize(("norm", "scope"), BALLS)
def test_layouts_agree_and_the_batch_may_be_permuted(norm: str, scope: str) -> None:
    """(B, L, D) rows are packed sequences, strided delta is updated in place: catches a reshape that copies
    and loses the update.
    """
    g = torch.Generator().manual_seed(5)
    start, grad = (
        0.1 * torch.randn(3, 4, 5, generator=g, dtype=F64),
        torch.randn(3, 4, 5, generator=g, dtype=F64),
    )
    given: dict[str, Any] = {"step_size": 0.2, "radius": 0.3, "norm": norm, "scope": scope}
    padded = perturb_step(start.clone(), grad, **given)
    packed = start.clone().view(12, 5)
    perturb_step(packed, grad.view(12, 5), cu_seqlens=torch.tensor([0, 4, 8, 12]), **given)
    assert torch.equal(packed.view(3, 4, 5), padded)
    strided = start.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous() and perturb_step(strided, grad, **given) is strided
    torch.testing.assert_close(strided, padded, atol=1e-14, rtol=0)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        perturb_step(start[order].clone(), grad[order], **given), padded[order], atol=1e-12, rtol=0
    )


def test_pgd_climbs_a_bowl_to_its_analytic_maximum() -> None:
    """Maximise -|x - a|^2 over the l2 ball with a outside: the maximiser is radius a / |a|; catches a step of
    the wrong sign.
    """
    a = torch.randn(1, 6, dtype=F64, generator=torch.Generator().manual_seed(6)) * 2
    delta = perturb_init(a, radius=0.5, norm="l2", scope="batch", seed=0).requires_grad_()
    for k in range(200):
        (grad,) = torch.autograd.grad(-(delta - a).square().sum(), delta)
        # a leaf that requires grad may be stepped
        perturb_step(delta, grad, step_size=0.25 * 0.95**k, radius=0.5, scope="batch")
    torch.testing.assert_close(delta.detach(), 0.5 * a / a.norm(), atol=1e-3, rtol=0)


# --- the start --------------------------------------------------------------------------------------
@pytest.mark.parametrize(("norm", "scope"), BALLS)
def test_start_fills_its_cube(norm: str, scope: str) -> None:
    """Uniform in +- radius / c with c = sqrt(n), 1, n over live elements: catches masked tokens counted in n,
    and uniforms in [0, 1).
    """
    mask = torch.tensor([True] * 5 + [False] + [True] * 3)
    delta = perturb_init(
        torch.empty(9, 4000, dtype=torch.bfloat16),
        radius=2.0,
        norm=norm,
        scope=scope,
        seed=7,
        mask=mask,
        cu_seqlens=CU,
    )
    assert delta.dtype == torch.float32 and not delta[5].any()
    for at in (0, 4):
        live = {"token": 1, "sequence": 4, "batch": 8}[scope]
        edge = 2.0 / {"l2": math.sqrt(live * 4000), "linf": 1.0, "l1": live * 4000.0}[norm]
        assert 0.998 * edge < float(delta[at].abs().max()) <= edge * (1 + 1e-6)
        assert abs(float(delta[at].mean())) < 0.04 * edge  # 4 standard errors
        assert float(delta[at].var()) == pytest.approx(edge**2 / 3, rel=0.06)


def test_start_is_a_function_of_the_seed() -> None:
    """The first numbers for seed 0 and seed 1 + 2^32 are part of the interface: catches a seed cut to 32
    bits.
    """
    given: dict[str, Any] = {"radius": 1.0, "norm": "linf", "scope": "token"}
    first = perturb_init(torch.empty(2, 3), seed=0, **given)
    assert torch.equal(first, perturb_init(torch.empty(2, 3), seed=0, **given))
    assert torch.equal(first.flatten(), perturb_init(torch.empty(1, 3, 2), seed=0, **given).flatten())
    others = [perturb_init(torch.empty(2, 3), seed=s, **given) for s in (1, 1 + 2**32, 2**63 - 1)]
    assert all(not torch.equal(a, b) for a, b in zip([first, *others], [*others, first], strict=True))
    assert first.unique().numel() == 6


# --- embeds + delta ---------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64], ids=str)
@pytest.mark.parametrize("backend", ["reference", None])
def test_the_sum_is_of_the_new_delta_and_rounds_once(backend: str | None, dtype: torch.dtype) -> None:
    """Catches embeds plus the delta of before the step, a sum in bf16, and embeds changed when they are not
    `out`.
    """
    embeds, grad, mask = torch.randn(9, 5).to(dtype), torch.randn(9, 5), torch.arange(9) != 3
    over = embeds.clone()
    for out, source in ((torch.empty(9, 5), embeds), (torch.empty(9, 5, dtype=dtype), embeds), (over, over)):
        delta, before = torch.zeros(9, 5), embeds.clone()
        with use_backend(backend, "perturb_step") if backend else contextlib.nullcontext():
            perturb_step(delta, grad, step_size=0.1, radius=0.5, mask=mask, embeds=source, out=out)
        assert delta[mask].any()
        assert torch.equal(out, (before.float() + delta).to(out.dtype))
        assert torch.equal(embeds, before)


# --- the form of the ops ----------------------------------------------------------------------------
@pytest.mark.parametrize(("norm", "scope"), BALLS)
def test_nothing_to_move(norm: str, scope: str) -> None:
    given: dict[str, Any] = {"norm": norm, "scope": scope}
    for shape, cu in (((0, 3), torch.tensor([0])), ((0, 4, 3), None), ((2, 0, 3), None)):
        start = perturb_init(torch.empty(shape), radius=1.0, seed=0, cu_seqlens=cu, **given)
        moved = perturb_step(start, torch.empty(shape), step_size=1.0, radius=1.0, cu_seqlens=cu, **given)
        assert moved.shape == shape
    still = perturb_init(torch.empty(2, 2, 3), radius=0.0, seed=0, **given)
    assert not perturb_step(still, torch.ones(2, 2, 3), step_size=1.0, radius=0.0, **given).any()
    zeros = torch.zeros(2, 2, 3)
    assert not perturb_step(zeros, zeros.clone(), step_size=1.0, radius=1.0, **given).any()


@pytest.mark.parametrize("norm", NORMS)
def test_opcheck_and_compile(norm: str) -> None:
    embeds, mask = torch.randn(9, 4), torch.arange(9) != 3
    torch.library.opcheck(init_op, (embeds, CU, mask, 0.5, norm, "sequence", 3))
    torch.library.opcheck(step_op, (embeds.clone(), embeds, CU, mask, 0.1, 0.5, norm, "sequence"))
    torch.library.opcheck(
        step_op,
        (embeds.clone(), embeds, CU[:0], mask[:0], 0.1, 0.5, norm, "token", embeds, torch.empty(9, 4)),
    )

    def attack(x: Tensor) -> Tensor:
        delta = perturb_init(x, radius=0.5, norm=norm, scope="token", seed=1)
        out = torch.empty_like(delta)
        return perturb_step(delta, x, step_size=0.1, radius=0.5, norm=norm, embeds=x, out=out) + out

    torch.testing.assert_close(
        torch.compile(attack, fullgraph=True, backend="aot_eager")(embeds), attack(embeds)
    )


@pytest.mark.parametrize(("norm", "scope"), BALLS)
def test_the_definitions_read_no_values(norm: str, scope: str) -> None:
    """Meta tensors have none: catches .item() and boolean indexing, which make the host wait for a GPU."""
    x, mask = torch.empty(9, 4, device="meta"), torch.empty(9, dtype=torch.bool, device="meta")
    cu = CU.to("meta") if scope == "sequence" else CU[:0].to("meta")
    assert reference_init(x, cu, mask, 0.5, norm, scope, 0).shape == (9, 4)
    reference_step(x, x, cu, mask, 0.1, 0.5, norm, scope)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "l3"}, r"norm: expected one of 'l2', 'linf', 'l1'; got 'l3'"),
        ({"scope": "row"}, r"scope: expected one of 'token', 'sequence', 'batch'; got 'row'"),
        (
            {"scope": "sequence"},
            r'cu_seqlens: expected \(S\+1,\) ends, got None; scope="sequence" needs them',
        ),
        (
            {"scope": "sequence", "cu_seqlens": torch.tensor([0, 2])},
            r"cu_seqlens: expected non-decreasing ends from 0 to T=3",
        ),
        (
            {"delta": torch.zeros(1, 3, 2), "grad": torch.zeros(1, 3, 2), "cu_seqlens": CU},
            r"cu_seqlens: expected None with delta",
        ),
        ({"radius": -1.0}, r"radius: expected 0 or a positive number, got -1.0"),
        (
            {"grad": torch.zeros(2, 2)},
            r"grad: expected floats in the shape of delta \(3, 2\), got torch.float32 \(2, 2\)",
        ),
        (
            {"delta": torch.zeros(3, 2, dtype=torch.bfloat16)},
            r"delta: expected dtype float32 or float64, got bfloat16",
        ),
        (
            {"embeds": torch.zeros(3, 2)},
            r"out: expected a tensor like delta, got None; embeds and out go together",
        ),
        ({"out": torch.zeros(3, 2)}, r"embeds: expected a tensor like delta, got None"),
        (
            {"embeds": torch.zeros(3, 2), "out": torch.zeros(3, 1)},
            r"out: expected floats in the shape of delta \(3, 2\)",
        ),
        ({"mask": torch.ones(2, dtype=torch.bool)}, r"mask: expected bool \(3,\), got torch.bool \(2,\)"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        perturb_step(
            **{
                "delta": torch.zeros(3, 2),
                "grad": torch.zeros(3, 2),
                "step_size": 0.1,
                "radius": 0.5,
                **changes,
            }
        )


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_a_token_whose_gradient_is_not_finite_stays(name, norm):
    """Wrong: a NaN that spreads over the token, and with it over the batch of the next forward."""
    delta, grad = torch.zeros(3, 2), torch.tensor([[torch.nan, 1.0], [torch.inf, 0.0], [2.0, 0.0]])
    with use_backend(name, "perturb_step"):
        perturb_step(delta, grad, step_size=0.5, radius=1.0, norm=norm)
    assert delta.tolist() == [[0, 0], [0, 0], [0.5, 0]]
