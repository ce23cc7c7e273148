"""How a reward model does on held-out groups: accuracy with its interval, calibration, means."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastrl.algorithms.reward import RewardLoss
from fastrl.data.comparisons import Group, Texts
from fastrl.report.stats import Bin, Estimate, calibration, share_interval, wilson
from fastrl.train.source import LoggedSample, Metrics

Outcome = tuple[float, float]  # log-odds that the model gives something, and 1.0 if it holds, else 0.0


def judge_held_out(
    algorithm: RewardLoss, groups: Sequence[Group], scores: Sequence[Sequence[float]]
) -> tuple[Metrics, dict[str, object]]:
    """Metrics of scored groups, and what rewards.json keeps of them for the report.

    A comparison counts for each pair of a better and a worse completion, a verdict for each score.  Those of
    one group are not independent: where a group has several, accuracy and its interval are of the groups' own
    accuracies.
    """
    outcomes = [_outcomes(algorithm, g.target, s) for g, s in zip(groups, scores, strict=True)]
    accuracy = _accuracy(algorithm, outcomes)
    margins = _margins(algorithm, outcomes)
    rewards = [r for own in scores for r in own]
    ece, bins = _calibration(algorithm, outcomes)

    metrics = {
        "eval/accuracy": accuracy.mean,
        "eval/accuracy_lo": accuracy.lo,
        "eval/accuracy_hi": accuracy.hi,
        "eval/ece": ece,
        "eval/margin": sum(margins) / max(len(margins), 1),
        "eval/mean_reward": sum(rewards) / max(len(rewards), 1),
    }
    names = ("better", "worse") if algorithm.compares else ("right", "wrong")
    best, rest = _sides(algorithm, groups, scores)
    return metrics, {"names": names, "better": best, "worse": rest, "bins": bins, "ece": ece}


def shown(group: Group, texts: Texts, rewards: Sequence[float]) -> list[LoggedSample]:
    """A held-out group's completions as samples.jsonl has them."""
    rows = zip(texts.completions, rewards, group.target, strict=True)
    prompt = texts.prompt or ""
    return [{"prompt": prompt, "completion": c, "reward": r, "target": t} for c, r, t in rows]


def _outcomes(algorithm: RewardLoss, target: Sequence[float], score: Sequence[float]) -> list[Outcome]:
    """Everything in a group that can be checked."""
    if not algorithm.compares:
        return list(zip(score, target, strict=True))
    n = range(len(score))
    return [(score[i] - score[j], 1.0) for i in n for j in n if target[i] > target[j]]


def _accuracy(algorithm: RewardLoss, outcomes: Sequence[Sequence[Outcome]]) -> Estimate:
    hits = [[_hit(algorithm, *outcome) for outcome in own] for own in outcomes if own]
    if any(len(own) > 1 for own in hits):
        return share_interval([sum(own) / len(own) for own in hits])

    won, count = sum(map(sum, hits)), sum(map(len, hits))
    return Estimate(won / count, *wilson(won, count))


def _hit(algorithm: RewardLoss, log_odds: float, outcome: float) -> bool:
    return log_odds > 0 if algorithm.compares or outcome >= 0.5 else log_odds < 0


def _margins(algorithm: RewardLoss, outcomes: Sequence[Sequence[Outcome]]) -> list[float]:
    """How far each outcome is on its right side, in units of the reward."""
    pooled = [outcome for own in outcomes for outcome in own]
    if algorithm.compares:
        return [log_odds for log_odds, _ in pooled]
    return [log_odds if outcome >= 0.5 else -log_odds for log_odds, outcome in pooled]


def _calibration(algorithm: RewardLoss, outcomes: Sequence[Sequence[Outcome]]) -> tuple[float, list[Bin]]:
    """The expected calibration error, and its bins."""
    pooled = [outcome for own in outcomes for outcome in own]
    claims = [(_sigmoid(log_odds), outcome) for log_odds, outcome in pooled]
    if algorithm.compares:  # each pair both ways round: else every outcome is 1
        claims += [(_sigmoid(-log_odds), 0.0) for log_odds, _ in pooled]
    return calibration([p for p, _ in claims], [y for _, y in claims])


def _sides(
    algorithm: RewardLoss, groups: Sequence[Group], scores: Sequence[Sequence[float]]
) -> tuple[list[float], list[float]]:
    """Rewards of the best (or right) completions, and of the others."""
    best: list[float] = []
    rest: list[float] = []
    for group, own in zip(groups, scores, strict=True):
        top = max(group.target) if algorithm.compares else 1.0
        for reward, target in zip(own, group.target, strict=True):
            (best if target == top else rest).append(reward)
    return best, rest


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))
