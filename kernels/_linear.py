"""The three vocabulary products, chunked by a byte budget: logits = x W^T, dx = dlogits W, dW += dlogits^T x.

They accumulate in float32 whatever the operands are.  CUDA multiplies bfloat16 operands into float32 outputs directly; CPU
matrix products have no such output type, so there the operands are widened, a tile of the vocabulary at a time, never all of W.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

LOGITS_BYTES = {"cpu": 1 << 26, "cuda": 1 << 31}  # one chunk of logits: cache-friendly on CPU, a few thousand rows on CUDA
_TILE = 4096  # vocabulary rows widened at a time on CPU


def chunk_rows(V: int, itemsize: int, device: torch.device, budget: int | None = None) -> int:
    """Rows of logits that fit the byte budget, at least one."""
    return max(1, (budget or LOGITS_BYTES.get(device.type, 1 << 26)) // (V * itemsize))


def project(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Logits (N, V) of `dtype`, accumulated in float32."""
    if x.dtype == dtype:
        logits = x @ weight.T
    elif x.is_cuda:
        logits = torch.mm(x, weight.T, out_dtype=dtype)
    else:
        logits = torch.empty(x.shape[0], weight.shape[0], dtype=dtype, device=x.device)
        wide = x.to(dtype)
        for v, w in _tiles(weight, dtype):
            torch.mm(wide, w.T, out=logits[:, v : v + w.shape[0]])
    return logits if bias is None else logits.add_(bias)


def input_grad(dlogits: Tensor, weight: Tensor) -> Tensor:
    """dx (N, D) in the weight's dtype."""
    if dlogits.dtype == weight.dtype or dlogits.is_cuda:
        return dlogits.to(weight.dtype) @ weight
    dx = torch.zeros(dlogits.shape[0], weight.shape[1], dtype=dlogits.dtype, device=dlogits.device)
    for v, w in _tiles(weight, dlogits.dtype):
        torch.addmm(dx, dlogits[:, v : v + w.shape[0]], w, out=dx)
    return dx.to(weight.dtype)


def add_weight_grad(out: Tensor, dlogits: Tensor, x: Tensor) -> None:
    """out (V, D) += dlogits^T x, in place, in the dtype of `out` (float32, or float64 for float64 inputs)."""
    if dlogits.dtype == x.dtype == out.dtype:
        torch.addmm(out, dlogits.T, x, out=out)
    elif dlogits.is_cuda:
        torch.addmm(out, dlogits.to(x.dtype).T, x, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, dlogits.to(out.dtype).T, x.to(out.dtype), out=out)


def accumulator(weight: Tensor) -> Tensor:
    """Zeros to accumulate a gradient like `weight` in: float32, or float64 for float64."""
    return torch.zeros(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)


def _tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    for v in range(0, weight.shape[0], _TILE):
        yield v, weight[v : v + _TILE].to(dtype)
