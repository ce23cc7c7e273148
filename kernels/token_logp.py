"""Log-probability and entropy of each target token, from logits, in one pass over the vocabulary.

    z = logits / temperature      m = max_v z      s = sum_v exp(z_v - m)
    logp    = (z_target - m) - log s                                  (nats)
    entropy = log s - sum_v exp(z_v - m) (z_v - m) / s                (nats; 0 * -inf is 0)

    d/dlogits_v = [ dlogp (1[v = target] - p_v) - dentropy p_v (log p_v + entropy) ] / temperature

m and log s are kept apart: z_target - logsumexp loses 1e-5 once logits have an offset of 1000.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.kernels._backend import COMPILED_ONLY, pick, register, register_triton, unbuilt
from fastrl.kernels._check import FLOATS, INTS, compute_dtype, dims, same_device
from fastrl.kernels._contexts import ignore_autocast, with_gradient, without_gradient
from fastrl.kernels._launch import FLOAT_CODES
from fastrl.kernels._native import token_logp as native
from fastrl.kernels._native.build import obstacle
from fastrl.kernels._rows import in_any_order


class TokenStats(NamedTuple):
    """Per-token statistics: logp (nats), entropy (nats, None unless asked for), lse; fp32, or float64."""

    logp: Tensor
    entropy: Tensor | None
    lse: Tensor


# --- reference --------------------------------------------------------------------------------------
def reference(
    logits: Tensor, target: Tensor, temperature: Tensor, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition: logp, entropy (empty unless asked for), m and log s, each (T,).

    Shapes:  logits (T, V), or (B, L, V) with T = B L.
    """
    z = logits.reshape(-1, logits.shape[-1]).to(compute_dtype(logits)) / temperature[:, None]
    m = z.amax(-1) if z.shape[0] else z.new_empty(0)
    d = z - m[:, None]
    e = d.exp()
    s = e.sum(-1)
    log_s = s.log()
    inside = (target >= 0) & (target < z.shape[1])
    at = d.gather(1, torch.where(inside, target, 0)[:, None].long()).squeeze(1)
    logp = torch.where(inside, at - log_s, torch.nan)
    if not entropy:
        return logp, z.new_empty(0), m, log_s
    return logp, log_s - (e * torch.where(e > 0, d, 0)).sum(-1) / s, m, log_s


def reference_backward(
    dlogp: Tensor,
    dentropy: Tensor,
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    entropy: Tensor,
    m: Tensor,
    log_s: Tensor,
) -> Tensor:
    """The gradient of the logits, in their shape and dtype; `dentropy` is empty without an entropy."""
    z = logits.reshape(-1, logits.shape[-1]).to(m.dtype) / temperature[:, None]
    log_p = z - m[:, None] - log_s[:, None]
    p = log_p.exp()
    g = -dlogp[:, None] * p
    inside = (target >= 0) & (target < logits.shape[-1])
    at = torch.where(inside, target, 0)[:, None].long()
    with in_any_order(g):  # one entry a row
        g.scatter_add_(1, at, torch.where(inside, dlogp, 0)[:, None])
    if dentropy.numel():
        g -= dentropy[:, None] * p * (torch.where(p > 0, log_p, 0) + entropy[:, None])
    return (g / temperature[:, None]).to(logits.dtype).view(logits.shape)


def _backward_into(out: Tensor, *parts: Tensor) -> Tensor:
    return out.copy_(reference_backward(*parts))


def _fused_into(
    out: Tensor, logits: Tensor, target: Tensor, temperature: Tensor, dlogp: Tensor, dentropy: Tensor
) -> tuple[Tensor, ...]:
    stats = reference(logits, target, temperature, dentropy.numel() > 0)
    _backward_into(out, dlogp, dentropy, logits, target, temperature, *stats[1:])
    return stats


register(
    "token_logp",
    "reference",
    forward=reference,
    backward=reference_backward,
    backward_into=_backward_into,
    fused_into=_fused_into,
)


