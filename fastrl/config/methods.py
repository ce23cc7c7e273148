"""The training commands, a class each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastrl.config.run import Eval, Run, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Sft(Run):
    """Supervised fine-tuning on demonstrations: the task's own, or a dataset's completions."""

    turns: Literal["all", "last"] = "all"
    """Which assistant turns of a conversation count in the loss."""
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over the vocabulary."""
    z_loss: float = 0.0
    """Weight of the square of each row's log-sum-exp, which keeps logits from drifting."""
    neftune_alpha: float = 0.0
    """Noise on the embeddings in training, uniform within alpha / sqrt(L D) of a sequence of L tokens; 5 to
    15, 0 for none.
    """
    sample_weights: bool = False
    """Weigh each line of the dataset by its column `weight`: 2 is the line twice, 0 is the line left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dpo(Run):
    """Preference optimisation: DPO and its relatives, on pairs of a chosen and a rejected completion or on
    labelled ones.
    """

    algorithm: str = "dpo"
    """A row of fastrl.algorithms.preference.PREFERENCES: dpo, ipo, simpo, orpo, kto, ...; TRL's names of them
    are taken too.
    """
    reference: Literal["precomputed", "live", "none"] | None = None
    """The reference model's log-probs: computed once before training, or by a frozen copy at every step.
    None: as the row needs them.
    """
    beta: float | None = None
    """Weight of the reference, or scale of the scores (orpo: of its odds term); None keeps the row's own, as
    for the options below.
    """
    label_smoothing: float | None = None
    """Share of the labels taken to be wrong (cdpo, robust, exo)."""
    gamma: float | None = None
    """Target margin (simpo)."""
    penalty: float | None = None
    """Weight of the chosen completion's loss of likelihood (dpop)."""
    tau: float | None = None
    """Sharpness of the blend (discopop)."""
    desirable_weight: float | None = None
    """Weight of good examples (kto)."""
    undesirable_weight: float | None = None
    """Weight of bad examples (kto)."""
    nll_coef: float | None = None
    """Weight of the chosen completion's cross-entropy, beside any loss of pairs."""


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
    """What the advantage is divided by: the deviation of the group or of the batch, the group's range, or 1."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut(Eval):
    """Accuracy of a reward model on what it is not trained on."""

    prompts: int = 256
    """Held-out prompts per evaluation, with all their completions; 0 turns evaluation off and trains on
    everything.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward(Run):
    """Reward models: a score for every completion, from comparisons, rankings, or right and wrong answers."""

    algorithm: str = "bradley_terry"
    """A row of fastrl.algorithms.reward.REWARD_LOSSES."""
    center: float = 0.0
    """Weight of the squared sum of a pair's rewards, which keeps rewards near 0; 0.01 is usual.  Not for
    verdicts.
    """
    group: int = 2
    """Completions of a prompt that a task gives: a right one, and wrong ones."""
    step_separator: str = "\n"
    """What ends a step of a completion whose steps are judged."""
    holdout: float = 0.05
    """Share of a dataset's prompts that is kept for evaluation, not trained on."""
    eval: HeldOut = field(default_factory=HeldOut)


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
    """Of GAE: 1 trusts the rewards to come, 0 the critic's next value; None keeps the algorithm's own (0.95)."""
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


TRAINING: dict[str, type[Run]] = {
    "sft": Sft,
    "reward": Reward,
    "dpo": Dpo,
    "grpo": Grpo,
    "ppo": Ppo,
    "hybrid": Hybrid,
    "joint": Joint,
}
"""The commands that train, as a pipeline's stages name them."""
