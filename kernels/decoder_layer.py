"""A decoder layer of one new token per row, in one call: all that lies between two residual streams.

    h = x + residual
    q, k, v = heads of norm(h) qkv^T + bias;   q, k normed and turned;   k, v stored in their slots
    a = h + attention(q) out^T
    y = swiglu(norm(a) gate_up^T) down^T,   returned with the stream a: the next layer adds them

It is no op of torch.library: it writes pages, and has no gradient.  An implementation may return the sum
a + y with None in place of the stream.  Where it returns None, or `layer_for` has none, the model runs the
ops one by one, which give the same numbers, up to the order of sums in a product, and name what is wrong with
an argument.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastrl.kernels import decode_attention, linear, rms_norm, rope, swiglu
from fastrl.kernels._backend import direct, is_exact, pick, register, register_triton, requested, unbuilt
from fastrl.kernels._layer import LayerWeights, Paged, summed
from fastrl.kernels._native import decoder_layer as native

Angles = tuple[Tensor, Tensor, Tensor]  # positions (B,) int64, cos and sin
Run = Callable[
    [Tensor, Tensor | None, LayerWeights, Angles, Paged, float], tuple[Tensor, Tensor | None] | None
]
OPS = ("rms_norm", "linear", "rope", "decode_attention", "swiglu")  # what the layer is made of


# --- reference --------------------------------------------------------------------------------------
def reference(
    x: Tensor, residual: Tensor | None, weights: LayerWeights, angles: Angles, paged: Paged, eps: float
) -> tuple[Tensor, Tensor]:
    """The definition: what the layer adds, and the residual stream, both (B, D)."""
    (B, _), (_, _, K, E) = x.shape, paged.k_cache.shape
    stream = x if residual is None else x + residual
    normed = rms_norm.reference(stream, weights.input_norm, eps)[0]
    qkv = linear.reference(normed, weights.qkv, _or_empty(weights.qkv_bias, x)).view(B, -1, E)
    q, k, v = qkv.split((qkv.shape[1] - 2 * K, K, K), 1)
    head_norms = _or_empty(weights.q_norm, x), _or_empty(weights.k_norm, x)
    q, k = rope.reference(q, k, *angles, *head_norms, eps)
    for cache, new in ((paged.k_cache, k), (paged.v_cache, v)):
        cache.view(-1, K, E).index_copy_(0, paged.slots, new)

    pages = paged.k_cache, paged.v_cache, paged.table, paged.lengths
    attended = decode_attention.reference(q, *pages, None, E**-0.5).view(B, -1)
    stream = stream + linear.reference(attended, weights.out, x.new_empty(0))
    normed = rms_norm.reference(stream, weights.mlp_norm, eps)[0]
    gated = swiglu.reference(linear.reference(normed, weights.gate_up, x.new_empty(0)))
    return linear.reference(gated, weights.down, x.new_empty(0)), stream


def _or_empty(w: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if w is None else w


register("decoder_layer", "reference", forward=reference, summed=summed(reference))


# --- kernels ----------------------------------------------------------------------------------------
register(
    "decoder_layer",
    "cpu",
    dtypes=(torch.float32,),
    missing=unbuilt("decoder_layer_cpu"),
    forward=native.forward,
)
register_triton("decoder_layer", "decoder_layer", "forward", "summed")


# --- which ------------------------------------------------------------------------------------------
def layer_for(x: Tensor) -> Run | None:
    """What runs a layer over rows like x (B, D) in one call; None where the ops run one by one.

    An op that was asked for by name, of another backend than the layer, keeps its own implementation, and so
    does every op in exact mode on CUDA.
    """
    if torch.is_grad_enabled() or not direct(x):
        return None
    name = requested("decoder_layer")
    if name not in (None, "triton") or any(requested(op) != name for op in OPS):
        return None
    if x.is_cpu and name is None:
        return native.forward if native.is_supported(x) else None
    if is_exact():
        return None
    run = pick("decoder_layer", x, "forward")
    return None if run is reference else run
