"""Rollouts with the weights being trained: same process, same storage, same layers.  vLLM can stand in, with a copy of them."""

from collections.abc import Callable
from typing import Any

from fastrl.sampler.engine import Sampler, SamplingParams
from fastrl.sampler.vllm import VllmSampler

__all__ = ["SAMPLERS", "Sampler", "SamplingParams", "VllmSampler"]

SAMPLERS: dict[str, Callable[..., Any]] = {"fastrl": Sampler, "vllm": VllmSampler}
"""What --sampler chooses from: f(model, tokenizer, *, max_tokens_in_flight)."""
