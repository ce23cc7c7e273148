"""Options of `fastrl grpo`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastrl.config.run import Run, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Grpo(Run):
    """Reinforcement learning from verified rewards: the GRPO family."""

    reward: tuple[str, ...] = ()
    """Reward functions, my_rewards.py:fn; reward models, model:FOLDER; a policy's own preferences,
    implicit:POLICY,REFERENCE; the task's verifier, task, which is also what none given means.
    """
    algorithm: str = "grpo"
    """A row of fastrl.algorithms.ALGORITHMS."""
    group: int = 8
    """Completions per prompt."""
    max_new_tokens: int = 256
    """The longest completion, tokens."""
    minibatches: int = 1
    """Optimizer steps per rollout batch (each on its own share of the prompts)."""
    epochs: int = 1
    """Passes over a rollout batch."""
    semantics: Literal["paper", "trl", "verl", "nemo"] = "paper"
    """Whose constants, bounds and reductions a row has: the paper's, or another trainer's under the same
    name.
    """
    kl: Literal["k1", "k2", "k3", "k3+", "k1_is", "k3_is", "abs"] | None = None
    """Estimator of the KL to the reference model (k3_is is the unbiased one); None keeps the algorithm's own
    choice.
    """
    kl_coef: float | None = None
    """Its coefficient; None keeps the algorithm's own.  Above 0 a reference model is kept."""
    entropy_coef: float | None = None
    """Weight of the entropy bonus; None keeps the algorithm's own."""
    sampler: Literal["fastrl", "vllm"] = "fastrl"
    """Who generates: the model being trained itself, or vLLM (if installed) with a copy of its weights."""
    advantage: str | None = None
    """A row of fastrl.algorithms.advantage.ADVANTAGES (zscore, best, rank, softmax, ...); None keeps the
    algorithm's own.
    """
    scale_rewards: Literal["group", "batch", "range", "none"] | None = None
    """What the advantage is divided by: the deviation of the group or of the batch, the group's range,
    or 1.
    """
    epsilon: float | None = None
    """The ratio is clipped to [1 - epsilon, 1 + epsilon_high], of gmpo its logarithm to [-epsilon,
    epsilon_high]; alone it sets both.
    """
    epsilon_high: float | None = None
    """See epsilon.  Of cispo: the largest weight."""
    delta: float | None = None
    """Largest ratio of a token with a negative advantage (two-sided or dual clip), above 1 + epsilon_high."""
    pass_k: int | None = None
    """The k of pass_at_k; None is the whole group."""
    correction: str | None = None
    """A row of fastrl.algorithms.correction.CORRECTIONS: importance weights of the sampler against the
    trainer.
    """
    correction_min: float | None = None
    """Their lower bound; None keeps the row's own."""
    correction_max: float | None = None
    """Their upper bound; None keeps the row's own."""
    off_policy_mask_threshold: float | None = None
    """Sequences of negative advantage that the policy has left by more than this, nats per token, are masked
    out; None keeps all.
    """
    reward_weights: tuple[float, ...] = ()
    """One weight per reward function; none given is 1 for each."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Several rewards: advantages of their weighted sum, or the weighted sum of their advantages, whitened
    (GDPO).
    """
    refill: int = 0
    """Dynamic sampling: groups of equal rewards are dropped, and up to this many rounds of further prompts
    fill the batch.
    """
    overlong_filter: bool = False
    """Completions cut off at max_new_tokens do not count in the loss."""
    overlong_buffer: int = 0
    """Soft overlong shaping: the reward falls by up to 1 over the last so many tokens before max_new_tokens;
    0 turns it off.
    """
    tail: Literal["finish", "cut", "carry"] = "finish"
    """What becomes of a step's last unfinished completions: waited for, cut off, or carried over to the next
    step's weights.
    """
    tail_share: float = 0.1
    """Which those are: once no more than this share of a step's completions is unfinished."""
    sampling: Sampling = field(default_factory=Sampling)
