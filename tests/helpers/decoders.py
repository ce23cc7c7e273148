"""Decoders of random weights for the engine's tests, and what a trainer finds for its rollouts.

A machine with a GPU runs its tests with what is installed there: nothing here needs the command line or its
packages.
"""

from __future__ import annotations

from typing import Any

import torch
from support import tiny_config

from fastrl.algorithms import ALGORITHMS
from fastrl.batch.types import Batch
from fastrl.model.decoder import Decoder
from fastrl.sampler import Sampler, SamplingParams
from fastrl.train.objective import PolicyObjective, batch_logp

PROMPTS = (1, 5, 17, 70, 3, 9)  # tokens


def decoder(
    family: str = "qwen3", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Decoder:
    """A decoder of random weights that are large enough for its distributions to be far from uniform."""
    return Decoder.from_config(
        tiny_config(family, **{"vocab_size": 31, "initializer_range": 0.4} | changes), dtype=dtype, seed=seed
    )


def model_of(family, dtype=torch.float32, device="cpu"):
    """Large random weights, and random biases, which from_config leaves at 0."""
    config = tiny_config(family, initializer_range=0.3, max_position_embeddings=256)
    model = Decoder.from_config(config, seed=1, dtype=dtype, device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()))
    return model


def rollouts_of(model, temperature=0.7, **options):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, 61, (n,), generator=generator).tolist() for n in PROMPTS]
    params = SamplingParams(**{"n": 4, "max_new_tokens": 70, "temperature": temperature, "seed": 3} | options)
    return Sampler(model).generate(prompts, params)


def scores(model, rollouts, micro_tokens, temperature=0.7):
    """logp (T,) of `batch_logp`, in micro-batches of at most so many tokens, and logp and entropy (T,) beside
    the loss.
    """
    zeros = torch.zeros_like(rollouts.logp)
    columns = {"old_logp": rollouts.logp, "advantage": zeros, "weight": zeros}
    batch = Batch(
        tokens=rollouts.tokens, cu_seqlens=rollouts.cu_seqlens, mask=rollouts.completion_mask, **columns
    )
    stats = PolicyObjective(model, ALGORITHMS["grpo"], temperature).score(batch).stats
    shifted = [torch.cat([zeros[:1], x]) for x in (stats.logp, stats.entropy)]
    return batch_logp(model, batch, micro_tokens=micro_tokens, temperature=temperature), *shifted
