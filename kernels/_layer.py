"""What a decoder layer of one new token per row takes when it runs in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class LayerWeights(NamedTuple):
    """The weights of a layer, None where absent: norms (D,), projections (N, K), a bias, head norms (E,)."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(slots=True)
class Scratch:
    """What the layers of one decode step leave for each other.

    stream   (B, D)      the residual stream after the latest layer; what follows holds for this tensor
    squares  (B, parts)  fp32 sums of its squares over parts of each row
    tickets  (n,)        int32 zeros, with which programs count those that have arrived
    """

    stream: Tensor | None = None
    squares: Tensor | None = None
    tickets: Tensor | None = None


class Paged(NamedTuple):
    """The pages that one query per row attends over.

    k_cache, v_cache  (pages, page, K, E)
    slots             (B,) int64   where the new key and value of each row are stored
    table             (B, N) int32
    lengths           (B,) int32
    scratch           of the decode step
    """

    k_cache: Tensor
    v_cache: Tensor
    slots: Tensor
    table: Tensor
    lengths: Tensor
    scratch: Scratch


def uniform(weights: LayerWeights, dtype: torch.dtype) -> bool:
    """Whether all weights are contiguous and of this dtype."""
    return all(w is None or (w.dtype == dtype and w.is_contiguous()) for w in weights)


def readable(paged: Paged, B: int, dtype: torch.dtype) -> bool:
    """Whether the pages have the dtypes, shapes and strides that compiled code assumes at their addresses."""
    k, v, slots, table, lengths, _ = paged
    if k.dtype != dtype or v.dtype != dtype or slots.dtype != torch.int64:
        return False
    if table.dtype != torch.int32 or lengths.dtype != torch.int32:
        return False
    if k.shape != v.shape or not len(table) == len(lengths) == len(slots) == B:
        return False
    contiguous = all(x.is_contiguous() for x in (k, v, slots, lengths))
    return contiguous and table.stride(1) == 1


def summed(run: Callable[..., Any]) -> Callable[..., Tensor]:
    """`run`, which is a layer, with pages and angles one by one, and the residual stream after it alone."""

    def call(
        x: Tensor,
        residual: Tensor | None,
        weights: LayerWeights,
        position: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
        table: Tensor,
        lengths: Tensor,
        eps: float,
    ) -> Tensor:
        paged = Paged(k_cache, v_cache, slots, table, lengths, Scratch())
        added, stream = run(x, residual, weights, (position, cos, sin), paged, eps)
        result: Tensor = added if stream is None else stream + added
        return result

    return call
