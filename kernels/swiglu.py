"""The gated activation of the MLP: gate and up lie side by side in one row, gate first.

    y = silu(gate) up,  silu(g) = g sigmoid(g)
    dgate = dy up s (1 + g (1 - s)),  dup = dy g s,  s = sigmoid(g)

Computed in fp32 and rounded once.  Only the input is kept for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from fastrl.kernels._backend import pick, register, register_triton, route, unbuilt
from fastrl.kernels._check import FLOATS, compute_dtype, dims
from fastrl.kernels._contexts import ignore_autocast, with_gradient, without_gradient
from fastrl.kernels._launch import FLOAT_CODES
from fastrl.kernels._native import swiglu as native


# --- reference --------------------------------------------------------------------------------------
def reference(gate_up: Tensor) -> Tensor:
    """The definition, (T, F)."""
    gate, up = gate_up.to(compute_dtype(gate_up)).chunk(2, -1)
    return silu(gate).mul_(up).to(gate_up.dtype)


def reference_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate and up, (T, 2F)."""
    dtype = compute_dtype(gate_up)
    gate, up = gate_up.to(dtype).chunk(2, -1)
    dy = dy.to(dtype)
    out = torch.empty(gate_up.shape, dtype=dtype, device=gate_up.device)
    dgate, dup = out.chunk(2, -1)
    s = gate.sigmoid()
    torch.mul(gate, s, out=dup)  # silu(gate), which both gradients need
    torch.add(s, dup - dup * s, out=dgate)  # s + g s (1 - s)
    dgate.mul_(up).mul_(dy)
    dup.mul_(dy)
    return out.to(gate_up.dtype)


register("swiglu", "reference", forward=reference, backward=reference_backward)


# --- kernels ----------------------------------------------------------------------------------------
register(
    "swiglu",
    "cpu",
    dtypes=tuple(FLOAT_CODES),
    missing=unbuilt("swiglu_forward_cpu"),
    exact=("cpu",),
    forward=native.forward,
    backward=native.backward,
)

register_triton("swiglu", "swiglu", "forward", "backward", exact=True)


# --- registration and autograd ----------------------------------------------------------------------
@torch.library.custom_op("fastrl::swiglu", mutates_args=())
def forward_op(gate_up: Tensor) -> Tensor:
    """silu(gate) up, (T, F)."""
    return pick("swiglu", gate_up, "forward")(gate_up)


@torch.library.custom_op("fastrl::swiglu_backward", mutates_args=())
def backward_op(dy: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate_up, (T, 2F)."""
    return pick("swiglu", gate_up, "backward")(dy, gate_up)


@forward_op.register_fake
def _(gate_up):  # type: ignore[no-untyped-def]
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


@backward_op.register_fake
def _(dy, gate_up):  # type: ignore[no-untyped-def]
    return gate_up.new_empty(gate_up.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _autograd(ctx: Any, dy: Tensor) -> Tensor:
    dgate_up: Tensor = differentiate(dy, ctx.saved_tensors[0])
    return dgate_up


differentiate = without_gradient(backward_op)
differentiable = with_gradient(forward_op, _autograd, _setup)
ignore_autocast("swiglu", "swiglu_backward")


# --- public -----------------------------------------------------------------------------------------
def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) times up, differentiable in both.

    Shapes:  gate_up (T, 2F) bf16|fp16|fp32|fp64, gate in the first F columns  ->  (T, F) of the same dtype.
    Memory:  the input is kept for the backward, which allocates one gradient like it.
    Raises:  ValueError or TypeError naming the argument.
    Source:  Shazeer 2020, "GLU Variants Improve Transformer".
    """
    _, width = dims("gate_up", gate_up, "T 2F", FLOATS)
    if width % 2:
        raise ValueError(f"gate_up: expected an even number of columns, gate then up, got {width}")
    return route(differentiable, "swiglu", "forward", gate_up)(gate_up)
