"""Options of `fastrl joint`."""

from __future__ import annotations

from dataclasses import dataclass

from fastrl.config.grpo import Grpo


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint(Grpo):
    """A policy and the reward model that rewards it, trained side by side; the verifier labels what the
    reward model learns from.
    """

    reward: tuple[str, ...] = ()
    """The oracle, whose verdicts the reward model learns and the policy never sees; defaults to the task's
    verifier.
    """
    reward_model: str | None = None
    """Where the reward model starts: its folder, or a language model's, which gets a fresh head; defaults to
    the policy's start.
    """
    reward_loss: str = "bradley_terry"
    """A row of fastrl.algorithms.reward.REWARD_LOSSES that compares completions: bradley_terry,
    plackett_luce.
    """
    center: float = 0.01
    """Weight of the squared sum of a pair's rewards, which keeps rewards near 0."""
    reward_lr: float | None = None
    """Peak learning rate of the reward model; defaults to the policy's."""
    reward_every: int = 1
    """Steps between updates of the reward model, each on the comparisons of all steps since the last one."""
    reward_epochs: int = 1
    """Optimizer steps of the reward model per update, each over all of those comparisons."""
    demonstrations: bool = False
    """Compare the policy's completions with their prompt's demonstration, too: groups that are all wrong then
    teach the reward model.
    """
    offline_share: float = 0.0
    """Share of an update's groups that are offline comparisons: the task's demonstrations against its
    mistakes, or --offline's.
    """
    offline: str | None = None
    """File of offline comparisons, with the columns that `fastrl reward --dataset` takes."""
    calibration: int = 256
    """Completions of the first step, at most so many, on which the reward model's output is kept at mean 0
    and deviation 1.
    """
