"""Root-mean-square norm, with an optional residual addition before it.

h = x + residual                     rounded to the input's dtype, as it is stored
r = 1 / sqrt(mean_d h_d^2 + eps)     one number a row, fp32
y = round(h r) w                     normalised in fp32, rounded, then scaled: Hugging Face's order

dh = r (g - n mean_d(g n)) + dresidual_out,   n = h r,  g = dy w
dw = sum_t dy n
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from fastrl.kernels._backend import pick, register, register_triton, route, unbuilt
from fastrl.kernels._check import FLOATS, compute_dtype, dims, same_device
from fastrl.kernels._contexts import ignore_autocast, widened, with_gradient, without_gradient
from fastrl.kernels._launch import FLOAT_CODES
from fastrl.kernels._native import rms_norm as native


# --- reference --------------------------------------------------------------------------------------
def reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The definition: y (T, D) and r (T, 1)."""
    h = x.to(compute_dtype(x))
    r = h.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (h * r).to(x.dtype).mul(weight).to(x.dtype), r


def reference_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, h = x + residual, and r."""
    h = x + residual
    y, r = reference(h, weight, eps)
    return y, h, r


def reference_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the normalised input and of the weight."""
    dx, dw = _gradients(dy, x, weight, r)
    return dx.to(x.dtype), dw.to(weight.dtype)


def _gradients(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    n = x.to(r.dtype) * r
    dy = dy.to(r.dtype)
    g = dy * weight.to(r.dtype)
    dw = (dy * n).sum(0)
    return g.addcmul_(n, (g * n).mean(-1, keepdim=True), value=-1).mul_(r), dw


def reference_add_backward(
    dy: Tensor, dh: Tensor, h: Tensor, weight: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of both summands, and of the weight; `dh` is the gradient of the sum as an output."""
    dx, dw = _gradients(dy, h, weight, r)
    return dx.add_(dh).to(h.dtype), dw.to(weight.dtype)


register(
    "rms_norm",
    "reference",
    forward=reference,
    add=reference_add,
    backward=reference_backward,
    add_backward=reference_add_backward,
)


# --- kernels ----------------------------------------------------------------------------------------
register(
    "rms_norm",
    "cpu",
    dtypes=tuple(FLOAT_CODES),
    missing=unbuilt("rms_norm_forward_cpu"),
    exact=("cpu",),
    forward=native.forward,
    add=native.add,
    backward=native.backward,
    add_backward=native.add_backward,
)

register_triton("rms_norm", "rms_norm", "forward", "add", "backward", "add_backward", exact=True)


# --- registration and autograd ----------------------------------------------------------------------
@torch.library.custom_op("fastrl::rms_norm", mutates_args=())
def forward_op(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y (T, D) and r (T, 1)."""
    return pick("rms_norm", x, "forward")(x, weight, eps)


@torch.library.custom_op("fastrl::add_rms_norm", mutates_args=())
def add_op(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, D), x + residual (T, D) and r (T, 1)."""
    return pick("rms_norm", x, "add")(x, residual, weight, eps)


@torch.library.custom_op("fastrl::rms_norm_backward", mutates_args=())
def backward_op(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """dx (T, D) and dw (D,)."""
    return pick("rms_norm", x, "backward")(dy, x, weight, r)


@torch.library.custom_op("fastrl::add_rms_norm_backward", mutates_args=())
def add_backward_op(dy: Tensor, dh: Tensor, h: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """dx (T, D), which is dresidual too, and dw (D,)."""
    return pick("rms_norm", h, "add_backward")(dy, dh, h, weight, r)


@forward_op.register_fake
def _(x, weight, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty((x.shape[0], 1), dtype=compute_dtype(x))


@add_op.register_fake
def _(x, residual, weight, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty((x.shape[0], 1), dtype=compute_dtype(x))


@backward_op.register_fake
def _(dy, x, weight, r):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@add_backward_op.register_fake
def _(dy, dh, h, weight, r):  # type: ignore[no-untyped-def]
    return h.new_empty(h.shape), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _autograd(ctx: Any, dy: Tensor, dr: Tensor) -> tuple[Tensor | None, ...]:
    dx, dw = differentiate(dy, *ctx.saved_tensors)
    return dx, dw, None


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, h, r = output
    ctx.mark_non_differentiable(r)
    ctx.save_for_backward(h, inputs[2], r)


def _autograd_add(ctx: Any, dy: Tensor, dh: Tensor, dr: Tensor) -> tuple[Tensor | None, ...]:
    dx, dw = differentiate_add(dy, dh, *ctx.saved_tensors)
    return dx, dx, dw, None


differentiate = without_gradient(backward_op)
differentiable = with_gradient(forward_op, _autograd, _setup)
differentiate_add = without_gradient(add_backward_op)
differentiable_add = with_gradient(add_op, _autograd_add, _setup_add)
ignore_autocast("rms_norm", "add_rms_norm", "rms_norm_backward", "add_rms_norm_backward")


# --- public -----------------------------------------------------------------------------------------
@overload
def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`x` over its root mean square, times `weight`; with `residual`: (norm of x + residual, x + residual).

    Shapes:  x (..., D) bf16|fp16|fp32|fp64;  weight (D,);  residual like x  ->  y like x, or (y,
             residual_out).
    Memory:  one fp32 number a row is kept for the backward, beside the input (or residual_out).
    Raises:  ValueError or TypeError naming the argument.
    Source:  Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    x, residual = widened(x, residual)
    (D,) = dims("weight", weight, "D", FLOATS)
    if not isinstance(x, Tensor) or x.ndim != 2:
        if not isinstance(x, Tensor) or x.ndim < 1 or x.shape[-1] != D:
            raise ValueError(
                f"x: expected shape (..., D={D}), got "
                f"{tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
            )
        if residual is None:
            return rms_norm(x.reshape(-1, D), weight, eps=eps).view(x.shape)
        if residual.shape != x.shape:
            raise ValueError(f"residual: expected shape {tuple(x.shape)}, got {tuple(residual.shape)}")
        y, h = rms_norm(x.reshape(-1, D), weight, eps=eps, residual=residual.reshape(-1, D))
        return y.view(x.shape), h.view(x.shape)
    T, _ = dims("x", x, "T D", FLOATS, D=D)
    same_device(x=x, weight=weight, residual=residual)
    if residual is None:
        return route(differentiable, "rms_norm", "forward", x, weight)(x, weight, eps)[0]
    dims("residual", residual, "T D", (x.dtype,), T=T, D=D)
    y, h, _ = route(differentiable_add, "rms_norm", "add", x, residual, weight)(x, residual, weight, eps)
    return y, h
