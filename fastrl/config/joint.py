"""Options of `fastrl joint`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fastrl.config.algorithm import AlgorithmChoice, Rows
from fastrl.config.grpo import ROWS
from fastrl.config.on_policy import GroupRelative


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint(GroupRelative):
    """A policy and its reward model, trained side by side: the verifier labels what the reward model learns
    from.
    """

    algorithm: AlgorithmChoice = field(default_factory=lambda: AlgorithmChoice("grpo"))
    """A row of fastrl.algorithms.ALGORITHMS other than sft."""
    reward: tuple[str, ...] = ()
    """The oracle: its verdicts train the reward model, and the policy never sees them.  Defaults to the
    task's verifier.
    """
    reward_model: str | None = None
    """Folder the reward model starts from: a reward model, or a language model, which gets a fresh head;
    defaults to --model.
    """
    reward_loss: str = "bradley_terry"
    """Loss of the reward model, which compares completions: bradley_terry or plackett_luce."""
    center: float = 0.01
    """Weight of the squared sum of a pair's rewards, which keeps rewards near 0."""
    reward_lr: float | None = None
    """Peak learning rate of the reward model; defaults to the policy's."""
    reward_every: int = 1
    """Steps between updates of the reward model, each on the comparisons of all steps since the last one."""
    reward_epochs: int = 1
    """Optimizer steps of the reward model per update, each over all of those comparisons."""
    demonstrations: bool = False
    """Compare the policy's completions with their prompt's demonstration, too: then even a group of wrong
    completions trains the reward model.
    """
    offline_share: float = 0.0
    """Share of an update's groups that are offline comparisons: the task's demonstrations against its wrong
    answers, or --offline's.
    """
    offline: str | None = None
    """File of offline comparisons, with the columns that `fastrl reward --dataset` takes."""
    calibration: int = 256
    """Number of completions of the first step on which the reward model's output is scaled to mean 0 and
    deviation 1.
    """

    rows: ClassVar[Rows] = ROWS
