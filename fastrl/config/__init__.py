"""Every option of a run, once, with its default and unit.  No torch here: `fastrl --help` stays instant."""

from fastrl.config.algorithm import AlgorithmChoice, WithAlgorithm
from fastrl.config.dpo import Dpo
from fastrl.config.grpo import Grpo
from fastrl.config.hybrid import Hybrid
from fastrl.config.joint import Joint
from fastrl.config.on_policy import GroupRelative, OnPolicy
from fastrl.config.ppo import Ppo
from fastrl.config.reward import HeldOut, Reward
from fastrl.config.run import Eval, Optim, Run, Sampling, Save
from fastrl.config.sft import Sft
from fastrl.config.tools import Evaluate, Generate

__all__ = [
    "AlgorithmChoice",
    "Dpo",
    "Eval",
    "Evaluate",
    "Generate",
    "GroupRelative",
    "Grpo",
    "HeldOut",
    "Hybrid",
    "Joint",
    "OnPolicy",
    "Optim",
    "Ppo",
    "Reward",
    "Run",
    "Sampling",
    "Save",
    "Sft",
    "WithAlgorithm",
]
