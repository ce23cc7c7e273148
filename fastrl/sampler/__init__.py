"""Rollouts with the weights being trained: same process, same storage, same layers."""

from fastrl.sampler.params import SamplingParams, Tail
from fastrl.sampler.sampler import Sampler
from fastrl.sampler.turns import Environment, Turn

__all__ = ["Environment", "Sampler", "SamplingParams", "Tail", "Turn"]