# --- kernels ----------------------------------------------------------------------------------------
for _device, _note, _exact in (("cpu", "", ("cpu",)), ("cuda", COMPILED_ONLY, ())):
    register(
        "token_logp",
        _device,
        dtypes=tuple(FLOAT_CODES),
        note=_note,
        missing=unbuilt(f"token_logp_forward_{_device}"),
        obstacle=obstacle,
        exact=_exact,
        forward=native.forward,
        backward=native.backward,
        backward_into=native.backward_into,
        fused_into=native.fused_into,
    )
register_triton("token_logp", "token_logp", "forward", "backward", "backward_into", "fused_into", exact=True)


# --- registration and autograd ----------------------------------------------------------------------
@torch.library.custom_op("fastrl::token_logp", mutates_args=())
def forward_op(
    logits: Tensor, target: Tensor, temperature: Tensor, entropy: bool, inplace: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy (empty unless asked for), m and log s.

    `inplace` lets the backward overwrite the logits.
    """
    return pick("token_logp", logits, "forward")(logits, target, temperature, entropy)


@torch.library.custom_op("fastrl::token_logp_backward", mutates_args=())
def backward_op(
    dlogp: Tensor,
    dentropy: Tensor,
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    entropy: Tensor,
    m: Tensor,
    log_s: Tensor,
) -> Tensor:
    """The gradient of the logits; the arguments are those of `reference_backward`."""
    return pick("token_logp", logits, "backward")(
        dlogp, dentropy, logits, target, temperature, entropy, m, log_s
    )


@torch.library.custom_op("fastrl::token_logp_backward_", mutates_args=("logits",))
def backward_into_op(
    dlogp: Tensor,
    dentropy: Tensor,
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    entropy: Tensor,
    m: Tensor,
    log_s: Tensor,
    dtype: torch.dtype | None = None,
) -> None:
    """Overwrite `logits` with their own gradient: it is `narrow_view(logits, dtype)`."""
    into = pick("token_logp", logits, "backward_into")
    into(narrow_view(logits, dtype), dlogp, dentropy, logits, target, temperature, entropy, m, log_s)


@torch.library.custom_op("fastrl::token_logp_fused_", mutates_args=("logits",))
def fused_op(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    dlogp: Tensor,
    dentropy: Tensor,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward and backward at once, for derivatives that are known before the forward.

    Returns logp, entropy (empty if dentropy is), m and log s.
    """
    return pick("token_logp", logits, "fused_into")(
        narrow_view(logits, dtype), logits, target, temperature, dlogp, dentropy
    )


def narrow_view(logits: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The logits themselves, or as many elements of a narrower `dtype` in the front of each of their rows."""
    return logits if dtype in (None, logits.dtype) else logits.view(dtype)[..., : logits.shape[-1]]


@forward_op.register_fake
def _(logits, target, temperature, entropy, inplace):  # type: ignore[no-untyped-def]
    T, dtype = target.shape[0], compute_dtype(logits)
    return tuple(logits.new_empty(n, dtype=dtype) for n in (T, T if entropy else 0, T, T))


@fused_op.register_fake
def _(logits, target, temperature, dlogp, dentropy, dtype=None):  # type: ignore[no-untyped-def]
    T, stat = target.shape[0], compute_dtype(logits)
    return tuple(logits.new_empty(n, dtype=stat) for n in (T, T if dentropy.numel() else 0, T, T))


@backward_op.register_fake
def _(dlogp, dentropy, logits, target, temperature, entropy, m, log_s):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, temperature, entropy, ctx.inplace = inputs
    _, h, m, log_s = output
    ctx.entropy = entropy
    ctx.mark_non_differentiable(m, log_s)
    ctx.save_for_backward(logits, target, temperature, h, m, log_s)


def _autograd(
    ctx: Any, dlogp: Tensor, dentropy: Tensor, dm: Tensor, dlog_s: Tensor
) -> tuple[Tensor | None, ...]:
    logits, target, temperature, h, m, log_s = ctx.saved_tensors
    parts = (dlogp, dentropy if ctx.entropy else h, logits, target, temperature, h, m, log_s)
    if not ctx.inplace:
        return differentiate(*parts), None, None, None, None
    backward_into_op(*parts)
    return logits, None, None, None, None


differentiate = without_gradient(backward_op)
differentiable = with_gradient(forward_op, _autograd, _setup)
ignore_autocast("token_logp", "token_logp_backward", "token_logp_backward_", "token_logp_fused_")


# --- public -----------------------------------------------------------------------------------------
def token_logp(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    inplace_backward: bool = False,
) -> TokenStats:
    """Log-probability of `target` (nats) and, if asked for, the entropy (nats); differentiable in `logits`.

    Shapes:  logits (T, V) or (B, L, V), bf16|fp16|fp32|fp64;  target (T,) or (B, L) int;  temperature a float
             or (T,) or (B, L)
             ->  logp, entropy, lse shaped like target, fp32 (fp64 for fp64 logits).
    Memory:  4 (T,) vectors, and one gradient like `logits` in the backward; a view such as logits[:, :-1] is
             not copied.  `inplace_backward` writes the gradient over the logits instead: they must then have
             no other consumer, and a second backward is refused.
    Raises:  ValueError or TypeError naming the argument.  A target outside [0, V) gives NaN, and no memory
             outside of the logits is read.
    Source:  Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
    """
    if isinstance(logits, Tensor) and logits.ndim == 3:
        B, L, V = dims("logits", logits, "B L V", FLOATS)
        dims("target", target, "B L", INTS, B=B, L=L)
    else:
        L, V = dims("logits", logits, "T V", FLOATS)
        dims("target", target, "T", INTS, T=L)
    if V == 0:
        raise ValueError(
            f"logits: expected a vocabulary of at least one token, got shape {tuple(logits.shape)}"
        )
    same_device(logits=logits, target=target)
    tau = row_temperature(temperature, target, compute_dtype(logits))
    logp, h, m, log_s = differentiable(logits, target.reshape(-1), tau, entropy, inplace_backward)
    shape = target.shape
    return TokenStats(logp.view(shape), h.view(shape) if entropy else None, (m + log_s).view(shape))


def row_temperature(temperature: float | Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """The temperature of every target as one (T,) vector.

    Raises ValueError for a float that is not positive; the values of a tensor are not read.
    """
    if isinstance(temperature, Tensor):
        if temperature.shape != target.shape and temperature.ndim:
            raise ValueError(
                f"temperature: expected a float or shape {tuple(target.shape)}, "
                f"got {tuple(temperature.shape)}"
            )
        return temperature.to(dtype).expand(target.shape).reshape(-1).contiguous()
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    return torch.full((target.numel(),), float(temperature), dtype=dtype, device=target.device)


def selective_log_softmax(logits: Tensor, index: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """The log-probability (nats) of `index` under `logits / temperature`, in the dtype of the logits.

    It has the name and the arguments of TRL's function.

    Shapes:  logits (..., V);  index (...) int, or (..., K) for K tokens of each row  ->  shaped like index.
    Raises:  ValueError or TypeError naming the argument.
    """
    lead = logits.shape[:-1]
    if index.shape[: len(lead)] != lead or index.ndim > len(lead) + 1:
        raise ValueError(
            f"index: expected shape {tuple(lead)} or {tuple(lead)} + (K,), got {tuple(index.shape)}"
        )
    if not index.numel():  # as `gather` of nothing, which is differentiable
        columns = index if index.ndim == logits.ndim else index[..., None]
        return logits.gather(-1, columns.long()).view(index.shape)
    # a view with 2 or 3 axes is never copied
    rows = logits if logits.ndim in (2, 3) else logits.reshape(-1, logits.shape[-1])
    tau = temperature
    if isinstance(temperature, Tensor):
        tau = temperature.expand(lead).reshape(rows.shape[:-1])
    targets = index.reshape(*rows.shape[:-1], -1).unbind(-1)
    logp = torch.stack([token_logp(rows, target, temperature=tau).logp for target in targets], -1)
    return logp.view(index.shape).to(logits.dtype)
