"""Calls of the ops on hidden states, heads, sequences and samples: see `bench/calls.py`."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from fastrl import ops
from fastrl.bench.calls import (
    BF16,
    EITHER,
    FP16,
    FP32,
    Block,
    Blocks,
    Given,
    anything,
    flags,
    ints,
    once_in_fp16,
    zeros,
)
from fastrl.kernels._advance import Pages, Records, Rows
from fastrl.kernels._backend import pick
from fastrl.kernels._group_advantage import BASELINES, SCALES, SHAPES
from fastrl.kernels._layer import LayerWeights, Paged, Scratch
from fastrl.kernels.advance import advance as advance_rows
from fastrl.kernels.advance import newest as newest_rows
from fastrl.kernels.policy_loss import KLS, SURROGATES
from fastrl.kernels.rope import Store, rope_tables
from fastrl.kernels.sample import Sample

HEADS = ((14, 2, 64), (16, 8, 128), (8, 8, 80), (32, 8, 96), (3, 1, 36))  # H, K, E of models, and odd ones


# --- layers -----------------------------------------------------------------------------------------
def rms_norm() -> Blocks:
    for dtype, D in once_in_fp16((896, 70, 4096, 8192, 16384)):
        x = zeros(20, D, dtype=dtype)
        yield Block(
            function=ops.rms_norm,
            axes={
                "x": (x, zeros(20, D + 16, dtype=dtype)[:, :D]),
                "weight": (zeros(D, dtype=dtype),),
                "residual": (None, x),
            },
            grads=("x", "weight", "residual"),
            wide=D >= 896,
        )


def swiglu() -> Blocks:
    for dtype, F in once_in_fp16((4864, 1001, 40)):
        x = (zeros(4, 2 * F, dtype=dtype), zeros(4, 2 * F + 16, dtype=dtype)[:, : 2 * F])
        yield Block(function=ops.swiglu, axes={"gate_up": x}, grads=("gate_up",), wide=F == 4864)


def rope() -> Blocks:
    for dtype, (H, K, E) in once_in_fp16(HEADS):
        first = HEADS[0][0] == H
        fused, (cos, sin) = zeros(6, H + 2 * K, E, dtype=dtype), rope_tables(E, 1e4, None, 64, FP32, "cpu")
        q, k, v = fused.split((H, K, K), 1)
        weight = zeros(E, dtype=dtype)
        axes = {
            "positions": (ints(6), ints(6, dtype=torch.int32)) if first and dtype == BF16 else (ints(6),),
            "cos": (cos,),
            "sin": (sin,),
            "q_norm": (None, weight),
            "k_norm": (None, weight),
        }
        own = {"q": (zeros(6, H, E, dtype=dtype),), "k": (zeros(6, K, E, dtype=dtype),)}
        learned = ("q", "k", "q_norm", "k_norm")
        some = anything if first else _both_norms_or_none
        wide = E % 64 == 0
        yield Block(function=ops.rope, axes=own | axes, grads=learned, possible=some, wide=wide)
        cache = Store(v, zeros(20, K, E, dtype=dtype), zeros(20, K, E, dtype=dtype), torch.arange(6))
        parts = {"q": (q,), "k": (k,), "store": (None, cache)}
        yield Block(function=_without_gradients, axes=parts | axes, possible=some, wide=wide)


def _both_norms_or_none(given: Given) -> bool:
    return (given["q_norm"] is None) == (given["k_norm"] is None)


def _without_gradients(**given: Any) -> None:
    with torch.no_grad():
        ops.rope(**given)


def decode_attention() -> Blocks:
    for dtype, (H, K, E) in once_in_fp16(HEADS):
        first = HEADS[0][0] == H
        for page in (64, 16, 256, 20) if first and dtype != FP16 else (64,):
            q, cache = zeros(3, H + 2 * K, E, dtype=dtype)[:, :H], zeros(40, page, K, E, dtype=dtype)
            ends = torch.ones(3, dtype=torch.int32)
            yield Block(
                function=ops.decode_attention,
                axes={
                    "q": (q,),
                    "k_cache": (cache,),
                    "v_cache": (cache,),
                    "block_table": tuple(ints(3, N, dtype=torch.int32) for N in (1, 600 // page + 1)),
                    "lengths": (ends, ends.long()) if first and page == 64 else (ends,),
                    "rows": (None, ints(3)),
                    "scale": (None, 0.5),
                },
                possible=lambda given: (given["scale"] is None) == (given["rows"] is None),
                wide=E % 64 == 0 and page % 16 == 0,
            )


def decoder_layer() -> Blocks:
    for dtype, (H, K, E) in once_in_fp16(HEADS):
        first = HEADS[0][0] == H
        axes = {
            "B": (1, 40, 70, 256) if first else (16, 256),
            "dtype": (dtype,),
            "heads": ((H, K, E),),
            "layers": (2,),
            "residual": EITHER,
            "biased": EITHER,
            "normed": EITHER,
        }
        yield Block(function=_decoder_layer, axes=axes, possible=_of_a_family, wide=E % 64 == 0)


def _of_a_family(given: Given) -> bool:
    """A bias, head norms or neither; what a layer enters with does not depend on them."""
    both = given["biased"] and given["normed"]
    return not both and (not given["residual"] or given["biased"])


def _decoder_layer(
    B: int,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    layers: int,
    residual: bool,
    biased: bool,
    normed: bool,
) -> None:
    """One layer after another: the second takes the stream of the first."""
    (H, K, E), D, F = heads, 896, 4864
    x, cos, cache = zeros(B, D, dtype=dtype), zeros(64, E // 2), zeros(20, 64, K, E, dtype=dtype)
    norm, head_norm = zeros(D, dtype=dtype), zeros(E, dtype=dtype) if normed else None
    weights = LayerWeights(
        norm,
        zeros((H + 2 * K) * E, D, dtype=dtype),
        zeros((H + 2 * K) * E, dtype=dtype) if biased else None,
        head_norm,
        head_norm,
        zeros(D, H * E, dtype=dtype),
        norm,
        zeros(2 * F, D, dtype=dtype),
        zeros(D, F, dtype=dtype),
    )
    lengths = torch.ones(B, dtype=torch.int32)
    paged = Paged(cache, cache, ints(B), ints(B, 6, dtype=torch.int32), lengths, Scratch())
    stream: Tensor | None = x if residual else None
    for _ in range(layers):
        done = pick("decoder_layer", x, "forward")(x, stream, weights, (ints(B), cos, cos), paged, 1e-6)
        x, stream = done


# --- sequences and samples --------------------------------------------------------------------------
def gae() -> Blocks:
    for dtype, (T, S) in once_in_fp16(((2048, 1), (1000, 1), (64, 2), (2048, 8))):
        ends = torch.linspace(0, T, S + 1).int()
        yield Block(
            function=ops.gae,
            axes={
                "reward": (zeros(T, dtype=dtype),),
                "value": (zeros(T, dtype=dtype), zeros(T)) if S == 1 else (zeros(T, dtype=dtype),),
                "cu_seqlens": (ends, ends.long()) if S == 2 else (ends,),
                "gamma": (1.0, 0.9),
                "lam": (1.0, 0.9),
                "mask": (None, flags(T)),
            },
        )


def group_advantage() -> Blocks:
    for dtype, size in once_in_fp16((16, 1, 2, 7, 128, 1024, 1100, None)):
        S = 2 * (size or 20)
        yield Block(
            function=ops.group_advantage,
            axes={
                "reward": (zeros(S, dtype=dtype),),
                "group": (torch.arange(S) % 3, (torch.arange(S) % 3).int()) if size is None else (size,),
                "baseline": BASELINES,
                "scale": SCALES,
                "shape": SHAPES,
                "unbiased": EITHER,
            },
            wide=size in (16, 128, 1024),
        )


def advance() -> Blocks:
    for B, page in itertools.product((1, 3, 16, 40, 64, 100, 256, 1000, 1024), (64, 16)):
        axes = {"B": (B,), "page": (page,), "stops": (1, 2)}
        yield Block(function=_advance, axes=axes)


def _advance(B: int, page: int, stops: int) -> None:
    S, C = B + 1, 40
    numbers = (zeros(S, C), zeros(S, C), zeros(S, C), flags(S, C), ints(S, C, dtype=torch.int32))
    records = Records(ints(S, C), *numbers, ints(S), ints(S, dtype=torch.int8))
    b = ints(B)
    rows = Rows(b, b, b, b, b, b, flags(B), ints(B, 5, dtype=torch.int32))
    pages = Pages(ints(B, dtype=torch.int32), ints(1), ints(B, dtype=torch.int32))
    draw = Sample(ints(B), zeros(B), zeros(B), zeros(B))
    one = ints(1)
    newest_rows(rows, records, ints(S), page)
    advance_rows(draw, rows, records, pages, stops=ints(stops), version=one, total=one, page=page)


def policy_loss() -> Blocks:
    x, T = zeros(4096), 4096
    ends = torch.tensor([0, T // 2, T])
    inputs = {
        "logp": (x,),
        "old_logp": (x,),
        "advantage": (x,),
        "token_weight": (x,),
        "ratio": ("token", "sequence"),
        "mask": (None, flags(T)),
        "kl_coef": (0.0, 0.1),
        "ref_logp": (None, x),
        "correction": (None, x),
        "entropy": (None, x),
        "entropy_coef": (0.0, 0.1),
    }
    rows = {"surrogate": tuple(SURROGATES), "kl": (None, *KLS), "cu_seqlens": (None, ends.int())}
    of_clip = {"surrogate": ("clip",), "kl": (None, "k3"), "cu_seqlens": (None, ends.int(), ends)}
    yield Block(function=ops.policy_loss, axes=of_clip | inputs, possible=_valid, wide=True)
    yield Block(function=ops.policy_loss, axes=rows | inputs, possible=_all_or_nothing, wide=True)
    padded = {n: (zeros(3, 5, dtype=BF16),) for n in ("logp", "old_logp", "advantage", "token_weight")}
    yield Block(
        function=ops.policy_loss, axes=padded | {"surrogate": ("clip",), "ratio": ("token", "sequence")}
    )


def _valid(given: Given) -> bool:
    """Whether policy_loss accepts the call, and gets it in no other spelling."""
    there = {n: given[n] is not None for n in ("kl", "ref_logp", "entropy", "cu_seqlens")}
    return (
        there["kl"] == (given["kl_coef"] > 0)
        and there["ref_logp"] >= there["kl"]
        and there["entropy"] == (given["entropy_coef"] > 0)
        and there["cu_seqlens"] == (given["ratio"] == "sequence")
    )


def _all_or_nothing(given: Given) -> bool:
    """Every row with every KL, with all other inputs and with none of them."""
    others = {given[n] is not None for n in ("mask", "correction", "entropy", "cu_seqlens")}
    return _valid(given) and len(others) == 1 and (given["kl"] is None) == (given["ref_logp"] is None)


# --- perturbations ----------------------------------------------------------------------------------
PERTURBED = {
    "radius": (1.0,),
    "norm": ("l2", "linf", "l1"),
    "scope": ("token", "sequence", "batch"),
    "cu_seqlens": (None, torch.tensor([0, 2, 4], dtype=torch.int32)),
    "mask": (None, flags(4), flags(2, 2)),
}


def perturb_init() -> Blocks:
    for D in (70, 896, 4096):
        axes = {"embeds": (zeros(4, D), zeros(2, 2, D)), "seed": (3, 2**40 + 3)}
        yield Block(function=ops.perturb_init, axes=axes | PERTURBED, possible=_one_layout, wide=D > 70)


def perturb_step() -> Blocks:
    for dtype, D in ((FP32, 896), (FP16, 896), (BF16, 4096), (BF16, 70), (BF16, 9000), (BF16, 20000)):
        shapes = ((4, D), (2, 2, D))
        x = tuple(zeros(*shape, dtype=dtype) for shape in shapes)
        axes = {
            "delta": tuple(zeros(*shape) for shape in shapes),
            "grad": x,
            "step_size": (0.1,),
            "embeds": (None, *x),
            "out": (None, *x),
        }
        models = D in (896, 4096)
        possible = _one_layout if models else _extremes
        yield Block(function=ops.perturb_step, axes=axes | PERTURBED, possible=possible, wide=models)


def _extremes(given: Given) -> bool:
    """With all optional inputs, and with none."""
    return _one_layout(given) and (given["mask"] is None) == (given["out"] is None)


def _one_layout(given: Given) -> bool:
    """All tensors (T, D), with the ends of sequences where the scope needs them, or all (B, L, D)."""
    x = given.get("delta", given.get("embeds"))
    packed = x.ndim == 2  # type: ignore[union-attr]
    shapes = {given[n].shape for n in ("delta", "grad", "embeds", "out") if given.get(n) is not None}
    together = "out" not in given or (given["embeds"] is None) == (given["out"] is None)
    masked = given["mask"] is None or (given["mask"].ndim == 1) == packed
    ends = (given["cu_seqlens"] is not None) == (packed and given["scope"] == "sequence")
    return len(shapes) == 1 and together and masked and ends
