"""Any loss of per-token log-probs and entropies, from hidden states and the head's weight, with its gradient
computed in the forward.

For each chunk of live rows:

    logits = x W^T  ->  logp, entropy  ->  loss(logp, entropy, rows) and its derivative by both
    ->  the logits overwritten by their gradient  ->  dx = dlogits W,  dW += dlogits^T x

These are three products of 2 N D V FLOPs for N live rows; nothing is recomputed, and one chunk of logits is
alive at a time.  Masked rows are dropped before the first product and, on CPU, rows of zero derivative
(clipped tokens) before the other two.  A sequence-level loss needs every log-prob before any derivative: its
logits are kept when they fit `logits_bytes`, and recomputed (a fourth product) when not; on CUDA all but as
many rows as fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl.kernels._check import compute_dtype, dims, one_of, same_device
from fastrl.kernels._chunks import chunk_rows, logits_budget, policy, rows_that_fit, spans
from fastrl.kernels._contexts import (
    checkpointed,
    final,
    functional,
    gradient_of,
    lowered,
    needed,
    no_autocast,
)
from fastrl.kernels._head import (
    HeadGrads,
    accumulator,
    compact,
    gradient_dtype,
    live_rows,
    logits_buffer,
    project,
    scaled,
)
from fastrl.kernels._rows import put_rows
from fastrl.kernels._shard import Shard
from fastrl.kernels.linear_logp import check_linear, check_mask, row_stats
from fastrl.kernels.linear_logp import reference as linear_reference
from fastrl.kernels.token_logp import TokenStats, backward_into_op, narrow_view, row_temperature

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
    """The definition: float64 logits, one call of the loss on the live rows, gradients by autograd."""
    logp, h = linear_reference(hidden, weight, target, bias, temperature)
    rows = mask.nonzero().squeeze(1)
    return loss(logp[rows], h[rows] if entropy else None, rows)


# --- the chunks -------------------------------------------------------------------------------------
@dataclass(slots=True)
class _Chunk:
    """N rows after their forward: what their gradient needs."""

    at: slice | Tensor  # their place in (T,) vectors: a slice when every row is live, which copies nothing
    x: Tensor
    logits: Tensor | None
    logp: Tensor
    entropy: Tensor
    m: Tensor
    log_s: Tensor


@dataclass(frozen=True, slots=True)
class _Call:
    """Non-differentiable arguments of one call."""

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
    needs: tuple[bool, bool, bool]  # a gradient of hidden, weight and bias; none under no_grad
    shard: Shard | None


class _Pass:
    """One walk over the chunks, accumulating the loss, the statistics and the gradients."""

    def __init__(self, call: _Call, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.call, self.hidden, self.weight, self.bias = call, hidden, weight, bias
        stat, T = compute_dtype(hidden), hidden.shape[0]
        self.loss = hidden.new_zeros((), dtype=stat)
        self.logp, self.lse = (hidden.new_zeros(T, dtype=stat) for _ in range(2))
        self.entropy = hidden.new_zeros(T if call.entropy else 0, dtype=stat)
        self.differentiate = any(call.needs)
        # counted from the first row of these logits
        self.target = call.target if call.shard is None else call.shard.local(call.target)

        self.cut()
        rows = max([0, *(s.stop - s.start for s in self.spans)])
        alive = call.rows.numel() if self.keep_all else rows
        self.buffer = logits_buffer(alive, weight.shape[0], call.dtype, hidden.device)
        self.grads = HeadGrads(
            hidden,
            weight,
            bias,
            call.needs,
            chunks=len(self.spans),
            weight_grad=call.weight_grad,
            partial=call.shard is not None,
        )

    def cut(self) -> None:
        """Choose the chunks, and whose logits outlive their forward.

        keep_all   a sequence-level loss whose logits fit the budget together
        keep_last  one whose logits do not: those of the last chunk are still in the buffer when its turn
                   comes first; only where chunks are cut for it, as another order gives other bits
        """
        call, device, N = self.call, self.hidden.device, self.call.rows.numel()
        V, default = self.weight.shape[0], None if call.shard is None else call.shard.budget
        if call.shard is not None:  # chunks are the same on every rank
            V = call.shard.most
        budgets = call.logits_bytes, default
        size = V, call.dtype.itemsize, device
        most = chunk_rows(*size, *budgets)

        sequence = call.level == "sequence" and self.differentiate
        all_fit = rows_that_fit(*size, logits_budget(device, *budgets)) >= N
        self.keep_all = sequence and all_fit
        self.keep_last = sequence and not all_fit and policy(device).once
        self.spans = spans(N, most, device, full_last=self.keep_last)

    def run(self) -> None:
        call = self.call
        if call.level == "token":
            for span in self.spans:
                chunk = self.forward(span, keep=True)
                derivatives = self.derivative(call.rows[span], chunk.logp, chunk.entropy)
                self.backward(chunk, *derivatives)
            return

        last = len(self.spans) - 1
        keep = [self.keep_all or (self.keep_last and i == last) for i in range(len(self.spans))]
        chunks = [self.forward(span, k) for span, k in zip(self.spans, keep, strict=True)]
        if not chunks:
            return
        logp, entropy = torch.cat([c.logp for c in chunks]), torch.cat([c.entropy for c in chunks])
        dlogp, dentropy = self.derivative(call.rows, logp, entropy)
        parts = list(zip(self.spans, chunks, strict=True))
        for span, chunk in reversed(parts) if self.keep_last else parts:
            self.backward(chunk, dlogp[span], dentropy[span])

    def project(self, x: Tensor, a: int = 0) -> Tensor:
        """The logits of x, in the buffer: from its row `a` on when it holds all logits."""
        first = a if a + x.shape[0] <= self.buffer.shape[0] else 0
        return project(x, self.weight, self.bias, self.call.dtype, self.buffer[first : first + x.shape[0]])

    def forward(self, span: slice, keep: bool) -> _Chunk:
        call = self.call
        at: slice | Tensor = span if call.all_live else call.rows[span]
        x = self.hidden[at]
        logits = self.project(x, span.start)
        logp, h, m, log_s = row_stats(logits, call.target[at], call.temperature[at], call.entropy, call.shard)
        put_rows(self.logp, at, logp)
        put_rows(self.lse, at, m + log_s)
        if call.entropy:
            put_rows(self.entropy, at, h)
        return _Chunk(at, x, logits if keep else None, logp, h, m, log_s)

    def derivative(self, rows: Tensor, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """Add the loss of these rows; returns its derivative by logp, and by entropy (empty without one)."""
        call = self.call
        if not self.differentiate:
            self.loss += call.loss(logp, entropy if call.entropy else None, rows)
            return logp, entropy
        inputs = (logp, entropy) if call.entropy else (logp,)
        value, (dlogp, *rest) = gradient_of(lambda p, h=None: call.loss(p, h, rows), *inputs)
        self.loss += value
        return dlogp, rest[0] if rest else entropy

    def backward(self, chunk: _Chunk, dlogp: Tensor, dentropy: Tensor) -> None:
        if not self.differentiate:
            return
        at, x, logits = chunk.at, chunk.x, chunk.logits
        entropy, m, log_s = chunk.entropy, chunk.m, chunk.log_s

        live = live_rows(dlogp, dentropy) if dentropy.numel() else live_rows(dlogp)
        if live is not None:
            if logits is not None:
                logits, live = compact(logits, live)
            at = live + at.start if isinstance(at, slice) else at[live]
            entropy, dentropy = (v[live] if v.numel() else v for v in (entropy, dentropy))
            x, dlogp, m, log_s = x[live], dlogp[live], m[live], log_s[live]

        logits = self.project(x) if logits is None else logits
        dtype = gradient_dtype(logits, self.weight)
        target, temperature = self.target[at], self.call.temperature[at]
        backward_into_op(dlogp, dentropy, logits, target, temperature, entropy, m, log_s, dtype)
        self.grads.add(at, x, narrow_view(logits, dtype))


# --- autograd ---------------------------------------------------------------------------------------
def _walked(hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> _Pass:
    """All chunks, their gradients summed over the processes of the group."""
    walk = _Pass(call, hidden, weight, bias)
    walk.run()
    if call.shard is not None and walk.grads.hidden is not None:
        call.shard.sum(walk.grads.hidden)
    return walk


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call
    ) -> tuple[Tensor, ...]:
        walk = _walked(hidden, weight, bias, call)
        grads = walk.grads
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(grads.hidden, grads.weight if call.weight_grad is None else None, grads.bias)
        ctx.mark_non_differentiable(walk.logp, walk.entropy, walk.lse)
        return walk.loss, walk.logp, walk.entropy, walk.lse

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved = final("linear_loss", ctx.saved_tensors, ())
        grads = zip(saved, ctx.dtypes, strict=True)
        return (*(None if g is None else scaled(g, dloss, dtype) for g, dtype in grads), None)


class _FunctionalLinearLoss(torch.autograd.Function):
    """The form that torch.func requires: gradients are outputs, empty where there is none."""

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> tuple[Tensor, ...]:
        walk = _walked(hidden, weight, bias, call)
        found = walk.grads.hidden, walk.grads.weight if call.weight_grad is None else None, walk.grads.bias
        grads = (hidden.new_empty(0) if g is None else g for g in found)
        return walk.loss, walk.logp, walk.entropy, walk.lse, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors = inputs[0], inputs[1], inputs[0].new_empty(0) if inputs[2] is None else inputs[2]
        ctx.mark_non_differentiable(*output[1:])
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
        ctx.save_for_backward(*output[4:], *tensors)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grads = zip(final("linear_loss", saved[:3], saved[3:]), ctx.dtypes, strict=True)
        return (*(scaled(g, dloss, dtype) if g.numel() else None for g, dtype in grads), None)


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
    """The sum of `loss` over chunks of rows; computes the gradients of hidden, weight and bias along the way.

    `loss(logp, entropy, rows)` takes the log-probs and entropies (nats; None unless asked for) of N rows and
    their int64 indices into T, and returns the scalar contribution of these rows, already divided by global
    denominators: the sum over chunks is the loss.  It is plain PyTorch, differentiated by autograd.  A
    tensor that it closes over is a constant: one that requires grad is refused.  With `level="sequence"` it
    is called once, with every live row, in order.  Autocast is off while it runs.

    Shapes:  hidden (T, D), weight (V, D) of one dtype;  target (T,) int;  bias (V,);  temperature a float or
             (T,); mask (T,) bool, or (N,) int64 distinct live rows (a bool mask on CUDA waits for the device
             once, to count them)
             ->  loss scalar, TokenStats (T,), detached, 0 where masked; fp32 (fp64 for fp64 inputs).
             With a `group` of processes, weight, bias and weight_grad are this process's part of the
             vocabulary, of any size and in the order of the ranks; everything else is the same on every
             process, as are the loss and the gradient of hidden.  The processes wait for the device once, to
             exchange their sizes.
    Memory:  one chunk of logits of `logits_bytes` (default: at most 64 MiB on CPU, a sixteenth of the
             device's memory on CUDA: `_chunks.py`), one float32 gradient of the weight (on CUDA in the
             weight's dtype where all rows are one chunk), one gradient of hidden.  `weight_grad`, a float32
             (V, D) buffer, takes the weight's gradient instead, added during the forward, so that
             micro-batches share it; the loss must then be differentiated with an upstream gradient of 1.
    Raises:  ValueError or TypeError naming the argument.
    """
    hidden, weight = lowered(hidden, weight)
    dtype = check_linear(hidden, weight, target, bias, logits_dtype)
    one_of("level", level, LEVELS)
    if not torch.compiler.is_compiling():  # which cannot inspect a closure
        _refuse_gradients(loss)
    if weight_grad is not None:
        V, D = weight.shape
        dims("weight_grad", weight_grad, "V D", (accumulator(weight[:0]).dtype,), V=V, D=D)
        same_device(weight=weight, weight_grad=weight_grad)
        if checkpointed():
            raise ValueError(
                "weight_grad: expected a call outside of torch.utils.checkpoint, which runs the forward "
                "twice and would add the gradient twice; leave weight_grad out, or take the loss out of it"
            )

    rows = _live_rows(mask, hidden)
    tau = row_temperature(temperature, target, compute_dtype(hidden))
    shard = None if group is None else Shard.of(weight, group)
    call = _Call(
        target=target,
        rows=rows,
        all_live=mask is None,
        temperature=tau,
        loss=loss,
        entropy=entropy,
        dtype=dtype,
        level=level,
        weight_grad=weight_grad,
        logits_bytes=logits_bytes,
        needs=(needed(hidden), needed(weight), needed(bias)),
        shard=shard,
    )
    function = _FunctionalLinearLoss if functional() else _LinearLoss
    with no_autocast(hidden.device.type):
        value, logp, h, lse = function.apply(hidden, weight, bias, call)[:4]
    return value, TokenStats(logp, h if entropy else None, lse)


def _live_rows(mask: Tensor | None, hidden: Tensor) -> Tensor:
    check_mask(mask, hidden)
    if mask is None:
        return torch.arange(hidden.shape[0], device=hidden.device)
    return mask.nonzero().squeeze(1) if mask.dtype == torch.bool else mask


def _refuse_gradients(loss: Loss) -> None:
    """Raise ValueError if `loss` closes over a tensor that requires grad: it would silently get none."""
    if not callable(loss):
        raise TypeError(f"loss: expected a function of (logp, entropy, rows), got {type(loss).__name__}")
    closure = getattr(loss, "__closure__", None) or ()
    for cell, name in zip(closure, getattr(getattr(loss, "__code__", None), "co_freevars", ()), strict=False):
        if isinstance(cell.cell_contents, Tensor) and cell.cell_contents.requires_grad:
            raise ValueError(
                f"loss: it closes over {name!r}, which requires grad and would get none; detach it, "
                "or pass it through hidden"
            )
