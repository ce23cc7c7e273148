"""The floor of a row under sample's filters, and the draw above it: one Triton program per row.

`draw_kernel` (sample_filtered.py) has set aside the tokens of a window around the floor and left the mass and
the number of those above it.  The floor is the d of the first token set aside, in falling order, with which
the sum reaches its limit; it is found by sums at 16 thresholds at a time, until few enough tokens lie between
two of them for a program to hold, and by halving from there.  Keys are the bits of -d: smaller for the more
probable.

The masses are those of _fixed_mass.py.  The floor is the definition's, which sums fp64 masses, wherever the
limit is further than `slack` from the two sums next to it.  Where it is not (2 slack / mass of the token at
the floor: 1 row in 1,000 if that holds 2^-18 of the row, 1 in 30,000 at 2^-13), where more tokens lie in the
window than were set aside (nearly equal logits), and where the window misses the floor, `exact_floor` finds
it by the definition, and the race takes the logits themselves.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from fastrl.kernels._launch import launch_options
from fastrl.kernels._triton._exact_floor import exact_floor, limit_of
from fastrl.kernels._triton._fixed_mass import distance, mass, slack
from fastrl.kernels._triton._philox import philox4
from fastrl.kernels._triton._race import LOG2E, LOWEST, faster, fastest, unit_exponential

STOP = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 12}  # low bits of the fp32 form, always 0
TILE = tl.constexpr(2048)  # tokens that a program holds at once
PROBED = tl.constexpr(256)  # tokens compared with 16 thresholds at once
RACED = tl.constexpr(1024)  # tokens that race at once
SEARCHED = tl.constexpr(1024)  # logits at once, by the definition
BEYOND = tl.constexpr(0x7FFFFFFF)  # above every key; of -inf it is 0x7F800000
INFINITE = tl.constexpr(0x7F800000)
SETTLING = launch_options(num_warps=8, maxnreg=128)


# --- among what was set aside -----------------------------------------------------------------------
@triton.jit
def key_of(d):  # type: ignore[no-untyped-def]
    """The bits of -d, for d <= 0; -1, below every key, for d > 0."""
    bits = d.to(tl.int32, bitcast=True)
    return tl.where(d > 0, -1, bits & 0x7FFFFFFF)


@triton.jit
def distance_of(key):  # type: ignore[no-untyped-def]
    return -(key.to(tl.float32, bitcast=True))


@triton.jit
def weights(key, bits, MASS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What each token adds to the sum: its mass or 1; 0 beyond the last key."""
    weight = tl.full(key.shape, 1, tl.int64)
    if MASS:
        weight = mass(distance_of(tl.minimum(key, INFINITE)), bits)
    return tl.where(key == BEYOND, 0, weight)


@triton.jit
def keys_at(aside, at, live):  # type: ignore[no-untyped-def]
    return tl.where(live, key_of(tl.load(aside + at, live, 0.0)), BEYOND)


