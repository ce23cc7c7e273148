"""Cross-entropy of each target token, from hidden states and the head's weight, without the (T, V) logits.

    z = softcap tanh(logits / softcap)   (z = logits without a softcap)        lse = logsumexp(z)
    loss = (1 - eps) (lse - z_target) + eps (lse - mean_v z_v) + z_loss lse^2                           (nats)
    dloss/dz_v = (1 + 2 z_loss lse) p_v - (1 - eps) 1[v = target] - eps / V

With reduction "mean" and "sum" the gradient is formed in the forward: three products, nothing recomputed.
With "none" every token has its own upstream gradient, and the backward recomputes the logits.

Without label smoothing, softcap and z-loss a row is one of token_logp with dlogp = -dloss, and runs on the
kernels of that op: C++ on CPU, on CUDA one read for value and gradient.  The implementations registered here
are for rows with those options.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.kernels._backend import pick, register, register_triton, requested, use_backend
from fastrl.kernels._check import compute_dtype, one_of
from fastrl.kernels._chunks import chunk_rows, spans
from fastrl.kernels._contexts import final, ignore_autocast, kept, lowered, with_gradient, without_gradient
from fastrl.kernels._head import HeadGrads, gradient_dtype, logits_buffer, project, scaled
from fastrl.kernels._rows import in_any_order, put_rows
from fastrl.kernels.linear_logp import check_linear, check_mask
from fastrl.kernels.token_logp import forward_op as forward_token_op
from fastrl.kernels.token_logp import fused_op as fused_token_op
from fastrl.kernels.token_logp import narrow_view

REDUCTIONS = ("mean", "sum", "none")


# --- reference --------------------------------------------------------------------------------------
def reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    softcap: float,
    z_loss: float,
) -> Tensor:
    """The definition, through float64 logits, differentiable by autograd."""
    z = hidden.double() @ weight.double().T
    z = z if bias is None else z + bias.double()
    z = softcap * torch.tanh(z / softcap) if softcap else z
    lse = z.logsumexp(-1)
    live = target != ignore_index
    at = z.gather(1, torch.where(live, target, 0)[:, None].long()).squeeze(1)
    smoothed = smoothing * (lse - z.mean(-1)) if smoothing else 0
    loss = (1 - smoothing) * (lse - at) + smoothed + z_loss * lse**2
    loss = torch.where(live, loss, 0)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / live.sum()}[reduction]


def rows_forward(
    logits: Tensor, target: Tensor, smoothing: float, softcap: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, m and log s of each row of logits, (N,) each."""
    z = logits.to(compute_dtype(logits))
    z = softcap * torch.tanh(z / softcap) if softcap else z
    m = z.amax(-1) if z.shape[0] else z.new_empty(0)
    d = z - m[:, None]
    log_s = d.exp().sum(-1).log()
    inside = (target >= 0) & (target < z.shape[1])
    loss = (1 - smoothing) * (log_s - d.gather(1, torch.where(inside, target, 0)[:, None].long()).squeeze(1))
    if smoothing:
        loss = loss + smoothing * (log_s - d.mean(-1))
    return torch.where(inside, loss + z_loss * (m + log_s) ** 2, torch.nan), m, log_s


def rows_fused_into(
    out: Tensor,
    logits: Tensor,
    target: Tensor,
    dloss: Tensor,
    smoothing: float,
    softcap: float,
    z_loss: float,
) -> Tensor:
    """Loss (N,); writes the gradient for an upstream gradient `dloss` (N,) to `out`.

    `out` may lie over the logits, whose memory is used as scratch.
    """
    loss, m, log_s = rows_forward(logits, target, smoothing, softcap, z_loss)
    z = logits.to(m.dtype)
    slope = None
    if softcap:
        tanh = z.div_(softcap).tanh_()
        slope = tanh.square().neg_().add_(1)
        z = tanh.mul_(softcap)
    g = z.sub_(m[:, None]).sub_(log_s[:, None]).exp_().mul_((1 + 2 * z_loss * (m + log_s))[:, None])
    if smoothing:
        g -= smoothing / z.shape[1]
    inside = (target >= 0) & (target < z.shape[1])
    at = torch.where(inside, target, 0)[:, None].long()
    with in_any_order(g):  # one entry a row
        g.scatter_add_(1, at, torch.where(inside, smoothing - 1.0, 0.0).to(g.dtype)[:, None])
    g = (g if slope is None else g.mul_(slope)).mul_(dloss[:, None])
    if g is not out:
        out.copy_(g.to(out.dtype))  # a copy first: `out` may be narrower, and lie over g
    return loss


