"""The three products of a linear layer and of the head, in chunks of rows that fit a byte budget.

    y = x W^T        dx = dy W        dW += dy^T x

They accumulate in float32 for operands of any dtype.  CUDA multiplies bfloat16 operands into float32 outputs
directly; CPU matrix products have no such output type, so there the operands are widened, a tile of the
vocabulary at a time, never all of W.  Chunks share one buffer of logits: on CPU, fresh pages for every chunk
cost as much as a fifth of a product.

On CPU the products of float32 are those of csrc/cpu/linear.cpp.  torch calls MKL, which does not use the full
vector width of processors by other makers.  oneDNN, which torch carries for its compiler, is as fast as ours,
but sums all of K in one chain, twice as far from float64 as MKL, and is thousands of times slower where the
weight is a slice.  bench/kernels/bench_linear.py times all three.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastrl.kernels._backend import (
    batch_invariant,
    direct,
    is_exact,
    pick,
    preferred,
    requested,
    transformed,
    unbuilt,
)
from fastrl.kernels._chunks import policy
from fastrl.kernels._native import linear as native
from fastrl.kernels._rows import put_rows

ASKED_FOR = (None, "cpu")  # backends of `linear` under which the compiled products run
LEAST_ROWS = 8  # of x, from which csrc/cpu/linear.cpp is faster than torch's product
_TILE = 4096  # vocabulary rows widened at a time on CPU
_MOVED = 16  # rows of logits copied at a time
_BUILT = not unbuilt("linear_forward_cpu")


def logits_buffer(rows: int, V: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised logits (rows, V).

    On CUDA every row starts at a multiple of 16 elements, which cuBLAS and wide loads need.
    """
    padding = -V % policy(device).padding
    return torch.empty(rows, V + padding, dtype=dtype, device=device)[:, :V]


def compiled(x: Tensor, weight: Tensor, *, differentiable: bool = False) -> bool:
    """Whether products of x (T, .) and weight are the compiled ones by default.

    differentiable=True: the caller implements the backward.
    """
    if not _BUILT or x.shape[0] < LEAST_ROWS or not x.is_cpu or not weight.is_cpu:
        return False
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if requested("linear") not in ASKED_FOR or preferred() == "reference":
        return False
    return direct(x, weight, differentiable=differentiable)


