"""Every option of a run, once, with its default and unit.  No torch here: `fastrl --help` stays instant."""

from fastrl.config.methods import TRAINING, Dpo, Grpo, HeldOut, Hybrid, Joint, Ppo, Reward, Sft
from fastrl.config.run import Eval, Optim, Run, Sampling, Save
from fastrl.config.tools import Evaluate, Generate

__all__ = [
    "TRAINING",
    "Dpo",
    "Eval",
    "Evaluate",
    "Generate",
    "Grpo",
    "HeldOut",
    "Hybrid",
    "Joint",
    "Optim",
    "Ppo",
    "Reward",
    "Run",
    "Sampling",
    "Save",
    "Sft",
]
