"""group_advantage in Triton, for every baseline, scale and shape: one launch, all statistics in float64.

Contiguous groups of a fixed size up to MAX_TILE lie in a tile, a group a row.  Larger groups, and groups
given by ids (which are sorted first), are walked through: a program owns TILE samples in the order of their
groups, and goes over each group that has one of them in chunks.  The standard deviation of all samples, which
only scale="batch_std" needs, is a launch before: parts of fixed size, merged by every program in the same
order.  Baseline and scale are runtime values: three shapes are all that is compiled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._group_advantage import BASELINES, SCALES, SHAPES
from fastrl.kernels._launch import on_device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_TILE = 1024  # members of a group that are held at once
# of rewards in a tile of small groups: 16 for each thread, so that 4096 groups of 16 are 128 programs
BYTES = 2048
TILE, CHUNK, RANK_CHUNK = 32, 128, 32  # samples of a program that walks, and members it looks at together
PARTS, PART = 128, 1024  # parts of a batch's moments, and samples a program of them holds at once
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
WALK = {"num_warps": 1, "enable_fp_fusion": True, "maxnreg": 160}  # without it ptxas may spill a value
LEAVE_ONE_OUT, MAX, NO_BASELINE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # places in BASELINES
BATCH_STD, RANGE, NO_SCALE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # in SCALES
RANK, SOFTMAX = tl.constexpr(1), tl.constexpr(2)  # in SHAPES
INF = tl.constexpr(float("inf"))


# --- kernels ----------------------------------------------------------------------------------------
@triton.jit
def parts_kernel(reward, parts, S, per_part, PARTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """parts (3, PARTS): count, sum and centred squares of the scored samples of each part."""
    p = tl.program_id(0).to(tl.int64)
    begin, end = p * per_part, tl.minimum((p + 1) * per_part, S)
    lane = tl.arange(0, BLOCK)
    n = tl.zeros((BLOCK,), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    for i in range(begin, end, BLOCK):
        x = tl.load(reward + i + lane, i + lane < end, float("nan")).to(tl.float64)
        n += tl.where(x == x, 1.0, 0.0)
        total += tl.where(x == x, x, 0.0)
    n_part, sum_part = tl.sum(n, 0), tl.sum(total, 0)
    mean = sum_part / tl.maximum(n_part, 1.0)
    squares = tl.zeros((BLOCK,), tl.float64)
    for i in range(begin, end, BLOCK):
        x = tl.load(reward + i + lane, i + lane < end, float("nan")).to(tl.float64)
        d = tl.where(x == x, x - mean, 0.0)
        squares += d * d
    tl.store(parts + p, n_part)
    tl.store(parts + PARTS + p, sum_part)
    tl.store(parts + 2 * PARTS + p, tl.sum(squares, 0))


@triton.jit
def _divisor(parts, n_parts, squares, count, low, high, scale, eps, ddof, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the scale means for groups with these statistics; `squares` are those of the group."""
    # a group that divides by less has no spread
    found = tl.sqrt(squares / tl.maximum(count - ddof, 1.0)) + eps
    batch = tl.full((), 0.0, tl.float64)
    if scale == BATCH_STD:
        p = tl.arange(0, PARTS)
        n, total = tl.load(parts + p, p < n_parts, 0.0), tl.load(parts + PARTS + p, p < n_parts, 0.0)
        q = tl.load(parts + 2 * PARTS + p, p < n_parts, 0.0)
        all_n = tl.sum(n, 0)
        d = total / tl.maximum(n, 1.0) - tl.sum(total, 0) / tl.maximum(all_n, 1.0)
        batch = tl.sqrt(tl.sum(q + n * d * d, 0) / tl.maximum(all_n - ddof, 1.0)) + eps
    found = tl.where(scale == BATCH_STD, batch, found)
    found = tl.where(scale == RANGE, high - low, found)
    return tl.where(scale == NO_SCALE, 1.0, found)


@triton.jit
def _line(count, mean, high, divisor, baseline):  # type: ignore[no-untyped-def]
    """(base, factor) of the linear shape; R - mean of the others is K / (K - 1) times R - mean."""
    base = tl.where(baseline == MAX, high, tl.where(baseline == NO_BASELINE, 0.0, mean))
    others = tl.where(baseline == LEAVE_ONE_OUT, count / tl.maximum(count - 1.0, 1.0), 1.0)
    return base, others / divisor


