"""linear_logp forward in Triton for small D: logits live in registers, tile by tile, and never reach memory.

A program owns BLOCK_M tokens and one share of the vocabulary.  Tile after tile it multiplies (tensor cores,
float32 sums), and folds the tile into four float32 numbers a token:

    top = max x      s = sum exp((x - top) / tau)      a = sum exp((x - top) / tau) (x - top)
    the x of the target

A second kernel merges the shares of a token in a fixed order: two runs give the same bits.  With D <= 1536
the bytes of a materialised (T, V) cost more than the product; beyond that a library GEMM in front of
token_logp is the faster form.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastrl.kernels._launch import gpu, on_device

DTYPES = (torch.bfloat16, torch.float16)
MAX_WIDTH = 1536  # D up to which this is the form to use
WIDE, NARROW = "wide", "narrow"  # tiles; sm_90 has the registers for the wide one if there is no bias
TILES = {
    WIDE: {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64},
    NARROW: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64},
}
OPTIONS = {
    WIDE: {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True},
    NARROW: {"num_warps": 8, "num_stages": 4, "enable_fp_fusion": True},
}
COMBINE = {"num_warps": 4, "enable_fp_fusion": True}
ROWS = 128  # tokens a program of the second kernel merges
MAX_SPLITS = 32
# stands for -inf: exp2 of its distance to any logit is 0, and that distance times V is finite
LOWEST = tl.constexpr(-1e30)
LOG2E = tl.constexpr(1.4426950408889634)


# --- kernels ----------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["T"])
def partial_kernel(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    target,
    temperature,
    parts,
    T,
    V,
    D,
    per_split,
    BIAS: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """parts (splits, 4, T): top, s, a and the target's logit (0 where it lies in another share)."""
    first, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    rows = first + tl.arange(0, BLOCK_M)
    live = rows < T
    k = LOG2E / tl.load(temperature + rows, live, 1.0)
    y = tl.load(target + rows, live, -1)
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK_M,), tl.float32)
    a = tl.zeros((BLOCK_M,), tl.float32)
    chosen = tl.zeros((BLOCK_M,), tl.float32)
    begin = split * per_split
    for v in range(begin, tl.minimum(begin + per_split, V), BLOCK_N):
        lane = tl.arange(0, BLOCK_N)
        columns = v + lane
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for d in range(0, D, BLOCK_K):
            z = tl.dot(hidden.load([first, d]), weight.load([v, d]).T, z)
        if BIAS:
            b = tl.load(bias + columns, columns < V, float("-inf")).to(tl.float32)
            z += tl.where(b < LOWEST, LOWEST, b)[None, :]
        elif v + BLOCK_N > V:
            z = tl.where((columns < V)[None, :], z, LOWEST)
        chosen += tl.sum(tl.where(lane[None, :] == (y - v)[:, None], z, 0.0), 1)
        high = tl.maximum(top, tl.max(z, 1))
        shrink = tl.exp2((top - high) * k)
        e = tl.exp2((z - high[:, None]) * k[:, None])
        if ENTROPY:
            a = shrink * (a + (top - high) * s) + tl.sum(e * (z - high[:, None]), 1)
        s = shrink * s + tl.sum(e, 1)
        top = high
    out = parts + split.to(tl.int64) * 4 * T + rows
    tl.store(out, top, live)
    tl.store(out + T, s, live)
    tl.store(out + 2 * T, a, live)
    tl.store(out + 3 * T, chosen, live)


