"""The three products of a linear layer and of the vocabulary, which is chunked by a byte budget: y = x W^T,
dx = dy W, dW += dy^T x.

They accumulate in float32 whatever the operands are.  CUDA multiplies bfloat16 operands into float32 outputs
directly; CPU matrix products have no such output type, so there the operands are widened, a tile of the
vocabulary at a time, never all of W.  Chunks share one buffer of logits: fresh pages for every chunk cost the
CPU as much as a fifth of a product.

On CPU the products of float32 are csrc/cpu/linear.cpp's.  torch's are MKL's, which stays below the width of
processors that are not Intel's; oneDNN's, which torch carries for its compiler, are as fast as ours, but sum
all of K in one chain, twice as far from float64 as MKL's, and are thousands of times slower where the weight
is a slice.  bench/kernels/bench_linear.py has all three.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastrl.kernels._backend import batch_invariant, direct, is_exact, pick, requested, unbuilt
from fastrl.kernels._native import linear as native

LOGITS_BYTES = {"cpu": 1 << 26, "cuda": 1 << 31}  # of logits, at most, unless the caller says
# rows of a chunk from which products run at full speed: half the bytes do then
ENOUGH_ROWS = {
    "cpu": 128,
    "cuda": 4096,
}
ASKED_FOR = (None, "cpu")  # backends of `linear` under which the compiled products run
LEAST_ROWS = 8  # of x, from which csrc/cpu/linear.cpp is faster than torch's product
_TILE = 4096  # vocabulary rows widened at a time on CPU
_MOVED = 16  # rows of logits copied at a time
_BUILT = not unbuilt("linear_forward_cpu")


def logits_budget(device: torch.device, budget: int | None = None) -> int:
    """Bytes of logits that may be alive at once: the caller's, or the device's default."""
    return budget or LOGITS_BYTES.get(device.type, 1 << 26)


def chunk_rows(V: int, itemsize: int, device: torch.device, budget: int | None = None) -> int:
    """Rows of logits of one chunk, at least one: what the caller's budget holds, or of the default no more
    than is useful.
    """
    most = logits_budget(device, budget) // (V * itemsize)
    useful = most if budget else max(most // 2, ENOUGH_ROWS.get(device.type, 128))
    return max(1, min(most, useful))


def logits_buffer(rows: int, V: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised logits (rows, V); on CUDA every row begins at a multiple of 16 elements, which cuBLAS and
    wide loads want.
    """
    return torch.empty(rows, V + (-V % 16 if device.type == "cuda" else 0), dtype=dtype, device=device)[:, :V]


def compiled(x: Tensor, weight: Tensor, *, differentiable: bool = False) -> bool:
    """Whether products of x (T, .) and weight are the compiled ones by default; a `differentiable` caller
    sees to the gradient.
    """
    fits = (
        x.shape[0] >= LEAST_ROWS and x.dtype == weight.dtype == torch.float32 and x.is_cpu and weight.is_cpu
    )
    return (
        fits
        and _BUILT
        and requested("linear") in ASKED_FOR
        and direct(x, weight, differentiable=differentiable)
    )


