"""Rollouts with the weights being trained: same process, same storage, same layers.

`SAMPLERS` are the values of --sampler: each makes a sampler of a model, its tokenizer and the options
--sampling.*.
"""

from collections.abc import Callable
from typing import Any

from fastrl.config import Sampling
from fastrl.model.language import LanguageModel, Tokenizer
from fastrl.sampler.params import SamplingParams, Tail
from fastrl.sampler.sampler import Sampler
from fastrl.sampler.turns import Environment, Turn
from fastrl.sampler.vllm import VllmSampler

SAMPLERS: dict[str, Callable[[LanguageModel, Tokenizer | None, Sampling], Any]] = {
    "fastrl": Sampler.configured,
    "vllm": VllmSampler.configured,
}

__all__ = ["SAMPLERS", "Environment", "Sampler", "SamplingParams", "Tail", "Turn", "VllmSampler"]
