"""advance and need on CPU: csrc/cpu/advance.cpp, which takes addresses.

It checks every index that it writes through before it writes anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.kernels._advance import Pages, Records, Rows
from fastrl.kernels._backend import extension


def forward(
    draw: tuple[Tensor, ...],
    rows: Rows,
    records: Records,
    pages: Pages,
    stops: Tensor,
    version: Tensor,
    total: Tensor,
    page: int,
) -> None:
    """Advance every row, in place."""
    _check_contiguous("rows", rows)
    _check_contiguous("records", records)
    _check_contiguous("pages", pages)
    token, *values = draw
    drawn = (token.long(), *(x.contiguous() for x in values))
    (B, N), (S, C) = rows.table.shape, records.tokens.shape

    extension().advance_cpu(
        _addresses(drawn),
        _addresses(rows),
        _addresses(records),
        _addresses(pages),
        stops.data_ptr(),
        stops.numel(),
        int(version),
        total.data_ptr(),
        B,
        N,
        S,
        C,
        pages.refs.numel(),
        page,
    )


def _check_contiguous(name: str, group: Rows | Records | Pages) -> None:
    for field, x in zip(group._fields, group, strict=True):
        if not x.is_contiguous():
            raise ValueError(f"{name}.{field}: expected a contiguous tensor, got strides {x.stride()}")


def _addresses(group: tuple[Tensor, ...]) -> list[int]:
    return [x.data_ptr() for x in group]


def need(alive: Tensor, length: Tensor, until: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """Live rows, and the pages that they may still need, both () int64."""
    alive, length, until = alive.contiguous(), length.contiguous(), until.contiguous()
    counts = extension().need_cpu(alive.data_ptr(), length.data_ptr(), until.data_ptr(), alive.numel(), page)
    rows, pages = torch.tensor(counts).unbind()
    return rows, pages
