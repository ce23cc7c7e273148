"""The tiles of a decoder layer's three products, by the number of rows.

A few rows read the weights once and want many programs; many rows want large tiles, which read less often.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from fastrl.kernels._launch import launch_options

SPLITS = 8  # of a product along K, at most
LEAST_SHARE = 256  # of K, to a split
ENTER = {"BLOCK": 1024, "TICKETS": 128} | launch_options(4)


def tiles(rows: int, half: int, normed: bool, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """The tiles of the three kernels for this number of rows; a head with a norm is not cut."""
    if dtype == torch.float32:
        m = 16
        heads, gated, residual = _tile(m, 16, 32, 2), _tile(m, 16, 32, 2), _tile(m, 16, 32, 2)
    elif rows <= 16:
        heads, gated, residual = _tile(16, 16, 128, 4), _tile(16, 32, 128, 4), _tile(16, 32, 128, 4)
    elif rows <= 64:
        m = 32 if rows <= 32 else 64
        heads, gated, residual = _tile(m, 16, 64, 4), _tile(m, 32, 64, 4), _tile(m, 32, 64, 4)
    else:
        heads, gated, residual = _tile(64, 32, 64, 4), _tile(128, 64, 64, 3, 8), _tile(64, 64, 64, 4)
    if normed and triton.next_power_of_2(half) > heads["LANES"]:
        lanes = triton.next_power_of_2(half)
        heads = heads | {"LANES": lanes}
        if dtype != torch.float32 and lanes >= 64:  # registers of four warps do not hold 64 rows
            heads = _tile(32, lanes, 64, 3) if rows <= 64 else _tile(64, lanes, 64, 3, 8)
    residual["BLOCK_N"] = residual.pop("LANES")
    return {"heads": heads, "gated": gated, "residual": residual}


def _tile(rows: int, lanes: int, depth: int, stages: int, warps: int = 4) -> dict[str, Any]:
    return {"BLOCK_M": rows, "LANES": lanes, "BLOCK_K": depth} | launch_options(warps, num_stages=stages)


def splits_of(programs: int, K: int, processors: int) -> int:
    """Into how many parts a product of `programs` tiles is cut along K, to fill the processors: 1, 2, 4 or
    8.
    """
    splits = 1
    while 2 * splits * programs <= processors and 2 * splits <= min(SPLITS, K // LEAST_SHARE):
        splits *= 2
    return splits
