"""group_advantage: rewards of P prompts with G samples each, less their group's mean, over its standard deviation."""

from __future__ import annotations

from torch import Tensor

from fastrl import ops
from fastrl.bench.common import FORWARD, Bench, Case, Cost, Data, Draw, cases, compiled, plain

EPS = 1e-4
CASES = cases(
    "P G", tiny=(2, 4), quick=(64, 8), cpu=[(1024, 16)], cuda=[(4096, 16), (64, 8)], slice={"P": 64}, modes=(FORWARD,), cuda_dtype="float32"
)


def data(case: Case) -> Data:
    (P, G), draw = case.sizes("P G"), Draw(case)
    return Data({"reward": draw.normal(P * G), "group": G})


def cost(case: Case) -> Cost:
    """One vector read, one written."""
    P, G = case.sizes("P G")
    return Cost(2 * P * G * case.itemsize)


def eager(reward: Tensor, group: int) -> Tensor:
    grouped = reward.view(-1, group)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + EPS)).flatten()


PROVIDERS = {"fastrl": plain(ops.group_advantage), "eager": plain(eager), "torch.compile": compiled(eager)}
BENCH = Bench(op="group_advantage", cases=CASES, data=data, cost=cost, providers=PROVIDERS, truth=plain(eager), registry="group_advantage")
