"""A decoder layer for one new token of every row, in one call, on CPU.

csrc/cpu/decoder_layer.cpp calls the kernels of rms_norm, linear, rope, decode_attention and swiglu one after
the other: the result has the bits of `Layer.forward` in fastrl.model.decoder, which calls the ops.  For a
small model the Python calls take longer than the arithmetic of the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.kernels._backend import direct, extension, is_exact, overruled, unbuilt
from fastrl.kernels._head import LEAST_ROWS
from fastrl.kernels._layer import LayerWeights, Paged, readable, uniform

_BUILT = not unbuilt("decoder_layer_cpu")


def is_supported(x: Tensor) -> bool:
    """Whether each op of a layer over x (B, D) would pick the kernels called here, without a gradient."""
    if not _BUILT or torch.is_grad_enabled() or overruled():
        return False
    if not x.is_cpu or x.dtype != torch.float32:
        return False
    return (is_exact() or x.shape[0] >= LEAST_ROWS) and direct(x)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weights: LayerWeights,
    angles: tuple[Tensor, Tensor, Tensor],
    paged: Paged,
    eps: float,
) -> tuple[Tensor, Tensor] | None:
    """What the layer adds to the residual stream, and the stream, both (B, D).

    `angles` are positions (B,) int64 and the tables cos and sin.  Returns None for weights that are not
    contiguous and fp32, and for pages that are not as in `Paged`: the ops then name what is wrong with them.

    Raises:  ValueError for a position, slot, page or length out of range.
    """
    if not uniform(weights, torch.float32) or not readable(paged, x.shape[0], torch.float32):
        return None
    if angles[0].shape != x.shape[:1]:
        return None

    x = x.contiguous()
    B, D = x.shape
    pages, page, K, E = paged.k_cache.shape
    H, F = weights.out.shape[1] // E, weights.down.shape[1]
    y, stream = torch.empty(2, B, D).unbind()

    table = paged.table
    tensors = (*angles, paged.slots, paged.k_cache, paged.v_cache, table, paged.lengths)
    sizes = (len(angles[1]), pages, page, table.stride(0), table.shape[1])
    extension().decoder_layer_cpu(
        y.data_ptr(),
        stream.data_ptr(),
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        [0 if w is None else w.data_ptr() for w in weights],
        [t.data_ptr() for t in tensors],
        sizes,
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
