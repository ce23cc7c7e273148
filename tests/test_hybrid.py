"""Hybrids: every row against its equations through model, packing and denominators; what they become at their ends; gates and options.

tests/hybrids.py restates the equations.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hybrids import ANSWERS, OBJECTIVES, SCORES, demonstration, groups, half_cosine, hpt, learner, luffy, mixture, with_rule
from runs import BUDGET, GROUP, PROMPTS, SEED, assert_same_run, decoder, drift, gradient, lines, relative, straight_and_resumed, write_model
from runs import learner as plain_learner
from torch import Tensor

import fastrl.trainer
from fastrl import cli
from fastrl.algorithms import ALGORITHMS
from fastrl.algorithms.hybrid import DENOMINATORS, HYBRIDS, MEMBER, OWN, SUPERVISED, Estimator, certain, choose_hybrid, phi, uncertain
from fastrl.config import Hybrid, Optim
from fastrl.errors import UserError
from fastrl.experience import Demonstrations, OnPolicy, order
from fastrl.mixture import check_mixture, only
from fastrl.ops import SURROGATES
from fastrl.types import Tokens

F64 = torch.float64
ALL, NONE = (0, 1, 2), ()


# --- the equations ------------------------------------------------------------------------------------
@pytest.mark.parametrize("known", [ALL, (0, 1), NONE], ids=["all", "some", "none"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_loss_and_gradient_are_those_of_the_equations(name, known):
    """Wrong implementations: one denominator for completions and supervised tokens; gated completions left in a denominator; the
    demonstration outside its group's mean; a gradient through phi or an entropy weight; a missing demonstration counted as a sample."""
    model = decoder(dtype=F64)
    source = mixture(model, HYBRIDS[name], known=known)
    now, batch = groups(model, source, SCORES, known), source.collect(0, 0).batches[0]
    drift(model, 0.03)
    loss = -OBJECTIVES[name](now())
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    metrics, got = gradient(learner(model, HYBRIDS[name], 20), batch)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6, abs=1e-8)
    assert relative(got, want) < 1e-6


@pytest.mark.parametrize("name", HYBRIDS)
def test_cutting_and_order_change_nothing(name):
    """Wrong implementations: counts of a micro-batch in a denominator; kinds, or what a prompt counts, taken by place."""
    model = decoder(dtype=F64)
    batch = mixture(model, HYBRIDS[name]).collect(0, 0).batches[0]
    drift(model, 0.03)
    a, g = gradient(learner(model, HYBRIDS[name]), batch)
    b, h = gradient(learner(model, HYBRIDS[name], 14), batch.select(list(range(len(batch)))[::-1]))
    assert relative(h, g) < 1e-12 and a["loss"] == pytest.approx(b["loss"], rel=1e-10)
    assert {k: b[k] for k in a} == pytest.approx(a, rel=1e-6, abs=1e-9)


def test_two_processes_see_what_one_does():
    """Wrong implementation: denominators of one process's share."""
    model = decoder(dtype=F64)
    row = HYBRIDS["luffy"]
    whole = mixture(model, row).collect(0, 0).batches[0]

    class Half(type(mixture(model, row).world)):  # type: ignore[misc]
        def sum(self, *values):
            return [n.pop(0) for n in self.totals] if False else list(values)

    assert len(whole) > 0  # the counts below are those of the whole step, whoever holds the sequences
    kinds = whole.kind[whole.cu_seqlens[:-1].long()]
    weight = whole.weight[whole.cu_seqlens[:-1].long()]
    assert torch.allclose(weight, torch.full_like(weight, 1 / (15 * BUDGET))) and set(kinds.tolist()) == {OWN, MEMBER}


# --- the four parts -----------------------------------------------------------------------------------
def tokens(n: int = 40, spread: float = 0.3) -> Tokens:
    draw = torch.Generator().manual_seed(1)
    logp = -3 * torch.rand(n, generator=draw, dtype=F64)
    x, y, h = (torch.randn(n, generator=draw, dtype=F64) for _ in range(3))
    ends = torch.tensor([0, 7, 7, 25, n], dtype=torch.int32)
    return Tokens(old_logp=logp - spread * x, advantage=y, weight=torch.full((n,), 0.1, dtype=F64), cu_seqlens=ends, live=n).with_(logp, h.abs())


def slope(loss, t: Tokens) -> Tensor:
    """-d loss / d logp, without the aggregate: W of the four parts."""
    leaf = t.logp.clone().requires_grad_()
    return -torch.autograd.grad(loss(replace(t, logp=leaf)), leaf)[0] / t.weight


def mean_of(x: Tensor, t: Tokens) -> Tensor:
    parts = [x[a:b] for a, b in zip(t.cu_seqlens[:-1].tolist(), t.cu_seqlens[1:].tolist(), strict=True)]
    return torch.cat([p.mean().expand(len(p)) for p in parts if len(p)])


def inside(r: Tensor, A: Tensor, low: float, high: float) -> Tensor:
    return (~(((A > 0) & (r > 1 + high)) | ((A < 0) & (r < 1 - low)))).to(r.dtype)


