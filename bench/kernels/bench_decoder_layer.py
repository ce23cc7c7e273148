"""decoder_layer: one new token of B sequences of N tokens through one layer of width D, F in the MLP.

The weights are read once, and the keys and values of N tokens of every sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl import ops
from fastrl.bench.common import FORWARD, Bench, Case, Cost, Data, Draw, cases, plain
from fastrl.kernels._layer import LayerWeights, Paged, Scratch
from fastrl.kernels.decoder_layer import layer_for, reference
from fastrl.kernels.rope import Store, rope_tables

QWEN25_05B = (896, 4864, 14, 2, 64)
QWEN25_7B = (3584, 18944, 28, 4, 128)
PAGE, EPS = 64, 1e-6
CASES = cases(
    "B N D F H K E",
    tiny=(2, 9, 24, 32, 4, 2, 8),
    quick=(16, 64, 64, 96, 4, 2, 16),
    cpu=[(16, 256, 512, 1408, 8, 2, 64)],
    cuda=[(B, 700, *model) for model in (QWEN25_05B, QWEN25_7B) for B in (16, 64, 256)],
    slice={"B": 2},
    modes=(FORWARD,),
)


def data(case: Case) -> Data:
    """Weights of a Qwen2 layer, and rows that all have N tokens."""
    (B, N, D, F, H, K, E), draw = case.sizes("B N D F H K E"), Draw(case)
    each = -(-N // PAGE)
    args = {
        "x": draw.normal(B, D),
        "input_norm": draw.normal(D),
        "mlp_norm": draw.normal(D),
        "qkv": draw.normal((H + 2 * K) * E, D) * D**-0.5,
        "bias": draw.normal((H + 2 * K) * E),
        "out": draw.normal(D, H * E) * (H * E) ** -0.5,
        "gate_up": draw.normal(2 * F, D) * D**-0.5,
        "down": draw.normal(D, F) * F**-0.5,
        "k_cache": draw.normal(B * each, PAGE, K, E),
        "v_cache": draw.normal(B * each, PAGE, K, E),
        "table": torch.arange(B * each, dtype=torch.int32, device=draw.device).view(B, each),
        "lengths": torch.full((B,), N, dtype=torch.int32, device=draw.device),
    }
    return Data(args)


def cost(case: Case) -> Cost:
    """Weights, keys and values are read once."""
    B, N, D, F, H, K, E = case.sizes("B N D F H K E")
    weights = D * ((2 * H + 2 * K) * E + 3 * F)
    return Cost((weights + 2 * B * N * K * E) * case.itemsize, 2 * B * weights + 4 * B * N * H * E)


def _parts(args: dict[str, Tensor]) -> tuple[LayerWeights, tuple[Tensor, Tensor, Tensor], Paged]:
    weights = LayerWeights(
        args["input_norm"],
        args["qkv"],
        args["bias"],
        None,
        None,
        args["out"],
        args["mlp_norm"],
        args["gate_up"],
        args["down"],
    )
    k_cache, lengths = args["k_cache"], args["lengths"]
    position = lengths.long() - 1
    page = args["table"].gather(1, (position // PAGE)[:, None])[:, 0].long()
    E, wide = k_cache.shape[3], torch.promote_types(k_cache.dtype, torch.float32)
    angles = (position, *rope_tables(E, 1e6, None, 4096, wide, k_cache.device))
    slots = page * PAGE + position % PAGE
    return weights, angles, Paged(k_cache, args["v_cache"], slots, args["table"], lengths, Scratch())


@torch.no_grad()
def ours(**args: Tensor) -> Tensor:
    """In one call where there is one, else op by op."""
    x, (weights, angles, paged) = args["x"], _parts(args)
    run = layer_for(x)
    done = None if run is None else run(x, None, weights, angles, paged, EPS)
    return _one_by_one(x, weights, angles, paged) if done is None else _sum(*done)


@torch.no_grad()
def one_by_one(**args: Tensor) -> Tensor:
    """The ops of the layer, one after the other."""
    return _one_by_one(args["x"], *_parts(args))


def _one_by_one(
    x: Tensor, weights: LayerWeights, angles: tuple[Tensor, Tensor, Tensor], paged: Paged
) -> Tensor:
    K, E = paged.k_cache.shape[2:]
    normed = ops.rms_norm(x, weights.input_norm, eps=EPS)
    heads = ops.linear(normed, weights.qkv, weights.qkv_bias).view(len(x), -1, E)
    q, k, v = heads.split((heads.shape[1] - 2 * K, K, K), 1)
    store = Store(v, paged.k_cache.flatten(0, 1), paged.v_cache.flatten(0, 1), paged.slots)
    q, _ = ops.rope(q, k, *angles, store=store)
    attended = ops.decode_attention(q, paged.k_cache, paged.v_cache, paged.table, paged.lengths)
    added = ops.linear(attended.view(len(x), -1), weights.out)
    normed, stream = ops.rms_norm(added, weights.mlp_norm, eps=EPS, residual=x)
    return stream + ops.linear(ops.swiglu(ops.linear(normed, weights.gate_up)), weights.down)


@torch.no_grad()
def defined(**args: Tensor) -> Tensor:
    """The definition."""
    weights, angles, paged = _parts(args)
    return _sum(*reference(args["x"], None, weights, angles, paged, EPS))


def _sum(added: Tensor, stream: Tensor | None) -> Tensor:
    return added if stream is None else stream + added


PROVIDERS = {"fastrl": plain(ours), "one by one": plain(one_by_one), "eager": plain(defined)}
BENCH = Bench(
    op="decoder_layer",
    cases=CASES,
    data=data,
    cost=cost,
    providers=PROVIDERS,
    truth=plain(defined),
    registry="decoder_layer",
)
