"""sample in Triton: a program per chunk of a row reads its logits once, and one per row merges the chunks.

The token is the winner of the race argmin E / exp(d).  Every lane takes four neighbours at a time, for which
one Philox counter gives the noise, and keeps the (top, s, a) of what it saw, as in token_logp.py, and its own
winner:

    top = max x      s = sum exp((x - top) / tau)      a = sum exp((x - top) / tau) (x - top)
    E, p = exp((x - top) / tau) and the token of the winner

A new token replaces the winner if E' p < E p': products, no division.  The lanes are merged once, at the end
of the chunk.  A row is cut by V alone, so that its bits depend on nothing but itself.  Draws under
filters are in sample_filtered.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import launch_options, on_device, unit_rows
from fastrl.kernels._triton import sample_filtered
from fastrl.kernels._triton._philox import philox4
from fastrl.kernels._triton._race import (
    HOPELESS,
    LOG2E,
    LOWEST,
    faster,
    fastest,
    first_of,
    quarters,
    unit_exponential,
)
from fastrl.kernels._triton._vocabulary import rounded
from fastrl.kernels._triton.sample_floor import block

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 2048  # 8 elements a thread, two Philox counters
CHUNK = 16384  # of a row, to a program: 640 programs for 64 rows of 152k logits
OPTIONS = launch_options(num_warps=8)
ONE_WARP = launch_options(num_warps=1)  # for the few numbers that are left of a row


# --- the draw ---------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["plane"])
def draw_kernel(  # type: ignore[no-untyped-def]
    logits,
    seed,
    sequence,
    position,
    temperature,
    parts,
    tokens,
    V,
    stride,
    plane,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Planes of `parts`: top, s, a, the winner's E / exp(d); `tokens` has the winner.  One entry per (row,
    chunk).
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
    lane, counter = tl.arange(0, BLOCK), tl.arange(0, N)
    top = tl.full((N,), LOWEST, tl.float32)
    s, a = tl.zeros((N,), tl.float32), tl.zeros((N,), tl.float32)
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
        p *= scale
        top = new
        for i in tl.static_range(4):
            d = x[i] - new
            share = tl.exp2(d * k)
            s += share
            a += share * d
            e, p, token = faster(e, p, token, unit_exponential(words[i]), share, v + 4 * counter + i)
    m = tl.max(top, 0)
    scale = tl.exp2((top - m) * k)
    least, winner = fastest(e, p * scale, token)
    winner = tl.minimum(winner, end - 1)  # a row without a winner may draw the padding
    if greedy:
        winner = first_of(row, start, end, m, BLOCK)
    tl.store(tokens + pid, winner)
    tl.store(parts + pid, m)
    tl.store(parts + plane + pid, tl.sum(rounded(scale, s), 0))
    tl.store(parts + 2 * plane + pid, tl.sum(rounded(scale, a + (top - m) * s), 0))
    tl.store(parts + 3 * plane + pid, least)


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
    s_row = tl.sum(rounded(share, s), 0)
    a_row = tl.sum(rounded(share, a + (top - m) * s), 0)
    s_row = tl.where(m <= LOWEST, float("nan"), s_row)  # nothing above -inf: no distribution
    ln = tl.log(s_row)
    x = tl.div_rn(tl.load(logits + b * stride + drawn).to(tl.float32) - m, tau)
    tl.store(token + b, drawn.to(tl.int64))
    tl.store(logp + b, x - ln)
    tl.store(entropy + b, ln - a_row / (tau * s_row))
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
    if 0 < top_k < V or top_p < 1 or min_p > 0:
        return sample_filtered.forward(logits, seed, sequence, position, temperature, top_k, top_p, min_p)[0]

    chunks = triton.cdiv(V, CHUNK)
    parts = torch.empty((4, B * chunks), dtype=torch.float32, device=device)
    tokens = torch.empty(B * chunks, dtype=torch.int32, device=device)
    with on_device(logits):
        draw_kernel[(B * chunks,)](
            logits,
            seed,
            sequence,
            position,
            temperature,
            parts,
            tokens,
            V,
            logits.stride(0),
            B * chunks,
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
            CHUNKS=triton.next_power_of_2(chunks),
            **ONE_WARP,
        )
    return token, logp, behaviour_logp, entropy
