"""End a decode step on the device: what was drawn goes into the records, and every row learns whether and
where it goes on.

For each row b that is alive, of sequence s = seq[b] with c = length[b] tokens so far:

    records[s, c] = the draw;   length[b] += 1;  drawn[b] += 1;  last[b] = token
    the row ends as `stop` if the token is one of `stops`, else as `length` if drawn[b] = budget[b] or
    length[b] = until[b] a row that goes on, and whose newest token is the first of a page, gets the next free
    page for it

Rows that are not alive change nothing.  The host looks at none of this: a captured graph of the step runs it
as it is.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from fastrl.kernels._advance import LENGTH, RUNNING, STOP, Pages, Records, Rows
from fastrl.kernels._backend import pick, register, register_triton, unbuilt
from fastrl.kernels._check import INTS, dims, same_device
from fastrl.kernels._native import advance as native
from fastrl.kernels.sample import Sample

_DTYPES = {  # of each field
    "rows": (*(torch.int64,) * 6, torch.bool, torch.int32),
    "records": (torch.int64, *(torch.float32,) * 3, torch.bool, torch.int32, torch.int64, torch.int8),
    "pages": (torch.int32, torch.int64, torch.int32),
}
_dtype, _shape = attrgetter("dtype"), attrgetter("shape")


# --- reference --------------------------------------------------------------------------------------
def reference(
    draw: Sample,
    rows: Rows,
    records: Records,
    pages: Pages,
    stops: Tensor,
    version: Tensor,
    total: Tensor,
    page: int,
) -> None:
    """The definition, in PyTorch, without a look at any value."""
    alive, S, C = rows.alive.clone(), *records.tokens.shape
    seq = torch.where(alive, rows.seq, S - 1)
    place = seq * C + torch.where(alive, rows.length, 0)
    values = (draw.token, draw.logp, draw.behaviour_logp, draw.entropy, alive, version.expand_as(seq))
    for record, value in zip(records[:6], values, strict=True):
        record.view(-1).index_copy_(0, place, value.to(record.dtype))
    rows.length.add_(alive)
    rows.drawn.add_(alive)
    rows.last.copy_(torch.where(alive, draw.token, rows.last))
    total.add_(alive.sum())
    stopped = (draw.token[:, None] == stops).any(1)
    ended = alive & (stopped | (rows.drawn >= rows.budget) | (rows.length >= rows.until))
    records.length.index_copy_(0, seq, rows.length)
    records.finish.index_copy_(
        0, seq, torch.where(ended, torch.where(stopped, STOP, LENGTH), RUNNING).to(torch.int8)
    )
    rows.alive.logical_and_(~ended)
    newest = rows.length - 1
    needy = rows.alive & (newest % page == 0)
    rank = needy.cumsum(0)
    given = pages.free[torch.where(needy, pages.top - rank, 0)]
    column = torch.where(needy, newest // page, 0)[:, None]
    rows.table.scatter_(1, column, torch.where(needy, given, rows.table.gather(1, column)[:, 0])[:, None])
    # page 0 belongs to nobody, for good
    pages.refs.index_copy_(0, torch.where(needy, given, 0).long(), torch.ones_like(given))
    pages.top.sub_(rank[-1:])


def reference_need(alive: Tensor, length: Tensor, until: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """The definition of `need`; its last token never has a key."""
    pages = (until - 2) // page - (length - 1) // page
    return alive.sum(), torch.where(alive, pages, 0).sum()


register("advance", "reference", forward=reference)
register("need", "reference", forward=reference_need)


# --- kernels ----------------------------------------------------------------------------------------
register("need", "cpu", missing=unbuilt("need_cpu"), forward=native.need)
register("advance", "cpu", dtypes=(torch.float32,), missing=unbuilt("advance_cpu"), forward=native.forward)
register_triton("advance", "advance", "forward")


# --- public -----------------------------------------------------------------------------------------
def advance(
    draw: Sample,
    rows: Rows,
    records: Records,
    pages: Pages,
    *,
    stops: Tensor,
    version: Tensor,
    total: Tensor,
    page: int,
) -> None:
    """Record `draw` and move `rows`, `records` and `pages` on by one token, in place; add the number of
    tokens to `total` (1,) int64.

    Shapes:  those of `Rows` (B rows), `Records`, `Pages` and `Sample`;  stops (n,) int64;  version (1,)
             int64, of the weights.
    Memory:  the Triton kernel allocates nothing and is one launch of one program.  There must be a free page
             for every row.
    Raises:  ValueError or TypeError naming the argument.  No values are read.  Not traced by torch.compile,
             not differentiable.
    """
    B, N = dims("rows.table", rows.table, "B N", (torch.int32,))
    S, C = dims("records.tokens", records.tokens, "S C", (torch.int64,))
    (P,) = dims("pages.refs", pages.refs, "P", (torch.int32,))
    _check("rows", rows, (*((B,),) * 7, (B, N)))
    _check("records", records, (*((S, C),) * 6, (S,), (S,)))
    _check("pages", pages, ((P,), (1,), (P,)))
    dims("draw.token", draw.token, "B", INTS, B=B)
    for name, x in zip(draw._fields[1:], draw[1:], strict=True):
        dims(f"draw.{name}", x, "B", (draw.logp.dtype,), B=B)
    dims("stops", stops, "n", (torch.int64,))
    for name, x in (("version", version), ("total", total)):
        dims(name, x, "one", (torch.int64,), one=1)
    same_device(token=draw.token, length=rows.length, tokens=records.tokens, free=pages.free, stops=stops)
    if page < 1:
        raise ValueError(f"page: expected a positive number of tokens, got {page}")
    if B:
        pick("advance", draw.logp, "forward")(draw, rows, records, pages, stops, version, total, page)


def _check(name: str, group: Any, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Raise ValueError or TypeError naming the field that is not of its dtype or shape; at once for all,
    because a step is short.
    """
    dtypes = _DTYPES[name]
    if tuple(map(_dtype, group)) == dtypes and tuple(map(_shape, group)) == shapes:
        return
    for field, x, dtype, shape in zip(group._fields, group, dtypes, shapes, strict=True):
        if x.shape != shape:
            raise ValueError(f"{name}.{field}: expected shape {shape}, got {tuple(x.shape)}")
        if x.dtype != dtype:
            raise TypeError(f"{name}.{field}: expected dtype {dtype}, got {x.dtype}")


def need(alive: Tensor, length: Tensor, until: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """How many rows are alive, and how many pages they have not taken yet but may come to need, both ()
    int64.

    Shapes:  alive (B,) bool;  length, until (B,) int64, as in `Rows`.
    Raises:  ValueError or TypeError naming the argument.
    """
    (B,) = dims("alive", alive, "B", (torch.bool,))
    for name, x in (("length", length), ("until", until)):
        dims(name, x, "B", (torch.int64,), B=B)
    if page < 1:
        raise ValueError(f"page: expected a positive number of tokens, got {page}")
    return pick("need", alive, "forward")(alive, length, until, page)