@triton.jit
def sum_until(aside, fills, chunks, last, bits, MASS: tl.constexpr, ASIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The weight of the tokens set aside with keys up to each of `last` (16,), and their number."""
    lane = tl.arange(0, PROBED)
    weight = tl.zeros((16, PROBED), tl.int64)
    count = tl.zeros((16, PROBED), tl.int32)
    for c in range(chunks):
        n = tl.load(fills + c).to(tl.int32)
        for i in range(0, n, PROBED):
            key = keys_at(aside, c * (3 * ASIDE) + i + lane, i + lane < n)
            within = (key[None, :] <= last[:, None]) & (key != BEYOND)[None, :]
            weight = tl.where(within, weight + weights(key, bits, MASS)[None, :], weight)
            count = tl.where(within, count + 1, count)
    return tl.sum(weight, 1), tl.sum(count, 1)


@triton.jit
def gather(aside, fills, chunks, last, first_key, last_key, ASIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The keys set aside above `first_key` and up to `last_key`, TILE at most, through the scratch `last`."""
    lane = tl.arange(0, RACED)
    filled = tl.full((), 0, tl.int32)
    tl.debug_barrier()  # an earlier call has read the scratch
    for c in range(chunks):
        n = tl.load(fills + c).to(tl.int32)
        for i in range(0, n, RACED):
            key = keys_at(aside, c * (3 * ASIDE) + i + lane, i + lane < n)
            put = ((key > first_key) & (key <= last_key)).to(tl.int32)
            run = tl.cumsum(put, 0)
            at = filled + run - put
            tl.store(last + at, key, (put != 0) & (at < TILE))
            filled += tl.max(run, 0)
    tl.debug_barrier()
    tile = tl.arange(0, TILE)
    return tl.load(last + tile, tile < filled, BEYOND)


@triton.jit
def search(  # type: ignore[no-untyped-def]
    aside,
    fills,
    chunks,
    last,
    many,
    first_key,
    last_key,
    above,
    need,
    bits,
    MASS: tl.constexpr,
    ASIDE: tl.constexpr,
):
    """The smallest key in (first_key, last_key] up to which the tokens set aside, with `above`, weigh `need`,
    and the weights up to the key before it and up to it; `many` tokens are set aside.

    If there is none, the last weight is less than `need`.
    """
    index = tl.arange(0, 16)
    before, until = above, above
    skipped = tl.full((), 0, tl.int32)
    while (many > TILE) & (last_key - first_key > 1):
        step = (last_key - first_key + 15) // 16
        # in int64: the last thresholds may pass the largest int32
        key = tl.minimum(first_key + step.to(tl.int64) * (index + 1), last_key).to(tl.int32)
        weight, count = sum_until(aside, fills, chunks, key, bits, MASS, ASIDE)
        weight += above
        short = tl.minimum(tl.sum((weight < need).to(tl.int32), 0), 15)
        here, prior = index == short, index == short - 1
        before = tl.where(short > 0, tl.sum(tl.where(prior, weight, 0), 0), before)
        first_key = tl.where(short > 0, tl.sum(tl.where(prior, key, 0), 0), first_key)
        skipped = tl.where(short > 0, tl.sum(tl.where(prior, count, 0), 0), skipped)
        until = tl.sum(tl.where(here, weight, 0), 0)
        last_key = tl.sum(tl.where(here, key, 0), 0)
        many = tl.sum(tl.where(here, count, 0), 0) - skipped
    if many <= TILE:
        tile = gather(aside, fills, chunks, last, first_key, last_key, ASIDE)
        weight = weights(tile, bits, MASS)
        base = before
        until = base + tl.sum(weight, 0)
        while last_key - first_key > 1:
            middle = first_key + (last_key - first_key) // 2
            sum_ = base + tl.sum(tl.where(tile <= middle, weight, 0), 0)
            enough = sum_ >= need
            last_key = tl.where(enough, middle, last_key)
            until = tl.where(enough, sum_, until)
            first_key = tl.where(enough, first_key, middle)
            before = tl.where(enough, before, sum_)
    return last_key, before, until


# --- the draw above the floor -----------------------------------------------------------------------
@triton.jit
def noise_of(v, place, who, code):  # type: ignore[no-untyped-def]
    """The unit exponentials of tokens v, wherever they lie."""
    w = philox4(v >> 2, place, who, who >> 32, code, code >> 32)
    even, odd = tl.where((v & 2) != 0, w[2], w[0]), tl.where((v & 2) != 0, w[3], w[1])
    return unit_exponential(tl.where((v & 1) != 0, odd, even))


@triton.jit
def floor_aside(  # type: ignore[no-untyped-def]
    aside,
    sums,
    rows,
    last,
    chunks,
    plane,
    top_k,
    top_p,
    bits,
    V,
    MASS: tl.constexpr,
    COUNT: tl.constexpr,
    CHUNKS: tl.constexpr,
    ASIDE: tl.constexpr,
):
    """The floor among the tokens of a row that are set aside, and whether it is certain."""
    lane = tl.arange(0, CHUNKS)
    fill = tl.load(sums + lane, lane < chunks, 0)
    many = tl.sum(fill, 0).to(tl.int32)
    ok = tl.max(fill, 0) <= ASIDE
    # the window's upper edge belongs to what lies above
    first, end = key_of(tl.load(rows + 1)), key_of(tl.load(rows + 2))
    found = tl.full((), float("-inf"), tl.float32)
    if COUNT:
        above = tl.sum(tl.load(sums + plane + lane, lane < chunks, 0), 0)
        if ok:
            end, before, until = search(
                aside, sums, chunks, last, many, first, end, above, top_k, bits, False, ASIDE
            )
            ok = (before < top_k) & (until >= top_k)
            found = distance_of(end)
    if MASS:
        above = tl.sum(tl.load(sums + 2 * plane + lane, lane < chunks, 0), 0)
        total = tl.sum(tl.load(sums + 3 * plane + lane, lane < chunks, 0), 0)
        if ok:
            if COUNT:
                whole = tl.zeros((16,), tl.int32) + end
                total = above + tl.max(sum_until(aside, sums, chunks, whole, bits, True, ASIDE)[0], 0)
            limit = limit_of(top_p, total)
            end, before, until = search(
                aside, sums, chunks, last, many, first, end, above, limit, bits, True, ASIDE
            )
            doubt = slack(total, V)
            ok = (before + doubt < limit) & (limit + doubt <= until)
            found = distance_of(end)
    return found, ok


@triton.jit
def race_aside(aside, fills, chunks, floor, ASIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The cost and the index of the winner among the tokens set aside, and what those above `floor` hold."""
    lane = tl.arange(0, RACED)
    e, best = tl.full((RACED,), 1.0, tl.float32), tl.zeros((RACED,), tl.float32)
    winner, kept = tl.zeros((RACED,), tl.int32), tl.zeros((RACED,), tl.float32)
    for c in range(chunks):
        n = tl.load(fills + c).to(tl.int32)
        for i in range(0, n, RACED):
            at, within = aside + c * (3 * ASIDE) + i + lane, i + lane < n
            d = tl.load(at, within, float("-inf"))
            share = tl.where(d >= floor, tl.exp2(d * LOG2E), 0.0)
            kept += share
            noise = tl.load(at + ASIDE, within, 1.0)
            v = tl.load(at + 2 * ASIDE, within, 0.0).to(tl.int32, bitcast=True)
            e, best, winner = faster(e, best, winner, noise, share, v)
    return finish(e, best, winner, kept)


@triton.jit
def race_row(row, V, top, tau, floor, place, who, code):  # type: ignore[no-untyped-def]
    """The same among all tokens of a row."""
    lane = tl.arange(0, RACED)
    e, best = tl.full((RACED,), 1.0, tl.float32), tl.zeros((RACED,), tl.float32)
    winner, kept = tl.zeros((RACED,), tl.int32), tl.zeros((RACED,), tl.float32)
    inverse = tl.div_rn(1.0, tau)
    for i in range(0, V, RACED):
        v = i + lane
        x = tl.load(row + v, v < V, float("-inf")).to(tl.float32)
        d = distance(x, top, tau, inverse)
        share = tl.where((d >= floor) & (v < V), tl.exp2(d * LOG2E), 0.0)
        kept += share
        e, best, winner = faster(e, best, winner, noise_of(v, place, who, code), share, v)
    return finish(e, best, winner, kept)


@triton.jit
def finish(e, best, winner, kept):  # type: ignore[no-untyped-def]
    """One winner of all lanes; its cost is infinite if nobody raced."""
    cost, token = fastest(e, best, winner)
    return tl.where(tl.max(best, 0) > 0, cost, float("inf")), token, tl.sum(kept, 0)


@triton.jit(do_not_specialize=["chunks", "top_k", "top_p", "bits", "plane"])
def settle_kernel(  # type: ignore[no-untyped-def]
    logits,
    seed,
    sequence,
    position,
    temperature,
    rows,
    parts,
    sums,
    tokens,
    aside,
    last,
    token,
    logp,
    behaviour_logp,
    entropy,
    row_floor,
    V,
    chunks,
    stride,
    top_k,
    top_p,
    log_min_p,
    bits,
    plane,
    MASS: tl.constexpr,
    COUNT: tl.constexpr,
    STOP: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ASIDE: tl.constexpr,
):
    """Arguments as in `draw_kernel`; `top_p` is the bits of a double."""
    b = tl.program_id(0).to(tl.int64)
    row, own, listed = logits + b * stride, b * chunks, aside + b * chunks * (3 * ASIDE)
    tau = tl.load(temperature + b)
    greedy = tau == 0
    tau = tl.where(greedy, 1.0, tau)
    top = tl.load(rows + 3 * b)
    lane = tl.arange(0, CHUNKS)
    at, live = own + lane, lane < chunks
    least = tl.load(parts + 2 * plane + at, live, float("inf"))
    drawn = tl.load(tokens + at, live, 2147483647)
    kept = tl.sum(tl.load(parts + 3 * plane + at, live, 0.0), 0)
    floor = tl.full((), 0, tl.float32) + log_min_p
    cost, other, more = tl.full((), float("inf"), tl.float32), tl.full((), 0, tl.int32), tl.zeros_like(kept)
    if MASS or COUNT:
        fills, scratch = sums + own, last + b * TILE
        if greedy == 0:
            found, ok = floor_aside(
                listed,
                fills,
                rows + 3 * b,
                scratch,
                chunks,
                plane,
                top_k,
                top_p,
                bits,
                V,
                MASS,
                COUNT,
                CHUNKS,
                ASIDE,
            )
            if ok:
                floor = tl.maximum(floor, found)
                cost, other, more = race_aside(listed, fills, chunks, floor, ASIDE)
            else:
                found = exact_floor(row, V, top, tau, top_k, top_p, bits, COUNT, MASS, STOP, SEARCHED)
                floor = tl.maximum(floor, found)
                place, who, code = tl.load(position + b), tl.load(sequence + b), tl.load(seed + b)
                cost, other, more = race_row(row, V, top, tau, floor, place, who, code)
                least, kept = tl.full((CHUNKS,), float("inf"), tl.float32), tl.zeros_like(kept)
    kept += more
    winning = tl.min(least, 0)
    chosen = tl.min(tl.where(live & (least == winning), drawn, 2147483647), 0)
    first = (cost < winning) | ((cost == winning) & (other < chosen))
    chosen = tl.minimum(tl.where((cost < float("inf")) & first, other, chosen), V - 1)
    s = tl.sum(tl.load(parts + at, live, 0.0), 0)
    a = tl.sum(tl.load(parts + plane + at, live, 0.0), 0)
    s = tl.where(top <= LOWEST, float("nan"), s)  # nothing above -inf: no distribution
    ln = tl.log(s)
    d = tl.div_rn(tl.load(row + chosen).to(tl.float32) - top, tau)
    tl.store(token + b, chosen.to(tl.int64))
    tl.store(logp + b, d - ln)
    tl.store(entropy + b, ln - a / s)
    tl.store(behaviour_logp + b, tl.where(greedy, 0.0, d - tl.log(kept)))
    tl.store(row_floor + b, tl.where(greedy, float("-inf"), floor))


# --- what launches need -----------------------------------------------------------------------------
def exact(top_p: float) -> int:
    """The bits of a double: as a float argument it would be rounded to fp32."""
    bits: int = struct.unpack("<q", struct.pack("<d", top_p))[0]
    return bits


def block(V: int, most: int) -> int:
    """Columns a program holds at once: a power of two, so that a kernel is compiled for a handful of them."""
    return min(most, max(128, triton.next_power_of_2(V)))


def mass_bits(V: int) -> int:
    """n such that V masses of up to 2^n add up to less than 2^62, as in sample.py."""
    return 62 - V.bit_length()
