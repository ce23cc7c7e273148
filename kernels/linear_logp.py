"""Log-probability and entropy of each target token, from hidden states and the head's weight, without the
(T, V) logits.

    logits = hidden weight^T + bias, a chunk of rows at a time; the rest is `token_logp`.

The forward takes 2 T D V FLOPs, the backward, which recomputes the logits, 6 T D V more.  A loss that is
known when the log-probs are computed should use `linear_loss`, which recomputes nothing: 6 T D V in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl.kernels._backend import pick, register, register_triton
from fastrl.kernels._check import FLOATS, INTS, compute_dtype, dims, same_device
from fastrl.kernels._chunks import chunk_rows, spans
from fastrl.kernels._contexts import ignore_autocast, lowered, no_autocast, with_gradient, without_gradient
from fastrl.kernels._head import HeadGrads, gradient_dtype, live_rows, logits_buffer, project
from fastrl.kernels._shard import Shard
from fastrl.kernels.token_logp import TokenStats, backward_into_op, forward_op, narrow_view, row_temperature

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # some builds of torch have none


# --- reference --------------------------------------------------------------------------------------
def reference(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, through float64 logits: logp and entropy, both (T,), differentiable by autograd."""
    z = hidden.double() @ weight.double().T
    z = (z if bias is None else z + bias.double()) / temperature.double()[:, None]
    log_p = z.log_softmax(-1)
    logp = log_p.gather(1, target[:, None].long()).squeeze(1)
    return logp, -(log_p.exp() * torch.where(log_p > -torch.inf, log_p, 0)).sum(-1)


# --- the chunks -------------------------------------------------------------------------------------
def forward_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    temperature: Tensor,
    entropy: bool,
    logits_dtype: torch.dtype,
    rows: int,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy (empty unless asked for), m and log s, each (T,), in chunks of at most `rows`.

    An absent bias is empty.
    """
    T = hidden.shape[0]
    stat = torch.promote_types(logits_dtype, torch.float32)
    sizes = (T, T if entropy else 0, T, T)
    logp, h, m, log_s = (torch.empty(n, dtype=stat, device=hidden.device) for n in sizes)
    given_bias = bias if bias.numel() else None
    buffer = logits_buffer(min(rows, T), weight.shape[0], logits_dtype, hidden.device)

    for part in spans(T, rows, hidden.device):
        logits = project(hidden[part], weight, given_bias, logits_dtype, buffer[: part.stop - part.start])
        stats = row_stats(logits, target[part], temperature[part], entropy, shard)
        logp[part], m[part], log_s[part] = stats[0], stats[2], stats[3]
        if entropy:
            h[part] = stats[1]
    return logp, h, m, log_s


def row_stats(
    logits: Tensor, target: Tensor, temperature: Tensor, entropy: bool, shard: Shard | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, m and log s of rows of logits; for the logits of a shard, of the whole vocabulary."""
    if shard is None:
        return forward_op(logits, target, temperature, entropy, False)
    stats = forward_op(logits, shard.local(target), temperature, entropy, False)
    return shard.combine(target, *stats)


