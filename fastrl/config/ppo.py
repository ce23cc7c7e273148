"""Options of `fastrl ppo`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fastrl.config.algorithm import AlgorithmChoice, Rows
from fastrl.config.on_policy import CLIP, OnPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Ppo(OnPolicy):
    """Reinforcement learning with a critic: PPO, its advantages per token by GAE."""

    algorithm: AlgorithmChoice = field(default_factory=lambda: AlgorithmChoice("ppo"))
    """A row of fastrl.algorithms.ppo.PPO: ppo or dual_clip."""
    group: int = 1
    """Completions per prompt; the critic is the baseline, so 1 is enough."""
    refill: int = 0
    """Dynamic sampling: drop groups of equal rewards, and fill the batch in up to this many rounds of further
    prompts; needs a group of 2 or more.
    """
    gamma: float = 1.0
    """Discount per token."""
    lam: float | None = None
    """Lambda of GAE: 1 uses the rewards that follow, 0 the critic's next value; None is the algorithm's own
    (0.95).
    """
    whiten: bool = True
    """Scale advantages to mean 0 and deviation 1 over all tokens of the step, of all minibatches and
    processes.
    """
    bootstrap: bool = False
    """Add gamma times the value of the last state to the reward of a completion that was cut off, as if it
    went on.
    """
    missing_eos_penalty: float = 0.0
    """Subtracted from the reward of a completion that was cut off."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL to the reference model goes, with weight kl_coef (0.05 unless given); unless --kl is
    given, its estimator is k1 in the reward and k2 in the loss.
    """
    kl_target: float | None = None
    """Adapt kl_coef to this KL per completion, nats; None keeps it constant."""
    kl_horizon: int = 10000
    """Completions over which an adapted coefficient can change by a factor of about 1.2."""
    critic: Literal["separate", "shared", "head"] = "separate"
    """separate: a model of its own; shared: a head on the policy's hidden states, whose loss also trains the
    policy's weights; head: such a head, whose loss does not.
    """
    critic_model: str | None = None
    """Folder the separate critic starts from (a causal language model or a reward model); defaults to the
    policy's weights.
    """
    critic_lr: float | None = None
    """Peak learning rate of the separate critic; defaults to the policy's."""
    value_clip: float | None = None
    """How far a value may move from the one at sampling, in the value loss; 0 is any distance, None the
    algorithm's own (0.2).
    """
    vf_coef: float | None = None
    """Weight of the value loss, for a critic that shares the policy's optimizer; None is 0.1."""

    rows: ClassVar[Rows] = {"ppo": CLIP, "dual_clip": CLIP}
