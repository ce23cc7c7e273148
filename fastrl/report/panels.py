"""What a report draws and says of a run: the plots, and the numbers of its first sentence, as tables of
metrics' names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

KINDS = {  # what a run learned -> a metric that only such runs have; "text" has none of them
    "policy": "reward",
    "preferences": "logps/chosen",
    "scores": "mean_reward",
}
GISTS = {  # what a run learned -> the metrics its first sentence gives: label, metric, format
    "policy": (("Reward", "reward", ".3g"), ("Oracle's reward", "joint/oracle", ".3g")),
    "preferences": (("Preference loss", "loss", ".3g"), ("Reward margin", "rewards/margins", ".3g")),
    "scores": (("Comparisons won", "accuracy", ".1%"), ("Loss", "loss", ".3g")),
    "text": (("Cross-entropy", "loss", ".3g"),),
}


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot of a report: its title, its unit, and the metrics it shows by label; drawn where a run has any
    of them.

    of  None for every run; else the runs it is of, by what they learn (`Run.kind`): their losses are not the
        same quantity
    """

    title: str
    unit: str
    keys: Mapping[str, str]
    percent: bool = False
    of: Literal["text", "policy", "preferences", "scores"] | None = None


PANELS = (
    Panel("Reward", "mean reward of a completion", {"reward": "reward"}),
    Panel(
        "Held-out accuracy",
        "answers correct",
        {"greedy": "eval/accuracy_greedy", "sampled": "eval/accuracy_sampled"},
        percent=True,
    ),
    Panel("Cross-entropy", "nats per token", {"loss": "loss"}, of="text"),
    Panel("Policy loss", "loss", {"loss": "loss"}, of="policy"),
    Panel("Preference loss", "loss", {"loss": "loss"}, of="preferences"),
    Panel(
        "Implicit rewards",
        "beta times the score",
        {"chosen": "rewards/chosen", "rejected": "rewards/rejected"},
    ),
    Panel(
        "Pairs ranked right",
        "pairs",
        {"pairs": "rewards/accuracies", "beside rewards": "pairs/rewards/accuracies"},
        percent=True,
    ),
    Panel("Likelihood", "nats per completion", {"chosen": "logps/chosen", "rejected": "logps/rejected"}),
    # reward models, alone and beside a policy
    Panel("Reward loss", "loss of a group", {"loss": "loss"}, of="scores"),
    Panel(
        "Comparisons won",
        "comparisons or verdicts",
        {"training": "accuracy", "held out": "eval/accuracy"},
        percent=True,
        of="scores",
    ),
    Panel(
        "Reward margin",
        "log-odds of the truth",
        {"training": "margin", "held out": "eval/margin"},
        of="scores",
    ),
    Panel(
        "Rewards of a step",
        "reward",
        {"mean": "mean_reward", "lowest": "min_reward", "highest": "max_reward"},
        of="scores",
    ),
    Panel("Calibration error", "probability (ECE), held out", {"ECE": "eval/ece"}, of="scores"),
    Panel(
        "Proxy and oracle",
        "mean reward of a completion",
        {"reward model": "joint/proxy", "verifier": "joint/oracle"},
    ),
    Panel("Proxy against oracle", "correlation within a step", {"correlation": "joint/correlation"}),
    Panel(
        "Fresh comparisons won",
        "pairs, before they are learned",
        {"accuracy": "joint/accuracy"},
        percent=True,
    ),
    Panel("Groups without comparison", "groups that are all ties", {"groups": "joint/tied"}, percent=True),
    Panel("Loss of the reward model", "loss of a group", {"loss": "joint/loss"}),
    Panel("Scale of the proxy", "reward model's units", {"shift m": "joint/shift", "scale s": "joint/scale"}),
    # policies
    Panel("Entropy", "nats per token", {"entropy": "entropy"}),
    Panel("Response length", "tokens, mean", {"length": "completions/mean_length"}),
    Panel(
        "Clip fraction",
        "tokens clipped",
        {"all": "clip_ratio/region_mean", "below": "clip_ratio/low_mean", "above": "clip_ratio/high_mean"},
        percent=True,
    ),
    Panel("KL to the reference", "nats per token", {"KL": "kl"}),
    Panel("Value loss", "squared error, half", {"loss": "loss/value_avg"}),
    Panel("Explained variance", "share of the returns' variance", {"critic": "critic/vf_explained_var"}),
    Panel(
        "Returns and values",
        "reward's unit, mean of a token",
        {"returns": "critic/returns/mean", "values": "critic/values/mean"},
    ),
    Panel(
        "Sampler against trainer",
        "nats, mean size of the difference",
        {"log-prob": "sampling/sampling_logp_difference/mean"},
    ),
    Panel(
        "Groups without signal", "groups of equal rewards", {"groups": "frac_reward_zero_std"}, percent=True
    ),
    Panel(
        "Cut-off completions",
        "completions at the limit",
        {"cut off": "completions/clipped_ratio"},
        percent=True,
    ),
    # demonstrations, pairs and lists beside rewards
    Panel(
        "What teaches a prompt",
        "prompts",
        {"demonstration": "hybrid/sft_prompts", "rewards": "hybrid/rl_prompts"},
        percent=True,
    ),
    Panel(
        "Weights of the terms",
        "weight in the loss",
        {"completions": "hybrid/own_coef", "members": "hybrid/member_coef", "supervised": "hybrid/sft_coef"},
    ),
    Panel("Demonstrations", "nats per token", {"supervised": "sft_loss", "in the group": "member_nll"}),
    Panel("Loss of pairs", "nats per pair", {"loss": "pairs/loss"}),
    Panel("Weight of the pairs", "weight of their loss", {"weight": "hybrid/pair_coef"}),
    Panel(
        "Implicit rewards of pairs",
        "beta times the score",
        {"chosen": "pairs/rewards/chosen", "rejected": "pairs/rewards/rejected"},
    ),
    Panel(
        "Likelihood of pairs",
        "nats per completion",
        {"chosen": "pairs/logps/chosen", "rejected": "pairs/logps/rejected"},
    ),
    Panel("Distance from the targets", "nats per group (KL)", {"KL": "group_kl"}),
    # every run
    Panel(
        "Gradient norm",
        "L2 norm before clipping",
        {"all": "grad_norm", "rewards": "grad_norm/rl", "pairs": "grad_norm/pairs"},
    ),
    Panel("Gradient norm of the critic", "L2 norm before clipping", {"norm": "critic/grad_norm"}),
    Panel("Gradient norm of the reward model", "L2 norm before clipping", {"norm": "joint/grad_norm"}),
    Panel(
        "Learning rate",
        "learning rate",
        {"policy": "learning_rate", "critic": "critic/lr", "reward model": "joint/lr"},
    ),
    Panel("Throughput", "tokens per second", {"tokens/s": "perf/tokens_per_second"}),
)
