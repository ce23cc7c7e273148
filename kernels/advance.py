"""Begin and end a decode step on the device: find where the newest tokens go; record what was drawn, end
rows, and give pages to those that go on.

For each live row b, of sequence s = seq[b] with c = length[b] tokens so far:

    records[s, c] = the draw;   length[b] += 1;  drawn[b] += 1;  last[b] = token

    the row ends as `stop` if the token is one of `stops`,
    else as `length` if drawn[b] = budget[b] or length[b] = until[b]

    a row that goes on gets the next free page if its newest token is the first of a page

Other rows change nothing.  The host reads none of this, so a captured graph can hold the step.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.kernels._advance import LENGTH, RUNNING, STOP, Pages, Records, Rows
from fastrl.kernels._backend import pick, register, register_triton, unbuilt
from fastrl.kernels._check import INTS, dims, same_device
from fastrl.kernels._native import advance as native
from fastrl.kernels._rows import in_any_order, put_rows
from fastrl.kernels.sample import Sample

_DTYPES = {  # of the fields, in order
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
    """The definition; reads no value on the host."""
    S, C = records.tokens.shape
    alive = rows.alive.clone()
    seq = torch.where(alive, rows.seq, S - 1)
    place = seq * C + torch.where(alive, rows.length, 0)
    values = (draw.token, draw.logp, draw.behaviour_logp, draw.entropy, alive, version.expand_as(seq))
    for record, value in zip(records[:6], values, strict=True):
        put_rows(record.view(-1), place, value.to(record.dtype))

    rows.length.add_(alive)
    rows.drawn.add_(alive)
    rows.last.copy_(torch.where(alive, draw.token, rows.last))
    total.add_(alive.sum())

    stopped = (draw.token[:, None] == stops).any(1)
    ended = alive & (stopped | (rows.drawn >= rows.budget) | (rows.length >= rows.until))
    put_rows(records.length, seq, rows.length)
    finish = torch.where(ended, torch.where(stopped, STOP, LENGTH), RUNNING)
    put_rows(records.finish, seq, finish.to(torch.int8))
    rows.alive.logical_and_(~ended)

    newest = rows.length - 1
    needy = rows.alive & (newest % page == 0)
    rank = needy.cumsum(0)
    given = pages.free[torch.where(needy, pages.top - rank, 0)]
    column = torch.where(needy, newest // page, 0)[:, None]
    kept = rows.table.gather(1, column)[:, 0]
    with in_any_order(rows.table):  # one entry a row
        rows.table.scatter_(1, column, torch.where(needy, given, kept)[:, None])
    # page 0 is never given to a row
    pages.refs.index_fill_(0, torch.where(needy, given, 0).long(), 1)
    pages.top.sub_(rank[-1:])


def reference_need(alive: Tensor, length: Tensor, until: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """The definition of `need`."""
    # the last token of a sequence never needs a key
    pages = (until - 2) // page - (length - 1) // page
    return alive.sum(), torch.where(alive, pages, 0).sum()


def reference_newest(
    length: Tensor, table: Tensor, seq: Tensor, key: Tensor, page: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition of `newest`."""
    position = length - 1
    pages = table.gather(1, (position // page)[:, None])[:, 0].long()
    return position, pages * page + position % page, length.to(torch.int32), key[seq]


register("advance", "reference", forward=reference, newest=reference_newest)
register("need", "reference", forward=reference_need)


# --- kernels ----------------------------------------------------------------------------------------
register("need", "cpu", missing=unbuilt("need_cpu"), forward=native.need)
register(
    "advance",
    "cpu",
    dtypes=(torch.float32,),
    missing=unbuilt("advance_cpu"),
    forward=native.forward,
    newest=reference_newest,  # of a few numbers, for which a call of compiled code is no faster
)
register_triton("advance", "advance", "forward", "newest")


# --- public -----------------------------------------------------------------------------------------
class Newest(NamedTuple):
    """What a step needs to know of each row's newest token.

    position  (B,) int64  in its sequence
    slot      (B,) int64  of the caches, where its key and value go
    length    (B,) int32  tokens of its sequence up to it
    key       (B,) int64  the sequence's number in the noise
    """

    position: Tensor
    slot: Tensor
    length: Tensor
    key: Tensor


def newest(rows: Rows, records: Records, key: Tensor, page: int) -> Newest:
    """Where the newest token of each row is, and where its key and value go; one launch on CUDA.

    Shapes:  those of `Rows` (B rows) and `Records` (S sequences);  key (S,) int64.
    Raises:  ValueError or TypeError naming the argument.  No values are read.
    """
    (B, _) = dims("rows.table", rows.table, "B N", (torch.int32,))
    for name, x in (("rows.length", rows.length), ("rows.seq", rows.seq)):
        dims(name, x, "B", (torch.int64,), B=B)
    dims("key", key, "S", (torch.int64,), S=len(records.length))
    same_device(length=rows.length, table=rows.table, key=key)
    if page < 1:
        raise ValueError(f"page: expected a positive number of tokens, got {page}")
    return Newest(*pick("advance", records.logp, "newest")(rows.length, rows.table, rows.seq, key, page))


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
    """Record `draw` and advance `rows`, `records` and `pages` by one token, in place.

    The number of tokens drawn is added to `total`.

    Shapes:  those of `Rows` (B rows), `Records`, `Pages` and `Sample`;  stops (n,) int64;  version (1,)
             int64, of the weights;  total (1,) int64.
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
    """Raise ValueError or TypeError naming the field with a wrong shape or dtype.

    Correct fields are compared all at once: a step is short.
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
    """How many rows are alive, and how many more pages they may need, both () int64.

    Shapes:  alive (B,) bool;  length, until (B,) int64, as in `Rows`.
    Raises:  ValueError or TypeError naming the argument.
    """
    (B,) = dims("alive", alive, "B", (torch.bool,))
    for name, x in (("length", length), ("until", until)):
        dims(name, x, "B", (torch.int64,), B=B)
    if page < 1:
        raise ValueError(f"page: expected a positive number of tokens, got {page}")
    return pick("need", alive, "forward")(alive, length, until, page)
