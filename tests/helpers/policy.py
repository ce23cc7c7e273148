"""What the tests of policy_loss's implementations share: random cases, one run, its judgement against
float64, and common checks.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import torch
from support import ULP, within_budget
from torch import Tensor

from fastrl import ops
from fastrl.algorithms import ALGORITHMS
from fastrl.batch.types import Tokens
from fastrl.kernels.policy_loss import KLS, METRICS, policy_loss, reference

FLAGS = ("mask", "correction", "entropy")
SWITCHES = [
    tuple(f for f, on in zip(FLAGS, bits, strict=True) if on)
    for bits in itertools.product((True, False), repeat=3)
]
ALL_KLS = (None, *KLS)
Outcome = tuple[Tensor, dict[str, Tensor], list[Tensor]]


def case(T: int = 64, spread: float = 0.5, device: str = "cpu") -> dict[str, Any]:
    """float32 arguments of every kind; one of the four sequences is empty."""
    logp = -3 * torch.rand(T)
    draw = {
        "logp": logp,
        "old_logp": logp - spread * torch.randn(T),
        "advantage": torch.randn(T),
        "token_weight": torch.rand(T) / max(T, 1),
        "ref_logp": logp - 0.3 * torch.randn(T),
        "correction": 0.5 + torch.rand(T),
        "entropy": torch.rand(T),
        "mask": torch.rand(T) > 0.3,
        "cu_seqlens": torch.tensor([0, T // 4, T // 4, T // 2 + (T > 1), T], dtype=torch.int32),
    }
    return {name: x.to(device) for name, x in draw.items()}


def variant(
    given: dict[str, Any], surrogate: Any, ratio: str, kl: str | None, switches: tuple[str, ...] = FLAGS
) -> dict[str, Any]:
    """The arguments of one call: without what is not in `switches`, and without ref_logp where there is no
    KL.
    """
    drop = (
        {f for f in FLAGS if f not in switches}
        | ({"ref_logp"} if kl is None else set())
        | ({"cu_seqlens"} if ratio == "token" else set())
    )
    options = {"kl_coef": 0.3 if kl else 0.0, "entropy_coef": 0.2 if "entropy" in switches else 0.0}
    return (
        {n: x for n, x in given.items() if n not in drop}
        | {"surrogate": surrogate, "ratio": ratio, "kl": kl}
        | options
    )


def run(loss_of: Any, given: dict[str, Any]) -> Outcome:
    """Loss, metrics, and the gradients of logp and, if there, entropy."""
    leaves = {n: given[n].clone().requires_grad_() for n in ("logp", "entropy") if n in given}
    loss, metrics = loss_of(**{**given, **leaves})
    return loss.detach(), metrics, list(torch.autograd.grad(loss, list(leaves.values())))


def fused(backend: str, given: dict[str, Any]) -> Outcome:
    with ops.use_backend(backend, "policy_loss"):
        return run(policy_loss, given)


def numbers(outcome: Outcome) -> Tensor:
    """Everything in one vector, to compare bits; NaN is one number."""
    loss, metrics, gradients = outcome
    return torch.cat([loss[None], torch.stack(list(metrics.values())), *gradients]).nan_to_num(nan=-12345.0)


def wide(given: dict[str, Any]) -> dict[str, Any]:
    return {
        n: x.double() if isinstance(x, Tensor) and x.dtype == torch.float32 else x for n, x in given.items()
    }


def judge(backend: str, given: dict[str, Any]) -> Outcome:
    """One run, whose gradients, loss and metrics are no further from float64 than PyTorch's own float32."""
    ours, theirs, exact = fused(backend, given), run(reference, given), run(reference, wide(given))
    for mine, its, right in zip(ours[2], theirs[2], exact[2], strict=True):
        assert mine.dtype == torch.float32
        within_budget(mine, its, right)
    each = [{"loss": loss} | metrics for loss, metrics, _ in (ours, theirs, exact)]
    assert tuple(each[0]) == ("loss", *METRICS)
    for name, mine in each[0].items():
        budget, right = (each[1][name] - each[2][name]).abs(), each[2][name]
        ulps = 3 if name == "ess" else 1  # a square and a quotient of sums that are rounded
        # terms of about 1, which may cancel
        allowed = 1.5 * budget + ulps * ULP[torch.float32] * right.abs().clamp(min=1)
        assert (mine - right).abs() <= allowed, (name, given["surrogate"], given["kl"], mine, right)
    return ours


# --- checks that every implementation must pass -----------------------------------------------------
def masked_out_tokens_count_for_nothing(backend: str) -> None:
    given = variant(case(300), "clip", "sequence", "k3")
    clean = fused(backend, given)
    for bad in (math.nan, math.inf, -math.inf):
        poison = {
            n: torch.where(given["mask"], x, bad)
            for n, x in given.items()
            if isinstance(x, Tensor) and x.is_floating_point()
        }
        poisoned = fused(backend, given | poison)
        assert torch.equal(numbers(poisoned), numbers(clean))
        assert not any(g[~given["mask"]].any() for g in poisoned[2])


def diverged_tokens_say_so(backend: str) -> None:
    """A live NaN or infinity is NaN in loss, gradient, mean and largest ratio; the other tokens keep their
    gradient.
    """
    for bad in (math.nan, math.inf, -math.inf):
        given = variant(case(300), "clip", "token", "k3", ())
        given["old_logp"][130] = bad
        loss, metrics, (slope,) = fused(backend, given)
        assert loss.isnan() and metrics["ratio_mean"].isnan() and metrics["ratio_max"].isnan()
        assert slope[130].isnan() and slope.isnan().sum() == 1


