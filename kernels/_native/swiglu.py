"""swiglu on CPU: csrc/cpu/swiglu.cpp, which takes addresses, sizes and row strides."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.kernels._backend import extension
from fastrl.kernels._launch import FLOAT_CODES, unit_rows


def forward(gate_up: Tensor) -> Tensor:
    """silu(gate) up, (T, F)."""
    x = unit_rows(gate_up)
    T, F = x.shape[0], x.shape[1] // 2
    y = torch.empty(T, F, dtype=x.dtype)
    if not F:
        return y

    input_rows = (x.data_ptr(), x.stride(0), FLOAT_CODES[x.dtype])
    extension().swiglu_forward_cpu(y.data_ptr(), *input_rows, T, F, torch.get_num_threads())
    return y


def backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate and up, (T, 2F)."""
    x, dy = unit_rows(gate_up), unit_rows(dy)
    T, F = dy.shape
    dx = torch.empty(T, 2 * F, dtype=x.dtype)
    if not F:
        return dx

    extension().swiglu_backward_cpu(
        dx.data_ptr(),
        dy.data_ptr(),
        dy.stride(0),
        x.data_ptr(),
        x.stride(0),
        FLOAT_CODES[x.dtype],
        T,
        F,
        torch.get_num_threads(),
    )
    return dx
