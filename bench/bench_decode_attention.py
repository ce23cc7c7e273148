"""decode_attention: one new token of B sequences over N cached tokens, in pages, H query and K key/value heads of width E."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastrl import ops
from fastrl.bench.common import FORWARD, Bench, Case, Cost, Data, Draw, Function, cases, compiled, peer, plain

CASES = cases(
    "B N H K E page",
    tiny=(2, 9, 4, 2, 8, 4),
    quick=(8, 128, 4, 2, 32, 64),
    cpu=[(32, 512, 14, 2, 64, 64)],
    cuda=[(256, 2048, 32, 8, 128, 64), (256, 2048, 14, 2, 64, 64), (256, 2048, 14, 2, 64, 256)],
    slice={"B": 2},
    modes=(FORWARD,),
)


def data(case: Case) -> Data:
    (B, N, H, K, E, page), draw = case.sizes("B N H K E page"), Draw(case)
    each = -(-N // page)
    table = torch.randperm(B * each, generator=draw.generator, device=draw.device).view(B, each).to(torch.int32)
    cache = [draw.normal(B * each, page, K, E) for _ in range(2)]
    lengths = torch.full((B,), N, dtype=torch.int32, device=draw.device)
    return Data({"q": draw.normal(B, H, E), "k_cache": cache[0], "v_cache": cache[1], "block_table": table, "lengths": lengths})


def cost(case: Case) -> Cost:
    """The cache is read once."""
    B, N, H, K, E = case.sizes("B N H K E")
    return Cost(2 * B * (N * K + H) * E * case.itemsize, 4 * B * N * H * E)


def eager(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    """The pages gathered, then SDPA with a mask."""
    k, v = (c[block_table.long()].flatten(1, 2).transpose(1, 2) for c in (k_cache, v_cache))
    mask = torch.arange(k.shape[2], device=q.device) < lengths[:, None]
    return scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask[:, None, None], enable_gqa=True)[:, :, 0]


def flash_attn(case: Case) -> Function:
    fused = peer("flash_attn", "flash_attn_with_kvcache")

    def call(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
        return fused(q[:, None], k_cache, v_cache, cache_seqlens=lengths, block_table=block_table)[:, 0]

    return call


PROVIDERS = {"fastrl": plain(ops.decode_attention), "eager": plain(eager), "torch.compile": compiled(eager), "flash-attn": flash_attn}
BENCH = Bench(
    op="decode_attention", cases=CASES, data=data, cost=cost, providers=PROVIDERS, truth=plain(eager), registry="decode_attention"
)
