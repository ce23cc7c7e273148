"""Options of `fastrl hybrid`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fastrl.config.algorithm import (
    FINITE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    STEPS,
    AlgorithmChoice,
    Range,
    RowOption,
    RowOptions,
    Rows,
)
from fastrl.config.dpo import ROWS as PAIR_ROWS
from fastrl.config.grpo import ROWS as POLICY_ROWS
from fastrl.config.on_policy import CLIP, GroupRelative

# --- options that several rows have -----------------------------------------------------------------
POLICY: RowOptions = {  # of rows that train the policy's completions by a row of ALGORITHMS
    "rl": RowOption(
        str,
        "The algorithm that trains the policy's own completions, one of those of fastrl grpo "
        f"({', '.join(POLICY_ROWS)}); by default the hybrid's own.",
    ),
    **CLIP,
}
SOLVED = RowOption(
    float,
    "A completion with at least this reward solves its prompt; 1 unless given.",
    Range(lambda x: x == x, "a number that is not NaN"),
)
SFT_COEF = RowOption(float, "Weight of the supervised loss; 1 unless given.", NOT_NEGATIVE)
RL_COEF = RowOption(float, "Weight of the policy loss; 1 unless given.", NOT_NEGATIVE)
GAMMA = RowOption(
    float,
    "Tokens of demonstrations and pairs are shaped by p / (p + gamma); 0.1 unless given.",
    Range(lambda x: 1e-8 <= x < float("inf"), "a number of 1e-8 or more"),
)
GROUP_STATISTICS = RowOption(
    Literal["union", "own"],
    "Mean and deviation of a group include the demonstration (union, the default) or only the policy's own "
    "completions.",
)
PREFERENCE = RowOption(
    str, f"Loss of a pair, one of those of fastrl dpo ({', '.join(PAIR_ROWS)}); dpo unless given."
)
BETA = RowOption(float, "Beta of the preference loss; by default its own.", POSITIVE)
NLL_COEF = RowOption(
    float,
    "Weight of the chosen completion's cross-entropy in the loss of a pair; by default its own.",
    NOT_NEGATIVE,
)
ANCHOR = RowOption(
    Literal["start", "old"],
    "What log-probs are compared with: the model the run began with (start, the default), or the policy that "
    "sampled (old).",
)

# --- kinds of rows ----------------------------------------------------------------------------------
DEMONSTRATIONS: RowOptions = {**POLICY, "solved": SOLVED}
DEMONSTRATION_IN_GROUP: RowOptions = {
    **DEMONSTRATIONS,
    "demo_reward": RowOption(
        float, "Reward of the demonstration in its prompt's group; 1 unless given.", FINITE
    ),
    "group_statistics": GROUP_STATISTICS,
}
PAIR_IN_GROUP: RowOptions = {
    **DEMONSTRATIONS,
    "demo_reward": RowOption(float, "Reward of the chosen completion; 1 unless given.", FINITE),
    "members": RowOption(
        Literal["both", "chosen"],
        "Which completions of a prompt's pair join its group; both unless given.",
    ),
    "rejected_reward": RowOption(float, "Reward of the rejected completion; 0 unless given.", FINITE),
}
PAIRS_BESIDE: RowOptions = {
    **POLICY,
    "rl_coef": RL_COEF,
    "preference": PREFERENCE,
    "beta": BETA,
    "nll_coef": NLL_COEF,
    "pair_dataset": RowOption(
        str,
        "Offline pairs, as `fastrl dpo --dataset` takes them, under its names of columns; defaults to "
        "--dataset, or to the task's own pairs.",
    ),
    "pairs": RowOption(
        int,
        "Offline pairs per optimizer step; as many as --prompts unless given.",
        Range(lambda x: x >= 1, "at least 1"),
    ),
    "pair_coef": RowOption(float, "Largest weight of the pairs' loss; 1 unless given.", NOT_NEGATIVE),
    "pair_coef_end": RowOption(
        float, "Final weight of the pairs' loss, reached by half a cosine; 0 unless given.", NOT_NEGATIVE
    ),
    "pair_warmup": RowOption(int, "Steps over which the weight rises to its peak; 0 unless given.", STEPS),
    "pair_decay": RowOption(
        int, "Steps over which the weight falls; 0, the default, is the rest of the run.", STEPS
    ),
    "reference": RowOption(
        Literal["precomputed", "live"],
        "Log-probs of the pairs under the model the run began with: computed once (the default), or by a "
        "frozen copy.",
    ),
    "norms_every": RowOption(
        int,
        "Steps between measurements of the gradient norm of each of the two terms; 0, the default, measures "
        "none.",
        STEPS,
    ),
}
LIST: RowOptions = {
    "beta": RowOption(float, "Scale of the scores in the policy's softmax.", POSITIVE),
    "anchor": ANCHOR,
    "tau": RowOption(float, "Targets are softmax(reward / tau); 0.5 unless given.", POSITIVE),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hybrid(GroupRelative):
    """Verified rewards together with demonstrations or preferences, in one optimizer step."""

    algorithm: AlgorithmChoice = field(default_factory=lambda: AlgorithmChoice("hpt"))
    """A row of fastrl.algorithms.hybrid.HYBRIDS, for demonstrations (hpt, hpt_soft, luffy, srft, chord,
    chord_phi, mixed), or of fastrl.algorithms.fusion.FUSIONS, for preferences (grpo_dpo, grpo_pairs,
    luffy_pairs, online_dpo, group_softmax, group_softmax_norm).
    """
    refill: int = 0
    """Dynamic sampling: drop groups of equal rewards, and fill the batch in up to this many rounds of further
    prompts; not with demonstrations, which are for the prompts that no completion solves.
    """

    rows: ClassVar[Rows] = {
        "hpt": {
            **DEMONSTRATIONS,
            "gate": RowOption(
                float,
                "A prompt learns from its demonstration if at most this share of its completions is right; 0 "
                "unless given.",
                Range(lambda x: 0 <= x <= 1, "a share of completions in [0, 1]"),
            ),
            "sft_coef": SFT_COEF,
        },
        "hpt_soft": {**DEMONSTRATIONS, "sft_coef": SFT_COEF},
        "luffy": {**DEMONSTRATION_IN_GROUP, "gamma": GAMMA},
        "srft": {**DEMONSTRATION_IN_GROUP, "sft_coef": SFT_COEF},
        "chord": {
            **DEMONSTRATIONS,
            "mu": RowOption(float, "Largest weight of the supervised loss; 0.9 unless given.", FRACTION),
            "mu_end": RowOption(float, "Final weight of the supervised loss; 0.05 unless given.", FRACTION),
            "mu_warmup": RowOption(int, "Steps over which mu rises to its peak; 0 unless given.", STEPS),
            "mu_decay": RowOption(
                int, "Steps over which mu falls; 0, the default, is the rest of the run.", STEPS
            ),
        },
        "chord_phi": {
            **DEMONSTRATIONS,
            "mu": RowOption(float, "Weight of the supervised loss; 0.1 unless given.", FRACTION),
        },
        "mixed": {**DEMONSTRATIONS, "sft_coef": SFT_COEF, "rl_coef": RL_COEF},
        "grpo_dpo": PAIRS_BESIDE,
        "grpo_pairs": PAIR_IN_GROUP,
        "luffy_pairs": {**PAIR_IN_GROUP, "gamma": GAMMA},
        "online_dpo": {
            "preference": PREFERENCE,
            "beta": BETA,
            "nll_coef": NLL_COEF,
            "pairing": RowOption(
                Literal["extremes", "all"],
                "Pairs of a group: the best against the worst completion (the default), or every two.",
            ),
            "gap": RowOption(
                float,
                "Least difference of two rewards that makes a pair; equal rewards never do.  0 unless given.",
                NOT_NEGATIVE,
            ),
            "anchor": ANCHOR,
        },
        "group_softmax": LIST,
        "group_softmax_norm": LIST,
    }
