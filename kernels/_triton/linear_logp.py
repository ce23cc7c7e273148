"""linear_logp forward in Triton for small D: logits live in registers, tile by tile, and never reach memory.

A program owns BLOCK_M tokens and one share of the vocabulary.  Tile after tile it multiplies (tensor cores,
float32 sums), and folds the tile into three float32 numbers a token:

    top = max x      s = sum exp((x - top) / tau)      a = sum exp((x - top) / tau) (x - top)

The logit of the target is a product of two rows, apart from the tiles: to look for it there takes as many
instructions as the exponents.  A last kernel merges the shares of a token in a fixed order: two runs give
the same bits.  With D <= 1536 the bytes of a materialised (T, V) cost more than the product; beyond that a
library GEMM in front of token_logp is the faster form.

On sm_90 without a bias, linear_logp_hopper.py takes the place of the first kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastrl.kernels._launch import gpu, launch_options, on_device
from fastrl.kernels._triton import linear_logp_hopper as hopper
from fastrl.kernels._triton.linear_logp_fold import LOG2E, LOWEST, finish, fold

DTYPES = (torch.bfloat16, torch.float16)
MAX_WIDTH = 1536  # D up to which this is the form to use
# with TMA, and the 131 KB of shared memory that a program takes: sm_90 and sm_100 have 227, sm_120 only 99
GENERATIONS = (9, 10)
TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
OPTIONS = launch_options(num_warps=8, num_stages=4)
HOPPER_COLUMNS = hopper.COLUMNS.value
COMBINE = launch_options(num_warps=4)
ROWS = 128  # tokens a program of the last kernel merges
TARGETS = {"ROWS": 4, "BLOCK": 256}  # tokens, and numbers of each at a time, of a program of target_kernel
TARGET = launch_options(num_warps=4)
MAX_SPLITS = 32


# --- kernels ----------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["T"])
def partial_kernel(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
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
    """parts (splits, 3, T): top, s and a of BLOCK_M tokens over one share of the vocabulary."""
    first, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    rows = first + tl.arange(0, BLOCK_M)
    live = rows < T
    k = LOG2E / tl.load(temperature + rows, live, 1.0)
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    c = tl.zeros((BLOCK_M,), tl.float32)
    s = tl.zeros((BLOCK_M,), tl.float32)
    a = tl.zeros((BLOCK_M,), tl.float32)
    begin = split * per_split
    for v in range(begin, tl.minimum(begin + per_split, V), BLOCK_N):
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for d in range(0, D, BLOCK_K):
            z = tl.dot(hidden.load([first, d]), weight.load([v, d]).T, z)
        columns = v + tl.arange(0, BLOCK_N)
        if BIAS:
            b = tl.load(bias + columns, columns < V, float("-inf")).to(tl.float32)
            z += tl.where(b < LOWEST, LOWEST, b)[None, :]
        elif v + BLOCK_N > V:
            z = tl.where((columns < V)[None, :], z, LOWEST)
        top, c, s, a = fold(z, top, c, s, a, k, ENTROPY)

    s, a = finish(top, c, s, a, k, ENTROPY)
    out = parts + split.to(tl.int64) * 3 * T + rows
    tl.store(out, top, live)
    tl.store(out + T, s, live)
    if ENTROPY:
        tl.store(out + 2 * T, a, live)


@triton.jit(do_not_specialize=["T"])
def target_kernel(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    target,
    chosen,
    T,
    V,
    D,
    hidden_stride,
    weight_stride,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """chosen (T,): the logit of each token's target, -inf where it is not in the vocabulary."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    y = tl.load(target + t, t < T, -1).to(tl.int64)
    inside = (y >= 0) & (y < V)
    lane = tl.arange(0, BLOCK)
    x, w = hidden + t.to(tl.int64) * hidden_stride, weight + y * weight_stride
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for d in range(0, D, BLOCK):
        here = inside[:, None] & (d + lane < D)[None, :]
        a = tl.load(x[:, None] + (d + lane)[None, :], here, 0.0).to(tl.float32)
        total += a * tl.load(w[:, None] + (d + lane)[None, :], here, 0.0).to(tl.float32)
    z = tl.sum(total, 1)
    if BIAS:
        z += tl.load(bias + y, inside, 0.0).to(tl.float32)
    tl.store(chosen + t, tl.where(inside, z, float("-inf")), t < T)


