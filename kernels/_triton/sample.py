"""sample in Triton: a program per chunk of a row reads its logits once, and one per row merges the chunks.

The token is the winner of the race argmin E / exp(d).  Every lane takes four neighbours at a time, for which
one Philox counter gives the noise, and keeps the (top, s, a) of what it saw, as in token_logp.py, and its own
winner:

    top = max x      s = sum exp((x - top) / tau)      a = sum exp((x - top) / tau) (x - top)
    E, p = exp((x - top) / tau) and the token of the winner

A new token replaces the winner if E' p < E p': products, no division.  The lanes are merged once, at the end
of the chunk.  A row is cut by V alone, so that its bits depend on nothing but itself.  Filters take one more
launch before: sample_floor.py finds the floor, and only tokens that are not below it race.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import launch_options, on_device, unit_rows
from fastrl.kernels._triton._philox import philox4
from fastrl.kernels._triton.sample_floor import block, floors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 2048  # 8 elements a thread, two Philox counters
CHUNK = 16384  # of a row, to a program: 640 programs for 64 rows of 152k logits
OPTIONS = launch_options(num_warps=8)
ONE_WARP = launch_options(num_warps=1)  # for the few numbers that are left of a row
# stands for -inf: exp2 of its distance to any logit is 0, and that distance times V is finite
LOWEST = tl.constexpr(-1e30)
# exp(d) below it wins no race: E / exp(d) is at most 22.9 for the largest logit, E at least 2^-33
HOPELESS = tl.constexpr(1e-18)
LOG2E = tl.constexpr(1.4426950408889634)
LOG1P = (
    -0.500002384185791,
    0.33330854773521423,
    -0.24976040422916412,
    0.20085856,
    -0.17363739,
    0.14275685,
    -0.068338864,
)
# log(1 + f) / f = 1 + P1 f + ... on [-1/4, 1/2], to 2.4e-7
P1, P2, P3, P4, P5, P6, P7 = (tl.constexpr(p) for p in LOG1P)


# --- the draw ---------------------------------------------------------------------------------------
@triton.jit
def unit_exponential(word):  # type: ignore[no-untyped-def]
    """-log(1 - u), u = (word + 1/2) 2^-32, to 1e-6 of itself: 1 - u = 2^n (1 + f), and f = -u to the last bit
    where n = 0.
    """
    u = tl.fma(word.to(tl.float32), 2.0**-32, 2.0**-33)
    bits = tl.fma((~word).to(tl.float32), 2.0**-32, 2.0**-33).to(tl.int32, bitcast=True)
    n = (bits - 0x3F400000) >> 23  # 1 + f is in [3/4, 3/2)
    f = tl.where(n == 0, -u, (bits - (n << 23)).to(tl.float32, bitcast=True) - 1.0)
    q = tl.fma(f, P7, P6)  # log(1 + f) / f
    q = tl.fma(f, q, P5)
    q = tl.fma(f, q, P4)
    q = tl.fma(f, q, P3)
    q = tl.fma(f, q, P2)
    q = tl.fma(f, q, P1)
    q = tl.fma(f, q, 1.0)
    return tl.fma(n.to(tl.float32), -0.6931471805599453, -f * q)


@triton.jit
def faster(e, p, v, e_other, p_other, v_other):  # type: ignore[no-untyped-def]
    """Of two tokens the one with the smaller e / p, the first of equals: its e, its p and itself."""
    other = e_other * p < e * p_other
    return tl.where(other, e_other, e), tl.where(other, p_other, p), tl.where(other, v_other, v)


@triton.jit
def fastest(e, p, token):  # type: ignore[no-untyped-def]
    """Of the lanes' winners the least e / p, and its token, the first of equals."""
    cost = e / tl.maximum(p, HOPELESS)
    least = tl.min(cost, 0)
    return least, tl.min(tl.where(cost == least, token, 2147483647), 0)