def far_drift(backend: str) -> None:
    """Bounded to 20 before the exponential, with the gradient of the bound; k3's linear term goes on."""
    given = case(300) | {"token_weight": torch.ones(300)}
    given["old_logp"] = given["logp"] + torch.tensor([50.0, -50.0, 21.0, -21.0]).repeat(75)
    given["ref_logp"] = given["old_logp"].flip(0)
    for name, kl in (
        ("ratio", "k3"),
        ("clip", "k3_is"),
        ("sapo", "k3+"),
        ("cispo", "k1_is"),
        ("pg", "k3_cut"),
        ("nll", "k3+_cut"),
    ):
        ours, exact = (
            fused(backend, variant(given, name, "token", kl, ())),
            run(reference, wide(variant(given, name, "token", kl, ()))),
        )
        most = exact[2][0].abs().max()
        # two such terms may cancel
        torch.testing.assert_close(ours[2][0].double(), exact[2][0], rtol=1e-6, atol=1e-6 * float(most))
        torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-6, atol=0)
        for metric, right in exact[1].items():
            torch.testing.assert_close(ours[1][metric].double(), right, rtol=1e-6, atol=1e-6)


def k3_of_a_small_step(backend: str, device: str = "cpu") -> None:
    """exp(d) - 1 - d at d = 1e-4 is 5e-9: where a difference of numbers near 1 has no digit left, the kernel
    has all of them.
    """
    old = torch.zeros(2000, device=device)
    for scale in (1e-4, 1e-2, 0.3, 0.4, 1.0, 3.0):
        d = (
            scale
            * (1 + torch.rand(2000, device=device))
            * torch.tensor([1.0, -1.0], device=device).repeat(1000)
        )
        given = {"advantage": old, "token_weight": old, "surrogate": "pg", "kl": None, "ref_logp": 2 * d}
        _, metrics, _ = fused(backend, {"logp": d, "old_logp": old} | given)
        wide_d = d.double()
        for name, x in (("old_kl_k3", wide_d), ("ref_kl_k3", wide_d)):
            truth = (
                (x.expm1() - x).mean()
                if scale > 0.1
                else (x.square() / 2 * (1 + x / 3 + x.square() / 12 + x**3 / 60)).mean()
            )
            torch.testing.assert_close(metrics[name].double(), truth, rtol=4e-7, atol=0)


def layouts_give_one_answer(backend: str) -> None:
    """Padded (B, L), every second element, a broadcast advantage and an expanded weight; int64 ends; bf16
    vectors.
    """
    given = variant(case(40), "clip", "sequence", "k3")
    given["advantage"], given["token_weight"] = torch.full((40,), 0.5), torch.full((40,), 0.1)
    want = fused(backend, given | {"cu_seqlens": torch.arange(0, 41, 8)})
    vectors = {n: x for n, x in given.items() if isinstance(x, Tensor) and n != "cu_seqlens"}
    strided = {n: torch.stack([x, x], 1)[:, 0] for n, x in vectors.items()} | {
        "advantage": torch.tensor(0.5).expand(40)
    }
    padded = {n: x.view(5, 8).T.contiguous().T for n, x in vectors.items()} | {
        "token_weight": torch.full((5, 1), 0.1).expand(5, 8)
    }
    for ends, change in ((torch.arange(0, 41, 8, dtype=torch.int32), strided), (None, padded)):
        loss, metrics, gradients = fused(backend, given | change | {"cu_seqlens": ends})
        assert torch.equal(numbers((loss, metrics, [g.reshape(-1) for g in gradients])), numbers(want))
    half = {n: x.bfloat16() for n, x in vectors.items() if x.is_floating_point()}
    assert (
        fused(backend, given | half)[0] == fused(backend, given | {n: x.float() for n, x in half.items()})[0]
    )


def nothing_live(backend: str) -> None:
    for T, mask in ((0, None), (6, torch.zeros(6, dtype=torch.bool))):
        given = variant(case(T), "clip", "sequence", "k3") | {"mask": mask}
        assert not numbers(fused(backend, given)).any()


def algorithm(backend: str, name: str) -> None:
    """A row of ALGORITHMS, as it is and with every coefficient, fused and unfused: equal value, gradients and
    metrics.
    """
    x = case(301)
    fields = {n: x[n] for n in ("old_logp", "advantage", "ref_logp", "correction")} | {
        "weight": x["token_weight"]
    }
    for row in (ALGORITHMS[name], replace(ALGORITHMS[name], kl="k3", kl_coef=0.1, entropy_coef=0.05)):

        def loss_of(
            logp: Tensor, entropy: Tensor, row: Any = row, **fields: Tensor
        ) -> tuple[Tensor, dict[str, Tensor]]:
            tokens = Tokens(**fields, cu_seqlens=x["cu_seqlens"], live=301).with_(logp, entropy)
            return row.loss(tokens), row.metrics(tokens)

        given = fields | {"logp": x["logp"], "entropy": x["entropy"]}
        with ops.use_backend(backend, "policy_loss"):
            ours = run(loss_of, given)
        with ops.use_backend("reference", "policy_loss"):
            theirs, exact = run(loss_of, given), run(loss_of, wide(given))
        for mine, its, right in zip(ours[2], theirs[2], exact[2], strict=True):
            within_budget(mine, its, right)
        torch.testing.assert_close(numbers(ours), numbers(theirs), rtol=1e-6, atol=1e-6)


# what every implementation passes
CHECKS = (
    masked_out_tokens_count_for_nothing,
    diverged_tokens_say_so,
    far_drift,
    k3_of_a_small_step,
    layouts_give_one_answer,
    nothing_live,
)
