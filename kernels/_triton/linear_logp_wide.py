"""linear_logp forward for wide models: library products of tiles that stay in the L2 cache, and a Triton row
kernel that reduces each.

    logits[rows, columns] = x W^T   2048 tokens by 4096 of the vocabulary, 32 MiB of float32 in one buffer
    top = max x      s = sum exp((x - top) / tau)      a = sum exp((x - top) / tau) (x - top)

and the x of the target.  The last kernel of linear_logp.py merges the shares of a token.  Logits that are
written and read within the cache cost no memory traffic; whole rows of them cost 8 bytes a logit, 10% of the
product at D = 4096, 20% at 2048.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._head import project
from fastrl.kernels._launch import on_device
from fastrl.kernels._triton import linear_logp as in_registers
from fastrl.kernels._triton.linear_logp import merge
from fastrl.kernels._triton.linear_logp_fold import LOG2E, LOWEST

ROWS, COLUMNS = 2048, 4096  # 256 output tiles of 128 x 256: two waves on 132 multiprocessors, 97% busy
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True, "maxnreg": 128}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit(do_not_specialize=["T", "first"])
def tile_kernel(  # type: ignore[no-untyped-def]
    logits,
    target,
    temperature,
    parts,
    chosen,
    T,
    first,
    v,
    columns,
    stride,
    ENTROPY: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One row of a tile, columns [v, v + columns) of the vocabulary.

    Stores its top, s and a to parts (3, T) of this share, and the target's logit to `chosen` (T,) if this is
    the share that has it.
    """
    row, t = tl.program_id(0), first + tl.program_id(0)
    k = LOG2E / tl.load(temperature + t)
    lane = tl.arange(0, COLUMNS)
    start = logits + row * stride
    x = tl.load(start + lane, lane < columns, float("-inf")).to(tl.float32)
    x = tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    top = tl.max(x, 0)
    d = x - top
    e = tl.exp2(d * k)
    tl.store(parts + t, top)
    tl.store(parts + T + t, tl.sum(tl.where(lane < columns, e, 0.0), 0))
    if ENTROPY:
        tl.store(parts + 2 * T + t, tl.sum(e * d, 0))
    y = tl.load(target + t) - v
    here = (y >= 0) & (y < columns)
    tl.store(chosen + t, tl.load(start + y, here, 0.0).to(tl.float32), here)


# --- launch -----------------------------------------------------------------------------------------
def forward_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    temperature: Tensor,
    entropy: bool,
    logits_dtype: torch.dtype,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's forward: logits in registers where that is faster, else tiles; `rows` is not used."""
    b = bias if bias.numel() else None
    if in_registers.fits(hidden):
        return in_registers.forward(hidden, weight, target, b, temperature, entropy)
    return forward(hidden, weight, target, b, temperature, entropy, logits_dtype)


def forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    entropy: bool,
    logits_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy (empty unless asked for), m and log s, each (T,), of hidden (T, D) and weight (V, D).

    Memory:  one tile of logits, and 12 bytes a token and share of 4096 of the vocabulary.
    """
    T, V = hidden.shape[0], weight.shape[0]
    target, temperature = target.contiguous(), temperature.contiguous()
    parts = torch.empty((triton.cdiv(V, COLUMNS), 3, T), dtype=torch.float32, device=hidden.device)
    chosen = torch.empty(T, dtype=torch.float32, device=hidden.device)
    buffer = torch.empty(min(T, ROWS) * min(V, COLUMNS), dtype=logits_dtype, device=hidden.device)
    with on_device(hidden):
        for first, (share, part) in itertools.product(range(0, T, ROWS), enumerate(parts)):
            v, x = share * COLUMNS, hidden[first : first + ROWS]
            w, b = weight[v : v + COLUMNS], None if bias is None else bias[v : v + COLUMNS]
            logits = project(
                x, w, b, logits_dtype, buffer[: x.shape[0] * w.shape[0]].view(x.shape[0], w.shape[0])
            )
            tile_kernel[(x.shape[0],)](
                logits,
                target,
                temperature,
                part,
                chosen,
                T,
                first,
                v,
                w.shape[0],
                logits.stride(0),
                ENTROPY=entropy,
                COLUMNS=COLUMNS,
                **OPTIONS,
            )
    return merge(parts, chosen, target, temperature, V, entropy)
