"""sample under filters, in Triton: two reads of a row, in three launches.

    survey   per chunk of a row: roughly where the floor lies (sample_window.py)
    draw     per chunk: tokens above that window race, those below it only enter the sums, and those within
             are set aside, d, noise and index of each; the mass of all tokens, as an integer
    settle   per row: the floor, from the exact masses, among what was set aside; its survivors race with the
             winners of the chunks (sample_floor.py)

Without top_k and top_p the floor is known and nothing is set aside.  A row is cut by V alone, so that its
bits depend on nothing but itself.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import launch_options, on_device
from fastrl.kernels._triton._fixed_mass import distance, mass
from fastrl.kernels._triton._philox import philox4
from fastrl.kernels._triton._race import LOG2E, faster, fastest, first_of, quarters, unit_exponential
from fastrl.kernels._triton.sample_floor import SETTLING, STOP, TILE, block, exact, mass_bits, settle_kernel
from fastrl.kernels._triton.sample_window import EDGES, survey_kernel, window

CHUNK = 16384  # of a row, to a program
ASIDE = 4096  # tokens of a chunk that may be set aside: 3 bytes per logit
SURVEYED, READ = 1024, 2048  # logits at once; half for mass and number
# 8 a thread; of 16 bits 4, or two programs do not fit on a multiprocessor
DRAWN = {torch.float32: 2048, torch.bfloat16: 1024, torch.float16: 1024}
OPTIONS = launch_options(num_warps=8)
DRAWING = launch_options(num_warps=8, maxnreg=128)  # without it ptxas may aim at 64, and spill two
FAR = tl.constexpr(-1e4)  # exp of it is 0, and its product with 0 is not NaN


# --- kernels ----------------------------------------------------------------------------------------
@triton.jit
def weigh(count, above, total, d, high, bits, MASS: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The number and the mass of the tokens above a window, and the mass of all, with tokens d added."""
    if COUNT:
        count = tl.where(d >= high, count + 1, count)
    if MASS:
        weight = mass(d, bits)
        above = tl.where(d >= high, above + weight, above)
        if not COUNT:
            total += weight
    return count, above, total


