"""rms_norm on CPU: csrc/cpu/rms_norm.cpp, which takes addresses, row strides and an fp32 weight."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.kernels._backend import extension
from fastrl.kernels._launch import FLOAT_CODES, unit_rows


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y (T, D) and r (T, 1)."""
    y, _, r = _forward(x, None, weight, eps)
    return y, r


def add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, h = x + residual, and r."""
    return _forward(x, residual, weight, eps)


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x = unit_rows(x)
    other = x if residual is None else unit_rows(residual)
    weight = weight.float().contiguous()

    T, D = x.shape
    y = torch.empty(T, D, dtype=x.dtype)
    h = x if residual is None else torch.empty(T, D, dtype=x.dtype)
    r = torch.empty(T, 1)
    if not D:
        return y, h, r

    absent = residual is None
    extension().rms_norm_forward_cpu(
        y.data_ptr(),
        0 if absent else h.data_ptr(),
        r.data_ptr(),
        x.data_ptr(),
        x.stride(0),
        0 if absent else other.data_ptr(),
        other.stride(0),
        FLOAT_CODES[x.dtype],
        weight.data_ptr(),
        eps,
        T,
        D,
        torch.get_num_threads(),
    )
    return y, h, r


def backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the normalised input and of the weight."""
    return _backward(dy, None, x, weight, r)


def add_backward(dy: Tensor, dh: Tensor, h: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of both summands, of which `dh` arrives at the sum itself, and of the weight."""
    return _backward(dy, dh, h, weight, r)


def _backward(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    dy, h = unit_rows(dy), unit_rows(h)
    other = dy if dh is None else unit_rows(dh)
    wide = weight.float().contiguous()

    T, D = h.shape
    dx, dw = torch.empty(T, D, dtype=h.dtype), torch.empty(D)
    if D:
        extension().rms_norm_backward_cpu(
            dx.data_ptr(),
            dw.data_ptr(),
            dy.data_ptr(),
            dy.stride(0),
            0 if dh is None else other.data_ptr(),
            other.stride(0),
            h.data_ptr(),
            h.stride(0),
            FLOAT_CODES[h.dtype],
            wide.data_ptr(),
            r.data_ptr(),
            T,
            D,
            torch.get_num_threads(),
        )
    return dx, dw.to(weight.dtype)
