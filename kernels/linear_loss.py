"""Any loss of per-token log-probs and entropies, from hidden states and the head's weight, its gradient computed in the forward.

For each chunk of live rows:  logits = x W^T  ->  logp, entropy  ->  loss(logp, entropy, rows) and its derivative by both
  ->  the logits overwritten by their gradient  ->  dx = dlogits W,  dW += dlogits^T x.

Three products of 2 N D V FLOPs for N live rows, nothing recomputed, one chunk of logits alive at a time; masked rows leave before
the first product.  A sequence-level loss needs every log-prob before any derivative: its logits are kept when they fit
`logits_bytes`, and recomputed (a fourth product) when they do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.kernels._check import compute_dtype, dims, one_of, same_device
from fastrl.kernels._linear import LOGITS_BYTES, accumulator, add_weight_grad, chunk_rows, input_grad, project
from fastrl.kernels.linear_logp import check_linear
from fastrl.kernels.linear_logp import reference as linear_reference
from fastrl.kernels.token_logp import TokenStats, backward_into_op, forward_op, row_temperature

Loss = Callable[[Tensor, Tensor | None, Tensor], Tensor]
LEVELS = ("token", "sequence")


# --- reference --------------------------------------------------------------------------------------
def reference(
    hidden: Tensor, weight: Tensor, target: Tensor, loss: Loss, mask: Tensor, bias: Tensor | None, temperature: Tensor, entropy: bool
) -> Tensor:
    """The definition: materialised float64 logits, one call of the loss on the live rows, gradients by autograd."""
    logp, h = linear_reference(hidden, weight, target, bias, temperature)
    rows = mask.nonzero().squeeze(1)
    return loss(logp[rows], h[rows] if entropy else None, rows)


# --- the chunks -------------------------------------------------------------------------------------
@dataclass(slots=True)
class _Chunk:
    """N rows on their way through: what the forward leaves for the gradient."""

    rows: Tensor
    x: Tensor
    logits: Tensor | None
    logp: Tensor
    entropy: Tensor
    m: Tensor
    log_s: Tensor


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one call that autograd has no business with."""

    target: Tensor
    rows: Tensor
    temperature: Tensor
    loss: Loss
    entropy: bool
    dtype: torch.dtype
    level: str
    weight_grad: Tensor | None
    logits_bytes: int | None
    grads: bool  # False under no_grad, where inputs may still say that they require grad


class _Pass:
    """One walk over the chunks, accumulating the loss, the statistics and the gradients."""

    def __init__(self, call: _Call, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]) -> None:
        self.call, self.hidden, self.weight, self.bias = call, hidden, weight, bias
        stat = compute_dtype(hidden)
        T = hidden.shape[0]
        self.loss = hidden.new_zeros((), dtype=stat)
        self.logp, self.lse = (hidden.new_zeros(T, dtype=stat) for _ in range(2))
        self.entropy = hidden.new_zeros(T if call.entropy else 0, dtype=stat)
        self.dhidden = torch.zeros_like(hidden) if needs[0] else None
        own = accumulator(weight) if needs[1] and call.weight_grad is None else None
        self.dweight = call.weight_grad if needs[1] and call.weight_grad is not None else own
        self.dbias = accumulator(bias) if needs[2] and bias is not None else None
        self.differentiate = any(needs)

    def run(self) -> None:
        call = self.call
        V, N = self.weight.shape[0], call.rows.numel()
        size = chunk_rows(V, call.dtype.itemsize, self.hidden.device, call.logits_bytes)
        parts = [call.rows[a : a + size] for a in range(0, N, size)]
        if call.level == "token":
            for rows in parts:
                chunk = self.forward(rows)
                self.backward(chunk, *self.derivative(chunk.rows, chunk.logp, chunk.entropy))
            return
        budget = call.logits_bytes or LOGITS_BYTES.get(self.hidden.device.type, 1 << 26)
        keep = N * V * call.dtype.itemsize <= budget
        chunks = [self.forward(rows, keep) for rows in parts]
        if chunks:
            logp, entropy = torch.cat([c.logp for c in chunks]), torch.cat([c.entropy for c in chunks])
            dlogp, dentropy = self.derivative(call.rows, logp, entropy)
            for i, chunk in enumerate(chunks):
                part = slice(i * size, (i + 1) * size)
                self.backward(chunk, dlogp[part], dentropy[part])

    def forward(self, rows: Tensor, keep: bool = True) -> _Chunk:
        call = self.call
        x = self.hidden[rows]
        logits = project(x, self.weight, self.bias, call.dtype)
        logp, h, m, log_s = forward_op(logits, call.target[rows], call.temperature[rows], call.entropy, False)
        self.logp.index_copy_(0, rows, logp)
        self.lse.index_copy_(0, rows, m + log_s)
        if call.entropy:
            self.entropy.index_copy_(0, rows, h)
        return _Chunk(rows, x, logits if keep else None, logp, h, m, log_s)

    def derivative(self, rows: Tensor, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """Add these rows' loss, and return its derivative by logp and by entropy (empty when there is none)."""
        call = self.call
        if not self.differentiate:
            self.loss += call.loss(logp, entropy if call.entropy else None, rows)
            return logp, entropy
        if call.entropy:
            value, pull = torch.func.vjp(lambda p, h: call.loss(p, h, rows), logp, entropy)  # type: ignore[misc]
        else:
            value, pull = torch.func.vjp(lambda p: call.loss(p, None, rows), logp)  # type: ignore[misc]
        dlogp, *rest = pull(torch.ones_like(value))
        self.loss += value
        return dlogp, rest[0] if rest else entropy

    def backward(self, chunk: _Chunk, dlogp: Tensor, dentropy: Tensor) -> None:
        if not self.differentiate:
            return
        call, rows = self.call, chunk.rows
        logits = chunk.logits if chunk.logits is not None else project(chunk.x, self.weight, self.bias, call.dtype)
        backward_into_op(dlogp, dentropy, logits, call.target[rows], call.temperature[rows], chunk.entropy, chunk.m, chunk.log_s)
        if self.dhidden is not None:
            self.dhidden.index_copy_(0, rows, input_grad(logits, self.weight))
        if self.dweight is not None:
            add_weight_grad(self.dweight, logits, chunk.x)
        if self.dbias is not None:
            self.dbias += logits.sum(0, dtype=self.dbias.dtype)
        chunk.logits = None


# --- autograd ---------------------------------------------------------------------------------------
class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        needs = tuple(call.grads and n for n in ctx.needs_input_grad[:3])
        walk = _Pass(call, hidden, weight, bias, needs)  # type: ignore[arg-type]
        walk.run()
        own = walk.dweight if call.weight_grad is None else None
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(walk.dhidden, own, walk.dbias)
        ctx.mark_non_differentiable(walk.logp, walk.entropy, walk.lse)
        return walk.loss, walk.logp, walk.entropy, walk.lse

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*(None if g is None else (g * dloss.to(g.dtype)).to(dtype) for g, dtype in grads), None)


