"""Rows by index where the indices are all different: written, taken and spread without a sort."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def in_any_order(out: Tensor) -> Iterator[None]:
    """What is written to `out` inside the block has the same bits in any order: every element that is read
    later is written once, or integers are added.

    Deterministic mode turns each write by index on CUDA (index_copy_, index_put_, scatter_, scatter_add_)
    into a sort of the indices and a second kernel, about eight launches.  Here it is switched off for the
    call.  It is a setting of the whole process, read when an operation is launched; it is back before this
    returns, also when that raises.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    if not enabled or not out.is_cuda or torch.compiler.is_compiling():
        yield
        return
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch._C._set_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(True, warn_only=warn_only)


def put_rows(out: Tensor, rows: slice | Tensor, values: Tensor) -> None:
    """out[rows] = values, in place; `rows` (N,) int64 are distinct."""
    if isinstance(rows, slice):
        out[rows] = values
        return
    with in_any_order(out):
        out.index_copy_(0, rows, values)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], (N, ...), differentiable; `rows` (N,) int64 are distinct."""
    taken: Tensor = _Take.apply(x, rows)
    return taken


def spread_rows(x: Tensor, rows: Tensor, size: int) -> Tensor:
    """(size, ...) with x (N, ...) at distinct `rows` (N,) int64, and 0 elsewhere; differentiable."""
    out: Tensor = _Spread.apply(x, rows, size)
    return out


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.shape = x.shape
        ctx.save_for_backward(rows)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), (rows,) = grads, ctx.saved_tensors
        out = grad.new_zeros(ctx.shape)
        with in_any_order(out):
            return out.index_add_(0, rows, grad), None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(rows)
        out = x.new_zeros(size, *x.shape[1:])
        put_rows(out, rows, x)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None
