"""Log-probability and entropy of each target token, from hidden states and the head's weight, without the (T, V) logits.

    logits = hidden weight^T + bias, a chunk of rows at a time; the rest is `token_logp`.

Forward 2 T D V FLOPs; backward recomputes the logits, 6 T D V more.  A loss that is known when the log-probs are computed
should use `linear_loss` instead, which never recomputes: 6 T D V in all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrl.kernels._check import FLOATS, INTS, compute_dtype, dims, same_device
from fastrl.kernels._linear import accumulator, add_weight_grad, chunk_rows, input_grad, project
from fastrl.kernels.token_logp import TokenStats, backward_into_op, forward_op, row_temperature


# --- reference --------------------------------------------------------------------------------------
def reference(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, through materialised float64 logits: logp and entropy, both (T,), differentiable by autograd."""
    z = hidden.double() @ weight.double().T
    z = (z if bias is None else z + bias.double()) / temperature.double()[:, None]
    log_p = z.log_softmax(-1)
    return log_p.gather(1, target[:, None].long()).squeeze(1), -(log_p.exp() * torch.where(log_p > -torch.inf, log_p, 0)).sum(-1)


# --- registration and autograd ----------------------------------------------------------------------
@torch.library.custom_op("fastrl::linear_logp", mutates_args=())
def forward_linear_op(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, temperature: Tensor, entropy: bool, logits_dtype: torch.dtype, rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy (empty unless asked for), m and log s, each (T,); an absent bias is empty; `rows` per chunk of logits."""
    T = hidden.shape[0]
    out = torch.empty((4, T), dtype=torch.promote_types(logits_dtype, torch.float32), device=hidden.device)
    for a in range(0, T, rows):
        part = slice(a, min(a + rows, T))
        logits = project(hidden[part], weight, bias if bias.numel() else None, logits_dtype)
        logp, h, m, log_s = forward_op(logits, target[part], temperature[part], entropy, False)
        out[0, part], out[2, part], out[3, part] = logp, m, log_s
        if entropy:
            out[1, part] = h
    return out[0].clone(), (out[1] if entropy else out[1, :0]).clone(), out[2].clone(), out[3].clone()


@torch.library.custom_op("fastrl::linear_logp_backward", mutates_args=())
def backward_linear_op(
    dlogp: Tensor, dentropy: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, temperature: Tensor,
    entropy: Tensor, m: Tensor, log_s: Tensor, logits_dtype: torch.dtype, rows: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias (empty without one); the logits are computed again, chunk by chunk."""
    T = hidden.shape[0]
    dhidden, dweight, dbias = torch.empty_like(hidden), accumulator(weight), accumulator(bias)
    for a in range(0, T, rows):
        part = slice(a, min(a + rows, T))
        logits = project(hidden[part], weight, bias if bias.numel() else None, logits_dtype)
        h, dh = (entropy[part], dentropy[part]) if dentropy.numel() else (entropy, dentropy)
        backward_into_op(dlogp[part], dh, logits, target[part], temperature[part], h, m[part], log_s[part])
        dhidden[part] = input_grad(logits, weight)
        add_weight_grad(dweight, logits, hidden[part])
        if bias.numel():
            dbias += logits.sum(0, dtype=dbias.dtype)
    return dhidden, dweight.to(weight.dtype), dbias.to(bias.dtype)


@forward_linear_op.register_fake
def _(hidden, weight, bias, target, temperature, entropy, logits_dtype, rows):  # type: ignore[no-untyped-def]
    T, dtype = hidden.shape[0], torch.promote_types(logits_dtype, torch.float32)
    return tuple(hidden.new_empty(n, dtype=dtype) for n in (T, T if entropy else 0, T, T))


@backward_linear_op.register_fake
def _(dlogp, dentropy, hidden, weight, bias, target, temperature, entropy, m, log_s, logits_dtype, rows):  # type: ignore[no-untyped-def]
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, temperature, ctx.entropy, ctx.logits_dtype, ctx.rows = inputs
    _, h, m, log_s = output
    ctx.mark_non_differentiable(m, log_s)
    ctx.save_for_backward(hidden, weight, bias, target, temperature, h, m, log_s)


def _autograd(ctx: Any, dlogp: Tensor, dentropy: Tensor, dm: Tensor, dlog_s: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, target, temperature, h, m, log_s = ctx.saved_tensors
    dh = dentropy if ctx.entropy else h
    grads = backward_linear_op(dlogp, dh, hidden, weight, bias, target, temperature, h, m, log_s, ctx.logits_dtype, ctx.rows)
    return (*grads, None, None, None, None, None)


forward_linear_op.register_autograd(_autograd, setup_context=_setup)


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
) -> TokenStats:
    """Log-probability of `target` (nats) and, if asked for, the entropy (nats), differentiable in hidden, weight and bias.

    Shapes:  hidden (T, D), weight (V, D) of one dtype;  target (T,) int;  bias (V,);  temperature a float or (T,)
             ->  logp, entropy, lse (T,) fp32 (fp64 for fp64 inputs).
    Memory:  one chunk of logits of `logits_bytes` (default: 64 MiB on CPU, 2 GiB on CUDA), in the forward and in the backward.
    Raises:  ValueError or TypeError naming the argument.  A target outside [0, V) gives NaN.
    """
    dtype = check_linear(hidden, weight, target, bias, logits_dtype)
    tau = row_temperature(temperature, target, compute_dtype(hidden))
    rows = chunk_rows(weight.shape[0], dtype.itemsize, hidden.device, logits_bytes)
    b = weight.new_empty(0) if bias is None else bias
    logp, h, m, log_s = forward_linear_op(hidden, weight, b, target, tau, entropy, dtype, rows)
    return TokenStats(logp, h if entropy else None, m + log_s)


def check_linear(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, logits_dtype: torch.dtype) -> torch.dtype:
    """Check the arguments every linear op shares; the dtype of the logits (float64 inputs always have float64 logits)."""
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