@triton.jit(do_not_specialize=["T", "splits"])
def combine_kernel(  # type: ignore[no-untyped-def]
    parts,
    chosen,
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
        part += 3 * T
    s = tl.zeros((ROWS,), tl.float32)
    a = tl.zeros((ROWS,), tl.float32)
    part = parts + t
    for _ in range(0, splits):
        d = tl.load(part, live, 0.0) - high
        share, s_part = tl.exp2(d * k), tl.load(part + T, live, 1.0)
        s += share * s_part
        if ENTROPY:
            a += share * (tl.load(part + 2 * T, live, 0.0) + d * s_part)
        part += 3 * T
    s = tl.where(high <= LOWEST, float("nan"), s)  # nothing above -inf: no distribution
    ln = tl.log(s)
    scaled = high / tau
    inside = (y >= 0) & (y < V)
    z = tl.load(chosen + t, live & inside, 0.0)
    z = tl.where(z <= LOWEST, float("-inf"), z)
    found = (z - high) / tau - ln
    found = tl.where(found > 0, 0.0, found)  # the target's logit is rounded apart from those in s
    tl.store(logp + t, tl.where(inside, found, float("nan")), live)
    tl.store(m + t, scaled, live)
    tl.store(log_s + t, ln - tl.fma(scaled, tau, -high) / tau, live)  # relative to the rounded m
    if ENTROPY:
        tl.store(entropy + t, ln - a / (tau * s), live)


# --- launch -----------------------------------------------------------------------------------------
def fits(hidden: Tensor) -> bool:
    """Whether this form is to be used: for a narrow model in 16 bits, on a GPU of GENERATIONS or in the
    interpreter.
    """
    on = gpu(hidden)
    runs = on is None or on.capability[0] in GENERATIONS
    return runs and hidden.dtype in DTYPES and hidden.shape[1] <= MAX_WIDTH


def forward(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: Tensor, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy (empty unless asked for), m and log s, each (T,), of hidden (T, D) and weight (V, D) in
    bfloat16 or float16.

    Memory:  12 bytes a token and share of the vocabulary, of which there are at most 32; no logits.  A copy
             of hidden or weight whose rows do not start at multiples of 16 bytes.
    """
    T, V = hidden.shape[0], weight.shape[0]
    target, temperature = target.contiguous(), temperature.contiguous()
    b = None if bias is None else bias.contiguous()
    x, w = _aligned(hidden), _aligned(weight)

    on = gpu(hidden)
    processors = 8 if on is None else on.multiprocessors
    overlapped = on is not None and on.capability[0] == 9 and b is None and hopper.available()
    columns = HOPPER_COLUMNS if overlapped else TILE["BLOCK_N"]
    blocks, tiles = triton.cdiv(T, TILE["BLOCK_M"]), triton.cdiv(V, columns)
    per_split = triton.cdiv(tiles, shares(max(blocks, 1), tiles, processors)) * columns

    parts = torch.empty((triton.cdiv(V, per_split), 3, T), dtype=torch.float32, device=hidden.device)
    chosen = torch.empty(T, dtype=torch.float32, device=hidden.device)
    if T:
        grid = blocks, parts.shape[0]
        with on_device(hidden):
            _launch_target(x, w, b, target, chosen, hidden.shape[1])
            if overlapped:
                hopper.launch(grid, x, w, temperature, parts, per_split, entropy)
            else:
                _launch(grid, x, w, b, temperature, parts, per_split, entropy)
    return merge(parts, chosen, target, temperature, V, entropy)


def _launch(
    grid: tuple[int, int],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    parts: Tensor,
    per_split: int,
    entropy: bool,
) -> None:
    """Fill parts (shares, 3, T); the grid is (blocks of tokens, shares)."""
    (T, D), V = hidden.shape, weight.shape[0]
    partial_kernel[grid](
        _tiles(hidden, TILE["BLOCK_M"], TILE["BLOCK_K"]),
        _tiles(weight, TILE["BLOCK_N"], TILE["BLOCK_K"]),
        parts if bias is None else bias,
        temperature,
        parts,
        T,
        V,
        D,
        per_split,
        BIAS=bias is not None,
        ENTROPY=entropy,
        **TILE,
        **OPTIONS,
    )


def _launch_target(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, chosen: Tensor, D: int
) -> None:
    T, V = hidden.shape[0], weight.shape[0]
    target_kernel[(triton.cdiv(T, TARGETS["ROWS"]),)](
        hidden,
        weight,
        chosen if bias is None else bias,
        target,
        chosen,
        T,
        V,
        D,
        hidden.stride(0),
        weight.stride(0),
        BIAS=bias is not None,
        **TARGETS,
        **TARGET,
    )


def merge(
    parts: Tensor, chosen: Tensor, target: Tensor, temperature: Tensor, V: int, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy (empty unless asked for), m and log s from parts (shares, 3, T) and the targets' logits
    (T,).
    """
    T = parts.shape[2]
    logp, m, log_s = (torch.empty(T, dtype=torch.float32, device=parts.device) for _ in range(3))
    h = torch.empty(T if entropy else 0, dtype=torch.float32, device=parts.device)
    if T:
        with on_device(parts):
            combine_kernel[(triton.cdiv(T, ROWS),)](
                parts,
                chosen,
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


def _aligned(x: Tensor) -> Tensor:
    """`x`, or a copy with zeros behind its rows, so that they start at multiples of 16 bytes."""
    if gpu(x) is None:
        x = x.float()  # the interpreter would multiply the bits of bfloat16 as integers
    if x.stride(1) == 1 and x.stride(0) * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    return torch.nn.functional.pad(x, (0, -x.shape[1] % (16 // x.itemsize))).contiguous().clone()


def _tiles(x: Tensor, rows: int, depth: int) -> TensorDescriptor:
    """`x` as tiles (rows, depth) for TMA, which reads zeros past its ends."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, depth])


def shares(blocks: int, tiles: int, processors: int) -> int:
    """The number of parts of the vocabulary: the smallest that leaves the fewest processors idle."""

    def busy(splits: int) -> float:
        waves = -(-blocks * splits // processors)
        return blocks * splits / (waves * processors)

    return max(range(1, min(MAX_SPLITS, tiles) + 1), key=lambda splits: (round(busy(splits), 2), -splits))
