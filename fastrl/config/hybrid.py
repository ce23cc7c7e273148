"""Options of `fastrl hybrid`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrl.config.grpo import Grpo


@dataclass(frozen=True, slots=True, kw_only=True)
class Hybrid(Grpo):
    """Demonstrations or preferences, and verified rewards, in one step: hybrids of supervised, preference and
    reinforcement learning.
    """

    algorithm: str = "hpt"
    """A row of fastrl.algorithms.hybrid.HYBRIDS (hpt, hpt_soft, luffy, srft, chord, chord_phi, mixed:
    demonstrations) or .fusion.FUSIONS (grpo_dpo, grpo_pairs, luffy_pairs, online_dpo, group_softmax,
    group_softmax_norm: preferences).
    """
    rl: str | None = None
    """The row of fastrl.algorithms.ALGORITHMS that trains the policy's own completions; None keeps the
    hybrid's own.
    """
    solved: float = 1.0
    """A completion with at least this reward solves its prompt."""
    gate: float | None = None
    """hpt: prompts of which no more than this share of completions is solved learn from their demonstration;
    None is 0.
    """
    demo_reward: float = 1.0
    """luffy, srft: the reward of a demonstration among its prompt's completions; grpo_pairs, luffy_pairs: of
    the chosen one.
    """
    group_statistics: Literal["union", "own"] = "union"
    """luffy, srft: mean and deviation of a group are of its completions and the demonstration, or of its own
    completions alone.
    """
    gamma: float | None = None
    """luffy, luffy_pairs: a member's tokens are shaped by p / (p + gamma); None is 0.1."""
    sft_coef: float | None = None
    """hpt, hpt_soft, srft, mixed: weight of the supervised loss; None is 1."""
    rl_coef: float | None = None
    """mixed, grpo_dpo: weight of the policy loss; None is 1."""
    mu: float | None = None
    """chord: the largest weight of the supervised loss, 0.9 if None; chord_phi: its weight, 0.1 if None."""
    mu_end: float | None = None
    """chord: what mu falls to; None is 0.05."""
    mu_warmup: int | None = None
    """chord: steps over which mu rises to its peak; None is 0."""
    mu_decay: int | None = None
    """chord: steps over which it falls; None, or 0, is the rest of the run."""
    preference: str | None = None
    """grpo_dpo, online_dpo: the loss of a pair, a row of fastrl.algorithms.preference.PREFERENCES; None is
    dpo.
    """
    beta: float | None = None
    """That loss's beta, or a group softmax's; None keeps the row's own."""
    nll_coef: float | None = None
    """grpo_dpo, online_dpo: weight of the chosen completion's cross-entropy in the loss of a pair; None keeps
    the row's own.
    """
    pair_dataset: str | None = None
    """grpo_dpo: offline pairs, as `fastrl dpo` takes them, under its names of columns; None is the --dataset,
    or the task's own.
    """
    pairs: int | None = None
    """grpo_dpo: offline pairs per optimizer step; None is as many as --prompts."""
    pair_coef: float | None = None
    """grpo_dpo: the largest weight of their loss; None is 1."""
    pair_coef_end: float | None = None
    """grpo_dpo: what the weight falls to, by half a cosine; None is 0."""
    pair_warmup: int | None = None
    """grpo_dpo: steps over which the weight rises to its peak; None is 0."""
    pair_decay: int | None = None
    """grpo_dpo: steps over which it falls; None, or 0, is the rest of the run."""
    reference: Literal["precomputed", "live"] | None = None
    """grpo_dpo: the pairs' log-probs under the model that the run began with: computed once, or by a frozen
    copy; None is once.
    """
    norms_every: int | None = None
    """grpo_dpo: steps between measurements of the gradient norms of both terms; None, or 0, measures none."""
    members: Literal["both", "chosen"] | None = None
    """grpo_pairs, luffy_pairs: which completions of a prompt's pair join its group; None is both."""
    rejected_reward: float | None = None
    """grpo_pairs, luffy_pairs: the reward of the rejected one; None is 0."""
    pairing: Literal["extremes", "all"] | None = None
    """online_dpo: the best against the worst completion of a group, or every two; None is extremes."""
    gap: float | None = None
    """online_dpo: two rewards make a pair from this difference on; equal ones never do.  None is 0."""
    anchor: Literal["start", "old"] | None = None
    """online_dpo, group_softmax: what is compared with: the model that the run began with, or the policy that
    sampled; None is start.
    """
    tau: float | None = None
    """group_softmax: targets are softmax(reward / tau); None is 0.5."""