@triton.jit(do_not_specialize=["P", "G", "n_parts", "baseline", "scale"])
def tile_kernel(  # type: ignore[no-untyped-def]
    reward,
    out,
    parts,
    P,
    G,
    n_parts,
    baseline,
    scale,
    eps,
    ddof,
    tau,
    SHAPE: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """ROWS groups of G <= BLOCK; FULL: G is BLOCK, so that rows follow one another in steps the compiler
    knows.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    first = row * BLOCK if FULL else row * G
    at = first[:, None] + column[None, :]
    inside = (row < P)[:, None] & (FULL | (column < G)[None, :])
    y = tl.load(reward + at, inside, float("nan")).to(tl.float32)
    scored = y == y
    x = y.to(tl.float64)
    count = tl.sum(tl.where(scored, 1.0, 0.0).to(tl.float64), 1)
    low, high = tl.min(tl.where(scored, x, INF), 1), tl.max(tl.where(scored, x, -INF), 1)
    if SHAPE == RANK:
        twice = tl.zeros((ROWS, BLOCK), tl.int32)
        for j in range(0, G):
            other = tl.load(reward + first + j, row < P, float("nan")).to(tl.float32)[:, None]
            twice += (other < y).to(tl.int32) + (other <= y).to(tl.int32)
        a = (twice - 1) / tl.maximum(count - 1.0, 1.0)[:, None] - 1.0
    elif SHAPE == SOFTMAX:
        e = tl.where(scored, tl.exp((x - high[:, None]) / tau), 0.0)
        a = e * (count / tl.sum(e, 1))[:, None] - 1.0
    else:
        mean = tl.sum(tl.where(scored, x, 0.0), 1) / tl.maximum(count, 1.0)
        d = tl.where(scored, x - mean[:, None], 0.0)
        divisor = _divisor(parts, n_parts, tl.sum(d * d, 1), count, low, high, scale, eps, ddof, PARTS)
        base, factor = _line(count, mean, high, divisor, baseline)
        a = (x - base[:, None]) * factor[:, None]
    tl.store(out + at, tl.where(scored & (high > low)[:, None], a, 0.0).to(tl.float32), inside)


@triton.jit
def _members(reward, order, begin, end, BY_IDS: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The rewards of a chunk of a group that ends at `end`, then NaN."""
    j = begin + tl.arange(0, CHUNK)
    at = tl.load(order + j, j < end, 0) if BY_IDS else j
    return tl.load(reward + at, j < end, float("nan")).to(tl.float64)


@triton.jit
def _moments(reward, order, begin, end, BY_IDS: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scored members of a group, their mean, and the lowest and highest reward."""
    n = tl.zeros((CHUNK,), tl.float64)
    total = tl.zeros((CHUNK,), tl.float64)
    low = tl.full((CHUNK,), INF, tl.float64)
    high = tl.full((CHUNK,), -INF, tl.float64)
    for j in range(begin, end, CHUNK):
        x = _members(reward, order, j, end, BY_IDS, CHUNK)
        n += tl.where(x == x, 1.0, 0.0)
        total += tl.where(x == x, x, 0.0)
        low = tl.minimum(low, tl.where(x == x, x, INF))
        high = tl.maximum(high, tl.where(x == x, x, -INF))
    count, mean = tl.sum(n, 0), tl.sum(total, 0)
    mean = mean / tl.maximum(count, 1.0)
    return count, mean, tl.min(low, 0), tl.max(high, 0)


@triton.jit
def _first_from(ids, wanted, S, steps, AFTER: tl.constexpr):  # type: ignore[no-untyped-def]
    """For each wanted id, the first place in the sorted ids not below it, or, with AFTER, above it."""
    low = wanted * 0
    high = low + S
    for _ in range(0, steps):
        middle = (low + high) // 2
        found = tl.load(ids + middle, middle < high, 0)
        right = (middle < high) & ((found <= wanted) if AFTER else (found < wanted))
        low = tl.where(right, middle + 1, low)
        high = tl.where(right, high, middle)
    return low


@triton.jit(do_not_specialize=["S", "G", "steps", "n_parts", "baseline", "scale"])
def walk_kernel(  # type: ignore[no-untyped-def]
    reward,
    ids,
    order,
    out,
    parts,
    S,
    G,
    steps,
    n_parts,
    baseline,
    scale,
    eps,
    ddof,
    tau,
    BY_IDS: tl.constexpr,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """TILE samples in the order of their groups: `ids` sorted, `order` where each sample is; or groups of G
    where it is.
    """
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = place < S
    at = place
    starts, ends = place, place
    if BY_IDS:
        at = tl.load(order + place, live, 0)
        group = tl.load(ids + place, live, 0)
        starts = _first_from(ids, group, S, steps, False)
        ends = _first_from(ids, group, S, steps, True)
    else:
        starts = place // G * G
        ends = starts + G
    y = tl.load(reward + at, live, float("nan")).to(tl.float64)
    result = tl.zeros((TILE,), tl.float64)
    begin = tl.min(tl.where(live, starts, S), 0)
    stop = tl.max(tl.where(live, ends, 0), 0)
    while begin < stop:
        end = tl.max(tl.where(live & (starts == begin), ends, 0), 0)
        count, mean, lowest, highest = _moments(reward, order, begin, end, BY_IDS, CHUNK)
        if SHAPE == RANK:
            twice = tl.zeros((TILE,), tl.int32)
            for j in range(begin, end, CHUNK):
                x = _members(reward, order, j, end, BY_IDS, CHUNK)[None, :]
                twice += tl.sum((x < y[:, None]).to(tl.int32) + (x <= y[:, None]).to(tl.int32), 1)
            a = (twice - 1) / tl.maximum(count - 1.0, 1.0) - 1.0
        elif SHAPE == SOFTMAX:
            total = tl.zeros((CHUNK,), tl.float64)
            for j in range(begin, end, CHUNK):
                x = _members(reward, order, j, end, BY_IDS, CHUNK)
                total += tl.where(x == x, tl.exp((x - highest) / tau), 0.0)
            a = tl.exp((y - highest) / tau) * (count / tl.sum(total, 0)) - 1.0
        else:
            total = tl.zeros((CHUNK,), tl.float64)
            for j in range(begin, end, CHUNK):
                x = _members(reward, order, j, end, BY_IDS, CHUNK)
                d = tl.where(x == x, x - mean, 0.0)
                total += d * d
            divisor = _divisor(
                parts, n_parts, tl.sum(total, 0), count, lowest, highest, scale, eps, ddof, PARTS
            )
            base, factor = _line(count, mean, highest, divisor, baseline)
            a = (y - base) * factor
        a = tl.where(highest > lowest, a, 0.0)
        result = tl.where((starts == begin) & (y == y), a, result)
        begin = end
    tl.store(out + at, result.to(tl.float32), live)


# --- launch -----------------------------------------------------------------------------------------
def forward(
    reward: Tensor,
    group: Tensor,
    size: int,
    baseline: str,
    scale: str,
    shape: str,
    eps: float,
    unbiased: bool,
    tau: float,
) -> Tensor:
    """(S,) advantages; `group` holds ids, or is empty for contiguous groups of `size`."""
    S = reward.shape[0]
    out = torch.empty(S, dtype=torch.float32, device=reward.device)
    if not S:
        return out
    reward = reward.contiguous()
    with on_device(reward):
        parts, n_parts = _batch_parts(reward, needed=scale == "batch_std" and shape == "linear")
        numbers = (n_parts, BASELINES.index(baseline), SCALES.index(scale), eps, float(unbiased), tau)
        kind = SHAPES.index(shape)
        if 0 < size <= MAX_TILE:
            tile = shape_of_tile(size, reward.element_size())
            groups = S // size
            tile_kernel[(triton.cdiv(groups, tile["ROWS"]),)](
                reward,
                out,
                parts,
                groups,
                size,
                *numbers,
                SHAPE=kind,
                FULL=size == tile["BLOCK"],
                PARTS=PARTS,
                **tile,
                **OPTIONS,
            )
            return out
        ids, order = (reward, reward) if size else group.sort(stable=True)
        walk_kernel[(triton.cdiv(S, TILE),)](
            reward,
            ids,
            order,
            out,
            parts,
            S,
            max(size, 1),
            S.bit_length(),
            *numbers,
            BY_IDS=not size,
            SHAPE=kind,
            TILE=TILE,
            CHUNK=RANK_CHUNK if shape == "rank" else CHUNK,
            PARTS=PARTS,
            **WALK,
        )
    return out


def _batch_parts(reward: Tensor, needed: bool) -> tuple[Tensor, int]:
    """What the kernels make the standard deviation of all samples from, and of how many parts it is."""
    parts = torch.empty(3 * PARTS if needed else 0, dtype=torch.float64, device=reward.device)
    if not needed:
        return parts, 0
    S = reward.shape[0]
    per_part = triton.cdiv(triton.cdiv(S, PARTS), PART) * PART
    n_parts = triton.cdiv(S, per_part)
    parts_kernel[(n_parts,)](reward, parts, S, per_part, PARTS=PARTS, BLOCK=PART, **OPTIONS)
    return parts, n_parts


def shape_of_tile(size: int, itemsize: int) -> dict[str, int]:
    """Members and groups of a tile, both powers of two."""
    block = max(2, triton.next_power_of_2(size))
    members = BYTES // (itemsize if block == size else 4)  # narrow accesses gain nothing from more
    return {"ROWS": max(1, members // block), "BLOCK": block}
