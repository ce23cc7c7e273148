"""A linear layer: y = x W^T + b.

    dx = dy W      dW = dy^T x      db = sum_t dy_t

By default it is torch's own product, except for float32 on CPU, where ours is faster: without a gradient from
`LEAST_ROWS` rows on, with one from `ENOUGH` multiplications.

A library's product chooses its tiles, and how a sum is split, by the number of rows, so that the bits of a
row depend on the batch.  The other implementations are batch-invariant: an element is a sum over k in one
fixed order, in float32, for any number of rows, any place among them and any number of threads.  `exact` mode
picks them.  Gradients need not have that property.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastrl.kernels._backend import is_exact, pick, register, register_triton, requested, unbuilt
from fastrl.kernels._check import FLOATS, dims, same_device
from fastrl.kernels._contexts import ignore_autocast, lowered, with_gradient
from fastrl.kernels._head import compiled, input_grad, weight_grad
from fastrl.kernels._launch import FLOAT_CODES
from fastrl.kernels._native import linear as native

ENOUGH = 1 << 20  # multiplications from which a compiled product is worth an autograd.Function
_NO_BIAS = torch.empty(0)


# --- reference --------------------------------------------------------------------------------------
def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition, (T, N); an absent bias is empty."""
    return functional.linear(x, weight, bias if bias.numel() else None)


def reference_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same into `out`, whose dtype may be wider, and is then that of the product."""
    return out.copy_(reference(*(t.to(out.dtype) for t in (x, weight, bias))))


register("linear", "reference", forward=reference, into=reference_into)


# --- kernels ----------------------------------------------------------------------------------------
register(
    "linear",
    "cpu",
    dtypes=tuple(FLOAT_CODES),
    missing=unbuilt("linear_forward_cpu"),
    exact=("cpu",),
    default=(torch.float32,),
    forward=native.forward,
    into=native.into,
)
register_triton("linear", "linear", "forward", "into", exact=True, default=())


# --- registration and autograd ----------------------------------------------------------------------
def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return pick("linear", x, "forward")(x, weight, bias)


# not custom_op: its wrapper costs as much as the product of a small layer
torch.library.define("fastrl::linear", torch.library.infer_schema(_forward, mutates_args=()))
torch.library.impl("fastrl::linear", "CompositeExplicitAutograd", _forward)
forward_op = torch.ops.fastrl.linear.default


@torch.library.register_fake("fastrl::linear")
def _(x, weight, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias = bias.numel() > 0


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    dx = input_grad(dy, weight) if wanted[0] else None
    dweight = weight_grad(dy, x) if wanted[1] else None
    return dx, dweight, dy.sum(0) if ctx.bias and wanted[2] else None


differentiable = with_gradient(forward_op, _autograd, _setup)
ignore_autocast("linear")


class _Compiled(torch.autograd.Function):
    """The compiled product with the same gradient, for a call that bypasses torch.library."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        _setup(ctx, (x, weight, bias), bias)
        return native.forward(x, weight, bias)

    backward = staticmethod(_autograd)


# --- public -----------------------------------------------------------------------------------------
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, differentiable in all three.

    It is torch's own product unless exact mode or `use_backend` asks for another, or for float32 on CPU.

    Shapes:  x (T, K), weight (N, K), bias (N,) of one dtype, bf16|fp16|fp32|fp64  ->  (T, N) of the same
             dtype, rounded once.
    Memory:  the result; x and weight are kept for the backward.  On CPU the batch-invariant kernel packs 128
             rows of x a thread.
    Raises:  ValueError or TypeError naming the argument, RuntimeError in exact mode for a dtype without such
             a kernel.
    Source:  Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication" (the packed
             panels); He et al. 2025, "Defeating nondeterminism in LLM inference" (why batch invariance).
    """
    x, weight, bias = lowered(x, weight, bias)
    _, K = dims("x", x, "T K", FLOATS)
    N, _ = dims("weight", weight, "N K", (x.dtype,), K=K)
    if bias is not None:
        dims("bias", bias, "N", (x.dtype,), N=N)
    same_device(x=x, weight=weight, bias=bias)
    return linear_layer(x, weight, bias)


def linear_layer(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` without its checks, for models: by default it adds nothing to the cost of torch's own."""
    if is_exact() or requested("linear") is not None:
        x, weight, bias = lowered(x, weight, bias)
        y: Tensor = differentiable(x, weight, weight.new_empty(0) if bias is None else bias)
        return y
    if not compiled(x, weight, differentiable=True):
        return functional.linear(x, weight, bias)

    b = _NO_BIAS if bias is None else bias
    differentiated = x.requires_grad or weight.requires_grad or b.requires_grad
    if not differentiated or not torch.is_grad_enabled():
        return native.forward(x, weight, b)
    if x.shape[0] * weight.numel() >= ENOUGH:
        return _Compiled.apply(x, weight, b)
    return functional.linear(x, weight, bias)