def test_every_method_is_mask_denominator_advantage_and_likelihood():
    """W = 1_stable A exp(logp - den) of the unified estimator.  Wrong implementations: pi_old as SFT's denominator; the recorded log-prob as
    LUFFY's; a mask by the ratio alone; GSPO's ratio of one token."""
    t = tokens()
    everywhere, A, p, r = torch.ones(t.live, dtype=torch.bool), t.advantage, t.logp.exp(), (t.logp - t.old_logp).exp()
    one, zeros = torch.ones_like(A), torch.zeros_like(A)
    s = mean_of(t.logp - t.old_logp, t).exp()

    def unified(stable, denominator, advantage):
        return stable * advantage * (t.logp - denominator).exp()

    own = {
        "sft": unified(one, t.logp, one),
        "rloo": unified(one, t.logp, A),
        "grpo": unified(inside(r, A, 0.2, 0.2), t.old_logp, A),
        "cispo": unified(r.clamp(0, 5) / r, t.old_logp, A),
        "gspo": unified(inside(s, A, 3e-4, 4e-4), t.logp - s.log(), A),
    }
    for name, weight in own.items():
        torch.testing.assert_close(slope(ALGORITHMS[name].loss, t), weight, rtol=1e-10, atol=1e-12)
    shown = {
        "luffy": (HYBRIDS["luffy"].member, unified(0.1 / (p + 0.1).square(), zeros, A)),
        "srft": (HYBRIDS["srft"].member, unified(one, zeros, A)),
        "sft": (HYBRIDS["hpt"].supervised, unified(one, t.logp, A)),
        "sft by its ratio": (Estimator(SURROGATES["ratio"], "policy"), unified(one, t.logp, A)),
        "chord_phi": (HYBRIDS["chord_phi"].supervised, unified(p * (1 - p), t.logp, A)),
        "srft, supervised": (HYBRIDS["srft"].supervised, unified(0.5 * (-mean_of(t.entropy, t)).exp(), t.logp, A)),
    }
    for estimator, weight in shown.values():
        torch.testing.assert_close(slope(lambda x, e=estimator: e.loss(x, everywhere), t), weight, rtol=1e-10, atol=1e-12)
    assert set(DENOMINATORS) == {"policy", "old", "one"}


def test_hand_worked_weights():
    """LUFFY and phi at p = 1/e; SRFT at H = 0.5."""
    t = Tokens(
        old_logp=torch.zeros(1, dtype=F64), advantage=torch.ones(1, dtype=F64), weight=torch.ones(1, dtype=F64),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32), live=1,
    ).with_(torch.tensor([-1.0], dtype=F64), torch.tensor([0.5], dtype=F64))  # fmt: skip
    live, member = torch.ones(1, dtype=torch.bool), HYBRIDS["luffy"].member
    assert float(-member.loss(t, live)) == pytest.approx(0.78627, abs=1e-5)
    assert float(slope(lambda x: member.loss(x, live), t)) == pytest.approx(0.16805, abs=1e-5)
    weights = [float(f(t, SURROGATES["pg"])) for f in (phi, certain, uncertain)]
    assert weights == pytest.approx([0.232544, 0.303265, 0.164872], abs=1e-6)
    assert uncertain(replace(t, advantage=-t.advantage), SURROGATES["pg"]) == 1


# --- the special cases --------------------------------------------------------------------------------
def supervised_gradient(model):
    """Of the `sft` row, on the demonstrations of all prompts."""
    shown = order(3, SEED, 0, 3)
    source = Demonstrations(
        lambda some: [demonstration(shown[i]) for i in sorted(some)], 3, count=3, algorithm=ALGORITHMS["sft"], seed=0,
        device=torch.device("cpu"), world=mixture(model, HYBRIDS["hpt"]).world,
    )  # fmt: skip
    return gradient(plain_learner(model, ALGORITHMS["sft"]), source.collect(0, 0).batches[0])


@pytest.mark.parametrize("row", [with_rule("hpt", gate=1.0), with_rule("mixed", rl_coef=0.0), with_rule("chord", mu=1.0)])
def test_with_demonstrations_alone_it_is_sft_exactly(row):
    """Wrong implementations: completions that still count; a denominator that counts them; an advantage other than 1."""
    model = decoder()
    metrics, got = gradient(learner(model, row), mixture(model, row).collect(0, 0).batches[0])
    theirs, want = supervised_gradient(model)
    assert torch.equal(got, want)
    assert metrics["loss"] == metrics["sft_loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert metrics["num_tokens"] == theirs["num_tokens"] == sum(map(len, ANSWERS)) and metrics["off_policy_share"] == 1
    assert not {"ratio_mean", "approx_kl", "tokens"} & metrics.keys(), "there are no tokens of its own to measure"


@pytest.mark.parametrize("name", HYBRIDS)
def test_without_demonstrations_it_is_reinforcement_learning_exactly(name):
    """Wrong implementation: the place of a demonstration that is not there in the group's mean or in a denominator."""
    model, row = decoder(), HYBRIDS[name]
    if name in ("srft", "chord", "chord_phi"):  # weights of their own; the equations have them
        row = replace(with_rule(name, mu=0.0) if name != "srft" else row, prepare=(), own_advantage=None)
        row = with_rule("chord_phi", mu=0.0) if name == "chord" else row
    source = mixture(model, row, known=NONE)
    batch = source.collect(0, 0).batches[0]
    other = OnPolicy.__new__(OnPolicy)
    other.__dict__.update(source.__dict__ | {"members": GROUP})
    base = replace(ALGORITHMS[{"hpt": "dr_grpo", "hpt_soft": "dr_grpo", "luffy": "dr_grpo"}.get(name, "grpo")], surrogate=row.surrogate)
    other.algorithm = base
    drift(model, 0.03)
    got, want = gradient(learner(model, row), batch), gradient(plain_learner(model, base), source_batch(other))
    assert relative(got[1], want[1]) < 1e-6 and got[0]["ratio_mean"] == pytest.approx(want[0]["ratio_mean"])


def source_batch(source):
    return source.collect(0, 0).batches[0]
