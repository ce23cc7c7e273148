"""The table of methods: its rows hold the published constants, and the loss and gradient that come out,
through model, packing and denominators, are those of the published equations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from family import ADVANTAGE_OF, OBJECTIVES, RESTATED, Rect, clipped
from runs import (
    BUDGET,
    EXTRA,
    GROUP,
    METHODS,
    SCORES,
    SEED,
    TEMPERATURE,
    decoder,
    drift,
    gradient,
    learner,
    make_batch,
    reference,
    relative,
)
from torch import Tensor

from fastrl.algorithms import ALGORITHMS, Totals
from fastrl.algorithms.advantage import ADVANTAGES
from fastrl.algorithms.aggregate import fixed_length, sequence_mean, sequence_sum, token_mean
from fastrl.batch.types import Batch, Tokens
from fastrl.config import Grpo, Sft
from fastrl.errors import UserError
from fastrl.methods.grpo.options import choose_algorithm
from fastrl.methods.sft.options import choose_supervised
from fastrl.model.decoder import Decoder
from fastrl.train.source import order

REWARD = torch.tensor([1.0, 0.0, 0.0, 3.0], dtype=torch.float64)  # mean 1, unbiased variance 2


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("zscore", [0.0, -1 / (2**0.5 + 1e-4), -1 / (2**0.5 + 1e-4), 2 / (2**0.5 + 1e-4)]),
        ("center", [0, -1, -1, 2]),
        ("rloo", [0, -4 / 3, -4 / 3, 8 / 3]),
        ("best", [-2, -3, -3, 0]),
        ("best_range", [-2 / 3, -1, -1, 0]),
        ("rank", [1 / 3, -2 / 3, -2 / 3, 1]),
    ],
)
def test_advantages(name, want):
    """Wrong implementations: the biased standard deviation; a leave-one-out mean that includes the sample;
    ties ranked by place.
    """
    twice = torch.cat([REWARD, REWARD + 5])
    got = ADVANTAGES[name](twice, 4)
    assert torch.allclose(got, torch.tensor(want, dtype=torch.float64).repeat(2), atol=1e-12)


def test_groups_do_not_see_each_other_but_for_batch_std():
    assert torch.equal(
        ADVANTAGES["zscore"](REWARD, 4), ADVANTAGES["zscore"](torch.cat([REWARD, REWARD * 7]), 4)[:4]
    )
    both = torch.cat([REWARD, REWARD * 7])
    want = (REWARD - 1) / (both.std() + 1e-4)
    assert torch.allclose(ADVANTAGES["batch_std"](both, 4)[:4], want)


def test_aggregates_with_the_denominators_of_the_whole_step():
    """Wrong implementations: denominators of the micro-batch; a sequence without loss tokens counted; Dr.
    GRPO by the longest sample.
    """
    length, totals = torch.tensor([3.0, 1.0, 0.0]), Totals(tokens=10, samples=4, max_length=8)
    weights = {f: f(length, totals).tolist() for f in (token_mean, sequence_mean, sequence_sum, fixed_length)}
    assert weights[token_mean] == pytest.approx([0.1] * 3)
    assert weights[sequence_mean][:2] == pytest.approx([1 / 12, 1 / 4])
    assert weights[sequence_sum] == pytest.approx([1 / 4] * 3)
    assert weights[fixed_length] == pytest.approx([1 / 32] * 3)
    assert all(torch.isfinite(f(length, Totals(tokens=0, samples=0, max_length=8))).all() for f in weights)


def test_the_rows():
    """Wrong implementations: DAPO without clip-higher, Dr. GRPO with GRPO's length bias, GSPO with token
    ratios, GMPO's log bounds taken for ratios.
    """
    bounds = {
        name: (row.surrogate.params.get("low"), row.surrogate.params.get("high"))
        for name, row in ALGORITHMS.items()
    }
    plain = dict.fromkeys(
        (
            "grpo",
            "dr_grpo",
            "bnpo",
            "lite_ppo",
            "two_sided",
            "reinforce++",
            "reinforce++_baseline",
            "pass_at_k",
            "max_rl",
        ),
        (0.2, 0.2),
    )
    others = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "luspo": (2e-3, 2.5e-3), "cispo": (0, 5)}
    gmpo = {"gmpo": pytest.approx((1 - math.exp(-0.4), math.exp(0.4) - 1))}
    assert bounds == plain | others | gmpo | dict.fromkeys(
        ("sft", "sapo", "vespo", "rloo", "gpg"), (None, None)
    )
    rules = {
        f: {name for name, row in ALGORITHMS.items() if row.aggregate is f}
        for f in (sequence_mean, sequence_sum, fixed_length)
    }
    assert rules == {
        sequence_mean: {"grpo", "gspo", "gmpo", "sapo"},
        sequence_sum: {"rloo", "luspo"},
        fixed_length: {"dr_grpo", "pass_at_k", "max_rl"},
    }
    assert {row.aggregate for row in ALGORITHMS.values()} - rules.keys() == {token_mean}
    assert [name for name, row in ALGORITHMS.items() if row.ratio == "sequence"] == ["gspo", "luspo"]
    assert [name for name, row in ALGORITHMS.items() if row.advantage is None] == ["sft"]
    assert not any(row.kl_coef or row.entropy_coef or row.correction for row in ALGORITHMS.values())


def test_loss_and_metrics_are_of_one_formula():
    x = torch.tensor([0.5, -1.0])
    tokens = Tokens(old_logp=torch.zeros(2), advantage=x, weight=torch.full((2,), 0.5), live=2).with_(
        torch.tensor([0.1, -0.1]), None
    )
    loss = ALGORITHMS["grpo"].loss(tokens)
    assert loss == pytest.approx(-0.5 * (0.5 * 2.718281828**0.1 - 2.718281828**-0.1), abs=1e-6)
    assert ALGORITHMS["grpo"].metrics(tokens)["tokens"] == 2


def test_options_change_a_row():
    """Wrong implementations: --kl-coef without an estimator is no KL at all; an option of 0 taken for one
    that was not given.
    """
    row = choose_algorithm(Grpo(model="m", algorithm="dapo", kl_coef=0.1))
    assert (row.kl, row.kl_coef, row.surrogate) == ("k3", 0.1, ALGORITHMS["dapo"].surrogate)
    assert choose_algorithm(Grpo(model="m", kl="k2", kl_coef=0.1)).kl == "k2"
    assert choose_algorithm(Grpo(model="m", entropy_coef=0.01)).entropy_coef == 0.01
    assert (
        choose_algorithm(Grpo(model="m")) == ALGORITHMS["grpo"]
        and choose_supervised(Sft(model="m")).policy == ALGORITHMS["sft"]
    )


@pytest.mark.parametrize("name", ["ppoo", "sft"])
def test_an_unknown_row_is_an_error(name):
    with pytest.raises(
        UserError, match=rf"--algorithm: expected one of grpo, dr_grpo, dapo, bnpo, .*, max_rl; got '{name}'"
    ):
        choose_algorithm(Grpo(model="m", algorithm=name))


# --- the equations, padded and in float64 -----------------------------------------------------------
class Padded(Rect):
    """A batch as (S, L) matrices: every sequence forwarded alone, log-probs and entropies from a full
    softmax.
    """

    def __init__(self, model: Decoder, batch: Batch, temperature: float, advantage: str) -> None:
        ends = batch.cu_seqlens.tolist()
        spans = [slice(a, b) for a, b in pairwise(ends)]
        rows = [
            (model(batch.tokens[s]) @ model.head_weight.T / temperature).log_softmax(-1)[:-1] for s in spans
        ]
        logp = _pad(
            [r.gather(1, batch.tokens[s][1:, None]).squeeze(1) for r, s in zip(rows, spans, strict=True)]
        )
        self.entropy = _pad([-(r.exp() * r).sum(-1) for r in rows])
        mask, old, self.ref = (
            _pad([x[s][1:].double() for s in spans]) for x in (batch.mask, batch.old_logp, reference(batch))
        )
        super().__init__(logp, old, mask.bool(), torch.zeros(len(batch), 1, dtype=torch.float64), BUDGET)
        if len(batch) == len(SCORES):
            reward = torch.tensor(SCORES, dtype=torch.float64).view(-1, GROUP)[order(3, SEED, 0, 3)]
            self.advantage = RESTATED[advantage](reward, self.length.view(-1, GROUP)).view(-1, 1)

    def k3(self) -> Tensor:
        return (self.ref - self.logp).exp() - (self.ref - self.logp) - 1


def _pad(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


EXTRA_EQUATIONS: dict[str, Callable[[Padded], Tensor]] = {
    "sft": lambda b: b.by_token(b.logp),
    "grpo+kl+entropy": lambda b: b.by_sequence(clipped(b, b.r, 0.2, 0.2) - 0.1 * b.k3() + 0.01 * b.entropy),
    "gspo+kl": lambda b: OBJECTIVES["gspo"](b) - b.by_sequence(0.1 * (b.logp - b.ref).square()),
}
EQUATIONS: dict[str, Callable[[Padded], Tensor]] = {**OBJECTIVES, **EXTRA_EQUATIONS}  # type: ignore[dict-item]
# so that both branches of every clip are seen
DRIFTS = {
    "gspo": 1e-3,
    "gspo+kl": 1e-3,
    "luspo": 5e-3,
    "gmpo": 0.06,
}
# rows under which no sample's gradient is 0
ALL_MOVE = {
    "sft",
    "reinforce++",
    "reinforce++_baseline",
    *EXTRA,
}


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_are_those_of_the_equations(name, monkeypatch):
    """Wrong implementations: token means for sequence means, denominators of a micro-batch, a shift by one
    token, the biased deviation, a gradient through CISPO's weight, groups of equal rewards left out of the
    denominators.
    """
    model = decoder(dtype=torch.float64)
    batch = make_batch(name, model)
    with monkeypatch.context() as patch:
        patch.setattr("fastrl.methods.grpo.shaping.prune", lambda batch: batch)
        whole = make_batch(name, model)
    assert len(whole) == len(batch) if name in ALL_MOVE else len(whole) > len(batch)
    drift(model, DRIFTS.get(name, 0.03))
    loss = -EQUATIONS[name](
        Padded(model, whole, 1.0 if name == "sft" else TEMPERATURE, ADVANTAGE_OF.get(name, "zscore"))
    )
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    metrics, got = gradient(learner(model, METHODS[name], 20), batch)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6, abs=1e-8)
    assert relative(got, want) < 1e-6
    if METHODS[name].surrogate.params.get("high", 5) < 1:
        assert 0.1 < metrics["clip_region"] < 0.9, "both branches of the clip are seen"


@pytest.mark.parametrize("aggregate", [token_mean, sequence_mean, sequence_sum, fixed_length])
def test_weights_of_integer_lengths_are_not_rounded(aggregate):
    """Wrong implementation: a result in the dtype of the lengths, 0 for every one of them."""
    totals = Totals(tokens=7, samples=2, max_length=8)
    whole, exact = (aggregate(torch.tensor([3, 4]).to(d), totals) for d in (torch.int64, torch.float64))
    assert whole.dtype == torch.float32 and exact.dtype == torch.float64
    torch.testing.assert_close(whole.double(), exact, rtol=1e-7, atol=0)
