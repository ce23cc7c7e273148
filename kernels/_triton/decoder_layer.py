"""A decoder layer of one new token per row in five launches.

    heads      norm_linear.py        norm, qkv, bias, head norms, rope, store
    attention  decode_attention.py   the last program of a query adds up its splits
    out        linear_residual.py    product, residual sum, sums of squares
    gated      norm_linear.py        norm, gate_up, silu(gate) up
    down       linear_residual.py    product, residual sum, sums of squares

The ops one by one take ten.  Numbers are rounded where the ops round them; products are added up in other
orders than a library's.  The order depends on the number of rows, so this is not batch-invariant.

Which shapes gain is a prediction (docs/ops.md): a fused product norms its rows again in every program, so
from some number of rows on a library's product, and two more launches, are faster.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fastrl.kernels import _layer as layers
from fastrl.kernels._backend import requested
from fastrl.kernels._launch import gpu, on_device
from fastrl.kernels._layer import LayerWeights, Paged, readable, uniform
from fastrl.kernels._triton import decode_attention
from fastrl.kernels._triton._chain import chain
from fastrl.kernels._triton._layer_tiles import ENTER, splits_of, tiles
from fastrl.kernels._triton.linear_residual import enter_kernel, residual_kernel
from fastrl.kernels._triton.norm_linear import gated_kernel, heads_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GAINS = ((1024, 256), (2048, 64), (4096, 16))  # (width at most, rows at most): predicted to gain
INTERPRETED_PROCESSORS = 8  # without a GPU to fill


# --- which shapes ---------------------------------------------------------------------------------
def gains(rows: int, width: int, dtype: torch.dtype) -> bool:
    """Whether a layer of this width is predicted to be faster in five launches."""
    most = next((m for w, m in GAINS if width <= w), 0)
    return dtype != torch.float32 and rows <= most


# --- launches ---------------------------------------------------------------------------------------
def forward(
    x: Tensor,
    residual: Tensor | None,
    weights: LayerWeights,
    angles: tuple[Tensor, Tensor, Tensor],
    paged: Paged,
    eps: float,
) -> tuple[Tensor, Tensor | None] | None:
    """The residual stream (B, D) after the layer, and None: nothing is left to add to it.

    None for what the ops do faster or name the fault of, as in fastrl.kernels.decoder_layer.
    """
    B, D = x.shape
    if not uniform(weights, x.dtype) or not readable(paged, B, x.dtype) or angles[0].shape != (B,):
        return None
    if (weights.q_norm is None) != (weights.k_norm is None):
        return None
    if B == 0 or (requested("decoder_layer") is None and not gains(B, D, x.dtype)):
        return None
    return _always(x, residual, weights, angles, paged, eps)


def _always(
    x: Tensor,
    residual: Tensor | None,
    weights: LayerWeights,
    angles: tuple[Tensor, Tensor, Tensor],
    paged: Paged,
    eps: float,
) -> tuple[Tensor, None]:
    """`forward` for any shape and arguments that are right."""
    with on_device(x):
        return _launch(x, residual, weights, angles, paged, eps), None


summed = layers.summed(_always)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weights: LayerWeights,
    angles: tuple[Tensor, Tensor, Tensor],
    paged: Paged,
    eps: float,
) -> Tensor:
    half, table, lengths = paged.k_cache.shape[3] // 2, paged.table, paged.lengths
    shape = tiles(x.shape[0], half, weights.q_norm is not None, x.dtype)
    stream = _enter(x, residual, weights, paged, shape["residual"])

    q = _heads(stream, weights, angles, paged, eps, shape["heads"])
    tickets, scale = paged.scratch.tickets, q.shape[2] ** -0.5
    attended = decode_attention.forward(
        q, paged.k_cache, paged.v_cache, table, lengths, None, scale, tickets
    ).view(len(q), -1)

    stream = _residual(attended, weights.out, stream, paged, shape["residual"])
    gated = _gated(stream, weights, paged, eps, shape["gated"])
    return _residual(gated, weights.down, stream, paged, shape["residual"])


def _enter(
    x: Tensor, residual: Tensor | None, weights: LayerWeights, paged: Paged, tile: dict[str, Any]
) -> Tensor:
    """The stream before the layer; a launch only where it is not the one that a fused layer left."""
    scratch, (B, D) = paged.scratch, x.shape
    if residual is None and scratch.stream is x:
        return x
    x = x.contiguous()
    stream = x if residual is None else torch.empty_like(x)
    other = x if residual is None else residual.contiguous()
    parts = triton.cdiv(D, ENTER["BLOCK"])
    n = max(B * paged.k_cache.shape[2], triton.cdiv(B, tile["BLOCK_M"]) * triton.cdiv(D, tile["BLOCK_N"]))
    squares = torch.empty(B, parts, dtype=torch.float32, device=x.device)
    tickets = torch.empty(n, dtype=torch.int32, device=x.device)
    enter_kernel[(B * parts,)](
        stream, squares, tickets, x, other, B, parts, n, D, ADD=residual is not None, **ENTER, **chain(x)
    )
    scratch.stream, scratch.squares, scratch.tickets = stream, squares, tickets
    return stream


def _heads(
    stream: Tensor,
    weights: LayerWeights,
    angles: tuple[Tensor, Tensor, Tensor],
    paged: Paged,
    eps: float,
    tile: dict[str, Any],
) -> Tensor:
    """Turned queries (B, H, E); keys and values are in their pages."""
    (B, D), (_, _, K, E), squares = stream.shape, paged.k_cache.shape, paged.scratch.squares
    assert squares is not None
    positions, cos, sin = angles
    H = weights.out.shape[1] // E
    normed, biased = weights.q_norm is not None, weights.qkv_bias is not None
    q = torch.empty(B, H, E, dtype=stream.dtype, device=stream.device)
    down, each = triton.cdiv(B, tile["BLOCK_M"]), triton.cdiv(E // 2, tile["LANES"])
    heads_kernel[(down * each * (H + 2 * K),)](
        q,
        paged.k_cache,
        paged.v_cache,
        stream,
        squares,
        weights.input_norm,
        weights.qkv,
        weights.qkv_bias if biased else weights.qkv,
        weights.q_norm if normed else weights.qkv,
        weights.k_norm if normed else weights.qkv,
        positions.contiguous(),
        cos,
        sin,
        paged.slots,
        B,
        cos.shape[0],
        squares.shape[1],
        D,
        H,
        K,
        E // 2,
        eps,
        BIAS=biased,
        NORMS=normed,
        PARTS=triton.next_power_of_2(squares.shape[1]),
        **tile,
        **chain(stream),
    )
    return q


def _gated(stream: Tensor, weights: LayerWeights, paged: Paged, eps: float, tile: dict[str, Any]) -> Tensor:
    """silu(gate) up of the normed stream, (B, F)."""
    (B, D), F, squares = stream.shape, weights.down.shape[1], paged.scratch.squares
    assert squares is not None
    y = torch.empty(B, F, dtype=stream.dtype, device=stream.device)
    gated_kernel[(triton.cdiv(B, tile["BLOCK_M"]) * triton.cdiv(F, tile["LANES"]),)](
        y,
        stream,
        squares,
        weights.mlp_norm,
        weights.gate_up,
        B,
        squares.shape[1],
        D,
        F,
        eps,
        PARTS=triton.next_power_of_2(squares.shape[1]),
        **tile,
        **chain(stream),
    )
    return y


def _residual(x: Tensor, weight: Tensor, stream: Tensor, paged: Paged, tile: dict[str, Any]) -> Tensor:
    """stream + x W^T, (B, D), whose sums of squares are left in the scratch."""
    (B, K), N, scratch = x.shape, weight.shape[0], paged.scratch
    down, across = triton.cdiv(B, tile["BLOCK_M"]), triton.cdiv(N, tile["BLOCK_N"])
    depth = min(tile["BLOCK_K"], max(16, triton.next_power_of_2(K) // 2))  # two blocks, at least
    on = gpu(x)
    splits = splits_of(down * across, K, INTERPRETED_PROCESSORS if on is None else on.multiprocessors)
    h = torch.empty_like(stream)
    squares = torch.empty(B, across, dtype=torch.float32, device=x.device)
    partial = splits * down * across * tile["BLOCK_M"] * tile["BLOCK_N"] if splits > 1 else 0
    partials = torch.empty(partial, dtype=torch.float32, device=x.device)
    residual_kernel[(down * across, splits)](
        h,
        squares,
        partials,
        scratch.tickets,
        x,
        weight,
        stream,
        B,
        across,
        N,
        K,
        SPLITS=splits,
        **tile | {"BLOCK_K": depth},
        **chain(x),
    )
    scratch.stream, scratch.squares = h, squares
    return h