@triton.jit
def quarters(x, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements 0, 1, 2 and 3 of every four neighbours."""
    even, odd = tl.split(tl.reshape(x, (N, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit(do_not_specialize=["plane"])
def draw_kernel(  # type: ignore[no-untyped-def]
    logits,
    seed,
    sequence,
    position,
    temperature,
    row_top,
    row_floor,
    parts,
    tokens,
    V,
    stride,
    plane,
    FILTER: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Planes of `parts`: top, s, a, the winner's E / exp(d), kept; `tokens` has the winner.  One entry per
    (row, chunk).
    """
    N: tl.constexpr = BLOCK // 4
    chunks = tl.cdiv(V, CHUNK)
    pid = tl.program_id(0)
    b = (pid // chunks).to(tl.int64)  # B V exceeds 2^31 at V = 152k, B = 14k
    start = (pid % chunks) * CHUNK
    end = tl.minimum(start + CHUNK, V)
    row = logits + b * stride
    tau = tl.load(temperature + b)
    greedy = tau == 0
    tau = tl.where(greedy, 1.0, tau)
    k = LOG2E / tau
    key, who, place = tl.load(seed + b), tl.load(sequence + b), tl.load(position + b)
    high, floor = 0.0, 0.0
    if FILTER:
        high, floor = tl.load(row_top + b), tl.load(row_floor + b)
    lane, counter = tl.arange(0, BLOCK), tl.arange(0, N)
    top = tl.full((N,), LOWEST, tl.float32)
    s, a, kept = tl.zeros((N,), tl.float32), tl.zeros((N,), tl.float32), tl.zeros((N,), tl.float32)
    e, p = tl.full((N,), 1.0, tl.float32), tl.zeros((N,), tl.float32)  # E and exp(d) of the lane's winner
    token = start + 4 * counter
    for v in range(start, end, BLOCK):
        x = tl.load(row + v + lane, v + lane < V, float("-inf")).to(tl.float32)
        x = quarters(tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL), N)
        words = philox4(v // 4 + counter, place, who, who >> 32, key, key >> 32)
        new = tl.maximum(tl.maximum(tl.maximum(x[0], x[1]), tl.maximum(x[2], x[3])), top)
        down = top - new
        scale = tl.exp2(down * k)
        a = scale * (a + down * s)
        s *= scale
        kept *= scale
        p *= scale
        top = new
        for i in tl.static_range(4):
            d = x[i] - new
            share = tl.exp2(d * k)
            s += share
            a += share * d
            if FILTER:
                share = tl.where(tl.div_rn(x[i] - high, tau) >= floor, share, 0.0)
                kept += share
            e, p, token = faster(e, p, token, unit_exponential(words[i]), share, v + 4 * counter + i)
    m = tl.max(top, 0)
    scale = tl.exp2((top - m) * k)
    least, winner = fastest(e, p * scale, token)
    winner = tl.minimum(winner, end - 1)  # a row without a winner may draw the padding
    if greedy:
        winner = first_of(row, start, end, m, BLOCK)
    tl.store(tokens + pid, winner)
    tl.store(parts + pid, m)
    tl.store(parts + plane + pid, tl.sum(scale * s, 0))
    tl.store(parts + 2 * plane + pid, tl.sum(scale * (a + (top - m) * s), 0))
    tl.store(parts + 3 * plane + pid, least)
    if FILTER:
        tl.store(parts + 4 * plane + pid, tl.sum(scale * kept, 0))


@triton.jit
def first_of(row, start, end, value, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first index in [start, end) of a logit that is not below `value`; end - 1 where there is none."""
    lane = tl.arange(0, BLOCK)
    found = tl.full((BLOCK,), 2147483647, tl.int32)
    for v in range(start, end, BLOCK):
        x = tl.maximum(tl.load(row + v + lane, v + lane < end, float("-inf")).to(tl.float32), LOWEST)
        found = tl.minimum(found, tl.where(x >= value, v + lane, 2147483647))
    return tl.minimum(tl.min(found, 0), end - 1)


@triton.jit(do_not_specialize=["chunks", "plane"])
def combine_kernel(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    parts,
    tokens,
    token,
    logp,
    behaviour_logp,
    entropy,
    chunks,
    stride,
    plane,
    FILTER: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Merge the chunks of a row, in order."""
    b = tl.program_id(0).to(tl.int64)
    tau = tl.load(temperature + b)
    greedy = tau == 0
    tau = tl.where(greedy, 1.0, tau)
    lane = tl.arange(0, CHUNKS)
    at, live = b * chunks + lane, lane < chunks
    top = tl.load(parts + at, live, LOWEST)
    s = tl.load(parts + plane + at, live, 0.0)
    a = tl.load(parts + 2 * plane + at, live, 0.0)
    m = tl.max(top, 0)
    share = tl.exp2((top - m) * (LOG2E / tau))
    cost = tl.load(parts + 3 * plane + at, live, float("inf")) / tl.maximum(share, HOPELESS)
    cost = tl.where(live, tl.where(greedy, tl.where(top == m, 0.0, float("inf")), cost), float("inf"))
    drawn = tl.load(tokens + at, live, 2147483647)
    drawn = tl.min(tl.where(cost == tl.min(cost, 0), drawn, 2147483647), 0)
    s_row = tl.sum(share * s, 0)
    a_row = tl.sum(share * (a + (top - m) * s), 0)
    s_row = tl.where(m <= LOWEST, float("nan"), s_row)  # nothing above -inf: no distribution
    ln = tl.log(s_row)
    x = tl.div_rn(tl.load(logits + b * stride + drawn).to(tl.float32) - m, tau)
    tl.store(token + b, drawn.to(tl.int64))
    tl.store(logp + b, x - ln)
    tl.store(entropy + b, ln - a_row / (tau * s_row))
    if FILTER:
        ln = tl.log(tl.sum(share * tl.load(parts + 4 * plane + at, live, 0.0), 0))
    tl.store(behaviour_logp + b, tl.where(greedy, 0.0, x - ln))


# --- launch -----------------------------------------------------------------------------------------
def forward(
    logits: Tensor,
    seed: Tensor,
    sequence: Tensor,
    position: Tensor,
    temperature: Tensor,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """token, logp, behaviour_logp and entropy, each (B,)."""
    logits = unit_rows(logits)
    B, V = logits.shape
    device = logits.device
    token = torch.empty(B, dtype=torch.int64, device=device)
    logp, behaviour_logp, entropy = (torch.empty(B, dtype=torch.float32, device=device) for _ in range(3))
    if not B:
        return token, logp, behaviour_logp, entropy
    seed, sequence, position, temperature = (x.contiguous() for x in (seed, sequence, position, temperature))
    filtered = 0 < top_k < V or top_p < 1 or min_p > 0
    chunks = triton.cdiv(V, CHUNK)
    parts = torch.empty((5, B * chunks), dtype=torch.float32, device=device)
    tokens = torch.empty(B * chunks, dtype=torch.int32, device=device)
    top, floor = parts, parts  # not read without filters
    if filtered:
        top, floor = floors(logits, temperature, top_k, top_p, min_p)
    with on_device(logits):
        draw_kernel[(B * chunks,)](
            logits,
            seed,
            sequence,
            position,
            temperature,
            top,
            floor,
            parts,
            tokens,
            V,
            logits.stride(0),
            B * chunks,
            FILTER=filtered,
            CHUNK=CHUNK,
            BLOCK=block(V, BLOCK),
            **OPTIONS,
        )
        combine_kernel[(B,)](
            logits,
            temperature,
            parts,
            tokens,
            token,
            logp,
            behaviour_logp,
            entropy,
            chunks,
            logits.stride(0),
            B * chunks,
            FILTER=filtered,
            CHUNKS=triton.next_power_of_2(chunks),
            **ONE_WARP,
        )
    return token, logp, behaviour_logp, entropy