# --- products ---------------------------------------------------------------------------------------
def project(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Logits (N, V) of `dtype`, accumulated in float32; written to `out` if given.

    In exact mode, and in float32 on CPU, they come from `linear`'s batch-invariant kernel, in rows that begin
    alike with and without an `out`.
    """
    if is_exact() or (dtype == torch.float32 and compiled(x, weight)):
        out = logits_buffer(x.shape[0], weight.shape[0], dtype, x.device) if out is None else out
        run = pick if is_exact() else batch_invariant
        return run("linear", x, "into")(out, x, weight, weight.new_empty(0) if bias is None else bias)
    if x.dtype == dtype:
        logits = x @ weight.T if out is None else torch.mm(x, weight.T, out=out)
    elif x.is_cuda:
        logits = (
            torch.mm(x, weight.T, out_dtype=dtype)
            if out is None
            else torch.mm(x, weight.T, out_dtype=dtype, out=out)
        )
    else:
        logits = (
            torch.empty(x.shape[0], weight.shape[0], dtype=dtype, device=x.device) if out is None else out
        )
        wide = x.to(dtype)
        for v, w in _tiles(weight, dtype):
            torch.mm(wide, w.T, out=logits[:, v : v + w.shape[0]])
    return logits if bias is None else logits.add_(bias)


def input_grad(dlogits: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """dx (N, D) in the weight's dtype; written to `out` if given, whose dtype must be that of all three."""
    if compiled(dlogits, weight) and (out is None or (out.dtype == torch.float32 and out.stride(1) == 1)):
        return native.input_grad(dlogits, weight, out)
    if out is not None:
        return torch.mm(dlogits, weight, out=out)
    if dlogits.dtype == weight.dtype or dlogits.is_cuda:
        return dlogits.to(weight.dtype) @ weight
    return _tiled_input_grad(dlogits, weight).to(weight.dtype)


def _tiled_input_grad(dlogits: Tensor, weight: Tensor) -> Tensor:
    wide = torch.promote_types(dlogits.dtype, weight.dtype)
    dx = torch.zeros(dlogits.shape[0], weight.shape[1], dtype=wide, device=dlogits.device)
    for v, w in _tiles(weight, wide):
        torch.addmm(dx, dlogits[:, v : v + w.shape[0]].to(wide), w, out=dx)
    return dx


def weight_grad(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x (N, K), in their dtype."""
    if not compiled(dy, x):
        return dy.T @ x
    out = torch.empty(dy.shape[1], x.shape[1])
    native.weight_grad(out, dy, x, add=False)
    return out


def add_weight_grad(out: Tensor, dlogits: Tensor, x: Tensor) -> None:
    """out (V, D) += dlogits^T x, in place, in the dtype of `out` (float32, or float64 for float64 inputs)."""
    if out.dtype == torch.float32 and out.stride(1) == 1 and compiled(dlogits, x):
        native.weight_grad(out, dlogits, x, add=True)
    elif dlogits.dtype == x.dtype == out.dtype:
        torch.addmm(out, dlogits.T, x, out=out)
    elif dlogits.is_cuda:
        torch.addmm(out, dlogits.to(x.dtype).T, x, out_dtype=out.dtype, out=out)
    else:
        wide = x.to(out.dtype)
        for v in range(0, out.shape[0], _TILE):
            tile = out[v : v + _TILE]
            torch.addmm(tile, dlogits[:, v : v + _TILE].to(out.dtype).T, wide, out=tile)


def gradient_dtype(logits: Tensor, head: Tensor) -> torch.dtype:
    """What the gradient of `logits` is written as, over them: CUDA multiplies operands of one dtype, so it is
    rounded once for both.
    """
    return head.dtype if logits.is_cuda else logits.dtype


def accumulator(weight: Tensor) -> Tensor:
    """Zeros to accumulate a gradient like `weight` in: float32, or float64 for float64."""
    return torch.zeros(
        weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device
    )


def _tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    for v in range(0, weight.shape[0], _TILE):
        yield v, weight[v : v + _TILE].to(dtype)


# --- gradients over chunks --------------------------------------------------------------------------
class HeadGrads:
    """The gradients of hidden, weight and bias, gathered over chunks of rows; None where one is not wanted.

    hidden   in its own dtype, 0 at rows that no chunk brings; in float32 when `partial`: a share that is
             still to be summed
    weight   float32, or `weight_grad`, which is added to
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        wanted: Sequence[bool],
        *,
        weight_grad: Tensor | None = None,
        partial: bool = False,
    ) -> None:
        self.head = weight
        share = torch.promote_types(hidden.dtype, torch.float32) if partial else hidden.dtype
        self.hidden = torch.zeros(hidden.shape, dtype=share, device=hidden.device) if wanted[0] else None
        self.weight = (accumulator(weight) if weight_grad is None else weight_grad) if wanted[1] else None
        self.bias = accumulator(bias) if wanted[2] and bias is not None else None

    def add(self, rows: slice | Tensor, x: Tensor, dlogits: Tensor) -> None:
        """Take in a chunk: its rows of hidden, their values, the gradient of their logits (of
        `gradient_dtype`).
        """
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=self.bias.dtype)
        if self.hidden is not None:
            self._add_hidden(self.hidden, rows, dlogits)
        if self.weight is not None:
            add_weight_grad(self.weight, dlogits, x)

    def _add_hidden(self, out: Tensor, rows: slice | Tensor, dlogits: Tensor) -> None:
        if out.dtype == dlogits.dtype == self.head.dtype:
            if isinstance(rows, slice):
                input_grad(dlogits, self.head, out[rows])
                return
            dx = input_grad(dlogits, self.head)
        elif out.dtype == self.head.dtype:
            dx = input_grad(dlogits, self.head)
        else:  # the share of a shard
            dx = (
                torch.mm(dlogits, self.head, out_dtype=out.dtype)
                if out.is_cuda
                else _tiled_input_grad(dlogits, self.head).to(out.dtype)
            )
        if isinstance(rows, slice):
            out[rows] = dx
        else:
            out.index_copy_(0, rows, dx)


# --- rows without a gradient ------------------------------------------------------------------------
def live_rows(*derivatives: Tensor) -> Tensor | None:
    """The rows (N',) whose derivatives are not all zero, or None to take all.

    None unless they are at least an eighth fewer; and None on CUDA, where counting them would wait for the
    device.  A row of zero derivative adds exact zeros to the gradients: leaving it out changes them by the
    order of the sums at most.
    """
    if derivatives[0].device.type != "cpu" or torch.compiler.is_compiling():
        return None
    live = derivatives[0] != 0
    for d in derivatives[1:]:
        live |= d != 0
    rows = live.nonzero().squeeze(1)
    return rows if 8 * rows.numel() <= 7 * live.numel() and live.numel() else None


def compact(logits: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Move the live rows to the front, in place: the moves that are needed, and no more; those rows, and
    which each one was.
    """
    n = live.numel()
    order = torch.arange(logits.shape[0], device=live.device)
    kept = torch.zeros_like(order, dtype=torch.bool).index_fill_(0, live, True)
    holes, movers = (~kept[:n]).nonzero().squeeze(1), kept[n:].nonzero().squeeze(1) + n
    for hole, mover in zip(holes.split(_MOVED), movers.split(_MOVED), strict=True):
        logits.index_copy_(0, hole, logits[mover])
    return logits[:n], order.index_copy_(0, holes, movers)[:n]