# --- public -----------------------------------------------------------------------------------------
def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    loss: Loss,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    logits_dtype: torch.dtype = torch.float32,
    level: str = "token",
    weight_grad: Tensor | None = None,
    logits_bytes: int | None = None,
) -> tuple[Tensor, TokenStats]:
    """The sum of `loss` over chunks of rows, with the gradients of hidden, weight and bias computed along the way.

    `loss(logp, entropy, rows)` gets the log-probs and entropies (nats; None unless asked for) of N rows and their int64
    indices into T, and returns these rows' scalar contribution, already divided by global denominators: the sum over chunks is
    the loss.  It is plain PyTorch, differentiated by torch.func.vjp.  A tensor it closes over is a constant: one that requires
    grad is refused.  With `level="sequence"` it is called once, with every live row, in order.

    Shapes:  hidden (T, D), weight (V, D) of one dtype;  target (T,) int;  bias (V,);  temperature a float or (T,);
             mask (T,) bool, or (N,) int64 distinct live rows (a bool mask on CUDA waits for the device once, to count them)
             ->  loss scalar, TokenStats (T,), detached, 0 where masked; fp32 (fp64 for fp64 inputs).
    Memory:  one chunk of logits of `logits_bytes` (default: 64 MiB on CPU, 2 GiB on CUDA), one float32 gradient of the weight,
             one gradient of hidden.  `weight_grad`, a float32 (V, D) buffer, takes the weight's gradient instead, added during
             the forward, so that micro-batches share it; the loss must then be differentiated with an upstream gradient of 1.
    Raises:  ValueError or TypeError naming the argument.
    """
    dtype = check_linear(hidden, weight, target, bias, logits_dtype)
    one_of("level", level, LEVELS)
    if not torch.compiler.is_compiling():  # which cannot look into a closure
        _refuse_gradients(loss)
    if weight_grad is not None:
        dims("weight_grad", weight_grad, "V D", (accumulator(weight[:0]).dtype,), V=weight.shape[0], D=weight.shape[1])
        same_device(weight=weight, weight_grad=weight_grad)
    rows = _live_rows(mask, hidden)
    tau = row_temperature(temperature, target, compute_dtype(hidden))
    call = _Call(target, rows, tau, loss, entropy, dtype, level, weight_grad, logits_bytes, torch.is_grad_enabled())
    value, logp, h, lse = _LinearLoss.apply(hidden, weight, bias, call)
    return value, TokenStats(logp, h if entropy else None, lse)


def _live_rows(mask: Tensor | None, hidden: Tensor) -> Tensor:
    T = hidden.shape[0]
    if mask is None:
        return torch.arange(T, device=hidden.device)
    same_device(hidden=hidden, mask=mask)
    if mask.dtype == torch.int64:
        dims("mask", mask, "N", (torch.int64,))
        return mask
    dims("mask", mask, "T", (torch.bool,), T=T)
    return mask.nonzero().squeeze(1)


def _refuse_gradients(loss: Loss) -> None:
    """A closed-over tensor would silently get no gradient."""
    if not callable(loss):
        raise TypeError(f"loss: expected a function of (logp, entropy, rows), got {type(loss).__name__}")
    closure = getattr(loss, "__closure__", None) or ()
    for cell, name in zip(closure, getattr(getattr(loss, "__code__", None), "co_freevars", ()), strict=False):
        if isinstance(cell.cell_contents, Tensor) and cell.cell_contents.requires_grad:
            raise ValueError(f"loss: it closes over {name!r}, which requires grad and would get none; detach it, or pass it through hidden")
