"""The metrics of every command, one row each: how it is merged, where it is drawn, and where it is shown.

A new metric is one row here.  The learner's number of that key is then merged over the step's batches and
written to metrics.jsonl, shown beside the progress bar, drawn in the panel it names (see panels.py) and
quoted in the first sentence of a report, as the row says.  What a verifier or a reward function names itself
("correct", "rewards/NAME/mean") has no row.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from fastrl.report.metric import Gist, Metric, Ratio

LEARNER_METRICS = (
    Metric(
        "loss",
        key="loss",
        parts="sum",
        panel=("Cross-entropy", "Policy loss", "Preference loss", "Reward loss"),
        label="loss",
        shown=("loss", ".4g"),
        unless="reward",  # on policy the loss is 0 but for rounding
        gists=(
            Gist("text", "Cross-entropy"),
            Gist("preferences", "Preference loss"),
            Gist("scores", "Loss", rank=1),
        ),
    ),
    Metric("num_tokens", key="num_tokens", parts="sum", batches="sum"),
    Metric("grad_norm", key="grad_norm", panel="Gradient norm", label="all"),
    Metric("learning_rate", key="learning_rate", panel="Learning rate", label="policy"),
)
ENTROPY = Metric("entropy", panel="Entropy", label="entropy", shown=("entropy", ".3g"))
KL = Metric("kl", panel="KL to the reference", label="KL", shown=("KL", ".3g"))

ROLLOUT_METRICS = (  # sums: those of methods/grpo/groups.py
    Metric(
        "reward",
        parts=Ratio("reward", "known", empty=math.nan),
        panel="Reward",
        label="reward",
        shown=("reward", ".3f"),
        gists=(Gist("policy", "Reward"),),
        marks="policy",
    ),
    Metric("reward_std", parts=Ratio("reward_std", "groups", empty=0.0)),
    Metric(
        "frac_reward_zero_std",
        parts=Ratio("flat", "groups", empty=0.0),
        panel="Groups without signal",
        label="groups",
    ),
    replace(ENTROPY, parts=Ratio("entropy", "tokens", empty=0.0)),
    Metric(
        "completions/mean_length",
        parts=Ratio("tokens", "samples", empty=0.0),
        panel="Response length",
        label="length",
        shown=("length", ".1f"),
    ),
    Metric("completions/max_length", parts="max"),
    Metric("completions/min_length", parts="min"),
    Metric(
        "completions/clipped_ratio",
        parts=Ratio("cut", "samples", empty=0.0),
        panel="Cut-off completions",
        label="cut off",
        shown=("cut off", ".0%"),
    ),
    Metric("rollout/tokens", parts="sum"),
    Metric("sampler/staleness_mean", parts=Ratio("stale", "tokens", empty=0.0)),
    Metric("sampler/staleness_max", parts="max"),
    Metric("sampler/rejected"),
    Metric("refill/groups"),
    Metric("refill/kept"),
)

# keys: those of kernels/policy_loss.METRICS and algorithms/correction.py
POLICY_METRICS = (
    replace(KL, key="ref_kl_k3", parts="mean", needs="reference"),
    Metric(
        "clip_ratio/region_mean",
        key="clip_region",
        parts="mean",
        panel="Clip fraction",
        label="all",
    ),
    Metric("clip_ratio/low_mean", key="clip_low", parts="mean", panel="Clip fraction", label="below"),
    Metric("clip_ratio/high_mean", key="clip_high", parts="mean", panel="Clip fraction", label="above"),
    Metric("clip_ratio/cap_mean", key="clip_cap", parts="mean"),
    Metric("ratio/mean", key="ratio_mean", parts="mean"),
    Metric("ratio/max", key="ratio_max", parts="max", batches="max"),
    Metric("approx_kl", key="approx_kl", parts="mean"),
    Metric("ess", key="ess"),
    # sampler against trainer: of the step's first batch, before any weight has changed
    Metric(
        "sampling/sampling_logp_difference/mean",
        key="sampler_diff_mean",
        parts="mean",
        batches="first",
        panel="Sampler against trainer",
        label="log-prob",
    ),
    Metric(
        "sampling/sampling_logp_difference/max",
        key="sampler_diff_max",
        parts="max",
        batches="first",
    ),
    Metric("sampler/kl", key="sampler_kl", parts="mean", batches="first"),
    Metric("sampler/ess", key="sampler_ess", batches="first"),
    Metric(
        "sampling/importance_sampling_ratio/min",
        key="correction_min",
        parts="min",
        batches="first",
        needs="correction",
    ),
    Metric(
        "sampling/importance_sampling_ratio/mean",
        key="correction_mean",
        parts="mean",
        batches="first",
        needs="correction",
    ),
    Metric(
        "sampling/importance_sampling_ratio/max",
        key="correction_max",
        parts="max",
        batches="first",
        needs="correction",
    ),
)

PREFERENCE_METRICS = (  # sums: algorithms/preference.SUMS
    replace(ENTROPY, key="entropy", parts=Ratio("entropy", "tokens")),
    Metric("nll_loss", key="nll_loss", parts=Ratio("nll", "n_good")),
    Metric(
        "rewards/chosen",
        key="rewards/chosen",
        parts=Ratio("reward_good", "n_good"),
        panel="Implicit rewards",
        label="chosen",
    ),
    Metric(
        "rewards/rejected",
        key="rewards/rejected",
        parts=Ratio("reward_bad", "n_bad"),
        panel="Implicit rewards",
        label="rejected",
    ),
    Metric("rewards/margins", key="rewards/margins", gists=(Gist("preferences", "Reward margin"),)),
    Metric(
        "rewards/accuracies",
        key="rewards/accuracies",
        parts=Ratio("accurate", "units"),
        panel="Pairs ranked right",
        label="pairs",
        shown=("pairs right", ".3f"),
    ),
    Metric(
        "logps/chosen",
        key="logps/chosen",
        parts=Ratio("logp_good", "n_good"),
        panel="Likelihood",
        label="chosen",
        marks="preferences",
    ),
    Metric(
        "logps/rejected",
        key="logps/rejected",
        parts=Ratio("logp_bad", "n_bad"),
        panel="Likelihood",
        label="rejected",
    ),
)

SCORE_METRICS = (  # sums: algorithms/reward.MEASURES
    Metric(
        "accuracy",
        key="accuracy",
        parts=Ratio("agreed", "compared", empty=0.0),
        panel="Comparisons won",
        label="training",
        shown=("accuracy", ".3f"),
        gists=(Gist("scores", "Comparisons won", ".1%"),),
    ),
    Metric(
        "margin",
        key="margin",
        parts=Ratio("margin", "compared", empty=0.0),
        panel="Reward margin",
        label="training",
    ),
    Metric(
        "mean_reward",
        key="mean_reward",
        parts=Ratio("reward", "scores", empty=0.0),
        panel="Rewards of a step",
        label="mean",
        marks="scores",
    ),
    Metric("min_reward", key="min_reward", parts="min", panel="Rewards of a step", label="lowest"),
    Metric("max_reward", key="max_reward", parts="max", panel="Rewards of a step", label="highest"),
    Metric("centering", key="centering", parts="sum"),
)

# TRL's names, and verl's where TRL has none; sums: algorithms/ppo.VALUE_SUMS
CRITIC_METRICS = (
    Metric("loss/policy_avg", key="policy_loss", parts="sum"),
    Metric("loss/value_avg", key="vf_loss", parts="sum", panel="Value loss", label="loss"),
    Metric("val/clipfrac_avg", key="vf_clipfrac", parts=Ratio("clipped", "tokens", empty=0.0)),
    Metric("critic/vpred_mean", key="vpred_mean", parts=Ratio("value", "tokens", empty=0.0)),
    Metric(
        "critic/grad_norm",
        key="critic_grad_norm",
        panel="Gradient norm of the critic",
        label="norm",
    ),
    Metric("critic/lr", key="critic_lr", panel="Learning rate", label="critic"),
)
_ENDS: tuple[Literal["max"], Literal["min"]] = ("max", "min")
VALUE_METRICS = (
    Metric("critic/returns/mean", parts="mean", panel="Returns and values", label="returns"),
    Metric("critic/values/mean", parts="mean", panel="Returns and values", label="values"),
    Metric("critic/advantages/mean", parts="mean"),
    *(
        Metric(f"critic/{column}/{end}", parts=end)
        for column in ("returns", "values", "advantages")
        for end in _ENDS
    ),
    Metric("critic/vf_explained_var", panel="Explained variance", label="critic"),
    Metric("objective/scores", parts="mean"),
    Metric("objective/rlhf_reward", parts="mean"),
    Metric("objective/kl", parts="mean"),
    Metric("objective/non_score_reward", parts="mean"),
    Metric("objective/kl_coef"),
)

DEMONSTRATION_METRICS = (
    Metric("sft_loss", key="sft_loss", parts="mean", panel="Demonstrations", label="supervised"),
    Metric("member_nll", key="member_nll", parts="mean", panel="Demonstrations", label="in the group"),
    Metric("off_policy_share", key="off_policy_share", parts="mean"),
    Metric("group_kl", key="group_kl", parts="mean", panel="Distance from the targets", label="KL"),
    Metric("hybrid/sft_prompts", parts="mean", panel="What teaches a prompt", label="demonstration"),
    Metric("hybrid/rl_prompts", parts="mean", panel="What teaches a prompt", label="rewards"),
    Metric("hybrid/own_coef", parts="mean", panel="Weights of the terms", label="completions"),
    Metric("hybrid/member_coef", parts="mean", panel="Weights of the terms", label="members"),
    Metric("hybrid/sft_coef", parts="mean", panel="Weights of the terms", label="supervised"),
    Metric("hybrid/demonstrated", parts="mean"),
    Metric("hybrid/solved", parts="mean"),
)

# titles of the panels that draw a preference metric: alone -> beside rewards
_BESIDE = {
    "Preference loss": "Loss of pairs",
    "Implicit rewards": "Implicit rewards of pairs",
    "Likelihood": "Likelihood of pairs",
    "Pairs ranked right": "Pairs ranked right",
}


def beside_rewards(row: Metric) -> Metric:
    """The same metric of pairs that are trained on beside rewards: under another name, in another panel."""
    name = f"pairs/{row.name}"
    panels = tuple(_BESIDE[title] for title in row.panels if title in _BESIDE)
    label = "beside rewards" if panels == row.panels else row.label
    return Metric(name, key=name, parts=row.parts, panel=panels, label=label)


PAIR_METRICS = (
    Metric("grad_norm/rl", key="grad_norm/rl", panel="Gradient norm", label="rewards"),
    Metric("grad_norm/pairs", key="grad_norm/pairs", panel="Gradient norm", label="pairs"),
    *(beside_rewards(row) for row in (*LEARNER_METRICS, *PREFERENCE_METRICS)),
    Metric("hybrid/pair_coef", panel="Weight of the pairs", label="weight"),
)

JOINT_METRICS = (
    Metric("joint/loss", key="reward_loss", parts="sum", panel="Loss of the reward model", label="loss"),
    Metric("joint/groups", key="reward_groups", parts="sum"),
    Metric(
        "joint/grad_norm",
        key="reward_grad_norm",
        panel="Gradient norm of the reward model",
        label="norm",
    ),
    Metric("joint/lr", key="reward_lr", panel="Learning rate", label="reward model"),
    Metric("joint/proxy", parts="mean", panel="Proxy and oracle", label="reward model"),
    Metric(
        "joint/oracle",
        parts="mean",
        panel="Proxy and oracle",
        label="verifier",
        shown=("oracle", ".3f"),
        gists=(Gist("policy", "Oracle's reward"),),
    ),
    Metric("joint/correlation", panel="Proxy against oracle", label="correlation"),
    Metric("joint/accuracy", parts="mean", panel="Fresh comparisons won", label="accuracy"),
    Metric("joint/pairs", parts="sum"),
    Metric("joint/tied", parts="mean", panel="Groups without comparison", label="groups"),
    Metric("joint/shift", panel="Scale of the proxy", label="shift m"),
    Metric("joint/scale", panel="Scale of the proxy", label="scale s"),
)

EVALUATION_METRICS = (
    Metric("eval/accuracy_greedy", panel="Held-out accuracy", label="greedy", accuracy=", greedy"),
    Metric("eval/accuracy_sampled", panel="Held-out accuracy", label="sampled", accuracy=", sampled"),
    Metric("eval/accuracy", panel="Comparisons won", label="held out", accuracy=""),
    Metric("eval/margin", panel="Reward margin", label="held out"),
    Metric("eval/ece", panel="Calibration error", label="ECE"),
    Metric("eval/mean_reward"),
    Metric("eval/well_formed"),
)
CLOCK_METRICS = (
    Metric("time/step"),
    Metric("time/collect"),
    Metric("time/update"),
    Metric("eval/time"),
    Metric(
        "perf/tokens_per_second",
        panel="Throughput",
        label="tokens/s",
        shown=("tok/s", ",.0f"),
    ),
)

_ON_POLICY = (*ROLLOUT_METRICS, *LEARNER_METRICS, *POLICY_METRICS)
# what a command logs in a step; of the learner's numbers nothing else is
LOGGED: dict[str, tuple[Metric, ...]] = {
    "grpo": _ON_POLICY,
    "reward": (*LEARNER_METRICS, *SCORE_METRICS),
    "dpo": (*LEARNER_METRICS, *PREFERENCE_METRICS, KL),
    "sft": (*LEARNER_METRICS, replace(ENTROPY, key="entropy", parts="mean")),
    "ppo": (*_ON_POLICY, *CRITIC_METRICS, *VALUE_METRICS),
    "hybrid": (*_ON_POLICY, *DEMONSTRATION_METRICS, *PAIR_METRICS),
    "joint": (*_ON_POLICY, *JOINT_METRICS),
}


def all_metrics() -> list[Metric]:
    """One row for each name that any command logs; commands agree on where a metric is drawn and shown."""
    rows: dict[str, Metric] = {}
    for table in (*LOGGED.values(), EVALUATION_METRICS, CLOCK_METRICS):
        for row in table:
            rows.setdefault(row.name, row)
    return list(rows.values())
