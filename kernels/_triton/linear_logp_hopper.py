"""linear_logp forward on sm_90: products and exponents overlap, in a program of specialised warps.

One warp loads (TMA), and two groups of four warps compute: each owns 64 of the 128 tokens of a program and
all 256 columns of a tile.

    group 0   multiply tile i          sums of tile i      multiply tile i + 1 ...
    group 1     ... i - 1    sums of i - 1      multiply tile i          sums of tile i ...

Both read the weight's tile from the same ring in shared memory.  Group 1 begins a tile when group 0 is LEAD
steps of 64 columns of D into it, so that one group keeps the tensor cores busy while the other takes
exponents.  A step that only one group multiplies takes 512 cycles, so LEAD steps hide the 1024 cycles that
16,384 exponents take at 16 a cycle (bench/predict.py; not measured).

Two programs a multiprocessor would overlap as well, but their tiles of 128 x 128 read a third more through
L2 and shared memory.  Triton itself does not specialise warps on sm_90, hence Gluon, its language of explicit
layouts, which is experimental, hence a range of versions.  There is no bias: with one, ptxas spills.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastrl.kernels._launch import launch_options
from fastrl.kernels._triton.linear_logp_fold import LOG2E, LOWEST, finish, fold

VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")  # of Triton, that compile it
HALF = gl.constexpr(64)  # tokens of a group of warps
COLUMNS = gl.constexpr(256)
DEPTH = gl.constexpr(64)  # 128 bytes: the widest swizzle
STAGES = gl.constexpr(4)  # of 48 KiB: 192 of the 227 KiB of shared memory
LEAD = gl.constexpr(2)  # steps of D that group 0 is ahead when group 1 begins a tile
OPTIONS = launch_options(num_warps=4)  # of the first group; the others are asked for in the kernel

load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name before Triton 3.9


def available() -> bool:
    """Whether this Triton is one that compiles it."""
    return triton.__version__.startswith(VERSIONS)


# --- warps ------------------------------------------------------------------------------------------
@gluon.jit
def produce(hidden, weight, ring, place, D):  # type: ignore[no-untyped-def]
    """Load each step's tiles of hidden and weight as soon as both groups have left its stage."""
    x, w, full, empty, _ = ring
    first, begin, end, _ = place
    i = 0
    for v in range(begin, end, COLUMNS):
        for d in range(0, D, DEPTH):
            stage = i % STAGES
            mbarrier.wait(empty.index(stage), (i // STAGES + 1) & 1)
            mbarrier.expect(full.index(stage), (2 * HALF + COLUMNS) * DEPTH * 2)
            load(hidden, [first, d], full.index(stage), x.index(2 * stage))
            load(hidden, [first + HALF, d], full.index(stage), x.index(2 * stage + 1))
            load(weight, [v, d], full.index(stage), w.index(stage))
            i += 1


@gluon.jit
def multiply(ring, i, steps, stagger, GROUP: gl.constexpr, MMA: gl.constexpr):  # type: ignore[no-untyped-def]
    """The logits (HALF, COLUMNS) of a tile, from steps [i, i + steps) of the ring.

    One product is in flight while the next is issued: a stage is left when the product after its own is
    under way.
    """
    x, w, full, empty, lead = ring
    z = gl.full([HALF, COLUMNS], 0.0, gl.float32, MMA)
    for n in range(0, steps):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        z = warpgroup_mma(x.index(2 * stage + GROUP), w.index(stage).permute((1, 0)), z, is_async=True)
        z = warpgroup_mma_wait(1, deps=[z])
        mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1, pred=n > 0)
        if GROUP == 0:
            mbarrier.arrive(lead, count=1, pred=stagger & (n == LEAD - 1))
        i += 1
    z = warpgroup_mma_wait(0, deps=[z])
    mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
    return z, i


@gluon.jit
def consume(  # type: ignore[no-untyped-def]
    temperature,
    parts,
    ring,
    place,
    sizes,
    GROUP: gl.constexpr,
    ENTROPY: gl.constexpr,
):
    """Multiply and fold the tiles of one group's tokens; store its parts."""
    first, begin, end, split = place
    T, V, D = sizes
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16]
    )
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    rows = first + GROUP * HALF + gl.arange(0, HALF, ROW)
    live = rows < T
    k = LOG2E / gl.load(temperature + rows, live, 1.0)
    top = gl.full([HALF], LOWEST, gl.float32, ROW)
    c = gl.full([HALF], 0.0, gl.float32, ROW)
    s = gl.full([HALF], 0.0, gl.float32, ROW)
    a = gl.full([HALF], 0.0, gl.float32, ROW)

    steps = (D + DEPTH - 1) // DEPTH
    # with fewer steps a tile, group 0 could be two tiles ahead, and the parity of `lead` be ambiguous
    stagger = steps + LEAD > STAGES
    i = 0
    for v in range(begin, end, COLUMNS):
        if GROUP == 1:
            mbarrier.wait(ring[4], ((v - begin) // COLUMNS) & 1, pred=stagger)
        z, i = multiply(ring, i, steps, stagger, GROUP, MMA)
        if v + COLUMNS > V:
            columns = v + gl.arange(0, COLUMNS, gl.SliceLayout(0, MMA))
            z = gl.where((columns < V)[None, :], z, LOWEST)
        top, c, s, a = fold(z, top, c, s, a, k, ENTROPY)

    s, a = finish(top, c, s, a, k, ENTROPY)
    out = parts + split.to(gl.int64) * 3 * T + rows
    gl.store(out, top, live)
    gl.store(out + T, s, live)
    if ENTROPY:
        gl.store(out + 2 * T, a, live)


# --- kernel -----------------------------------------------------------------------------------------
@gluon.jit(do_not_specialize=["T"])
def partial_kernel(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    temperature,
    parts,
    T,
    V,
    D,
    per_split,
    ENTROPY: gl.constexpr,
):
    """parts (splits, 3, T): top, s and a of 128 tokens over one share of the vocabulary."""
    first, split = gl.program_id(0) * (2 * HALF), gl.program_id(1)
    begin = split * per_split
    end = gl.minimum(begin + per_split, V)
    x = gl.allocate_shared_memory(hidden.dtype, [2 * STAGES, HALF, DEPTH], hidden.layout)
    w = gl.allocate_shared_memory(weight.dtype, [STAGES, COLUMNS, DEPTH], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    lead = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(lead, count=1)
    fence_async_shared()  # the barriers, before TMA arrives at them

    ring, place, sizes = (x, w, full, empty, lead), (first, begin, end, split), (T, V, D)
    gl.warp_specialize(
        [
            (consume, (temperature, parts, ring, place, sizes, gl.constexpr(0), ENTROPY)),
            (consume, (temperature, parts, ring, place, sizes, gl.constexpr(1), ENTROPY)),
            (produce, (hidden, weight, ring, place, D)),
        ],
        [4, 1],
        [240, 24],
    )


# --- launch -----------------------------------------------------------------------------------------
def tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """`x` as tiles (rows, DEPTH) for TMA; its rows start at multiples of 16 bytes."""
    block = [rows, DEPTH.value]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


def launch(
    grid: tuple[int, int],
    hidden: Tensor,
    weight: Tensor,
    temperature: Tensor,
    parts: Tensor,
    per_split: int,
    entropy: bool,
) -> None:
    """Fill parts (shares, 3, T); the grid is (blocks of 128 tokens, shares)."""
    (T, D), V = hidden.shape, weight.shape[0]
    partial_kernel[grid](
        tiles(hidden, HALF.value),
        tiles(weight, COLUMNS.value),
        temperature,
        parts,
        T,
        V,
        D,
        per_split,
        ENTROPY=entropy,
        **OPTIONS,
    )