# --- products ---------------------------------------------------------------------------------------
def project(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Logits (N, V) of `dtype`, accumulated in float32; written to `out` if given.

    In exact mode, and in float32 on CPU, they come from the batch-invariant kernel of `linear`, and rows are
    aligned in the same way with and without an `out`.
    """
    if is_exact() or (dtype == torch.float32 and compiled(x, weight)):
        out = logits_buffer(x.shape[0], weight.shape[0], dtype, x.device) if out is None else out
        run = pick if is_exact() else batch_invariant
        return run("linear", x, "into")(out, x, weight, weight.new_empty(0) if bias is None else bias)

    if x.dtype == dtype:
        logits = x @ weight.T if out is None else torch.mm(x, weight.T, out=out)
    elif x.is_cuda and out is None:
        logits = torch.mm(x, weight.T, out_dtype=dtype)
    elif x.is_cuda:
        logits = torch.mm(x, weight.T, out_dtype=dtype, out=out)
    else:
        logits = _widened_product(x, weight, dtype, out)
    return logits if bias is None else logits.add_(bias)


def _widened_product(x: Tensor, weight: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    if out is None:
        out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype, device=x.device)
    wide = x.to(dtype)
    for v, w in _tiles(weight, dtype):
        torch.mm(wide, w.T, out=out[:, v : v + w.shape[0]])
    return out


def input_grad(dlogits: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """dx (N, D) in the weight's dtype; written to `out` if given, where all three are of one dtype."""
    writable = out is None or (out.dtype == torch.float32 and out.stride(1) == 1)
    if writable and compiled(dlogits, weight):
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


def first_weight_grad(dlogits: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dlogits^T x (V, D) in `dtype`, accumulated in float32 (float64 for float64), written and not read."""
    if dlogits.dtype == x.dtype == dtype:
        return weight_grad(dlogits, x)
    if dlogits.is_cuda:
        dy = dlogits.to(x.dtype).T
        return dy @ x if x.dtype == dtype else torch.mm(dy, x, out_dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    out = torch.zeros(dlogits.shape[1], x.shape[1], dtype=wide, device=x.device)
    add_weight_grad(out, dlogits, x)
    return out.to(dtype)


def scaled(grad: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy scaled by the scalar `dloss`, so that a second backward finds the gradient unchanged.

    The product is formed in float32 at least, and rounded as it is written.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    factor = dloss.to(wide).reshape([1] * grad.ndim)  # without dimensions it would be rounded to grad's dtype
    if dtype == wide or transformed() or torch.is_grad_enabled():  # the latter to differentiate once more
        return (grad * factor).to(dtype)
    out = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    return torch.mul(grad, factor, out=out)


def gradient_dtype(logits: Tensor, head: Tensor) -> torch.dtype:
    """The dtype in which the gradient of `logits` is written over them.

    CUDA multiplies operands of one dtype, so there it is rounded once, for both products.
    """
    return head.dtype if logits.is_cuda else logits.dtype


def accumulator(weight: Tensor) -> Tensor:
    """Zeros in which to accumulate a gradient like `weight`: float32, or float64 for float64."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros(weight.shape, dtype=dtype, device=weight.device)


def _tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    for v in range(0, weight.shape[0], _TILE):
        yield v, weight[v : v + _TILE].to(dtype)


# --- gradients over chunks --------------------------------------------------------------------------
class HeadGrads:
    """The gradients of hidden, weight and bias, accumulated over chunks of rows; None where not wanted.

    hidden   in its own dtype, 0 at rows of no chunk; in float32 when `partial`, as it is still to be summed
             over the processes of a group
    weight   float32, or `weight_grad`, to which it is added; in its own dtype where one chunk is all there is
             and the device's policy is to write it once: the product rounds it, and nothing reads it again
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        wanted: Sequence[bool],
        *,
        chunks: int,
        weight_grad: Tensor | None = None,
        partial: bool = False,
    ) -> None:
        self.head = weight
        self.sole = chunks == 1
        share = torch.promote_types(hidden.dtype, torch.float32) if partial else hidden.dtype
        self.hidden = torch.zeros(hidden.shape, dtype=share, device=hidden.device) if wanted[0] else None
        self.weight = weight_grad if wanted[1] else None
        self.unwritten = wanted[1] and weight_grad is None  # the first chunk writes the weight's gradient
        if self.unwritten and not (chunks and policy(weight.device).once):
            self.weight, self.unwritten = accumulator(weight), False
        self.bias = accumulator(bias) if wanted[2] and bias is not None else None

    def add(self, rows: slice | Tensor, x: Tensor, dlogits: Tensor) -> None:
        """Add a chunk: its rows, their hidden states `x`, and the gradient of their logits."""
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=self.bias.dtype)
        if self.hidden is not None:
            self._add_hidden(self.hidden, rows, dlogits)
        if self.unwritten:
            dtype = self.head.dtype if self.sole else torch.promote_types(self.head.dtype, torch.float32)
            self.weight, self.unwritten = first_weight_grad(dlogits, x, dtype), False
        elif self.weight is not None:
            add_weight_grad(self.weight, dlogits, x)

    def _add_hidden(self, out: Tensor, rows: slice | Tensor, dlogits: Tensor) -> None:
        if isinstance(rows, slice) and out.dtype == dlogits.dtype == self.head.dtype:
            input_grad(dlogits, self.head, out[rows])
            return

        if out.dtype == self.head.dtype:
            dx = input_grad(dlogits, self.head)
        elif out.is_cuda:  # the share of a shard, which stays in float32
            dx = torch.mm(dlogits, self.head, out_dtype=out.dtype)
        else:
            dx = _tiled_input_grad(dlogits, self.head).to(out.dtype)
        put_rows(out, rows, dx)


# --- rows without a gradient ------------------------------------------------------------------------
def live_rows(*derivatives: Tensor) -> Tensor | None:
    """The rows (N',) with a derivative that is not zero, or None to take all.

    None unless they are at least an eighth fewer, and None on CUDA, where counting them would wait for the
    device.  A row of zero derivatives adds exact zeros to the gradients: without it they change by the order
    of their sums at most.
    """
    if derivatives[0].device.type != "cpu" or torch.compiler.is_compiling():
        return None
    live = derivatives[0] != 0
    for d in derivatives[1:]:
        live |= d != 0
    rows = live.nonzero().squeeze(1)
    return rows if 8 * rows.numel() <= 7 * live.numel() and live.numel() else None


def compact(logits: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Move the live rows to the front, in place, with as few moves as possible.

    Returns the logits of the live rows, and the former number of each.
    """
    n = live.numel()
    order = torch.arange(logits.shape[0], device=live.device)
    kept = torch.zeros_like(order, dtype=torch.bool).index_fill_(0, live, True)
    holes, movers = (~kept[:n]).nonzero().squeeze(1), kept[n:].nonzero().squeeze(1) + n
    for hole, mover in zip(holes.split(_MOVED), movers.split(_MOVED), strict=True):
        logits.index_copy_(0, hole, logits[mover])
    return logits[:n], order.index_copy_(0, holes, movers)[:n]
