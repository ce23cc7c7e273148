"""A decoder layer for one new token of every row, in one call: what `Layer.forward` of fastrl.model.decoder
does, by the same kernels.

It defines nothing: csrc/cpu/decoder_layer.cpp calls the kernels of rms_norm, linear, rope, decode_attention
and swiglu one after the other, with the bits of the ops called one by one.  A layer of a small model takes
less time than the calls of Python that ask for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.kernels._backend import direct, extension, is_exact, overruled, unbuilt
from fastrl.kernels._head import LEAST_ROWS

_BUILT = not unbuilt("decoder_layer_cpu")


class LayerWeights(NamedTuple):
    """What a layer reads, None where it has none: norms (D,), projections (N, K), the bias of qkv, norms (E,)
    of heads.
    """

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Paged(NamedTuple):
    """The pages that one query per row attends over: k_cache, v_cache (pages, page, K, E), table (B, N),
    lengths (B,) int32.

    Each row's new key and value go to its slot, of `slots` (B,).
    """

    k_cache: Tensor
    v_cache: Tensor
    slots: Tensor
    table: Tensor
    lengths: Tensor


def serves(x: Tensor) -> bool:
    """Whether each op of a layer over x (B, D) would pick the kernel that is called here: nobody asks for
    another, or for a gradient.
    """
    if not _BUILT or not x.is_cpu or x.dtype != torch.float32 or torch.is_grad_enabled() or overruled():
        return False
    return (is_exact() or x.shape[0] >= LEAST_ROWS) and direct(x)


def decoder_layer(
    x: Tensor,
    residual: Tensor | None,
    weights: LayerWeights,
    angles: tuple[Tensor, Tensor, Tensor],
    paged: Paged,
    eps: float,
) -> tuple[Tensor, Tensor] | None:
    """What the layer adds to the stream, and the stream, both (B, D); None for weights that are not
    contiguous and fp32, and for pages that are not what `Paged` says: the ops name what is wrong with them.

    `angles` are positions (B,) int64 and the tables cos and sin.
    Raises:  ValueError for a position, slot, page or length out of range.
    """
    for w in weights:
        if w is not None and (w.dtype != torch.float32 or not w.is_contiguous()):
            return None
    if not _readable(paged, x.shape[0]) or angles[0].shape != x.shape[:1]:
        return None
    (B, D), x, (pages, page, K, E), table = x.shape, x.contiguous(), paged.k_cache.shape, paged.table
    (y, stream), H, F = torch.empty(2, B, D).unbind(), weights.out.shape[1] // E, weights.down.shape[1]
    place = (*angles, paged.slots, paged.k_cache, paged.v_cache, table, paged.lengths)
    extension().decoder_layer_cpu(
        y.data_ptr(),
        stream.data_ptr(),
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        [0 if w is None else w.data_ptr() for w in weights],
        [t.data_ptr() for t in place],
        (len(angles[1]), pages, page, table.stride(0), table.shape[1]),
        E**-0.5,
        eps,
        B,
        D,
        F,
        H,
        K,
        E,
        torch.get_num_threads(),
    )
    return y, stream


def _readable(paged: Paged, B: int) -> bool:
    """Whether compiled code, which is given addresses, reads in these pages what B rows mean by them."""
    k, v, slots, table, lengths = paged
    return (
        k.dtype == v.dtype == torch.float32
        and table.dtype == lengths.dtype == torch.int32
        and slots.dtype == torch.int64
        and k.shape == v.shape
        and len(table) == len(lengths) == len(slots) == B
        and k.is_contiguous()
        and v.is_contiguous()
        and slots.is_contiguous()
        and lengths.is_contiguous()
        and table.stride(1) == 1
    )
