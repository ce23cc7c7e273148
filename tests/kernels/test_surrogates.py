"""The tables of policy_loss against hand-computed values and autograd; each test names the wrong
implementation it catches.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl import ops
from fastrl.kernels._backend import COMPILED_ONLY
from fastrl.kernels.policy_loss import KLS, SURROGATES, Surrogate, policy_loss, reference

F64 = torch.float64


def vector(*x: float) -> Tensor:
    return torch.tensor(x, dtype=F64)


# --- golden tables ----------------------------------------------------------------------------------
LOGP = vector(-1, -0.5, -2, -0.3, -0.7, -1.2)
OLD = LOGP - vector(0.5, 0, -0.5, 0.22, 0.2, -0.8)
REF = vector(-1.1, -0.7, -1.8, -0.3, -0.6, -1.0)
DRIFT = vector(0.05, -0.05, 0.1, 0, 0, 0.9)  # old_logp - sampler's logp
ADVANTAGE = vector(1, 1, 1, 1, -1, -1)
CU = torch.tensor([0, 4, 6], dtype=torch.int32)
TOKEN_MEAN, SEQ_SUM, SUM_NORM = (vector(*[x] * 6) for x in (1 / 6, 1 / 2, 1 / 8))
SEQ_MEAN = vector(*[1 / 8] * 4, *[1 / 4] * 2)
CLIP, CISPO = SURROGATES["clip"], SURROGATES["cispo"].with_params(low=0.8, high=1.28)
TIS = DRIFT.exp().clamp(max=2)
ICEPOP = torch.where(DRIFT.exp() <= 2, DRIFT.exp(), 0)
SEQ_MASK = vector(*[math.exp(0.1)] * 4, 0, 0)
NONE = vector(*[0] * 6)


def row(
    loss: float, slope: tuple[float, ...], **arguments: Any
) -> tuple[float, tuple[float, ...], dict[str, Any]]:
    return loss, slope, arguments


REFERENCE_ONLY = {"surrogate": "pg", "advantage": NONE, "kl_coef": 1.0, "ref_logp": REF}
GOLDEN = {
    "clip token-mean": row(-0.330855, (0, -0.166667, -0.101088, 0, 0.203567, 0), surrogate="clip"),
    "clip seq-mean": row(
        0.004534, (0, -0.125, -0.075816, 0, 0.305351, 0), surrogate="clip", token_weight=SEQ_MEAN
    ),
    "clip seq-sum": row(
        -0.992564, (0, -0.5, -0.303265, 0, 0.610701, 0), surrogate="clip", token_weight=SEQ_SUM
    ),
    "clip sum-norm": row(
        -0.248141, (0, -0.125, -0.075816, 0, 0.152675, 0), surrogate="clip", token_weight=SUM_NORM
    ),
    "clip higher": row(
        -0.351867, (0, -0.166667, -0.101088, -0.207679, 0.203567, 0), surrogate=CLIP.with_params(high=0.28)
    ),
    "ratio": row(
        -0.471766, (-0.274787, -0.166667, -0.101088, -0.207679, 0.203567, 0.074888), surrogate="ratio"
    ),
    "cap": row(-0.332755, (0, -0.166667, -0.101088, 0, 0, 0), surrogate=CLIP.with_params(cap=1.21)),
    "cispo": row(0.323140, (-0.213333, -0.166667, -0.133333, -0.207679, 0.203567, 0.133333), surrogate=CISPO),
    "pg": row(0.316667, (-0.166667,) * 4 + (0.166667,) * 2, surrogate="pg"),
    "sapo": row(
        -0.186880,
        (-0.185842, -0.125, -0.072956, -0.153425, 0.301262, 0.103443),
        surrogate="sapo",
        token_weight=SEQ_MEAN,
    ),
    "gspo": row(
        -0.128270,
        (-0.132068,) * 4 + (0, 0),
        surrogate="clip",
        token_weight=SEQ_MEAN,
        ratio="sequence",
        cu_seqlens=CU,
    ),
    "k1": row(-0.033333, (0.166667,) * 6, kl="k1", **REFERENCE_ONLY),
    "k2": row(0.011667, (0.016667, 0.033333, -0.033333, 0, -0.016667, -0.033333), kl="k2", **REFERENCE_ONLY),
    "k3": row(0.011924, (0.015860, 0.030212, -0.036900, 0, -0.017528, -0.036900), kl="k3", **REFERENCE_ONLY),
    "grpo as published": row(
        0.005025,
        (0.000476, -0.124094, -0.076923, 0, 0.304299, -0.002214),
        surrogate="clip",
        token_weight=SEQ_MEAN,
        kl="k3",
        kl_coef=0.04,
        ref_logp=REF,
    ),
    "token TIS": row(-0.210279, (0, -0.158538, -0.111720, 0, 0.203567, 0), surrogate="clip", correction=TIS),
    "icepop": row(-0.476945, (0, -0.158538, -0.111720, 0, 0.203567, 0), surrogate="clip", correction=ICEPOP),
    "sequence mask": row(
        -0.737984, (0, -0.184195, -0.111720, 0, 0, 0), surrogate="clip", correction=SEQ_MASK
    ),
}


@pytest.fixture(params=["definition", "float64", "cpu", "triton"])
def loss_of(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """The definition, the op in float64, and in float32 on each implementation that runs here."""
    if request.param in ("definition", "float64"):
        yield reference if request.param == "definition" else policy_loss
        return
    state = ops.implementations()["policy_loss"].get(request.param, "not written")
    if state not in ("ready", COMPILED_ONLY) or (
        request.param == "triton" and os.environ.get("TRITON_INTERPRET") != "1"
    ):
        pytest.skip(f"{request.param}: {state}")
    with ops.use_backend(request.param, "policy_loss"):
        yield lambda *vectors, **given: policy_loss(
            *map(narrow, vectors), **{n: narrow(x) for n, x in given.items()}
        )


def narrow(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype == F64 else x


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_values_and_gradients(case: str, loss_of: Any) -> None:
    """Catches, in each implementation, whatever the published equations do not say."""
    expected, slope, arguments = GOLDEN[case]
    logp = LOGP.clone().requires_grad_()
    loss, _ = loss_of(logp, OLD, **{"advantage": ADVANTAGE, "token_weight": TOKEN_MEAN, **arguments})
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(logp.grad, vector(*slope), atol=1.2e-6, rtol=0)


@pytest.mark.parametrize(
    ("surrogate", "advantage", "ratios", "each", "mean"),
    [
        (CLIP, (1, -1, 2), (0.5, 1, 1.5), (-0.5, 1, -2.4), -0.6333),
        (CLIP.with_params(cap=3), (1, -1, -4), (0.5, 1, 10), (-0.5, 1, 12), 4.1667),
    ],
)
def test_vectors_worked_by_hand_in_nemo(
    surrogate: Surrogate, advantage: Any, ratios: Any, each: Any, mean: float, loss_of: Any
) -> None:
    d = vector(*ratios).log()
    got = [
        loss_of(d, 0 * d, vector(*advantage), surrogate=surrogate, token_weight=torch.eye(3, dtype=F64)[i])[0]
        for i in range(3)
    ]
    torch.testing.assert_close(torch.stack(got).double(), vector(*each), atol=1e-6, rtol=1e-6)
    loss, _ = loss_of(d, 0 * d, vector(*advantage), surrogate=surrogate, token_weight=vector(*[1 / 3] * 3))
    assert loss.item() == pytest.approx(mean, abs=5e-5)


def test_cispo_vector_worked_by_hand(loss_of: Any) -> None:
    """NeMo-RL's ratios and advantages with its bounds of 0.8 and 1.2: every token keeps a gradient, of its
    held weight times A.

    Catches a weight that is differentiated, and tokens dropped where they are held.
    """
    d = vector(0.5, 1, 1.5).log().requires_grad_()
    cispo = SURROGATES["cispo"].with_params(low=0.8, high=1.2)
    loss, _ = loss_of(d, 0 * d.detach(), vector(1, -1, 2), surrogate=cispo, token_weight=vector(*[1 / 3] * 3))
    loss.backward()
    assert loss.item() == pytest.approx(-0.139533, abs=1e-6)
    assert d.grad is not None and d.grad.tolist() == pytest.approx([-0.8 / 3, 1 / 3, -0.8], abs=1e-6)


def test_luffy_s_weight_of_a_demonstration(loss_of: Any) -> None:
    """At p = 1/e, f = p / (p + 0.1) is 0.78627 and its weight 0.16805: catches p taken for logp, and a
    forgotten square.
    """
    logp = vector(-1.0).requires_grad_()
    loss, _ = loss_of(logp, vector(0.0), vector(2.0), surrogate="luffy_off", token_weight=vector(1.0))
    loss.backward()
    assert loss.item() == pytest.approx(-2 * 0.78627, abs=1e-5)
    assert logp.grad.item() == pytest.approx(-2 * 0.16805, abs=1e-5)


def test_sequence_ratio_vector_worked_by_hand_in_nemo(loss_of: Any) -> None:
    d, cu = vector(0.5, 1, 1.5).log(), torch.tensor([0, 3])
    loss, metrics = loss_of(
        d,
        0 * d,
        vector(1, -1, 2),
        surrogate="clip",
        token_weight=vector(*[1 / 3] * 3),
        ratio="sequence",
        cu_seqlens=cu,
    )
    assert loss.item() == pytest.approx(-0.6057, abs=1e-4)
    assert metrics["ratio_max"].item() == pytest.approx(0.9086, abs=1e-4)


# --- value and derivative ---------------------------------------------------------------------------
@pytest.mark.parametrize("name", SURROGATES)
def test_stated_derivative_is_the_one_autograd_finds(name: str) -> None:
    """Catches a forgotten stop-gradient (cispo would gain logp * d clip(r)) and a mask of the wrong sign in
    clip.
    """
    row = SURROGATES[name]
    row = row.with_params(cap=1.9, low=0.1) if name == "clip" else row
    logp = -3 * torch.rand(400, dtype=F64, generator=torch.Generator().manual_seed(1))
    d = torch.linspace(-2, 2, 400, dtype=F64).flip(0)
    advantage = torch.tensor([1.3, -0.4, 0.0, -2.0], dtype=F64).repeat(100)
    shift = torch.zeros_like(d, requires_grad=True)  # moves d and logp one for one
    value, slope = row.torch(d + shift, logp + shift, advantage, **row.params)
    (found,) = torch.autograd.grad(value.sum(), shift)
    torch.testing.assert_close(slope.detach(), found)
    value, slope = row.torch(torch.zeros_like(d), logp, advantage, **row.params)
    if name not in ("nll", "luffy_off"):
        torch.testing.assert_close(slope, advantage, rtol=0, atol=0)


@pytest.mark.parametrize("name", KLS)
def test_kl_derivative_is_the_one_autograd_finds(name: str) -> None:
    """Catches k3 with the wrong sign of e (a gradient of 1 - exp(e)) and an importance ratio treated as a
    constant.
    """
    e, d = torch.linspace(-1.5, 1.4, 50, dtype=F64), torch.linspace(-1, 1, 50, dtype=F64).flip(0)
    shift = torch.zeros_like(d, requires_grad=True)
    value, slope = KLS[name](e + shift, d + shift)
    (found,) = torch.autograd.grad(value.sum(), shift)
    torch.testing.assert_close(slope.detach(), found)


def test_k3_point_values() -> None:
    value, slope = KLS["k3"](vector(0.1, -0.1, 1, -1), NONE[:4])
    torch.testing.assert_close(value, vector(0.004837, 0.005171, 0.367879, 0.718282), atol=1e-6, rtol=0)
    torch.testing.assert_close(slope[2:], vector(0.632121, -1.718282), atol=1e-6, rtol=0)


def test_kl_gradients_in_expectation() -> None:
    """E[grad] of k2 and k3_is is the reverse KL's, of k3 the forward KL's, of k1 zero: catches estimators
    mixed up.
    """
    theta, p_ref = vector(0.5, -0.2, 0.1).requires_grad_(), vector(0, 0.3, -0.4).log_softmax(0)
    expected = {
        "k1": (0, 0, 0),
        "k2": (0.1058, -0.1767, 0.0709),
        "k3": (0.1304, -0.2178, 0.0874),
        "k3_is": (0.1058, -0.1767, 0.0709),
        "k1_is": (0.1058, -0.1767, 0.0709),
        "k3+": (0.1058, -0.1767, 0.0709),
    }
    for kl, answer in expected.items():
        logp = theta.log_softmax(0)
        loss, _ = policy_loss(
            logp,
            logp.detach(),
            NONE[:3],
            surrogate="pg",
            token_weight=logp.detach().exp(),
            kl=kl,
            kl_coef=1.0,
            ref_logp=p_ref,
        )
        (got,) = torch.autograd.grad(loss, theta)
        torch.testing.assert_close(got, vector(*answer), atol=6e-5, rtol=0, msg=kl)


def test_cap_is_both_dual_clip_and_the_two_sided_clip() -> None:
    """PPO's dual clip max(min(...), c A) for A < 0 and INTELLECT-2's min(r, c) are one function for c > 1 +
    high.
    """
    r, a = (
        x.flatten()
        for x in torch.meshgrid(
            torch.linspace(0.1, 6, 120, dtype=F64), vector(-1.3, -0.2, 0.7), indexing="ij"
        )
    )
    inner = torch.minimum(r * a, r.clamp(0.8, 1.2) * a)
    dual = torch.where(a < 0, torch.maximum(inner, 3 * a), inner)
    value, _ = CLIP.torch(r.log(), r.log(), a, low=0.2, high=0.2, cap=3.0)
    torch.testing.assert_close(value, dual)
    torch.testing.assert_close(value, torch.minimum(r.clamp(max=3) * a, r.clamp(0.8, 1.2) * a))


def test_surrogate_parameters_are_checked() -> None:
    with pytest.raises(ValueError, match="eps: not a parameter of this surrogate, which has: low, high, cap"):
        CLIP.with_params(eps=0.1)
    with pytest.raises(ValueError, match=r"cap: expected more than 1 \+ high = 1.2, got 1.1"):
        policy_loss(LOGP, OLD, ADVANTAGE, surrogate=CLIP.with_params(cap=1.1), token_weight=TOKEN_MEAN)
    assert CLIP.params["high"] == 0.2


def test_far_drift_stays_finite_and_keeps_its_gradient(loss_of: Any) -> None:
    """A log-ratio of 50 is bounded to 20: catches exp overflow in fp32, and a clamp that zeroes the KL
    gradient exactly there.
    """
    logp = torch.tensor([-1.0, -51.0], requires_grad=True)
    loss, metrics = loss_of(
        logp,
        torch.tensor([-51.0, -1.0]),
        torch.ones(2),
        surrogate="ratio",
        token_weight=torch.tensor([1.0, 1.0]),
        kl="k3",
        kl_coef=1.0,
        ref_logp=torch.tensor([-1.0, -1.0]),
    )
    (slope,) = torch.autograd.grad(loss, logp)
    assert loss.isfinite() and all(m.isfinite() for m in metrics.values())
    assert slope[0] == pytest.approx(-math.exp(20), rel=1e-5)
    assert slope[1] == pytest.approx(1 - math.exp(20), rel=1e-5)


@pytest.mark.parametrize("kl", KLS)
def test_kl_is_per_token_whatever_the_ratio(kl: str) -> None:
    """Catches importance-weighted KL that takes the sequence's ratio."""
    given = {"kl": kl, **REFERENCE_ONLY, "token_weight": TOKEN_MEAN, "cu_seqlens": CU}
    token, sequence = (policy_loss(LOGP, OLD, ratio=ratio, **given)[0] for ratio in ("token", "sequence"))
    assert token == sequence != 0