register("linear_cross_entropy", "reference", forward=rows_forward, fused_into=rows_fused_into)
register_triton("linear_cross_entropy", "linear_cross_entropy", "forward", "fused_into")


# --- the chunks -------------------------------------------------------------------------------------
class _Options(NamedTuple):
    """What both directions take, in the order of the registered ops."""

    ignore_index: int
    smoothing: float
    softcap: float
    z_loss: float
    logits_dtype: torch.dtype
    rows: int  # the most per chunk of logits

    @property
    def plain(self) -> bool:
        """Whether the rows are those of token_logp."""
        return not (self.smoothing or self.softcap or self.z_loss)


def _live(target: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    """The rows that count, int64.  Finding them, unless they are given, waits for the device once."""
    if mask is None:
        mask = target != ignore_index
    return mask.nonzero().squeeze(1) if mask.dtype == torch.bool else mask


def _rows_forward(logits: Tensor, target: Tensor, o: _Options) -> Tensor:
    """Loss (N,) of rows of logits."""
    if o.plain:
        ones = torch.ones_like(target, dtype=compute_dtype(logits))
        return forward_token_op(logits, target, ones, False, False)[0].neg_()
    forward = pick("linear_cross_entropy", logits, "forward")
    return forward(logits, target, o.smoothing, o.softcap, o.z_loss)[0]


def _rows_fused(logits: Tensor, target: Tensor, dloss: Tensor, o: _Options, dtype: torch.dtype) -> Tensor:
    """Loss (N,); the gradient is left in `narrow_view(logits, dtype)`."""
    if o.plain:
        no_entropy = dloss.new_empty(0)
        stats = fused_token_op(logits, target, torch.ones_like(dloss), -dloss, no_entropy, dtype)
        return stats[0].neg_()
    into = pick("linear_cross_entropy", logits, "fused_into")
    return into(narrow_view(logits, dtype), logits, target, dloss, o.smoothing, o.softcap, o.z_loss)


def _walk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    live: Tensor,
    dloss: Tensor,
    wanted: Sequence[bool],
    o: _Options,
) -> tuple[Tensor, HeadGrads]:
    """Loss (T,), 0 at ignored rows, and the `wanted` gradients for the upstream gradient `dloss` (T,)."""
    loss = hidden.new_zeros(hidden.shape[0], dtype=torch.promote_types(o.logits_dtype, torch.float32))
    given_bias = bias if bias.numel() else None
    cuts = spans(live.numel(), o.rows, hidden.device)
    grads = HeadGrads(hidden, weight, given_bias, wanted, chunks=len(cuts))
    buffer = logits_buffer(min(o.rows, live.numel()), weight.shape[0], o.logits_dtype, hidden.device)
    asked = requested("linear_cross_entropy")

    # a backend asked for this op runs its plain rows too
    with use_backend(asked, "token_logp") if asked else contextlib.nullcontext():
        for part in (live[cut] for cut in cuts):
            x, y = hidden[part], target[part]
            logits = project(x, weight, given_bias, o.logits_dtype, buffer[: part.numel()])
            if not any(wanted):
                put_rows(loss, part, _rows_forward(logits, y, o))
                continue
            dtype = gradient_dtype(logits, weight)
            put_rows(loss, part, _rows_fused(logits, y, dloss[part], o, dtype))
            grads.add(part, x, narrow_view(logits, dtype))
    return loss, grads


def _results(grads: HeadGrads, *like: Tensor) -> tuple[Tensor, ...]:
    """The gradients in the dtypes of hidden, weight and bias; empty where not wanted."""
    pairs = zip((grads.hidden, grads.weight, grads.bias), like, strict=True)
    return tuple(x.new_empty(0) if g is None else g.to(x.dtype) for g, x in pairs)


