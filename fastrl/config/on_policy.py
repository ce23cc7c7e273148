"""What the commands that learn from the policy's own completions share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fastrl.config.algorithm import POSITIVE, RowOption, RowOptions, Rows, WithAlgorithm
from fastrl.config.run import Sampling

# --- options of rows --------------------------------------------------------------------------------
EPSILON_HIGH = RowOption(float, "Upper bound of the ratio is 1 + epsilon_high; see epsilon.", POSITIVE)
CLIP: RowOptions = {
    "epsilon": RowOption(
        float,
        "The ratio is clipped to [1 - epsilon, 1 + epsilon_high]; given alone, epsilon sets both.",
        POSITIVE,
    ),
    "epsilon_high": EPSILON_HIGH,
    "delta": RowOption(
        float,
        "Largest ratio of a token with a negative advantage (two-sided or dual clip); above 1 + "
        "epsilon_high.",
        POSITIVE,
    ),
}
PASS_K = RowOption(int, "The k of pass@k, 2 to --group: the best of k counts; the whole group unless given.")


# --- options of commands ----------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class OnPolicy(WithAlgorithm):
    """Reinforcement learning on the policy's own completions."""

    reward: tuple[str, ...] = ()
    """Reward functions (my_rewards.py:fn), reward models (model:FOLDER), a policy's implicit reward
    (implicit:POLICY,REFERENCE), or the task's verifier (task), which is the default.
    """
    group: int = 8
    """Completions per prompt."""
    max_new_tokens: int = 256
    """Longest completion, tokens."""
    minibatches: int = 1
    """Optimizer steps per rollout batch, each on its share of the prompts."""
    epochs: int = 1
    """Passes over a rollout batch."""
    semantics: Literal["paper", "trl", "verl", "nemo"] = "paper"
    """Whose constants, bounds and reductions an algorithm uses: its paper's, or another trainer's."""
    kl: Literal["k1", "k2", "k3", "k3+", "k1_is", "k3_is", "abs"] | None = None
    """Estimator of the KL to the reference model (k3_is is unbiased); None is the algorithm's own."""
    kl_coef: float | None = None
    """Weight of the KL; None is the algorithm's own.  Above 0 a reference model is kept."""
    entropy_coef: float | None = None
    """Weight of the entropy bonus; None is the algorithm's own."""
    sampler: Literal["fastrl", "vllm"] = "fastrl"
    """Rollout engine: fastrl's own, on the weights being trained, or vLLM (if installed) on a copy."""
    correction: str | None = None
    """Importance weights of the sampler against the trainer: token_truncate, token_mask, sequence_truncate,
    sequence_mask or geometric_mask; None trusts the recorded log-probs.
    """
    correction_min: float | None = None
    """Lower bound of these weights; None is the correction's own."""
    correction_max: float | None = None
    """Upper bound of these weights; None is the correction's own."""
    off_policy_mask_threshold: float | None = None
    """Mask out sequences of negative advantage whose log-prob under the policy has fallen by more than this,
    nats per token; None masks none.
    """
    reward_weights: tuple[float, ...] = ()
    """A weight for each reward function; by default 1."""
    overlong_filter: bool = False
    """Leave completions cut off at max_new_tokens out of the loss."""
    overlong_buffer: int = 0
    """Soft length penalty: the reward falls by up to 1 over the last so many tokens before max_new_tokens; 0
    turns it off.
    """
    tail: Literal["finish", "cut", "carry"] = "finish"
    """The last unfinished completions of a step are decoded to their end, cut off, or carried over to the
    next step.
    """
    tail_share: float = 0.1
    """The tail begins when at most this share of a step's completions is unfinished."""
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def refill(self) -> int:
        """Rounds of further prompts; 0 for a command without --refill."""
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRelative(OnPolicy):
    """Advantages from a comparison of a prompt's completions."""

    advantage: str | None = None
    """How rewards become advantages: zscore, center, rloo, batch_std, best, best_range, rank, softmax,
    leave_one_out_zscore, whiten, center_whiten, gpg, max_rl or max_at_k; None is the algorithm's own.
    """
    scale_rewards: Literal["group", "batch", "range", "none"] | None = None
    """What the advantage is divided by: the group's or the batch's standard deviation, the group's range, or
    1; None is the advantage's own.
    """
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """With several rewards: the advantage of their weighted sum, or the weighted sum of their advantages,
    whitened (GDPO).
    """

    advantages: ClassVar[Rows] = {"max_at_k": {"pass_k": PASS_K}}  # row of --advantage -> its options

    def row_options(self) -> RowOptions:
        """The options that the chosen row has, and those of the chosen advantage."""
        of_advantage = self.advantages.get(self.advantage or "", {})
        return {**WithAlgorithm.row_options(self), **of_advantage}

    @classmethod
    def all_row_options(cls) -> RowOptions:
        """Every option that some row of the command has."""
        rows = [*cls.rows.values(), *cls.advantages.values()]
        return {option: declared for row in rows for option, declared in row.items()}

    @classmethod
    def takers(cls, option: str) -> str:
        """The rows that have an option, in words."""
        rows = [name for name, row in cls.rows.items() if option in row]
        others = [f"any with --advantage {name}" for name, row in cls.advantages.items() if option in row]
        return ", ".join([*rows, *others])
