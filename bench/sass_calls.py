"""Production calls of the hot kernels, for `bench/sass_rows.py`; their launches matter, not their values.

Sizes are those of Qwen2.5-0.5B (D = 896, 14 and 2 heads of 64, V = 151936) unless a name says otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrl import ops
from fastrl.kernels._backend import pick
from fastrl.kernels._triton import linear_logp as narrow_models
from fastrl.kernels.rope import rope_tables

V, T = 151936, 8192


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def logp() -> None:
    ops.token_logp(zeros(8, V), integers(8), entropy=True)


def logp_alone() -> None:
    ops.token_logp(zeros(8, V), integers(8))


def logp_fp32() -> None:
    ops.token_logp(zeros(8, V, dtype=torch.float32), integers(8), entropy=True)


def logp_backward() -> None:
    leaf = zeros(8, V).requires_grad_()
    found = ops.token_logp(leaf * 1, integers(8), entropy=True, inplace_backward=True)
    assert found.entropy is not None
    (found.logp.sum() + found.entropy.sum()).backward()


def logp_fused() -> None:
    x, one = zeros(8, V), torch.ones(8)
    pick("token_logp", x, "fused_into")(x, x, integers(8), one, one, one)


def head() -> None:
    narrow_models.forward(zeros(T, 896), zeros(V, 896), integers(T), None, torch.ones(T), True)


def head_of_wide_model() -> None:
    ops.linear_logp(zeros(1024, 2048), zeros(V, 2048), integers(1024), entropy=True)


def cross_entropy() -> None:
    x = zeros(8, V, dtype=torch.float32)
    pick("linear_cross_entropy", x, "fused_into")(x, x, integers(8), torch.ones(8), 0.0, 0.0, 0.0)


def draw(top_p: float = 1.0) -> None:
    x = zeros(8, V, dtype=torch.float32)
    ops.sample(x, seed=0, sequence=integers(8), position=integers(8), top_p=top_p)


def draw_top_p() -> None:
    draw(0.9)


def norm(D: int = 896) -> None:
    x, residual, weight = (zeros(*s).requires_grad_() for s in ((1024, D), (1024, D), (D,)))
    y, total = ops.rms_norm(x, weight, residual=residual)
    (y.sum() + total.sum()).backward()


def norm_4096() -> None:
    norm(4096)


def gated() -> None:
    ops.swiglu(zeros(64, 2 * 4864).requires_grad_()).sum().backward()


def rotate() -> None:
    cos, sin = rope_tables(64, 1e4, None, 64, torch.float32, "cpu")
    q, k = zeros(64, 14, 64).requires_grad_(), zeros(64, 2, 64).requires_grad_()
    y, z = ops.rope(q, k, torch.arange(64), cos, sin)
    (y.sum() + z.sum()).backward()


def decode() -> None:
    cache, table = zeros(512, 64, 2, 64), integers(256, 32, dtype=torch.int32)
    ops.decode_attention(zeros(256, 14, 64), cache, cache, table, torch.ones(256, dtype=torch.int32))


def attack() -> None:
    delta, grad = zeros(8, 512, 4096, dtype=torch.float32), zeros(8, 512, 4096)
    ops.perturb_step(delta, grad, step_size=0.1, radius=1.0, scope="sequence")


def clip(full: bool = False) -> None:
    a = torch.zeros(131072)
    mask = torch.ones(131072, dtype=torch.bool)
    more: dict[str, Any] = {
        "kl": "k3",
        "kl_coef": 0.1,
        "ref_logp": a,
        "correction": a,
        "entropy": a,
        "entropy_coef": 0.1,
    }
    ops.policy_loss(a, a, a, surrogate="clip", token_weight=a, mask=mask, **(more if full else {}))


def clip_all() -> None:
    clip(full=True)


def advantages() -> None:
    ends = torch.arange(0, 131073, 512, dtype=torch.int32)
    ops.gae(torch.zeros(131072), torch.zeros(131072), ends, gamma=1.0, lam=0.95)
