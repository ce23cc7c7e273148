"""Options of `fastrl ppo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrl.config.grpo import Grpo


@dataclass(frozen=True, slots=True, kw_only=True)
class Ppo(Grpo):
    """Reinforcement learning with a critic: PPO, its advantages per token by GAE."""

    algorithm: str = "ppo"
    """A row of fastrl.algorithms.ppo.PPO."""
    group: int = 1
    """Completions per prompt: the critic, not the others, says what was to be expected."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float | None = None
    """Of GAE: 1 trusts the rewards to come, 0 the critic's next value;
    None keeps the algorithm's own (0.95).
    """
    whiten: bool = True
    """Advantages to mean 0 and deviation 1 over all tokens of the step, of all minibatches and processes."""
    bootstrap: bool = False
    """A completion that was cut off goes on: gamma times the value of its last state is added to its reward.
    Else it ends there.
    """
    missing_eos_penalty: float = 0.0
    """What a completion that was cut off loses of its reward."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL to the reference model goes: kl_coef (default 0.05) times its estimate (default k1 in the
    reward, k2 in the loss).
    """
    kl_target: float | None = None
    """KL of a completion, nats, that the coefficient is adapted to; None keeps the coefficient."""
    kl_horizon: int = 10000
    """Completions over which an adapted coefficient can change by a factor of about 1.2."""
    critic: Literal["separate", "shared", "head"] = "separate"
    """A model of its own, a head on the policy's hidden states that trains them too, or a head that leaves
    them alone.
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
    """Weight of the value loss beside the policy's, where they share hidden states or an optimizer; None is
    0.1.
    """