def backward_chunks(
    dlogp: Tensor,
    dentropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    temperature: Tensor,
    entropy: Tensor,
    m: Tensor,
    log_s: Tensor,
    logits_dtype: torch.dtype,
    rows: int,
    wanted: Sequence[bool],
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias (empty where not wanted); recomputes the logits by chunks."""
    live = live_rows(dlogp, dentropy) if dentropy.numel() else live_rows(dlogp)
    N = hidden.shape[0] if live is None else live.numel()
    target = target if shard is None else shard.local(target)
    given_bias = bias if bias.numel() else None
    cuts = spans(N, rows, hidden.device)
    grads = HeadGrads(hidden, weight, given_bias, wanted, chunks=len(cuts), partial=shard is not None)
    buffer = logits_buffer(min(rows, N), weight.shape[0], logits_dtype, hidden.device)
    for cut in cuts:
        part: slice | Tensor = cut if live is None else live[cut]
        x = hidden[part]
        logits = project(x, weight, given_bias, logits_dtype, buffer[: x.shape[0]])
        h, dh = (entropy[part], dentropy[part]) if dentropy.numel() else (entropy, dentropy)
        dtype = gradient_dtype(logits, weight)
        backward_into_op(
            dlogp[part], dh, logits, target[part], temperature[part], h, m[part], log_s[part], dtype
        )
        grads.add(part, x, narrow_view(logits, dtype))
    if shard is not None and grads.hidden is not None:
        shard.sum(grads.hidden)

    pairs = zip((grads.hidden, grads.weight, grads.bias), (hidden, weight, bias), strict=True)
    dhidden, dweight, dbias = (x.new_empty(0) if g is None else g.to(x.dtype) for g, x in pairs)
    return dhidden, dweight, dbias


register("linear_logp", "reference", exact=("cpu", "cuda"), forward_chunks=forward_chunks)
register_triton("linear_logp", "linear_logp_wide", "forward_chunks")


# --- registration and autograd ----------------------------------------------------------------------
@torch.library.custom_op("fastrl::linear_logp", mutates_args=())
def forward_linear_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    temperature: Tensor,
    entropy: bool,
    logits_dtype: torch.dtype,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments are those of `forward_chunks`, without a shard."""
    forward = pick("linear_logp", hidden, "forward_chunks")
    return forward(hidden, weight, bias, target, temperature, entropy, logits_dtype, rows)


@torch.library.custom_op("fastrl::linear_logp_backward", mutates_args=())
def backward_linear_op(
    dlogp: Tensor,
    dentropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    temperature: Tensor,
    entropy: Tensor,
    m: Tensor,
    log_s: Tensor,
    logits_dtype: torch.dtype,
    rows: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments are those of `backward_chunks`, without a shard."""
    options = (logits_dtype, rows, wanted)
    return backward_chunks(
        dlogp, dentropy, hidden, weight, bias, target, temperature, entropy, m, log_s, *options
    )


@forward_linear_op.register_fake
def _(hidden, weight, bias, target, temperature, entropy, logits_dtype, rows):  # type: ignore[no-untyped-def]
    T, dtype = hidden.shape[0], torch.promote_types(logits_dtype, torch.float32)
    return tuple(hidden.new_empty(n, dtype=dtype) for n in (T, T if entropy else 0, T, T))


@backward_linear_op.register_fake
def _(  # type: ignore[no-untyped-def]
    dlogp, dentropy, hidden, weight, bias, target, temperature, entropy, m, log_s, logits_dtype, rows, wanted
):
    return tuple(
        x.new_empty(x.shape if want else 0) for x, want in zip((hidden, weight, bias), wanted, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, temperature, ctx.entropy, ctx.logits_dtype, ctx.rows, *_ = inputs
    _, h, m, log_s = output
    ctx.mark_non_differentiable(m, log_s)
    ctx.save_for_backward(hidden, weight, bias, target, temperature, h, m, log_s)


def _autograd(
    ctx: Any, dlogp: Tensor, dentropy: Tensor, *_: Tensor, backward: Any = None
) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, target, temperature, h, m, log_s = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    dh = dentropy if ctx.entropy else h
    run = differentiate if backward is None else backward
    grads = run(
        dlogp, dh, hidden, weight, bias, target, temperature, h, m, log_s, ctx.logits_dtype, ctx.rows, wanted
    )
    return (*(g if want else None for g, want in zip(grads, wanted, strict=True)), *(None,) * 5)


differentiate = without_gradient(backward_linear_op)
differentiable = with_gradient(forward_linear_op, _autograd, _setup)
ignore_autocast("linear_logp", "linear_logp_backward")


class _Sharded(torch.autograd.Function):
    """The same with a shard: a process group is not something that a registered op can be given."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return forward_chunks(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.shard = inputs[-1]
        _setup(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *derivatives: Tensor) -> tuple[Tensor | None, ...]:
        with no_autocast(derivatives[0].device.type):
            return *_autograd(ctx, *derivatives, backward=partial(backward_chunks, shard=ctx.shard)), None


# --- public -----------------------------------------------------------------------------------------
def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    logits_dtype: torch.dtype = torch.float32,
    logits_bytes: int | None = None,
    group: ProcessGroup | None = None,
) -> TokenStats:
    """Log-probability of `target` (nats) and, if asked for, the entropy (nats), differentiable in hidden,
    weight and bias.

    Shapes:  hidden (T, D), weight (V, D) of one dtype;  target (T,) int;  bias (V,);  temperature a float or
             (T,)
             ->  logp, entropy, lse (T,) fp32 (fp64 for fp64 inputs).
             With a `group` of processes, weight and bias are this process's part of the vocabulary, in the
             order of the ranks and of any size; hidden and target (ids of the whole vocabulary) are the same
             on all, and so are the results and the gradient of hidden.  The processes wait for the device
             once, to learn each other's sizes.
    Memory:  one chunk of logits of `logits_bytes` (default: at most 64 MiB on CPU, a sixteenth of the
             device's memory on CUDA), in the forward and in the backward.
    Raises:  ValueError or TypeError naming the argument.  A target outside [0, V) gives NaN.
    """
    hidden, weight = lowered(hidden, weight)
    dtype = check_linear(hidden, weight, target, bias, logits_dtype)
    tau = row_temperature(temperature, target, compute_dtype(hidden))
    shard = None if group is None else Shard.of(weight, group)
    most, default = (weight.shape[0], None) if shard is None else (shard.most, shard.budget)
    rows = chunk_rows(most, dtype.itemsize, hidden.device, logits_bytes, default)
    b = weight.new_empty(0) if bias is None else bias
    inputs = (hidden, weight, b, target, tau, entropy, dtype, rows)
    if shard is None:
        logp, h, m, log_s = differentiable(*inputs)
    else:
        with no_autocast(hidden.device.type):
            logp, h, m, log_s = _Sharded.apply(*inputs, shard)
    return TokenStats(logp, h if entropy else None, m + log_s)


def check_linear(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, logits_dtype: torch.dtype
) -> torch.dtype:
    """Check the arguments every linear op shares; the dtype of the logits (float64 inputs always have float64
    logits).
    """
    T, D = dims("hidden", hidden, "T D", FLOATS)
    V, _ = dims("weight", weight, "V D", (hidden.dtype,), D=D)
    dims("target", target, "T", INTS, T=T)
    if bias is not None:
        dims("bias", bias, "V", FLOATS, V=V)
    if V == 0:
        raise ValueError("weight: expected a vocabulary of at least one token, got V=0")
    same_device(hidden=hidden, weight=weight, target=target, bias=bias)
    if logits_dtype not in (torch.float32, hidden.dtype):
        raise TypeError(f"logits_dtype: expected float32 or hidden's own {hidden.dtype}, got {logits_dtype}")
    return torch.float64 if hidden.dtype == torch.float64 else logits_dtype


def check_mask(mask: Tensor | None, hidden: Tensor) -> None:
    """Check which rows are live: all (None), those of a (T,) bool mask, or (N,) int64 distinct rows, whose
    values are not read.
    """
    if mask is None:
        return
    if isinstance(mask, Tensor) and mask.dtype == torch.int64:
        dims("mask", mask, "N", (torch.int64,))
    else:
        dims("mask", mask, "T", (torch.bool,), T=hidden.shape[0])
    same_device(hidden=hidden, mask=mask)
