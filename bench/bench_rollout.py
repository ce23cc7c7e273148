"""Rollouts: G completions of M tokens for each of P prompts of N tokens, in sampled tokens per second, log-probs included in ours."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.bench import decoders
from fastrl.bench.common import Bench, Case, Cost, Data, Draw, Function, cases
from fastrl.sampler import Sampler, SamplingParams

CASES = cases(
    "P G N M L D F H K V",
    tiny=(2, 2, 4, 3, 1, 16, 24, 2, 1, 37),
    quick=(2, 4, 16, 16, 2, 64, 128, 4, 2, 4096),
    cpu=[(8, 8, 64, 64, 4, 256, 512, 8, 4, 8192)],
    cuda=[(32, 8, 256, 128, 24, 896, 4864, 14, 2, 151936)],
    slice={},
    modes=("generate",),
)


def data(case: Case) -> Data:
    P, N, V = case.sizes("P N V")
    return Data({"prompts": Draw(case).below(V, P, N)})


def cost(case: Case) -> Cost:
    """Each step reads the weights and the cache so far; the products of every token."""
    P, G, N, M, L, D, H, K = case.sizes("P G N M L D H K")
    layers, head = decoders.parameters(case)
    cache = 2 * P * G * (N + M // 2) * K * (D // H) * L
    return Cost(M * (layers + head + cache) * case.itemsize, 2 * (layers * (P * N + P * G * M) + head * P * G * M), tokens=P * G * M)


def ours(case: Case) -> Function:
    G, M = case.sizes("G M")
    sampler = Sampler(decoders.ours(case), max_tokens_in_flight=1 << 30)
    params = SamplingParams(n=G, max_new_tokens=M)
    return lambda prompts: sampler.generate(prompts.tolist(), params).tokens


def transformers(case: Case) -> Function:
    G, M = case.sizes("G M")
    model = decoders.theirs(case).eval()

    def generate(prompts: Tensor) -> Tensor:
        options = {"max_new_tokens": M, "min_new_tokens": M, "num_return_sequences": G, "do_sample": True, "top_k": 0, "pad_token_id": 0}
        return model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)

    return generate


BENCH = Bench(op="rollout", cases=CASES, data=data, cost=cost, providers={"fastrl": ours, "transformers": transformers}, wall=True)
PROVIDERS = BENCH.providers
