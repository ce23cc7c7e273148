"""csrc/cuda: token_logp forward, backward, and both at once in clusters of multiprocessors."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastrl.kernels._launch import FLOAT_CODES, row_layout
from fastrl.kernels.token_logp import narrow_view, reference, reference_backward
from ptx import cuda
from ptx.cases.case import BF16, F32, NONE, ROUNDING, Build, Case, case, doubled

STREAM = 0


def token_logp(
    dtype: torch.dtype,
    V: int,
    *,
    out: torch.dtype | None = None,
    entropy: bool = True,
    pad: int = 0,
    T: int = 2,
    fused: bool = False,
    clusters: int = 1 << 31,
) -> Case:
    """Rows begin `pad` elements apart from one another; what lies between them must stay."""
    base = (3 * torch.randn(T, V + pad)).to(dtype)
    x = base[:, :V]
    x[0, 1::3] = -torch.inf
    y = torch.randint(0, V, (T,)) // 3 * 3
    y[-1] = V if V % 2 else y[-1]
    y[0] = V * 3 // 4 // 3 * 3  # of another warp than the one that stores it last
    tau, up = torch.rand(T) + 0.5, torch.randn(T)
    up_h = torch.randn(T) if entropy else NONE
    truth = reference(x.double(), y, tau.double(), True)
    gradient = reference_backward(*doubled(up, up_h), x.double(), y, tau.double(), *truth[1:])

    def run() -> list[Tensor]:
        whole = base.clone()
        rows = whole[:, :V]
        into = narrow_view(rows, out) if out else rows
        stats = tuple(torch.full((T,), 7.0) for _ in range(4))
        (_both if fused else _each)(into, rows, y, tau, up, up_h, stats)
        return [stats[0], stats[2] + stats[3], into, whole[:, V:], *([stats[1]] if entropy else [])]

    rounding = ROUNDING[out or dtype] if (out or dtype) != F32 else 2e-6
    run_by = partial(cuda.interpreted, clusters=clusters)
    want = (truth[0], truth[2] + truth[3], gradient, base[:, V:], *([truth[1]] if entropy else []))
    return case(run, want, (1e-5, 3e-6, rounding + 1e-6, 0, 1e-5)[: len(want)], run_by)


def _layout(x: Tensor) -> tuple[int, ...]:
    return (FLOAT_CODES[x.dtype], *row_layout(x))


def _out_layout(x: Tensor) -> tuple[int, ...]:
    code, _, batch, row = _layout(x)
    return code, batch, row


def _each(
    into: Tensor, x: Tensor, y: Tensor, tau: Tensor, up: Tensor, up_h: Tensor, stats: tuple[Tensor, ...]
) -> None:
    (T, V), (logp, h, m, log_s) = x.shape, stats
    asked = h if up_h.numel() else NONE
    rows = (x, *_layout(x), y, tau)
    cuda.call("token_logp_forward_cuda", *rows, logp, asked, m, log_s, T, V, STREAM)
    given = (up, up_h, h, m, log_s, T, V, STREAM)
    cuda.call("token_logp_backward_cuda", into, *_out_layout(into), *rows, *given)


def _both(
    into: Tensor, x: Tensor, y: Tensor, tau: Tensor, up: Tensor, up_h: Tensor, stats: tuple[Tensor, ...]
) -> None:
    (T, V), (logp, h, m, log_s) = x.shape, stats
    asked = h if up_h.numel() else NONE
    given = (x, *_layout(x), y, tau, up, up_h, logp, asked, m, log_s, T, V, STREAM)
    cuda.call("token_logp_fused_cuda", into, *_out_layout(into), *given)


CASES: dict[str, Build] = {
    "cuda token_logp fp32": partial(token_logp, F32, 300, pad=1),
    "cuda token_logp bf16": partial(token_logp, BF16, 1003, pad=5, clusters=1),
    "cuda token_logp fp32 to bf16": partial(token_logp, F32, 4200, out=BF16, pad=3, clusters=1),
    "cuda fused fp32": partial(token_logp, F32, 300, pad=1, fused=True),
    "cuda fused bf16": partial(token_logp, BF16, 1003, pad=5, fused=True, clusters=1),
    "cuda fused bf16 no entropy": partial(token_logp, BF16, 1024, entropy=False, fused=True, T=1),
    "cuda fused fp32 cluster of 2": partial(token_logp, F32, 28000, fused=True, T=1),
}
LONG: dict[str, Build] = {
    "cuda token_logp of 7": partial(token_logp, F32, 7, pad=1),
    "cuda token_logp bf16 long": partial(token_logp, BF16, 17001, pad=3),
    "cuda fused fp32 to bf16": partial(token_logp, F32, 4200, out=BF16, pad=3, fused=True),
    "cuda fused fp32 two rows in a cluster": partial(token_logp, F32, 28000, fused=True, clusters=1),
    "cuda fused fp32 in a cluster of 8": partial(token_logp, F32, 151936, T=1, fused=True),
    "cuda fused bf16 in a cluster of 4": partial(token_logp, BF16, 151936, T=1, fused=True),
}
