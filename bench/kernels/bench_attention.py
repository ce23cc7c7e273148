"""attention: packed causal attention of S sequences of L/2 to L tokens, H query and K key/value heads of
width E.

Our backward is deterministic with every library; the rows of the libraries are not, so that the difference
between fastrl/flash_attn_2 and flash-attn, or fastrl/varlen_attn and torch varlen_attn, is the cost of
determinism.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastrl import ops
from fastrl.bench.common import (
    BOTH,
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

CASES = cases(
    "S L H K E",
    tiny=(2, 6, 4, 2, 8),
    quick=(4, 64, 4, 2, 32),
    cpu=[
        (8, 256, 14, 2, 64),
        (16, 64, 14, 2, 64),
        (4, 512, 14, 2, 64),
        (2, 1024, 14, 2, 64),
        (1, 2048, 14, 2, 64),
        (16, 64, 8, 8, 64),
        (2, 1024, 8, 8, 128),
    ],
    cuda=[(16, 1024, 32, 8, 128), (4, 4096, 14, 2, 64)],
    slice={"S": 2, "L": 64},
)


def lengths(case: Case) -> tuple[int, ...]:
    S, L = case.sizes("S L")
    return tuple(L - i * L // (2 * S) for i in range(S))


def data(case: Case) -> Data:
    (H, K, E), draw, each = case.sizes("H K E"), Draw(case), lengths(case)
    T = sum(each)
    ends = torch.tensor((0, *each), device=draw.device).cumsum(0).to(torch.int32)
    args = {
        "q": draw.normal(T, H, E),
        "k": draw.normal(T, K, E),
        "v": draw.normal(T, K, E),
        "cu_seqlens": ends,
        "lengths": each,
    }
    return Data(args, wrt=("q", "k", "v"), upstream=(draw.normal(T, H, E),))


def cost(case: Case) -> Cost:
    """Two products over the lower triangle, five more in the backward."""
    H, K, E = case.sizes("H K E")
    each = lengths(case)
    passes, products = (2, 7) if case.mode == BOTH else (1, 2)
    return Cost(
        passes * 2 * sum(each) * (H + K) * E * case.itemsize, products * sum(n * n for n in each) * H * E
    )


def ours(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return ops.attention(q, k, v, cu_seqlens, max_seqlen=max(lengths))


def eager(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """SDPA, a sequence at a time."""
    heads_first = (x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v))
    done = [
        scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True)[0]
        for a, b, c in zip(*heads_first, strict=True)
    ]
    return torch.cat(done, 1).transpose(0, 1)


def matmul_softmax(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """All scores of a sequence at once, in plain operations."""
    G, done = q.shape[1] // k.shape[1], []
    for a, b, c in zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True):
        keys, values = (x.repeat_interleave(G, 0) for x in (b, c))
        scores = torch.matmul(a, keys.transpose(1, 2)) * q.shape[-1] ** -0.5
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu_(1)
        done.append(torch.matmul(scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(done, 1).transpose(0, 1)


def torch_varlen(case: Case) -> Function:
    only(case.device == "cuda", "varlen_attn is CUDA only")
    fused = peer("torch.nn.attention.varlen", "varlen_attn")
    takes = inspect.signature(fused).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    shared_heads = case.shape["H"] != case.shape["K"]
    only("enable_gqa" in takes or not shared_heads, "this version of varlen_attn takes no shared heads")
    options |= {"enable_gqa": True} if "enable_gqa" in takes else {}

    def call(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: tuple[int, ...]) -> Tensor:
        return fused(q, k, v, cu_seqlens, cu_seqlens, max(lengths), max(lengths), **options)

    return call


def flash_attn(case: Case) -> Function:
    fused = peer("flash_attn", "flash_attn_varlen_func")

    def call(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: tuple[int, ...]) -> Tensor:
        return fused(q, k, v, cu_seqlens, cu_seqlens, max(lengths), max(lengths), causal=True)

    return call


def flash_attn_4(case: Case) -> Function:
    only(case.device == "cuda", "flash-attn 4 is CUDA only")
    fused = peer("flash_attn.cute", "flash_attn_varlen_func")

    def call(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: tuple[int, ...]) -> Tensor:
        longest = {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
        found = fused(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, causal=True, **longest)
        return found if isinstance(found, Tensor) else found[0]

    return call


PROVIDERS = {
    "fastrl": plain(ours),
    "eager": plain(eager),
    "matmul + softmax": plain(matmul_softmax),
    "torch.compile": compiled(eager),
    "torch varlen_attn": torch_varlen,
    "flash-attn": flash_attn,
    "flash-attn 4": flash_attn_4,
}
BENCH = Bench(
    op="attention",
    cases=CASES,
    data=data,
    cost=cost,
    providers=PROVIDERS,
    truth=plain(eager),
    registry="attention",
)