@triton.jit
def set_aside(at, d, noise, index, fits, ASIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(at, d, fits)
    tl.store(at + ASIDE, noise, fits)
    tl.store(at + 2 * ASIDE, index.to(tl.float32, bitcast=True), fits)


@triton.jit
def winner_of(e, best, token, row, start, end, top, greedy, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The winner of the lanes, and its E / exp(d); of a greedy row the first of the largest logits, and 0."""
    least, winner = fastest(e, best, token)
    winner = tl.minimum(winner, end - 1)  # a row without a winner may draw the padding
    if greedy:
        winner = first_of(row, start, end, top, BLOCK)
        least = tl.where(tl.load(row + winner).to(tl.float32) >= top, 0.0, float("inf"))
    return winner, least


@triton.jit
def store_parts(at, plane, x, y, z, w):  # type: ignore[no-untyped-def]
    tl.store(at, x)
    tl.store(at + plane, y)
    tl.store(at + 2 * plane, z)
    tl.store(at + 3 * plane, w)


@triton.jit
def keep_window(rows, top, high, low, start):  # type: ignore[no-untyped-def]
    """Keep the largest logit of a row and its window, in the first of its programs."""
    edge = tl.arange(0, 4)
    few = tl.where(start == 0, 3, 0)
    tl.store(rows + edge, tl.where(edge == 0, top, tl.where(edge == 1, high, low)), edge < few)


@triton.jit(do_not_specialize=["top_k", "bits", "plane"])
def draw_kernel(  # type: ignore[no-untyped-def]
    logits,
    seed,
    sequence,
    position,
    temperature,
    tops,
    masses,
    counts,
    rows,
    parts,
    sums,
    tokens,
    aside,
    V,
    stride,
    top_k,
    p,
    log_min_p,
    bits,
    plane,
    MASS: tl.constexpr,
    COUNT: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ASIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`rows` (B, 3): top and window.  Planes of `parts`: s, a, the winner's E / exp(d), kept.  Planes of
    `sums`: tokens set aside, tokens above the window, their mass, all mass.  `tokens` has the winner.
    `aside`, per chunk: d, E and index of ASIDE tokens, in the order of the vocabulary.
    """
    N: tl.constexpr = BLOCK // 4
    chunks = tl.cdiv(V, CHUNK)
    pid = tl.program_id(0)
    b = (pid // chunks).to(tl.int64)
    start = (pid % chunks) * CHUNK
    end = tl.minimum(start + CHUNK, V)
    row, own = logits + b * stride, aside + pid.to(tl.int64) * (3 * ASIDE)
    tau = tl.load(temperature + b)
    greedy = tau == 0
    tau = tl.where(greedy, 1.0, tau)
    inverse = tl.div_rn(1.0, tau)
    top, high, low = window(tops, masses, counts, tau, b, chunks, top_k, p, MASS, COUNT, CHUNKS)
    if not (MASS or COUNT):
        high, low = log_min_p, log_min_p
    keep_window(rows + 3 * b, top, high, low, start)
    sure = tl.maximum(high, log_min_p)
    key, who, place = tl.load(seed + b), tl.load(sequence + b), tl.load(position + b)
    lane, counter = tl.arange(0, BLOCK), tl.arange(0, N)
    s, a, kept = tl.zeros((N,), tl.float32), tl.zeros((N,), tl.float32), tl.zeros((N,), tl.float32)
    e, best = tl.full((N,), 1.0, tl.float32), tl.zeros((N,), tl.float32)  # E and exp(d) of the lane's winner
    token = start + 4 * counter
    total, above = tl.zeros((N,), tl.int64), tl.zeros((N,), tl.int64)
    count, filled = tl.zeros((N,), tl.int32), tl.full((), 0, tl.int32)
    for v in range(start, end, BLOCK):
        x = tl.load(row + v + lane, v + lane < V, float("-inf")).to(tl.float32)
        far = distance(x, top, tau, inverse)
        near = tl.maximum(far, FAR, propagate_nan=tl.PropagateNan.ALL)
        part = tl.exp2(near * LOG2E)
        d, share, product = quarters(far, N), quarters(part, N), quarters(part * near, N)
        for i in tl.static_range(4):
            s += share[i]
            a += product[i]
            count, above, total = weigh(count, above, total, d[i], high, bits, MASS, COUNT)
        if tl.max(tl.maximum(tl.maximum(d[0], d[1]), tl.maximum(d[2], d[3])), 0) >= low:
            words = philox4(v // 4 + counter, place, who, who >> 32, key, key >> 32)
            at = tl.full((N,), filled, tl.int32)
            put = quarters(((far >= low) & (far < high) & (v + lane < V)).to(tl.int32), N)
            if MASS or COUNT:
                many = put[0] + put[1] + put[2] + put[3]
                run = tl.cumsum(many, 0)
                at += run - many
                filled += tl.max(run, 0)
            for i in tl.static_range(4):
                mine = tl.where(d[i] >= sure, share[i], 0.0)
                kept += mine
                noise, index = unit_exponential(words[i]), v + 4 * counter + i
                e, best, token = faster(e, best, token, noise, mine, index)
                if MASS or COUNT:
                    set_aside(own + at, d[i], noise, index, (put[i] != 0) & (at < ASIDE), ASIDE)
                    at += put[i]
    winner, least = winner_of(e, best, token, row, start, end, top, greedy, BLOCK)
    tl.store(tokens + pid, winner)
    store_parts(parts + pid, plane, tl.sum(s, 0), tl.sum(a, 0), least, tl.sum(kept, 0))
    if MASS or COUNT:
        store_parts(sums + pid, plane, filled, tl.sum(count, 0), tl.sum(above, 0), tl.sum(total, 0))


# --- launch -----------------------------------------------------------------------------------------
class Work(NamedTuple):
    """What the three kernels hand on; shapes in `draw_kernel` and `survey_kernel`."""

    tops: Tensor
    masses: Tensor
    counts: Tensor
    rows: Tensor
    parts: Tensor
    sums: Tensor
    tokens: Tensor
    aside: Tensor
    last: Tensor  # TILE keys a row

    @classmethod
    def of(cls, B: int, plane: int, searched: bool, device: torch.device) -> Work:
        """For B rows of `plane` chunks in all; what only the search for a floor reads is else empty."""

        def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        lists = plane if searched else 0
        return cls(
            tops=numbers(plane),
            masses=numbers(lists, EDGES.value),
            counts=numbers(lists, EDGES.value),
            rows=numbers(B, 3),
            parts=numbers(4, plane),
            sums=numbers(4, plane, dtype=torch.int64),
            tokens=numbers(plane, dtype=torch.int32),
            aside=numbers(lists, 3, ASIDE),
            last=numbers(B if searched else 0, TILE.value, dtype=torch.int32),
        )


def forward(
    logits: Tensor,
    seed: Tensor,
    sequence: Tensor,
    position: Tensor,
    temperature: Tensor,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """token, logp, behaviour_logp and entropy, and the floor under d, each (B,)."""
    B, V = logits.shape
    flags: dict[str, Any] = {"MASS": top_p < 1, "COUNT": 0 < top_k < V, "CHUNK": CHUNK}
    both, searched = flags["MASS"] and flags["COUNT"], flags["MASS"] or flags["COUNT"]
    chunks = triton.cdiv(V, CHUNK)
    plane, stride, bits = B * chunks, logits.stride(0), mass_bits(V)
    log_min_p = math.log(min_p) if min_p else -math.inf

    work = Work.of(B, plane, searched, logits.device)
    floats = (
        torch.empty(B, dtype=torch.float32, device=logits.device) for _ in range(4)
    )  # of an op: no views
    out = (torch.empty(B, dtype=torch.int64, device=logits.device), *floats)
    inputs = (logits, seed, sequence, position, temperature)
    surveyed, drawn = (work.tops, work.masses, work.counts), (work.rows, work.parts, work.sums, work.tokens)
    survey = {"BLOCK": block(V, SURVEYED // 2 if both else SURVEYED), "READ": block(V, READ)}
    draw = flags | {"CHUNKS": triton.next_power_of_2(chunks), "ASIDE": ASIDE}

    with on_device(logits):
        survey_kernel[(plane,)](logits, temperature, *surveyed, V, stride, **survey, **flags, **OPTIONS)
        numbers = (V, stride, top_k, top_p, log_min_p, bits, plane)
        BLOCK = block(V, DRAWN[logits.dtype])
        draw_kernel[(plane,)](
            *inputs, *surveyed, *drawn, work.aside, *numbers, **draw, BLOCK=BLOCK, **DRAWING
        )
        settling = (V, chunks, stride, top_k, exact(top_p), log_min_p, bits, plane)
        STOPPING = STOP[logits.dtype]
        settle_kernel[(B,)](
            *inputs, *drawn, work.aside, work.last, *out, *settling, **draw, STOP=STOPPING, **SETTLING
        )
    token, logp, behaviour_logp, entropy, floor = out
    return (token, logp, behaviour_logp, entropy), floor
