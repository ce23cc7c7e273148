"""What the tests of policy_loss's implementations share: a random case, and the judgement of one run against float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from support import ULP, within_budget
from torch import Tensor

from fastrl import ops
from fastrl.kernels.policy_loss import KLS, policy_loss, reference

FLAGS = ("mask", "correction", "entropy")
SWITCHES = [tuple(f for f, on in zip(FLAGS, bits, strict=True) if on) for bits in itertools.product((True, False), repeat=3)]
OPTIONS = {"kl_coef": 0.3, "entropy_coef": 0.2}


def case(T: int = 64, spread: float = 0.5, device: str = "cpu") -> dict[str, Any]:
    """float32 arguments of every kind; the ends hold an empty sequence."""
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


def variant(given: dict[str, Any], surrogate: Any, ratio: str, kl: str | None, switches: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of one call: what is not in `switches` left out, and ref_logp where there is no KL."""
    drop = {f for f in FLAGS if f not in switches} | ({"ref_logp"} if kl is None else set())
    drop |= {"cu_seqlens"} if ratio == "token" else set()
    options = {"kl_coef": OPTIONS["kl_coef"] if kl else 0.0, "entropy_coef": OPTIONS["entropy_coef"] if "entropy" in switches else 0.0}
    return {n: x for n, x in given.items() if n not in drop} | {"surrogate": surrogate, "ratio": ratio, "kl": kl} | options


def run(loss_of: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss, metrics as one tensor, and the gradients of logp and, if there, entropy."""
    leaves = {n: given[n].clone().requires_grad_() for n in ("logp", "entropy") if n in given}
    loss, metrics = loss_of(**{**given, **leaves})
    return loss.detach(), torch.stack(list(metrics.values())), list(torch.autograd.grad(loss, list(leaves.values())))


def judge(backend: str, given: dict[str, Any]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One run of an implementation, no further from float64 than PyTorch's own float32."""
    wide = {n: x.double() if isinstance(x, Tensor) and x.dtype == torch.float32 else x for n, x in given.items()}
    theirs, exact = run(reference, given), run(reference, wide)
    with ops.use_backend(backend, "policy_loss"):
        ours = run(policy_loss, given)
    for mine, its, right in zip(ours[2], theirs[2], exact[2], strict=True):
        assert mine.dtype == torch.float32
        within_budget(mine, its, right)
    for mine, its, right in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), (exact[0], *exact[1]), strict=True):
        allowed = 1.5 * (its - right).abs() + ULP[torch.float32] * right.abs().clamp(min=1)  # a sum of terms of about 1 that may cancel
        assert (mine - right).abs() <= allowed, (given["surrogate"], given["kl"], mine, its, right)
    return ours


def kls() -> Iterator[str | None]:
    yield None
    yield from KLS
