"""What the tests of reward models share: float64 restatements of the losses, random groups, a tiny model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from support import tiny_config
from torch import Tensor

from fastrl.algorithms.reward import Judged
from fastrl.data.comparisons import Group
from fastrl.model.reward import RewardModel

Said = tuple[float, list[float]]  # a loss, and its derivative by every score


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))


def softplus(z: float) -> float:
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


# --- the equations, one group at a time, in Python floats -------------------------------------------
def bradley_terry(r: Sequence[float], y: Sequence[float], margin: float) -> Said:
    pairs = [(i, j) for i in range(len(r)) for j in range(len(r)) if y[i] > y[j]]
    loss, grad = 0.0, [0.0] * len(r)
    for i, j in pairs:
        loss += softplus(-(r[i] - r[j] - margin)) / len(pairs)
        grad[i] -= sigmoid(-(r[i] - r[j] - margin)) / len(pairs)
        grad[j] += sigmoid(-(r[i] - r[j] - margin)) / len(pairs)
    return loss, grad


def plackett_luce(r: Sequence[float], y: Sequence[float], margin: float) -> Said:
    """Every completion against itself and all that are worse."""
    loss, grad = 0.0, [0.0] * len(r)
    for i in range(len(r)):
        among = [j for j in range(len(r)) if j == i or y[j] < y[i]]
        total = math.fsum(math.exp(r[j]) for j in among)
        loss += math.log(total) - r[i]
        grad[i] -= 1
        for j in among:
            grad[j] += math.exp(r[j]) / total
    return loss, grad


def cross_entropy(r: Sequence[float], y: Sequence[float], margin: float) -> Said:
    loss = math.fsum(t * softplus(-s) + (1 - t) * softplus(s) for s, t in zip(r, y, strict=True))
    return loss, [sigmoid(s) - t for s, t in zip(r, y, strict=True)]


EQUATIONS = {
    "bradley_terry": bradley_terry,
    "plackett_luce": plackett_luce,
    "outcome": cross_entropy,
    "process": cross_entropy,
}


def restated(name: str, groups: Sequence[tuple[list[float], list[float], float]], center: float) -> Said:
    """The loss of a whole step, groups of (scores, targets, margin), and its derivative by every score."""
    compares = name in ("bradley_terry", "plackett_luce")
    units = [int(max(y) > min(y)) if compares else len(y) for _, y, _ in groups]
    loss, grad = 0.0, []
    for (r, y, m), n in zip(groups, units, strict=True):
        value, slope = EQUATIONS[name](r, y, m)
        mean = 2 * sum(r) / len(r) if compares and n else 0.0
        loss += (value + center * mean**2) / sum(units)
        grad += [(g + center * 4 * mean / len(r)) / sum(units) for g in slope]
    return loss, grad


# --- random groups ----------------------------------------------------------------------------------
def random_groups(name: str, count: int = 9) -> list[tuple[list[float], list[float], float]]:
    """Groups of one to five, ties among them; one is all ties, one has a single completion."""
    sizes = [1, 3, *(1 + int(n) for n in torch.randint(5, (count - 2,)))]
    made = []
    for i, n in enumerate(sizes):
        target = (
            torch.rand(n)
            if name in ("outcome", "process")
            else torch.zeros(n)
            if i == 1
            else torch.randint(3, (n,)).float()
        )
        target = target.round() if name == "outcome" else target
        made.append(
            (
                (2 * torch.randn(n, dtype=torch.float64)).tolist(),
                target.double().tolist(),
                float(torch.rand(())),
            )
        )
    return made


def judged(
    groups: Sequence[tuple[list[float], list[float], float]],
    total: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Judged:
    score = torch.tensor([s for r, _, _ in groups for s in r], dtype=dtype, requires_grad=True)
    target = torch.tensor([t for _, y, _ in groups for t in y], dtype=dtype)
    margin = torch.tensor([m for _, _, m in groups], dtype=dtype)
    return Judged(
        score=score, target=target, sizes=[len(r) for r, _, _ in groups], margin=margin, total=total
    )


# --- a model ----------------------------------------------------------------------------------------
def reward_model(
    family: str = "qwen3", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> RewardModel:
    config = tiny_config(family, **{"vocab_size": 31, "initializer_range": 0.4, "pad_token_id": 3} | changes)
    return RewardModel.load(config, dtype=dtype, seed=seed)


def token_groups(name: str, count: int = 7) -> list[Group]:
    """Groups of random token sequences, for a row of REWARD_LOSSES."""
    out = []
    for i in range(count):
        verdicts = name in ("outcome", "process")
        K = 1 if verdicts else 1 + i % 4
        tokens = [torch.randint(4, 31, (int(torch.randint(3, 9, ())),)).tolist() for _ in range(K)]
        at = [[1, len(t) - 1] if name == "process" else [len(t) - 1] for t in tokens]
        target = (
            [float(torch.randint(2, ())) for a in at for _ in a]
            if verdicts
            else [float(K - k) for k in range(K)]
        )
        out.append(Group(f"group {i}", tokens, at, target, 0.25 * (i % 3)))
    return out


def grads(model: RewardModel) -> Tensor:
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    )
