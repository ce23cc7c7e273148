"""Rows of logits: token_logp, linear_cross_entropy, linear_logp, linear."""

from __future__ import annotations

from functools import partial
from unittest import mock

import torch

from fastrl.kernels import linear_cross_entropy as cross
from fastrl.kernels._triton import linear_logp as in_registers
from fastrl.kernels.token_logp import narrow_view, reference, reference_backward
from ptx.cases.case import BF16, F16, F32, NONE, ROUNDING, Build, Case, case, doubled, kernel


def token_logp(
    dtype: torch.dtype,
    V: int,
    *,
    out: torch.dtype | None = None,
    entropy: bool = True,
    offset: float = 0.0,
    strided: bool = False,
    T: int = 2,
) -> Case:
    """Forward, backward over the logits, both at once; an odd V has a target outside."""
    x = (3 * torch.randn(T, V + 3 * strided) + offset).to(dtype)[:, :V]
    x[0, 1::3] = -torch.inf
    y = torch.randint(0, V, (T,)) // 3 * 3
    y[-1] = -100 if V % 2 else y[-1]
    tau, up = torch.rand(T) + 0.5, torch.randn(T)
    up_h = torch.randn(T) if entropy else NONE
    truth = reference(x.double(), y, tau.double(), entropy)
    gradient = reference_backward(*doubled(up, up_h), x.double(), y, tau.double(), *truth[1:])

    def run() -> list[torch.Tensor]:
        forward, backward, fused = (
            kernel("token_logp", n, x) for n in ("forward", "backward_into", "fused_into")
        )
        logp, h, m, log_s = forward(x, y, tau, entropy)
        over, once = (torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x) for _ in range(2))
        into = narrow_view(over, out)
        backward(into, up, up_h, over, y, tau, h, m, log_s)
        both = fused(narrow_view(once, out), once, y, tau, up, up_h)
        return [logp, h, m + log_s, into, both[0], both[1], narrow_view(once, out)]

    stats = (truth[0], truth[1], truth[2] + truth[3])
    rounding = ROUNDING[out or dtype] if (out or dtype) != F32 else 2e-6
    budget = (1e-5, 1e-5, 3e-6 * max(1, abs(offset)))
    return case(
        run,
        (*stats, gradient, truth[0], truth[1], gradient),
        (*budget, rounding + 1e-6, 1e-5, 1e-5, rounding + 1e-6),
    )


def cross_entropy(
    dtype: torch.dtype,
    V: int,
    smoothing: float,
    softcap: float,
    z_loss: float,
    *,
    out: torch.dtype | None = None,
) -> Case:
    x, y, up = (3 * torch.randn(2, V)).to(dtype), torch.randint(V, (2,)), torch.rand(2)
    gradient = x.double()
    loss = cross.rows_fused_into(gradient, gradient, y, up.double(), smoothing, softcap, z_loss)

    def run() -> list[torch.Tensor]:
        forward = kernel("linear_cross_entropy", "forward", x)
        fused = kernel("linear_cross_entropy", "fused_into", x)
        alone, *_ = forward(x, y, smoothing, softcap, z_loss)
        over = x.clone()
        again = fused(narrow_view(over, out), over, y, up, smoothing, softcap, z_loss)
        return [alone, again, narrow_view(over, out)]

    rounding = ROUNDING[out or dtype] if (out or dtype) != F32 else 2e-6
    return case(run, (loss, loss, gradient), (1e-5, 1e-5, rounding + 1e-6))


def linear_logp(
    dtype: torch.dtype,
    T: int,
    D: int,
    V: int,
    *,
    bias: bool = False,
    entropy: bool = True,
    shares: int | None = None,
    offset: float = 0.0,
) -> Case:
    """By the form that the width asks for: logits in registers, or tiles of logits.

    shares   of the vocabulary in place of as many as fill a GPU: a program then has several tiles
    offset   of the bias, with hidden states of 0: logits are exact, and what rounding the reference point of
             the sums leaves is all there is to lose
    """
    hidden, weight = torch.randn(T, D).to(dtype), (torch.randn(V, D) * D**-0.5).to(dtype)
    b = (torch.randn(V) + offset).to(dtype) if bias else NONE.to(dtype)
    hidden = torch.zeros_like(hidden) if offset else hidden
    y, tau = torch.randint(V, (T,)), torch.rand(T) + 0.5
    y[0] = -5
    z = hidden.double() @ weight.double().T + (b.double() if bias else 0)
    logp, h, m, log_s = reference(z, y, tau.double(), entropy)

    def run() -> list[torch.Tensor]:
        forward = kernel("linear_logp", "forward_chunks", hidden)
        cut = in_registers.shares if shares is None else lambda *_: shares
        with mock.patch.object(in_registers, "shares", cut):
            a, e, top, s = forward(hidden, weight, b, y, tau, entropy, F32, T)
        return [a, e, top + s]

    budget = 3e-6 if offset else 3e-5
    return case(run, (logp, h, m + log_s), (budget, budget, budget))


