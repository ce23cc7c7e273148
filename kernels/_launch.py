"""What the launchers of kernels share: contiguous rows, the tensors' device made current, launch options."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import Tensor

FLOAT_CODES = {torch.float32: 0, torch.bfloat16: 1}  # enum Float of csrc/ops.h


class Gpu(NamedTuple):
    """What a launch depends on of the GPU that runs it."""

    capability: tuple[int, int]  # (9, 0) for an H100
    multiprocessors: int


stand_ins: list[Gpu] = []  # GPUs that CPU tensors stand for, the innermost last: see bench/offline.py


def gpu(x: Tensor) -> Gpu | None:
    """The GPU that kernels on `x` run on; None in Triton's interpreter."""
    if x.is_cuda:
        return _gpu(x.device)
    return stand_ins[-1] if stand_ins else None


@functools.cache  # a launch asks for it each time
def _gpu(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    return Gpu((properties.major, properties.minor), properties.multi_processor_count)


def launch_options(num_warps: int, **more: int) -> dict[str, int | bool]:
    """The options of a Triton launch: warps a program, `more` of them by Triton's own names, and products and
    sums fused.

    Fusing is Triton's default only for now, and it decides bits: every launch says it.
    """
    return {"num_warps": num_warps, "enable_fp_fusion": True} | more


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on the device of `x`, whatever the current one is."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def unit_rows(x: Tensor) -> Tensor:
    """`x` (..., V) with contiguous rows: itself if they are, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def address(x: Tensor) -> int:
    """Where the elements of `x` lie; 0 for an empty tensor, which is how compiled code sees an absent one."""
    return x.data_ptr() if x.numel() else 0


def row_layout(x: Tensor) -> tuple[int, int, int]:
    """(L, batch, row) of `x` (T, V) or (B, L, V): row t starts at element t // L * batch + t % L * row."""
    if x.ndim == 2:
        return max(x.shape[0], 1), 0, x.stride(0)
    return max(x.shape[1], 1), x.stride(0), x.stride(1)


def aligned_rows(x: Tensor) -> bool:
    """Whether every row of `x` (T, V) or (B, L, V) begins at a multiple of 16 bytes."""
    steps = (stride * x.element_size() for stride in x.stride()[:-1])
    return all(n % 16 == 0 for n in (x.data_ptr(), *steps))
