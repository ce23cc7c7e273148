"""decode_attention on CPU: csrc/cpu/decode_attention.cpp, which takes addresses.

It checks the lengths, the rows and the pages in use before it reads through any of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.kernels._backend import extension
from fastrl.kernels._launch import FLOAT_CODES, unit_rows


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    scale: float,
) -> Tensor:
    """y (B, H, E)."""
    q = unit_rows(q)
    table = unit_rows(block_table.int())
    lengths = lengths.int().contiguous()
    rows = None if rows is None else rows.long().contiguous()

    B, H, E = q.shape
    pages, page, K, _ = k_cache.shape
    R, N = table.shape
    y = torch.empty(B, H, E, dtype=q.dtype)

    extension().decode_attention_cpu(
        y.data_ptr(),
        q.data_ptr(),
        q.stride(0),
        q.stride(1),
        FLOAT_CODES[q.dtype],
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        table.data_ptr(),
        table.stride(0),
        lengths.data_ptr(),
        0 if rows is None else rows.data_ptr(),
        scale,
        B,
        R,
        N,
        H,
        K,
        E,
        pages,
        page,
        torch.get_num_threads(),
    )
    return y
