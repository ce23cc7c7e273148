"""Any loss of per-token log-probs and entropies, from hidden states and the head's weight, its gradient
computed in the forward.

For each chunk of live rows:  logits = x W^T  ->  logp, entropy  ->  loss(logp, entropy, rows) and its
                              derivative by both
  ->  the logits overwritten by their gradient  ->  dx = dlogits W,  dW += dlogits^T x.

Three products of 2 N D V FLOPs for N live rows, nothing recomputed, one chunk of logits alive at a time.
Masked rows leave before the first product and, on CPU, rows whose derivative is zero (clipped tokens) before
the other two.  A sequence-level loss needs every log-prob before any derivative: its logits are kept when
they fit `logits_bytes`, and recomputed (a fourth product) when not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl.kernels._check import compute_dtype, dims, one_of, same_device
from fastrl.kernels._head import (
    HeadGrads,
    accumulator,
    chunk_rows,
    compact,
    gradient_dtype,
    live_rows,
    logits_budget,
    logits_buffer,
    project,
)
from fastrl.kernels._shard import Shard
from fastrl.kernels.linear_logp import check_linear, check_mask, row_stats
from fastrl.kernels.linear_logp import reference as linear_reference
from fastrl.kernels.token_logp import TokenStats, backward_into_op, front, row_temperature

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # some builds of torch have none

Loss = Callable[[Tensor, Tensor | None, Tensor], Tensor]
LEVELS = ("token", "sequence")


# --- reference --------------------------------------------------------------------------------------
def reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    loss: Loss,
    mask: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    entropy: bool,
) -> Tensor:
    """The definition: materialised float64 logits, one call of the loss on the live rows, gradients by
    autograd.
    """
    logp, h = linear_reference(hidden, weight, target, bias, temperature)
    rows = mask.nonzero().squeeze(1)
    return loss(logp[rows], h[rows] if entropy else None, rows)


# --- the chunks -------------------------------------------------------------------------------------
@dataclass(slots=True)
class _Chunk:
    """N rows on their way through: what the forward leaves for the gradient."""

    at: slice | Tensor  # where they are in (T,) vectors: a slice when every row is live, which copies nothing
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
    all_live: bool
    temperature: Tensor
    loss: Loss
    entropy: bool
    dtype: torch.dtype
    level: str
    weight_grad: Tensor | None
    logits_bytes: int | None
    grads: bool  # False under no_grad, where inputs may still say that they require grad
    shard: Shard | None


class _Pass:
    """One walk over the chunks, accumulating the loss, the statistics and the gradients."""

    def __init__(
        self, call: _Call, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]
    ) -> None:
        self.call, self.hidden, self.weight, self.bias = call, hidden, weight, bias
        stat = compute_dtype(hidden)
        T = hidden.shape[0]
        self.loss = hidden.new_zeros((), dtype=stat)
        self.logp, self.lse = (hidden.new_zeros(T, dtype=stat) for _ in range(2))
        self.entropy = hidden.new_zeros(T if call.entropy else 0, dtype=stat)
        self.grads = HeadGrads(
            hidden, weight, bias, needs, weight_grad=call.weight_grad, partial=call.shard is not None
        )
        # as these logits count them
        self.target = call.target if call.shard is None else call.shard.local(call.target)
        self.differentiate = any(needs)
        most = weight.shape[0] if call.shard is None else call.shard.most
        self.size = chunk_rows(most, call.dtype.itemsize, hidden.device, call.logits_bytes)
        kept = call.rows.numel() * most * call.dtype.itemsize <= logits_budget(
            hidden.device, call.logits_bytes
        )
        self.keep = call.level == "token" or kept
        alive = (
            call.rows.numel()
            if call.level == "sequence" and kept and self.differentiate
            else min(self.size, call.rows.numel())
        )
        self.buffer = logits_buffer(alive, weight.shape[0], call.dtype, hidden.device)

    def run(self) -> None:
        call = self.call
        starts = range(0, call.rows.numel(), self.size)
        if call.level == "token":
            for a in starts:
                chunk = self.forward(a)
                self.backward(
                    chunk, *self.derivative(call.rows[a : a + self.size], chunk.logp, chunk.entropy)
                )
            return
        chunks = [self.forward(a) for a in starts]
        if chunks:
            logp, entropy = torch.cat([c.logp for c in chunks]), torch.cat([c.entropy for c in chunks])
            dlogp, dentropy = self.derivative(call.rows, logp, entropy)
            for a, chunk in zip(starts, chunks, strict=True):
                self.backward(chunk, dlogp[a : a + self.size], dentropy[a : a + self.size])

    def project(self, x: Tensor, a: int = 0) -> Tensor:
        """The logits of x, in the buffer; from its row `a` on when all of them are kept there."""
        first = a if a + x.shape[0] <= self.buffer.shape[0] else 0
        return project(x, self.weight, self.bias, self.call.dtype, self.buffer[first : first + x.shape[0]])

    def forward(self, a: int) -> _Chunk:
        call = self.call
        stop = min(a + self.size, call.rows.numel())
        at: slice | Tensor = slice(a, stop) if call.all_live else call.rows[a:stop]
        x = self.hidden[at]
        logits = self.project(x, a)
        logp, h, m, log_s = row_stats(logits, call.target[at], call.temperature[at], call.entropy, call.shard)
        self.logp[at] = logp
        self.lse[at] = m + log_s
        if call.entropy:
            self.entropy[at] = h
        return _Chunk(at, x, logits if self.keep else None, logp, h, m, log_s)

    def derivative(self, rows: Tensor, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """Add these rows' loss, and return its derivative by logp and by entropy (empty when there is
        none).
        """
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
        at, x, logits, entropy, m, log_s = (
            chunk.at,
            chunk.x,
            chunk.logits,
            chunk.entropy,
            chunk.m,
            chunk.log_s,
        )
        live = live_rows(dlogp, dentropy) if dentropy.numel() else live_rows(dlogp)
        if live is not None:
            if logits is not None:
                logits, live = compact(logits, live)
            at = live + at.start if isinstance(at, slice) else at[live]
            entropy, dentropy = (v[live] if v.numel() else v for v in (entropy, dentropy))
            x, dlogp, m, log_s = x[live], dlogp[live], m[live], log_s[live]
        logits = self.project(x) if logits is None else logits
        dtype = gradient_dtype(logits, self.weight)
        backward_into_op(
            dlogp, dentropy, logits, self.target[at], self.call.temperature[at], entropy, m, log_s, dtype
        )
        self.grads.add(at, x, front(logits, dtype))


# --- autograd ---------------------------------------------------------------------------------------
class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        needs = tuple(call.grads and n for n in ctx.needs_input_grad[:3])
        walk = _Pass(call, hidden, weight, bias, needs)  # type: ignore[arg-type]
        walk.run()
        grads = walk.grads
        if call.shard is not None and grads.hidden is not None:
            call.shard.sum(grads.hidden)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(grads.hidden, grads.weight if call.weight_grad is None else None, grads.bias)
        ctx.mark_non_differentiable(walk.logp, walk.entropy, walk.lse)
        return walk.loss, walk.logp, walk.entropy, walk.lse

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*(None if g is None else _scaled(g, dloss, dtype) for g, dtype in grads), None)


def _scaled(grad: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    """A scaled copy: a second backward finds the gradient unchanged."""
    if grad.dtype == dtype or torch.compiler.is_compiling():
        return (grad * dloss.to(grad.dtype)).to(dtype)
    # rounded on its way out
    return torch.mul(grad, dloss.to(grad.dtype), out=torch.empty(grad.shape, dtype=dtype, device=grad.device))


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
    group: ProcessGroup | None = None,
) -> tuple[Tensor, TokenStats]:
    """The sum of `loss` over chunks of rows, with the gradients of hidden, weight and bias computed along the
    way.

    `loss(logp, entropy, rows)` gets the log-probs and entropies (nats; None unless asked for) of N rows and
    their int64 indices into T, and returns these rows' scalar contribution, already divided by global
    denominators: the sum over chunks is the loss.  It is plain PyTorch, differentiated by torch.func.vjp.  A
    tensor it closes over is a constant: one that requires grad is refused.  With `level="sequence"` it is
    called once, with every live row, in order.

    Shapes:  hidden (T, D), weight (V, D) of one dtype;  target (T,) int;  bias (V,);  temperature a float or
             (T,); mask (T,) bool, or (N,) int64 distinct live rows (a bool mask on CUDA waits for the device
             once, to count them)
             ->  loss scalar, TokenStats (T,), detached, 0 where masked; fp32 (fp64 for fp64 inputs).
             With a `group` of processes, weight, bias and weight_grad are this process's part of the
             vocabulary, in the order of the ranks and of any size; all else is the same on every process, the
             loss and the gradient of hidden too.  The processes wait for the device once, to learn each
             other's sizes.
    Memory:  one chunk of logits of `logits_bytes` (default: at most 64 MiB on CPU, 2 GiB on CUDA), one
             float32 gradient of the weight, one gradient of hidden.  `weight_grad`, a float32 (V, D) buffer,
             takes the weight's gradient instead, added during the forward, so that micro-batches share it;
             the loss must then be differentiated with an upstream gradient of 1.
    Raises:  ValueError or TypeError naming the argument.
    """
    dtype = check_linear(hidden, weight, target, bias, logits_dtype)
    one_of("level", level, LEVELS)
    if not torch.compiler.is_compiling():  # which cannot look into a closure
        _refuse_gradients(loss)
    if weight_grad is not None:
        dims(
            "weight_grad",
            weight_grad,
            "V D",
            (accumulator(weight[:0]).dtype,),
            V=weight.shape[0],
            D=weight.shape[1],
        )
        same_device(weight=weight, weight_grad=weight_grad)
    rows = _live_rows(mask, hidden)
    tau = row_temperature(temperature, target, compute_dtype(hidden))
    shard = None if group is None else Shard.of(weight, group)
    grads = torch.is_grad_enabled()
    call = _Call(
        target, rows, mask is None, tau, loss, entropy, dtype, level, weight_grad, logits_bytes, grads, shard
    )
    value, logp, h, lse = _LinearLoss.apply(hidden, weight, bias, call)
    return value, TokenStats(logp, h if entropy else None, lse)


def _live_rows(mask: Tensor | None, hidden: Tensor) -> Tensor:
    check_mask(mask, hidden)
    if mask is None:
        return torch.arange(hidden.shape[0], device=hidden.device)
    return mask.nonzero().squeeze(1) if mask.dtype == torch.bool else mask


def _refuse_gradients(loss: Loss) -> None:
    """A closed-over tensor would silently get no gradient."""
    if not callable(loss):
        raise TypeError(f"loss: expected a function of (logp, entropy, rows), got {type(loss).__name__}")
    closure = getattr(loss, "__closure__", None) or ()
    for cell, name in zip(closure, getattr(getattr(loss, "__code__", None), "co_freevars", ()), strict=False):
        if isinstance(cell.cell_contents, Tensor) and cell.cell_contents.requires_grad:
            raise ValueError(
                f"loss: it closes over {name!r}, which requires grad and would get none; detach it, "
                "or pass it through hidden"
            )
