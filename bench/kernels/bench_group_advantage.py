"""group_advantage: rewards of P prompts with G samples each, normalised by their group's mean and std."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from fastrl import ops
from fastrl.bench.common import FORWARD, Bench, Case, Cost, Data, Draw, Function, cases, compiled, only, plain

EPS = 1e-4
SAMPLES = 1024  # up to which a Python loop over samples is timed: 20 us for each of them
CASES = cases(
    "P G",
    tiny=(2, 4),
    quick=(64, 8),
    cpu=[(4096, 16), (64, 8)],
    cuda=[(4096, 16), (64, 8)],
    slice={"P": 64},
    modes=(FORWARD,),
    cuda_dtype="float32",
)


def data(case: Case) -> Data:
    (P, G), draw = case.sizes("P G"), Draw(case)
    return Data({"reward": draw.normal(P * G), "group": G})


def cost(case: Case) -> Cost:
    """One vector read, one written; a dozen float64 operations a sample take little time beside that."""
    P, G = case.sizes("P G")
    return Cost(2 * P * G * case.itemsize)


def eager(reward: Tensor, group: int) -> Tensor:
    """As trainers write it: a NaN reward makes its whole group NaN."""
    grouped = reward.view(-1, group)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + EPS)).flatten()


def nan_aware(reward: Tensor, group: int) -> Tensor:
    """With unscored samples, as in ops.group_advantage, except for groups without spread."""
    grouped = reward.view(-1, group)
    scored = ~grouped.isnan()
    centred = torch.where(scored, grouped - grouped.nanmean(1, keepdim=True), 0)
    std = (centred.square().sum(1, keepdim=True) / (scored.sum(1, keepdim=True) - 1)).sqrt()
    return (centred / (std + EPS)).flatten()


def loop(case: Case) -> Function:
    """verl's default estimator: a Python loop over samples and groups, for ids in any order."""
    P, G = case.sizes("P G")
    only(P * G <= SAMPLES, f"a Python loop over samples: only up to {SAMPLES}")
    ids = [i // G for i in range(P * G)]

    def call(reward: Tensor, group: int) -> Tensor:
        found, members = reward.clone(), defaultdict(list)
        for i, key in enumerate(ids):
            members[key].append(found[i])
        stats = {
            key: (x.mean(), x.std()) for key, x in ((key, torch.stack(of)) for key, of in members.items())
        }
        for i, key in enumerate(ids):
            mean, std = stats[key]
            found[i] = (found[i] - mean) / (std + EPS)
        return found

    return call


PROVIDERS = {
    "fastrl": plain(ops.group_advantage),
    "eager": plain(eager),
    "eager, NaN-aware": plain(nan_aware),
    "Python loop": loop,
    "torch.compile": compiled(eager),
}
BENCH = Bench(
    op="group_advantage",
    cases=CASES,
    data=data,
    cost=cost,
    providers=PROVIDERS,
    truth=plain(eager),
    registry="group_advantage",
)
