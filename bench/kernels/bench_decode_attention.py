"""decode_attention: one new token of B sequences over about N cached tokens, in pages, H query and K
key/value heads of width E.

The bound is memory: keys and values are read once, 2 N K E numbers a sequence.  Lengths lie between 3/4 N and
5/4 N, as in a batch that is being decoded; the table holds 5/4 N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastrl import ops
from fastrl.bench.common import (
    FORWARD,
    Bench,
    Case,
    Cost,
    Data,
    Draw,
    Function,
    cases,
    compiled,
    only,
    peer,
    plain,
)

QWEN2 = {"H": 14, "K": 2, "E": 64}  # 0.5B
QWEN3 = {"H": 16, "K": 8, "E": 128}  # 0.6B
CASES = cases(
    "B N H K E page",
    tiny=(2, 9, 4, 2, 8, 4),
    quick=(64, 64, 4, 2, 32, 64),
    cpu=[(64, 64, 8, 2, 64, 64), (64, 64, 4, 2, 32, 64), (32, 512, *QWEN2.values(), 64)],
    cuda=[
        (256, n, *model.values(), page)
        for model in (QWEN2, QWEN3)
        for n, page in ((1024, 64), (2048, 64), (2048, 256))
    ],
    slice={"B": 2},
    modes=(FORWARD,),
)


def lengths(B: int, N: int) -> Tensor:
    """(B,) int32, evenly from 3/4 N to 5/4 N, in an order that pairs long with short."""
    return (3 * N // 4 + torch.arange(B) * 7919 % max(B, 1) * (N // 2) // max(B - 1, 1)).to(torch.int32)


def data(case: Case) -> Data:
    (B, N, H, K, E, page), draw = case.sizes("B N H K E page"), Draw(case)
    each = -(-5 * N // (4 * page))
    table = (
        torch.randperm(B * each, generator=draw.generator, device=draw.device).view(B, each).to(torch.int32)
    )
    cache = [draw.normal(B * each, page, K, E) for _ in range(2)]
    args = {"q": draw.normal(B, H, E), "k_cache": cache[0], "v_cache": cache[1], "block_table": table}
    return Data(args | {"lengths": lengths(B, N).to(draw.device)})


def cost(case: Case) -> Cost:
    """Keys and values in use are read once, queries once, outputs written once."""
    B, N, H, K, E = case.sizes("B N H K E")
    tokens = int(lengths(B, N).sum())
    return Cost(2 * (tokens * K + B * H) * E * case.itemsize, 4 * tokens * H * E)


def eager(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    """The pages gathered, then SDPA with a mask."""
    k, v = (c[block_table.long()].flatten(1, 2).transpose(1, 2) for c in (k_cache, v_cache))
    mask = (torch.arange(k.shape[2], device=q.device) < lengths[:, None])[:, None, None]
    y = scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, enable_gqa=True)
    return y[:, :, 0]


def flash_attn(case: Case) -> Function:
    fused = peer("flash_attn", "flash_attn_with_kvcache")
    only(case.shape["page"] % 256 == 0, "flash_attn_with_kvcache takes pages of multiples of 256 tokens")

    def call(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
        return fused(q[:, None], k_cache, v_cache, cache_seqlens=lengths, block_table=block_table)[:, 0]

    return call


PROVIDERS = {
    "fastrl": plain(ops.decode_attention),
    "eager": plain(eager),
    "torch.compile": compiled(eager),
    "flash-attn": flash_attn,
}
BENCH = Bench(
    op="decode_attention",
    cases=CASES,
    data=data,
    cost=cost,
    providers=PROVIDERS,
    truth=plain(eager),
    registry="decode_attention",
)
