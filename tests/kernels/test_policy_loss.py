"""policy_loss against hand-computed tables, autograd and float64; each test names the wrong implementation it
catches.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from support import within_budget
from torch import Tensor

from fastrl.kernels.policy_loss import (
    METRICS,
    RATIOS,
    SURROGATES,
    Surrogate,
    forward_op,
    merge_metrics,
    policy_loss,
    reference,
)

F64 = torch.float64
CLIP = SURROGATES["clip"]


# --- value and derivative ---------------------------------------------------------------------------
def random_case(T: int = 64, seed: int = 0, dtype: torch.dtype = F64, spread: float = 0.5) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(T, generator=g, dtype=F64)
    draw = {
        "logp": logp,
        "old_logp": logp - spread * torch.randn(T, generator=g, dtype=F64),
        "advantage": torch.randn(T, generator=g, dtype=F64),
        "token_weight": torch.rand(T, generator=g, dtype=F64) / T,
        "ref_logp": logp - 0.3 * torch.randn(T, generator=g, dtype=F64),
        "correction": 0.5 + torch.rand(T, generator=g, dtype=F64),
        "entropy": torch.rand(T, generator=g, dtype=F64),
    }
    cu = torch.tensor([0, T // 4, T // 4, T // 2 + 1, T], dtype=torch.int32)  # with an empty sequence
    return {n: x.to(dtype) for n, x in draw.items()} | {
        "mask": torch.rand(T, generator=g) > 0.3,
        "cu_seqlens": cu,
    }


@pytest.mark.parametrize("name", [n for n in SURROGATES if n != "cispo"])  # cispo's value has a detached part
def test_gradcheck(name: str) -> None:
    case = random_case(12)
    logp, entropy = case.pop("logp").requires_grad_(), case.pop("entropy").requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, h: policy_loss(
            x, surrogate=name, kl="k3_is", kl_coef=0.3, entropy=h, entropy_coef=0.2, **case
        )[0],
        (logp, entropy),
    )


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", SURROGATES)
def test_fused_op_equals_autograd_through_the_definition(name: str, ratio: str) -> None:
    """Catches a correction that also multiplies the KL term,
    and any term missing from the fused derivative.
    """
    case = random_case()
    both = []
    for loss_of in (policy_loss, reference):
        logp, entropy = case["logp"].clone().requires_grad_(), case["entropy"].clone().requires_grad_()
        given = {**case, "logp": logp, "entropy": entropy}
        loss, metrics = loss_of(surrogate=name, ratio=ratio, kl="k3", kl_coef=0.3, entropy_coef=0.2, **given)
        both.append((loss.detach(), *torch.autograd.grad(loss, (logp, entropy)), *metrics.values()))
    for fused, plain in zip(*both, strict=True):
        torch.testing.assert_close(fused, plain)


def test_correction_leaves_the_kl_term_alone() -> None:
    case = random_case()
    given = {n: case[n] for n in ("logp", "old_logp", "token_weight", "ref_logp")}
    zero = torch.zeros_like(case["logp"])
    with_correction, without = (
        policy_loss(advantage=zero, surrogate="clip", kl="k3", kl_coef=1.0, correction=k, **given)[0]
        for k in (case["correction"], None)
    )
    assert with_correction == without != 0


def test_sequence_ratio_is_gspo_where_the_advantage_is_constant() -> None:
    """Catches a sum in place of the mean of log-ratios, masked tokens counted in the length, and a mean that
    gets a gradient twice.
    """
    case = random_case(seed=3, spread=0.1)
    cu, mask = case["cu_seqlens"].tolist(), case["mask"]
    advantage, weight = torch.empty_like(case["logp"]), torch.empty_like(case["logp"])
    logp = case["logp"].clone().requires_grad_()
    truth = torch.zeros((), dtype=F64)
    for i, (a, b) in enumerate(pairwise(cu)):
        n = int(mask[a:b].sum())
        if n == 0:
            continue
        sign = (-1) ** i
        advantage[a:b], weight[a:b] = 0.7 * sign, 1 / (3 * n)
        q = (logp - case["old_logp"])[a:b][mask[a:b]].mean().exp()
        truth = truth - torch.minimum(0.7 * sign * q, 0.7 * sign * q.clamp(0.98, 1.02)) / 3
    (expected,) = torch.autograd.grad(truth, logp)
    row = CLIP.with_params(low=0.02, high=0.02)
    loss, _ = policy_loss(
        logp,
        case["old_logp"],
        advantage,
        surrogate=row,
        token_weight=weight,
        ratio="sequence",
        mask=mask,
        cu_seqlens=case["cu_seqlens"],
    )
    (got,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(got, expected)
    assert 0 < int((got[mask] != 0).sum()) < int(mask.sum())  # some sequences clipped, some not


# --- invariants -------------------------------------------------------------------------------------
def test_first_step_gradients_are_the_same_bits_for_every_surrogate() -> None:
    """With old_logp = logp every on-policy surrogate is plain policy gradient: catches a missing 4/tau in
    sapo.
    """
    case = random_case(dtype=torch.float32)
    gradients = []
    for name, ratio in [(n, r) for n in SURROGATES if n not in ("nll", "luffy_off") for r in RATIOS]:
        logp = case["logp"].clone().requires_grad_()
        loss, metrics = policy_loss(
            logp,
            case["logp"],
            case["advantage"],
            surrogate=name,
            token_weight=case["token_weight"],
            ratio=ratio,
            cu_seqlens=case["cu_seqlens"],
            mask=case["mask"],
        )
        gradients.append(torch.autograd.grad(loss, logp)[0])
        assert all(metrics[m] == 0 for m in ("clip_low", "clip_high", "clip_cap", "approx_kl", "old_kl_k3"))
        assert metrics["ratio_mean"] == 1 and metrics["ess"] == 1
    assert all(torch.equal(g, gradients[0]) for g in gradients)


@pytest.mark.parametrize("ratio", RATIOS)
def test_parts_add_up_to_the_whole(ratio: str) -> None:
    """Catches a denominator taken from the part in hand, and metrics averaged without their counts."""
    case = random_case()
    cut = int(case["cu_seqlens"][3])

    def run(part: slice, cu: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        given = {n: x[part] for n, x in case.items() if n != "cu_seqlens"}
        logp = given.pop("logp").clone().requires_grad_()
        loss, metrics = policy_loss(
            logp,
            surrogate="clip",
            ratio=ratio,
            cu_seqlens=cu,
            kl="k2",
            kl_coef=0.1,
            entropy_coef=0.1,
            **given,
        )
        return loss.detach(), torch.autograd.grad(loss, logp)[0], metrics

    cu = case["cu_seqlens"]
    loss, slope, metrics = run(slice(None), cu)
    parts = [run(slice(0, cut), cu[:4]), run(slice(cut, None), cu[3:] - cut), run(slice(0, 0), cu[:1])]
    torch.testing.assert_close(sum(p[0] for p in parts), loss)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), slope)
    torch.testing.assert_close(merge_metrics([p[2] for p in parts]), metrics)


def test_zero_advantage_has_zero_gradient() -> None:
    case = random_case()
    for name in ("pg", "ratio", "clip", "cispo", "sapo", "luffy_off"):
        logp = case["logp"].clone().requires_grad_()
        loss, _ = policy_loss(
            logp, case["old_logp"], torch.zeros_like(logp), surrogate=name, token_weight=case["token_weight"]
        )
        assert loss == 0 and not torch.autograd.grad(loss, logp)[0].any()


@pytest.mark.parametrize("surrogate", ["clip", Surrogate(lambda d, logp, a: (d.exp() * a, None))])
def test_masked_out_tokens_count_for_nothing_whatever_they_hold(surrogate: Any) -> None:
    """Catches loss * mask, for which NaN * 0 is NaN."""
    case = random_case()
    mask = case["mask"]

    def run(**changes: Tensor) -> tuple[Tensor, ...]:
        given = {**case, **changes}
        logp, entropy = (
            given.pop("logp").clone().requires_grad_(),
            given.pop("entropy").clone().requires_grad_(),
        )
        arguments = {
            "surrogate": surrogate,
            "ratio": "sequence",
            "kl": "k3",
            "kl_coef": 0.1,
            "entropy": entropy,
            "entropy_coef": 0.1,
        }
        loss, metrics = policy_loss(logp, **arguments, **given)
        return loss.detach(), *torch.autograd.grad(loss, (logp, entropy)), *metrics.values()

    floats = [n for n, x in case.items() if x.dtype == F64]
    for bad in (math.nan, math.inf, -math.inf):
        poisoned = run(**{n: torch.where(mask, case[n], bad) for n in floats})
        for got, clean in zip(poisoned, run(), strict=True):
            assert torch.equal(got, clean)
        assert not poisoned[1][~mask].any() and not poisoned[2][~mask].any()


# --- the form of the op -----------------------------------------------------------------------------
def test_own_surrogate_takes_the_same_formula() -> None:
    """A user's copy of a row, without a derivative, gives the row's gradient; a row with other parameters
    stays on the fused op.
    """
    case = random_case()
    mine = Surrogate(
        lambda d, logp, a, low, high, cap: (CLIP.torch(d, logp, a, low=low, high=high, cap=cap)[0], None),
        params=CLIP.params,
    )
    gradients = []
    for row in (mine.with_params(high=0.5), CLIP.with_params(high=0.5)):
        logp = case["logp"].clone().requires_grad_()
        loss, _ = policy_loss(**{**case, "logp": logp}, surrogate=row, ratio="sequence", entropy_coef=0.1)
        gradients.append(torch.autograd.grad(loss, logp)[0])
        assert type(loss.grad_fn).__name__ == (
            "_PolicyLossBackward" if row.torch is CLIP.torch else "SumBackward0"
        )
    torch.testing.assert_close(*gradients)


def test_only_logp_and_entropy_get_gradients() -> None:
    case = {n: x.requires_grad_() if x.dtype == F64 else x for n, x in random_case().items()}
    for loss_of in (policy_loss, reference):
        loss, metrics = loss_of(surrogate="cispo", kl="k3", kl_coef=0.1, entropy_coef=0.1, **case)
        inputs = [x for x in case.values() if x.requires_grad]
        gradients = dict(zip(case, torch.autograd.grad(loss, inputs, allow_unused=True), strict=False))
        assert {n for n, g in gradients.items() if g is not None} == {"logp", "entropy"}
        assert not any(m.requires_grad for m in metrics.values())


def test_second_derivative_is_refused() -> None:
    logp = torch.zeros(3, requires_grad=True)
    loss, _ = policy_loss(logp, torch.ones(3), torch.ones(3), surrogate="ratio", token_weight=torch.ones(3))
    with pytest.raises(RuntimeError, match="policy_loss: its gradient is computed with the loss"):
        torch.autograd.grad(loss, logp, create_graph=True)


@pytest.mark.parametrize("surrogate", ["clip", Surrogate(CLIP.torch, params=CLIP.params)])
def test_inside_torch_func_vjp(surrogate: Any) -> None:
    """linear_loss differentiates its callback this way; a custom op with register_autograd fails here."""
    case = random_case()
    logp, entropy = case.pop("logp"), case.pop("entropy")
    given = dict(surrogate=surrogate, ratio="sequence", kl="k3", kl_coef=0.1, entropy_coef=0.1, **case)
    loss, pull, metrics = torch.func.vjp(
        lambda x, h: policy_loss(x, entropy=h, **given), logp, entropy, has_aux=True
    )
    slopes = pull(torch.ones((), dtype=F64))
    inputs = (logp.requires_grad_(), entropy.requires_grad_())
    again, _ = policy_loss(inputs[0], entropy=inputs[1], **given)
    assert torch.equal(loss, again) and float(metrics["tokens"]) == int(case["mask"].sum())
    for got, expected in zip(slopes, torch.autograd.grad(again, inputs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("ratio", RATIOS)
def test_compiles_without_a_graph_break(ratio: str) -> None:
    case = random_case(dtype=torch.float32)
    given = {"surrogate": "clip", "ratio": ratio, "kl": "k3", "kl_coef": 0.1, "entropy_coef": 0.1}
    run = torch.compile(lambda c: policy_loss(**c, **given), fullgraph=True, backend="aot_eager")
    results = []
    for f in (run, lambda c: policy_loss(**c, **given)):
        logp = case["logp"].clone().requires_grad_()
        loss, _ = f({**case, "logp": logp})
        loss.backward()
        results.append((loss.detach(), logp.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("ratio", RATIOS)
def test_opcheck(ratio: str) -> None:
    c, empty = random_case(dtype=torch.float32), torch.empty(0)
    names = (
        "logp",
        "entropy",
        "old_logp",
        "advantage",
        "token_weight",
        "ref_logp",
        "correction",
        "mask",
        "cu_seqlens",
    )
    options = ("clip", [0.2, 0.2, math.inf], ratio, "k3", 0.1, 0.1)
    torch.library.opcheck(forward_op, (*(c[n] for n in names), *options))
    bare = (
        c["logp"],
        empty,
        c["old_logp"],
        c["advantage"],
        c["token_weight"],
        empty,
        empty,
        empty.bool(),
        c["cu_seqlens"],
    )
    torch.library.opcheck(forward_op, (*bare, *options[:3], "", 0.0, 0.0))


def test_error_against_float64_is_pytorchs_own() -> None:
    narrow = random_case(2000, dtype=torch.float32)
    wide = {n: x.double() if x.dtype == torch.float32 else x for n, x in narrow.items()}
    slopes = []
    for loss_of, case in ((policy_loss, narrow), (reference, narrow), (reference, wide)):
        logp = case["logp"].clone().requires_grad_()
        loss, _ = loss_of(
            **{**case, "logp": logp},
            surrogate="sapo",
            ratio="sequence",
            kl="k3",
            kl_coef=0.1,
            entropy_coef=0.1,
        )
        slopes.append(torch.autograd.grad(loss, logp)[0])
    assert slopes[0].dtype == torch.float32
    within_budget(slopes[0], slopes[1], slopes[2])


def test_layouts_give_one_answer() -> None:
    """Padded (B, L), strided and bf16 inputs: catches a flatten that reads a transposed tensor in memory
    order.
    """
    case = random_case(12)
    del case["cu_seqlens"]
    packed, _ = policy_loss(
        **case, surrogate="clip", ratio="sequence", cu_seqlens=torch.tensor([0, 4, 8, 12])
    )
    padded, _ = policy_loss(**{n: x.view(3, 4) for n, x in case.items()}, surrogate="clip", ratio="sequence")
    strided, _ = policy_loss(
        **{n: x.view(3, 4).T.contiguous().T for n, x in case.items()}, surrogate="clip", ratio="sequence"
    )
    assert torch.equal(packed, padded) and torch.equal(packed, strided)
    half = {n: x.bfloat16() if x.dtype == F64 else x for n, x in case.items()}
    half["logp"].requires_grad_()
    loss, _ = policy_loss(**half, surrogate="clip")
    loss.backward()
    widened, _ = policy_loss(
        **{n: x.float() if x.dtype == torch.bfloat16 else x for n, x in half.items()}, surrogate="clip"
    )
    assert loss == widened and loss.dtype == torch.float32 and half["logp"].grad.dtype == torch.bfloat16


def test_the_formula_reads_no_values() -> None:
    """Meta tensors have none: catches .item() and boolean indexing, which make the host wait for a GPU."""
    case = {n: x.to("meta") for n, x in random_case().items()}
    loss, metrics = reference(
        surrogate="clip", ratio="sequence", kl="k3", kl_coef=0.1, entropy_coef=0.1, **case
    )
    assert loss.shape == () and len(metrics) == len(METRICS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surrogate": "ppo"}, r"surrogate: expected one of 'nll'.*got 'ppo'"),
        ({"ratio": "group"}, r"ratio: expected one of 'token', 'sequence'; got 'group'"),
        (
            {"ratio": "sequence"},
            r'cu_seqlens: expected \(S\+1,\) ends .* got None; ratio="sequence" needs them',
        ),
        (
            {"ratio": "sequence", "cu_seqlens": torch.tensor([0, 5])},
            r"cu_seqlens: expected non-decreasing ends from 0 to T=6",
        ),
        (
            {"surrogate": Surrogate(CLIP.torch), "ratio": "sequence", "cu_seqlens": torch.tensor([1, 6])},
            r"cu_seqlens: expected non-decr",
        ),
        ({"kl": "k4"}, r"kl: expected one of 'k1'"),
        ({"kl": "k2", "kl_coef": 0.1}, r"ref_logp: expected a value, got None; kl_coef=0.1 needs it"),
        ({"kl_coef": 0.1}, r"kl: expected a value, got None; kl_coef=0.1 needs it"),
        ({"entropy_coef": 0.1}, r"entropy: expected a value, got None; entropy_coef=0.1 needs it"),
        ({"old_logp": torch.zeros(5)}, r"old_logp: expected shape \(T=6\), got \(5,\)"),
        ({"advantage": torch.arange(6)}, r"advantage: expected dtype .*float32.* got int64"),
        ({"mask": torch.zeros(6)}, r"mask: expected dtype bool, got float32"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], message: str) -> None:
    given = dict.fromkeys(("logp", "old_logp", "advantage", "token_weight"), torch.zeros(6))
    with pytest.raises((ValueError, TypeError), match=message):
        policy_loss(**{**given, "surrogate": "clip", **changes})