def linear(dtype: torch.dtype, M: int, K: int, N: int, *, bias: bool = False) -> Case:
    x, w = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)
    b = torch.randn(N).to(dtype) if bias else NONE.to(dtype)
    want = x.double() @ w.double().T + (b.double() if bias else 0)
    budget = {F32: 1e-6, BF16: 2.0**-8, F16: 2.0**-10}[dtype]
    return case(lambda: [kernel("linear", "forward", x)(x, w, b)], (want,), (budget,))


CASES: dict[str, Build] = {
    "token_logp fp32": partial(token_logp, F32, 1000),
    "token_logp fp32 of 7": partial(token_logp, F32, 7),
    "token_logp fp32 at an offset": partial(token_logp, F32, 1025, offset=1000.0),
    "token_logp bf16": partial(token_logp, BF16, 2048, entropy=False),
    "token_logp bf16 of odd rows": partial(token_logp, BF16, 1003, strided=True),
    "token_logp fp32 to bf16": partial(token_logp, F32, 1200, out=BF16),
    "token_logp fp16": partial(token_logp, F16, 600),
    "cross_entropy fp32 softcap": partial(cross_entropy, F32, 1000, 0.1, 30.0, 1e-4),
    "cross_entropy fp32 to bf16": partial(cross_entropy, F32, 1200, 0.0, 0.0, 1e-3, out=BF16),
    "cross_entropy bf16 smoothing": partial(cross_entropy, BF16, 1003, 0.1, 0.0, 0.0),
    "linear_logp bf16 overlapped": partial(linear_logp, BF16, 67, 264, 700, shares=1),
    "linear_logp bf16 of two steps a tile": partial(linear_logp, BF16, 3, 72, 1300, shares=1),
    "linear_logp bf16 bias": partial(linear_logp, BF16, 3, 64, 256, bias=True),
    "linear_logp fp16 at an offset": partial(linear_logp, F16, 9, 64, 300, bias=True, offset=1000.0),
    "linear_logp fp16 no entropy": partial(linear_logp, F16, 5, 64, 256, entropy=False),
    "linear_logp fp32 tiles": partial(linear_logp, F32, 2, 16, 5000),
    "linear bf16": partial(linear, BF16, 5, 96, 130, bias=True),
    "linear fp32": partial(linear, F32, 5, 40, 70, bias=True),
}
LONG: dict[str, Build] = {
    "token_logp fp32 long": partial(token_logp, F32, 5000),
    "token_logp bf16 long": partial(token_logp, BF16, 17000),
    "token_logp fp32 to bf16 of odd rows": partial(token_logp, F32, 5003, out=BF16, strided=True),
    "token_logp bf16 real vocabulary": partial(token_logp, BF16, 151936, T=1),
    "token_logp fp32 real vocabulary": partial(token_logp, F32, 50257, T=1),
    "token_logp of 1": partial(token_logp, F32, 1),
    "cross_entropy fp32 of 7": partial(cross_entropy, F32, 7, 0.2, 10.0, 0.0, out=BF16),
    "cross_entropy bf16 long": partial(cross_entropy, BF16, 9000, 0.1, 0.0, 1e-3),
    "linear_logp bf16 two blocks of rows": partial(linear_logp, BF16, 130, 136, 520),
    "linear_logp bf16 deep": partial(linear_logp, BF16, 67, 200, 390, shares=1),
    "linear_logp bf16 D=896": partial(linear_logp, BF16, 70, 896, 1100, shares=1),
    "linear_logp fp16 of one step a tile": partial(linear_logp, F16, 130, 40, 2100, entropy=False, shares=1),
    "linear_logp bf16 tiles": partial(linear_logp, BF16, 2, 4104, 4200),
    "linear_logp fp32 of one tile more": partial(linear_logp, F32, 2, 4, 4097),
    "linear bf16 two blocks": partial(linear, BF16, 129, 200, 64),
    "linear fp16": partial(linear, F16, 3, 72, 33, bias=True),
}
