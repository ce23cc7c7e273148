"""The products of a linear layer on CPU: csrc/cpu/linear.cpp, which takes addresses, sizes and row strides.

The output is fp32 or of the operands' type; the gradients are fp32, like their operands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.kernels._backend import extension
from fastrl.kernels._launch import FLOAT_CODES, address, unit_rows


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b, (T, N), in the dtype of x; an absent bias is empty."""
    return into(torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype), x, weight, bias)


def into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`forward`, written to `out` (T, N)."""
    x, weight, bias = unit_rows(x), unit_rows(weight), bias.float().contiguous()
    (T, K), N = x.shape, weight.shape[0]
    if not T or not N:
        return out

    extension().linear_forward_cpu(
        out.data_ptr(),
        out.stride(0),
        FLOAT_CODES[out.dtype],
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        weight.stride(0),
        FLOAT_CODES[x.dtype],
        address(bias),
        T,
        N,
        K,
        torch.get_num_threads(),
    )
    return out


def input_grad(dy: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """dy W (T, K); written to `out` if given."""
    dy, weight = unit_rows(dy), unit_rows(weight)
    (T, N), K = dy.shape, weight.shape[1]
    out = torch.empty(T, K) if out is None else out

    extension().linear_input_grad_cpu(
        out.data_ptr(),
        out.stride(0),
        dy.data_ptr(),
        dy.stride(0),
        weight.data_ptr(),
        weight.stride(0),
        T,
        N,
        K,
        torch.get_num_threads(),
    )
    return out


def weight_grad(out: Tensor, dy: Tensor, x: Tensor, *, add: bool) -> None:
    """out = dy^T x (N, K), or out += dy^T x with `add`."""
    dy, x = unit_rows(dy), unit_rows(x)
    (T, N), K = dy.shape, x.shape[1]

    extension().linear_weight_grad_cpu(
        out.data_ptr(),
        out.stride(0),
        dy.data_ptr(),
        dy.stride(0),
        x.data_ptr(),
        x.stride(0),
        T,
        N,
        K,
        add,
        torch.get_num_threads(),
    )
