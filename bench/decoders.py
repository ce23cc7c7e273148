"""The decoder of the pipeline benchmarks, the same weights in transformers, and bounds of its time.

L layers of width D, F in the MLP, H query heads of width E, K key/value heads, V tokens, embedding and head
tied.  E = D / H makes a Qwen2 decoder, any other E a Qwen3 one, with norms of queries and keys.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from fastrl import ops
from fastrl.bench.common import Case, Sizes, peer
from fastrl.bench.timing import Call, Ceilings, Effort, ceilings, measure, percentile, timer_for
from fastrl.model.decoder import Decoder

LETTERS = "L D F H K E V"
QWEN25_05B = (24, 896, 4864, 14, 2, 64, 151936)
QWEN25_15B = (28, 1536, 8960, 12, 2, 128, 151936)
QWEN3_06B = (28, 1024, 3072, 16, 8, 128, 151936)


def ours(case: Case, dtype: torch.dtype | None = None) -> Decoder:
    """Our decoder, always with the same weights."""
    L, D, F, H, K, E, V = case.sizes(LETTERS)
    family, name = ("qwen2", "Qwen2ForCausalLM") if E == D // H else ("qwen3", "Qwen3ForCausalLM")
    config = {
        "architectures": [name],
        "model_type": family,
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": H,
        "num_key_value_heads": K,
        "head_dim": E,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    }
    return Decoder.from_config(config, dtype=dtype or getattr(torch, case.dtype), device=case.device, seed=0)


def theirs(case: Case) -> Any:
    """The same weights as a transformers model.  Raises Unavailable without transformers."""
    auto = peer("transformers", "AutoModelForCausalLM")
    peer("transformers.utils.logging", "disable_progress_bar")()
    with tempfile.TemporaryDirectory() as folder:
        ours(case).save_pretrained(folder)
        model = auto.from_pretrained(folder, dtype=getattr(torch, case.dtype))
    model = model.to(case.device)
    assert isinstance(model, nn.Module)
    return model


def parameters(case: Case) -> tuple[int, int]:
    """Parameters of the layers' matrices, and of the embedding (which is the head)."""
    *layers, head = (m * n for m, n in products(case))
    return sum(layers) * case.shape["L"], head


def products(case: Case) -> list[Sizes]:
    """(outputs, inputs) of a layer's four matrices, and of the head."""
    _, D, F, H, K, E, V = case.sizes(LETTERS)
    return [((H + 2 * K) * E, D), (D, H * E), (2 * F, D), (D, F), (V, D)]


# --- the least a rollout can take -------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Bound:
    """Milliseconds of the products of a prefill, of those of all decode steps, and of reading the cache."""

    prefill_ms: float
    decode_ms: float
    cache_ms: float

    @property
    def ms(self) -> float:
        return self.prefill_ms + self.decode_ms + self.cache_ms


def bound(
    case: Case,
    prompts: Sequence[int],
    outputs: Sequence[int],
    samples: int = 1,
    limit: Ceilings | None = None,
) -> Bound:
    """The least time of a rollout of `samples` sequences for each prompt, all decoded together.

    `prompts` and `outputs` are tokens of each prompt and of its completions.  A decode step reads each weight
    once, and the keys and values of each live sequence; kernels run one after the other, so the two add up.
    On CUDA a product takes the longer of its traffic and its arithmetic at the measured limits.  On CPU the
    products are timed, torch's and ours, and the faster counts: at these sizes both are far from their best.
    """
    L, _, _, _, K, E, _ = case.sizes(LETTERS)
    *layer, head = products(case)
    limit = limit or limits(case.device)

    def ms(rows: int, matrices: list[Sizes]) -> float:
        if case.device == "cpu":
            return sum(_product_ms(rows, m, n) for m, n in matrices)
        size = sum(m * n for m, n in matrices)
        return limit.floor_ms(size * case.itemsize, 2 * rows * size)

    live: dict[int, int] = {}  # rows -> decode steps with that number of rows
    for t in range(1, max(outputs)):
        rows = samples * sum(n > t for n in outputs)
        live[rows] = live.get(rows, 0) + 1

    # step t reads the prompt and t tokens
    read = samples * sum((n - 1) * p + n * (n - 1) // 2 for p, n in zip(prompts, outputs, strict=True))
    cache_bytes = read * 2 * L * K * E * case.itemsize
    decode_ms = 0.0
    for rows, steps in live.items():
        decode_ms += steps * (L * ms(rows, layer) + ms(rows, [head]))
    prefill_ms = L * ms(sum(prompts), layer) + ms(len(prompts), [head])
    return Bound(prefill_ms, decode_ms, limit.floor_ms(cache_bytes, 0))


@cache
def limits(device: str) -> Ceilings:
    """The measured limits of the device; measured again, because `Bench.details` does not get the run's."""
    return ceilings(torch.device(device), quick=device == "cpu")


@cache
def _product_ms(rows: int, m: int, n: int) -> float:
    x, weight = torch.randn(rows, n), torch.randn(m, n)
    problems: list[Exception] = []
    timer = timer_for(torch.device("cpu"), wall=True)
    calls: dict[str, Call] = {"torch": lambda: torch.mm(x, weight.T), "fastrl": lambda: ops.linear(x, weight)}
    taken = measure(calls, timer, Effort(15, 2.0, 300.0), lambda _, error: problems.append(error))
    if problems:
        raise problems[0]
    return min(percentile(taken[name]["warm"], 0.5) for name in calls)