# --- registration and autograd ----------------------------------------------------------------------
@torch.library.custom_op("fastrl::linear_cross_entropy", mutates_args=())
def forward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    mask: Tensor | None,
    reduction: str,
    wanted: Sequence[bool],
    ignore_index: int,
    smoothing: float,
    softcap: float,
    z_loss: float,
    logits_dtype: torch.dtype,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, scalar or (T,) for "none", and the `wanted` gradients of hidden, weight and bias.

    The gradients are for an upstream gradient of 1.
    """
    o = _Options(ignore_index, smoothing, softcap, z_loss, logits_dtype, rows)
    live = _live(target, mask, ignore_index)
    count = live.numel() if reduction == "mean" else 1
    stat = torch.promote_types(logits_dtype, torch.float32)
    share = torch.full((1,), 1 / max(count, 1), dtype=stat, device=hidden.device).expand(hidden.shape[0])
    loss, grads = _walk(hidden, weight, bias, target, live, share, wanted, o)
    if reduction != "none":
        loss = loss.sum() / count if count else loss.sum() * torch.nan
    return loss, *_results(grads, hidden, weight, bias)  # type: ignore[return-value]


@torch.library.custom_op("fastrl::linear_cross_entropy_backward", mutates_args=())
def backward_op(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    mask: Tensor | None,
    wanted: Sequence[bool],
    ignore_index: int,
    smoothing: float,
    softcap: float,
    z_loss: float,
    logits_dtype: torch.dtype,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `wanted` gradients for a per-token upstream gradient (T,); recomputes the logits."""
    o = _Options(ignore_index, smoothing, softcap, z_loss, logits_dtype, rows)
    grads = _walk(hidden, weight, bias, target, _live(target, mask, ignore_index), dloss, wanted, o)[1]
    return _results(grads, hidden, weight, bias)  # type: ignore[return-value]


@forward_op.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    target,
    mask,
    reduction,
    wanted,
    ignore_index,
    smoothing,
    softcap,
    z_loss,
    logits_dtype,
    rows,
):
    out = hidden.new_empty(
        hidden.shape[:1] if reduction == "none" else (),
        dtype=torch.promote_types(logits_dtype, torch.float32),
    )
    return out, *(
        x.new_empty(x.shape if want else 0) for x, want in zip((hidden, weight, bias), wanted, strict=True)
    )


@backward_op.register_fake
def _(dloss, hidden, weight, bias, target, mask, wanted, *options):  # type: ignore[no-untyped-def]
    return tuple(
        x.new_empty(x.shape if want else 0) for x, want in zip((hidden, weight, bias), wanted, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, mask, ctx.reduction, _, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[1:])
    if ctx.reduction == "none":
        ctx.save_for_backward(hidden, weight, bias, target, mask)
    else:
        ctx.save_for_backward(*output[1:], *kept(hidden, weight, bias))


def _autograd(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    if ctx.reduction == "none":
        grads = differentiate(dloss, *ctx.saved_tensors, wanted, *ctx.options)
    else:
        saved = ctx.saved_tensors
        found = final("linear_cross_entropy", saved[:3], saved[3:])
        grads = tuple(scaled(g, dloss, g.dtype) for g in found)
    return (*(g if want else None for g, want in zip(grads, wanted, strict=True)), *(None,) * 10)


differentiate = without_gradient(backward_op)
differentiable = with_gradient(forward_op, _autograd, _setup)
ignore_autocast("linear_cross_entropy", "linear_cross_entropy_backward")


# --- public -----------------------------------------------------------------------------------------
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    logits_dtype: torch.dtype = torch.float32,
    logits_bytes: int | None = None,
) -> Tensor:
    """Cross-entropy (nats), differentiable in hidden, weight and bias.

    Shapes:  hidden (T, D), weight (V, D) of one dtype;  target (T,) int, `ignore_index` where a token does
             not count;  bias (V,);  mask (T,) bool, or (N,) int64 distinct rows: the tokens that count, in
             place of `ignore_index`
             ->  a scalar, or (T,) with 0 at ignored tokens for reduction "none"; fp32 (fp64 for fp64 inputs).
             "mean" divides by the number of tokens that count (NaN when there is none, as in PyTorch).
    Memory:  one chunk of logits of `logits_bytes` (default: at most 64 MiB on CPU, a sixteenth of the
             device's memory on CUDA), and the gradients, in the forward.  Finding the rows that count waits
             for the device once; rows given as int64 `mask` do not.
    Raises:  ValueError or TypeError naming the argument.  A target outside [0, V) that is not `ignore_index`
             gives NaN.
    """
    hidden, weight = lowered(hidden, weight)
    dtype = check_linear(hidden, weight, target, bias, logits_dtype)
    one_of("reduction", reduction, REDUCTIONS)
    check_mask(mask, hidden)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected None or a positive number, got {softcap}")
    rows = chunk_rows(weight.shape[0], dtype.itemsize, hidden.device, logits_bytes)
    b = weight.new_empty(0) if bias is None else bias
    fused = torch.is_grad_enabled() and reduction != "none"
    wanted = [fused and x.requires_grad for x in (hidden, weight, b)]
    options = _Options(
        ignore_index, float(label_smoothing), float(softcap or 0.0), float(z_loss), dtype, rows
    )
    loss: Tensor = differentiable(hidden, weight, b, target, mask, reduction, wanted, *options)[0]
    return loss
