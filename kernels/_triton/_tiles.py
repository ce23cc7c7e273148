"""Tiles of tokens for the Triton kernels of perturb: how a program finds its own, and adds up sums."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 2048  # enough to fill a GPU several times, few enough that each may read the sums of all
BALLS_AT_ONCE = tl.constexpr(256)  # balls searched at once for the one that holds a tile
TILES_AT_ONCE = tl.constexpr(256)  # tiles with sums added at once
INFINITY = tl.constexpr(float("inf"))


class Tiles(NamedTuple):
    """Tiles of R tokens over S balls of L tokens each, or with the ends `cu`."""

    programs: int
    S: int
    L: int
    T: int
    R: int
    cu: Tensor
    packed: bool

    @classmethod
    def over(cls, T: int, S: int, L: int, cu: Tensor, least: int) -> Tiles:
        """The tiles of T tokens; R, a power of two, depends on sizes alone, as do the bits of the sums."""
        R = max(least, triton.next_power_of_2(triton.cdiv(T, PROGRAMS)))
        packed = L == 0
        return cls(T // R + S if packed else S * triton.cdiv(L, R), S, L, T, R, cu.contiguous(), packed)

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.S, self.L, self.T, self.R, self.programs


@triton.jit
def find_ball(u, cu, L, R, PACKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Ball u: its first tile, how many it has, its tokens [a, b)."""
    if PACKED:
        a, b = tl.load(cu + u).to(tl.int64), tl.load(cu + u + 1).to(tl.int64)
        own = (a // R).to(tl.int32) + u
        many = (b // R).to(tl.int32) + u + 1 - own
    else:
        many = (L + R - 1) // R
        a = u.to(tl.int64) * L
        b = a + L
        own = u * many
    return own, many, a, b


@triton.jit
def find_tile(p, cu, S, L, T, R, PACKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tile p: its ball, the ball's first tile and how many it has, the tile's tokens [begin, end)."""
    if PACKED:
        lane = tl.arange(0, BALLS_AT_ONCE)
        u = -1
        for i in range(0, S, BALLS_AT_ONCE):
            at = i + lane
            start = tl.load(cu + at, at < S, 0)
            u += tl.sum(((start // R + at <= p) & (at < S)).to(tl.int32), 0)
        u = tl.maximum(u, 0)
    else:
        u = p // ((L + R - 1) // R)
    own, many, a, b = find_ball(u, cu, L, R, PACKED)
    begin = a + (p - own) * R
    return u, own, many, begin, tl.minimum(tl.minimum(begin + R, b), T)


@triton.jit
def total(partial, own, many):  # type: ignore[no-untyped-def]
    """The sum of a ball's tiles, the same in every program."""
    lane = tl.arange(0, TILES_AT_ONCE)
    s = tl.zeros((TILES_AT_ONCE,), tl.float64)
    for i in range(0, many, TILES_AT_ONCE):
        s += tl.load(partial + own + i + lane, i + lane < many, 0.0)
    return tl.sum(s, 0)


@triton.jit
def wide(x):  # type: ignore[no-untyped-def]
    """An fp64 argument as it was passed: the interpreter would round a Python number to fp32."""
    return x * tl.full((), 1.0, tl.float64)


@triton.jit
def finite(g):  # type: ignore[no-untyped-def]
    """Which rows hold finite numbers only."""
    return tl.min((tl.abs(g) < INFINITY).to(tl.int32), 1) != 0


@triton.jit
def load_row(x, t, stride, d, live, D):  # type: ignore[no-untyped-def]
    """Columns d of rows t in fp32; 0 where a row is not live."""
    return tl.load(x + t[:, None] * stride + d[None, :], live[:, None] & (d < D)[None, :], 0.0).to(tl.float32)


@triton.jit
def store_row(delta, embeds, out, y, t, stride, embeds_stride, out_stride, d, inside, D, ADD: tl.constexpr):  # type: ignore[no-untyped-def]
    """delta = y, and out = embeds + y."""
    at = inside[:, None] & (d < D)[None, :]
    tl.debug_barrier()  # in place: no warp stores what another still loads
    tl.store(delta + t[:, None] * stride + d[None, :], y, at)
    if ADD:
        e = tl.load(embeds + t[:, None] * embeds_stride + d[None, :], at, 0.0).to(tl.float32)
        tl.debug_barrier()
        tl.store(out + t[:, None] * out_stride + d[None, :], (e + y).to(out.dtype.element_ty), at)
