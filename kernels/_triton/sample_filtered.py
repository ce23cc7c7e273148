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
from typing import Any

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
    row = logits + b * stride
    tau = tl.load(temperature + b)
    greedy = tau == 0
    tau = tl.where(greedy, 1.0, tau)
    inverse = tl.div_rn(1.0, tau)
    top, high, low = window(tops, masses, counts, tau, b, chunks, top_k, p, MASS, COUNT, CHUNKS)
    if not (MASS or COUNT):
        high = log_min_p
        low = log_min_p
    if start == 0:
        tl.store(rows + 3 * b, top)
        tl.store(rows + 3 * b + 1, high)
        tl.store(rows + 3 * b + 2, low)
    sure = tl.maximum(high, log_min_p)
    key, who, place = tl.load(seed + b), tl.load(sequence + b), tl.load(position + b)
    lane, counter = tl.arange(0, BLOCK), tl.arange(0, N)
    s, a, kept = tl.zeros((N,), tl.float32), tl.zeros((N,), tl.float32), tl.zeros((N,), tl.float32)
    e, best = tl.full((N,), 1.0, tl.float32), tl.zeros((N,), tl.float32)  # E and exp(d) of the lane's winner
    token = start + 4 * counter
    total, above = tl.zeros((N,), tl.int64), tl.zeros((N,), tl.int64)
    count = tl.zeros((N,), tl.int32)
    filled = tl.full((), 0, tl.int32)
    own = aside + pid.to(tl.int64) * (3 * ASIDE)
    for v in range(start, end, BLOCK):
        x = tl.load(row + v + lane, v + lane < V, float("-inf")).to(tl.float32)
        far = distance(x, top, tau, inverse)
        near = tl.maximum(far, FAR, propagate_nan=tl.PropagateNan.ALL)
        part = tl.exp2(near * LOG2E)
        d, share, product = quarters(far, N), quarters(part, N), quarters(part * near, N)
        for i in tl.static_range(4):
            s += share[i]
            a += product[i]
            if COUNT:
                count = tl.where(d[i] >= high, count + 1, count)
            if MASS:
                weight = mass(d[i], bits)
                above = tl.where(d[i] >= high, above + weight, above)
                if not COUNT:
                    total += weight
        nearest = tl.maximum(tl.maximum(d[0], d[1]), tl.maximum(d[2], d[3]))
        if tl.max(nearest, 0) >= low:
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
                noise = unit_exponential(words[i])
                index = v + 4 * counter + i
                e, best, token = faster(e, best, token, noise, mine, index)
                if MASS or COUNT:
                    fits = (put[i] != 0) & (at < ASIDE)
                    tl.store(own + at, d[i], fits)
                    tl.store(own + ASIDE + at, noise, fits)
                    tl.store(own + 2 * ASIDE + at, index.to(tl.float32, bitcast=True), fits)
                    at += put[i]
    least, winner = fastest(e, best, token)
    winner = tl.minimum(winner, end - 1)  # a row without a winner may draw the padding
    if greedy:
        winner = first_of(row, start, end, top, BLOCK)
        least = tl.where(tl.load(row + winner).to(tl.float32) >= top, 0.0, float("inf"))
    tl.store(tokens + pid, winner)
    tl.store(parts + pid, tl.sum(s, 0))
    tl.store(parts + plane + pid, tl.sum(a, 0))
    tl.store(parts + 2 * plane + pid, least)
    tl.store(parts + 3 * plane + pid, tl.sum(kept, 0))
    if MASS or COUNT:
        tl.store(sums + pid, filled.to(tl.int64))
        tl.store(sums + plane + pid, tl.sum(count, 0).to(tl.int64))
        tl.store(sums + 2 * plane + pid, tl.sum(above, 0))
        tl.store(sums + 3 * plane + pid, tl.sum(total, 0))


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
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """token, logp, behaviour_logp and entropy, and the floor under d, each (B,)."""
    B, V = logits.shape
    device = logits.device
    flags: dict[str, Any] = {"MASS": top_p < 1, "COUNT": 0 < top_k < V, "CHUNK": CHUNK}
    searched = flags["MASS"] or flags["COUNT"]
    chunks = triton.cdiv(V, CHUNK)
    plane = B * chunks

    token = torch.empty(B, dtype=torch.int64, device=device)
    logp, behaviour_logp, entropy, floor = (
        torch.empty(B, dtype=torch.float32, device=device) for _ in range(4)
    )
    tops, rows = (torch.empty(n, dtype=torch.float32, device=device) for n in (plane, 3 * B))
    edges = torch.empty((2, plane * EDGES.value if searched else 1), dtype=torch.float32, device=device)
    parts = torch.empty((4, plane), dtype=torch.float32, device=device)
    sums = torch.empty((4, plane), dtype=torch.int64, device=device)
    tokens = torch.empty(plane, dtype=torch.int32, device=device)
    aside = torch.empty(3 * plane * ASIDE if searched else 1, dtype=torch.float32, device=device)
    last = torch.empty(B * TILE if searched else 1, dtype=torch.int32, device=device)

    bits = mass_bits(V)
    log_min_p = math.log(min_p) if min_p else -math.inf
    drawing = flags | {"CHUNKS": triton.next_power_of_2(chunks), "ASIDE": ASIDE}
    keys = (seed, sequence, position, temperature)
    with on_device(logits):
        survey_kernel[(plane,)](
            logits,
            temperature,
            tops,
            edges[0],
            edges[1],
            V,
            logits.stride(0),
            BLOCK=block(V, SURVEYED // 2 if flags["MASS"] and flags["COUNT"] else SURVEYED),
            READ=block(V, READ),
            **flags,
            **OPTIONS,
        )
        draw_kernel[(plane,)](
            logits,
            *keys,
            tops,
            edges[0],
            edges[1],
            rows,
            parts,
            sums,
            tokens,
            aside,
            V,
            logits.stride(0),
            top_k,
            top_p,
            log_min_p,
            bits,
            plane,
            BLOCK=block(V, DRAWN[logits.dtype]),
            **drawing,
            **DRAWING,
        )
        settle_kernel[(B,)](
            logits,
            *keys,
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
            floor,
            V,
            chunks,
            logits.stride(0),
            top_k,
            exact(top_p),
            log_min_p,
            bits,
            plane,
            STOP=STOP[logits.dtype],
            **drawing,
            **SETTLING,
        )
    return (token, logp, behaviour_logp, entropy), floor
