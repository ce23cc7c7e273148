"""Rollouts: G completions of M tokens for each of P prompts of N tokens, in sampled tokens per second.

Ours include log-probs.  Under "random lengths" prompt and completion lengths are uniform in [100, N] and
[100, M], drawn as in nano-vllm's bench.py: its 256 sequences have 142,827 prompt and 133,966 output tokens.
Memory is the most that torch's allocator held, without the weights.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fastrl.bench import decoders
from fastrl.bench.common import Bench, Case, Cost, Data, Function, cases, only
from fastrl.bench.decoders import LETTERS, QWEN3_06B, QWEN25_05B, QWEN25_15B
from fastrl.sampler import Sampler, SamplingParams

RANDOM = "random lengths"
PAGE = 64  # tokens of a cache page
SHORTEST, TOKEN_IDS = 100, 10000  # of nano-vllm's bench.py


def table(mode: str, cuda: Sequence[tuple[int, ...]]) -> tuple[Case, ...]:
    """The cases of a mode; the first on CUDA is the headline of its mode."""
    return cases(
        f"P G N M {LETTERS}",
        tiny=(2, 2, 4, 3, 1, 16, 24, 2, 1, 8, 37),
        quick=(4, 1, 16, 16, 2, 64, 128, 4, 2, 16, 4096),
        cpu=[(64, 1, 16, 64, 4, 128, 512, 4, 2, 32, 4096), (64, 1, 16, 64, 8, 512, 2048, 8, 2, 64, 4096)],
        cuda=cuda,
        slice={},
        modes=(mode,),
    )


LARGE = [(256, 1, 1024, 1024, *shape) for shape in (QWEN25_05B, QWEN25_15B, QWEN3_06B)]
CASES = (
    *table("generate", [(32, 8, 256, 128, *QWEN25_05B)]),
    *(c for c in table(RANDOM, LARGE) if c.device == "cuda"),
)


@cache
def requests(mode: str, P: int, G: int, N: int, M: int, V: int) -> tuple[list[list[int]], list[int]]:
    """The prompts, and the tokens of each prompt's completions."""
    if mode != RANDOM:
        draw = torch.randint(V, (P, N), generator=torch.Generator().manual_seed(0))
        return draw.tolist(), [M] * P
    noise = random.Random(0)
    prompts = [[noise.randint(0, TOKEN_IDS) for _ in range(noise.randint(SHORTEST, N))] for _ in range(P)]
    return prompts, [noise.randint(SHORTEST, M) for _ in range(P)]


def lengths(case: Case) -> tuple[list[int], list[int]]:
    """Prompt and output tokens of every prompt."""
    prompts, outputs = requests(case.mode, *case.sizes("P G N M V"))
    return [len(p) for p in prompts], outputs


def data(case: Case) -> Data:
    return Data({"prompts": requests(case.mode, *case.sizes("P G N M V"))[0]})


def cost(case: Case) -> Cost:
    """Each step reads the weights and the cache so far.  FLOPs are the products of every token."""
    G, L, K, E = case.sizes("G L K E")
    prompts, outputs = lengths(case)
    layers, head = decoders.parameters(case)
    tokens, steps = G * sum(outputs), max(outputs)
    cache = 2 * L * K * E * G * sum(n * p + n * n // 2 for p, n in zip(prompts, outputs, strict=True))
    return Cost(
        (steps * (layers + head) + cache) * case.itemsize,
        2 * (layers * (sum(prompts) + tokens) + head * tokens),
        tokens=tokens,
    )


# --- providers --------------------------------------------------------------------------------------
class Ours:
    """The engine, and the time of its last call by phase."""

    def __init__(self, case: Case) -> None:
        G, M = case.sizes("G M")
        # whole pages, and a spare one
        budget = G * sum(p + n + 2 * PAGE for p, n in zip(*lengths(case), strict=True))
        self.sampler = Sampler(decoders.ours(case), max_tokens_in_flight=budget)
        self.params = SamplingParams(n=G, max_new_tokens=M)
        self.lengths = lengths(case)[1] if case.mode == RANDOM else None
        self.seconds = 0.0

    def __call__(self, prompts: list[list[int]]) -> Tensor:
        began = time.perf_counter()
        tokens = self.sampler.generate(prompts, self.params, lengths=self.lengths).tokens
        if tokens.is_cuda:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - began
        return tokens

    def phases(self) -> dict[str, float]:
        """Milliseconds of the last call by phase; the rest is the host's."""
        known = {f"{name} ms": seconds * 1e3 for name, seconds in self.sampler.timing.items()}
        rest = {"host gaps ms": self.seconds * 1e3 - sum(known.values())}
        return known | rest | {"peak pages": float(self.sampler.peak_pages)}


def transformers(case: Case) -> Function:
    G, M = case.sizes("G M")
    only(case.mode != RANDOM, "its generate has one length for all sequences")
    model = decoders.theirs(case).eval()

    def generate(prompts: list[list[int]]) -> Tensor:
        ids = torch.tensor(prompts, device=case.device)
        options = {
            "max_new_tokens": M,
            "min_new_tokens": M,
            "num_return_sequences": G,
            "do_sample": True,
            "top_k": 0,
            "pad_token_id": 0,
        }
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return generate


def details(case: Case, function: Function, ms: float) -> dict[str, float]:
    """The bound, the share of it that was reached, and the time by phase if known."""
    G = case.shape["G"]
    prompts, outputs = lengths(case)
    least = decoders.bound(case, prompts, outputs, G)
    numbers = {
        "of bound": least.ms / ms,
        "bound tok/s": G * sum(outputs) / least.ms * 1e3,
        "bound ms": least.ms,
        "products ms": least.prefill_ms + least.decode_ms,
        "ms a step": ms / max(outputs),
    }
    return numbers | function.phases() if isinstance(function, Ours) else numbers


BENCH = Bench(
    op="rollout",
    cases=CASES,
    data=data,
    cost=cost,
    providers={"fastrl": Ours, "transformers": transformers},
    wall=True,
    details=details,
)
PROVIDERS = BENCH.providers