@triton.jit(do_not_specialize=["T", "splits"])
def combine_kernel(  # type: ignore[no-untyped-def]
    parts,
    target,
    temperature,
    logp,
    entropy,
    m,
    log_s,
    T,
    V,
    splits,
    ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The statistics of ROWS tokens from their shares, in the order of the vocabulary."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = t < T
    tau, y = tl.load(temperature + t, live, 1.0), tl.load(target + t, live, 0)
    k = LOG2E / tau
    high = tl.full((ROWS,), LOWEST, tl.float32)
    part = parts + t
    for _ in range(0, splits):
        high = tl.maximum(high, tl.load(part, live, 0.0))
        part += 4 * T
    s = tl.zeros((ROWS,), tl.float32)
    a = tl.zeros((ROWS,), tl.float32)
    chosen = tl.zeros((ROWS,), tl.float32)
    part = parts + t
    for _ in range(0, splits):
        d = tl.load(part, live, 0.0) - high
        share, s_part = tl.exp2(d * k), tl.load(part + T, live, 1.0)
        s += share * s_part
        if ENTROPY:
            a += share * (tl.load(part + 2 * T, live, 0.0) + d * s_part)
        chosen += tl.load(part + 3 * T, live, 0.0)
        part += 4 * T
    s = tl.where(high <= LOWEST, float("nan"), s)  # nothing above -inf: no distribution
    ln = tl.log(s)
    scaled = high / tau
    chosen = tl.where(chosen <= LOWEST, float("-inf"), chosen)
    tl.store(logp + t, tl.where((y >= 0) & (y < V), (chosen - high) / tau - ln, float("nan")), live)
    tl.store(m + t, scaled, live)
    tl.store(log_s + t, ln - tl.fma(scaled, tau, -high) / tau, live)  # relative to the rounded m
    if ENTROPY:
        tl.store(entropy + t, ln - a / (tau * s), live)


# --- launch -----------------------------------------------------------------------------------------
def fits(hidden: Tensor) -> bool:
    """Whether this form is to be used: for a narrow model in 16 bits, on a GPU with TMA or in the
    interpreter.
    """
    on = gpu(hidden)
    has_tma = on is None or on.capability >= (9, 0)
    return has_tma and hidden.dtype in DTYPES and hidden.shape[1] <= MAX_WIDTH


def forward(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: Tensor, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy (empty unless asked for), m and log s, each (T,), of hidden (T, D) and weight (V, D) in
    bfloat16 or float16.

    Memory:  16 bytes a token and share of the vocabulary, of which there are at most 32; no logits.  A copy
             of hidden or weight whose rows do not start at multiples of 16 bytes.
    """
    (T, D), V = hidden.shape, weight.shape[0]
    target, temperature = target.contiguous(), temperature.contiguous()
    hopper, processors = _hardware(hidden)
    kind = WIDE if hopper and bias is None else NARROW
    tile, rows, columns = TILES[kind], TILES[kind]["BLOCK_M"], TILES[kind]["BLOCK_N"]
    blocks, tiles = triton.cdiv(T, rows), triton.cdiv(V, columns)
    per_split = triton.cdiv(tiles, shares(max(blocks, 1), tiles, processors)) * columns
    parts = torch.empty((triton.cdiv(V, per_split), 4, T), dtype=torch.float32, device=hidden.device)
    if T:
        with on_device(hidden):
            partial_kernel[(blocks, parts.shape[0])](
                _tiles(hidden, rows, tile["BLOCK_K"]),
                _tiles(weight, columns, tile["BLOCK_K"]),
                parts if bias is None else bias.contiguous(),
                target,
                temperature,
                parts,
                T,
                V,
                D,
                per_split,
                BIAS=bias is not None,
                ENTROPY=entropy,
                **tile,
                **OPTIONS[kind],
            )
    return merge(parts, target, temperature, V, entropy)


def merge(
    parts: Tensor, target: Tensor, temperature: Tensor, V: int, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy (empty unless asked for), m and log s from parts (shares, 4, T)."""
    T = parts.shape[2]
    logp, m, log_s = (torch.empty(T, dtype=torch.float32, device=parts.device) for _ in range(3))
    h = torch.empty(T if entropy else 0, dtype=torch.float32, device=parts.device)
    if T:
        with on_device(parts):
            combine_kernel[(triton.cdiv(T, ROWS),)](
                parts,
                target,
                temperature,
                logp,
                h,
                m,
                log_s,
                T,
                V,
                parts.shape[0],
                ENTROPY=entropy,
                ROWS=ROWS,
                **COMBINE,
            )
    return logp, h, m, log_s


def _tiles(x: Tensor, rows: int, depth: int) -> TensorDescriptor:
    """`x` as tiles (rows, depth) for TMA, which reads zeros past its ends.

    It is copied unless its rows start at multiples of 16 bytes.
    """
    if gpu(x) is None:
        x = x.float()  # the interpreter would multiply the bits of bfloat16 as integers
    if x.stride(1) != 1 or x.stride(0) * x.itemsize % 16 or x.data_ptr() % 16:
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % (16 // x.itemsize))).contiguous().clone()
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, depth])


def shares(blocks: int, tiles: int, processors: int) -> int:
    """The number of parts of the vocabulary: the smallest that leaves the fewest processors idle."""

    def busy(splits: int) -> float:
        waves = -(-blocks * splits // processors)
        return blocks * splits / (waves * processors)

    return max(range(1, min(MAX_SPLITS, tiles) + 1), key=lambda splits: (round(busy(splits), 2), -splits))


def _hardware(x: Tensor) -> tuple[bool, int]:
    """Whether it is sm_90 or the interpreter, and how many programs run at once, one per multiprocessor."""
    on = gpu(x)
    return (True, 8) if on is None else (on.capability[0] == 9, on.multiprocessors)
