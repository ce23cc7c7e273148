"""Rollouts with the weights being trained: same process, same storage, same layers."""

from fastrl.sampler.engine import Sampler, SamplingParams

__all__ = ["Sampler", "SamplingParams"]
