"""The table of methods: its rows hold the published constants, its parts the published formulas.

That a row's loss and gradient are those of its paper, through model, packing and denominators, is tests/test_learner.py.
"""

from __future__ import annotations

import pytest
import torch

from fastrl.algorithms import ALGORITHMS, Totals
from fastrl.algorithms.advantage import ADVANTAGES
from fastrl.algorithms.aggregate import fixed_length, sequence_mean, sequence_sum, token_mean
from fastrl.config import Grpo, Sft
from fastrl.errors import UserError
from fastrl.setup import choose_algorithm
from fastrl.types import Tokens

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
    """Wrong implementations: the biased standard deviation; a leave-one-out mean that includes the sample; ties ranked by place."""
    twice = torch.cat([REWARD, REWARD + 5])
    got = ADVANTAGES[name](twice, 4)
    assert torch.allclose(got, torch.tensor(want, dtype=torch.float64).repeat(2), atol=1e-12)


def test_groups_do_not_see_each_other_but_for_batch_std():
    assert torch.equal(ADVANTAGES["zscore"](REWARD, 4), ADVANTAGES["zscore"](torch.cat([REWARD, REWARD * 7]), 4)[:4])
    both = torch.cat([REWARD, REWARD * 7])
    want = (REWARD - 1) / (both.std() + 1e-4)
    assert torch.allclose(ADVANTAGES["batch_std"](both, 4)[:4], want)


def test_aggregates_with_the_denominators_of_the_whole_step():
    """Wrong implementations: denominators of the micro-batch; a sequence without loss tokens counted; Dr. GRPO by the longest sample."""
    length, totals = torch.tensor([3.0, 1.0, 0.0]), Totals(tokens=10, samples=4, max_length=8)
    weights = {f: f(length, totals).tolist() for f in (token_mean, sequence_mean, sequence_sum, fixed_length)}
    assert weights[token_mean] == pytest.approx([0.1] * 3)
    assert weights[sequence_mean][:2] == pytest.approx([1 / 12, 1 / 4])
    assert weights[sequence_sum] == pytest.approx([1 / 4] * 3)
    assert weights[fixed_length] == pytest.approx([1 / 32] * 3)
    assert all(torch.isfinite(f(length, Totals(tokens=0, samples=0, max_length=8))).all() for f in weights)


def test_the_rows():
    """Wrong implementations: DAPO without clip-higher, Dr. GRPO with GRPO's length bias, GSPO with token ratios."""
    bounds = {name: (row.surrogate.params.get("low"), row.surrogate.params.get("high")) for name, row in ALGORITHMS.items()}
    assert bounds == {
        "sft": (None, None), "grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (0, 5), "rloo": (None, None),
    }  # fmt: skip
    rules = {name: row.aggregate for name, row in ALGORITHMS.items()}
    assert rules == {
        "sft": token_mean, "grpo": sequence_mean, "dr_grpo": fixed_length, "dapo": token_mean, "gspo": sequence_mean, "cispo": token_mean,
        "rloo": sequence_sum,
    }  # fmt: skip
    assert [name for name, row in ALGORITHMS.items() if row.ratio == "sequence"] == ["gspo"]
    assert [name for name, row in ALGORITHMS.items() if row.advantage is None] == ["sft"]


def test_loss_and_metrics_are_of_one_formula():
    x = torch.tensor([0.5, -1.0])
    tokens = Tokens(old_logp=torch.zeros(2), advantage=x, weight=torch.full((2,), 0.5), live=2).with_(torch.tensor([0.1, -0.1]), None)
    loss = ALGORITHMS["grpo"].loss(tokens)
    assert loss == pytest.approx(-0.5 * (0.5 * 2.718281828**0.1 - 2.718281828**-0.1), abs=1e-6)
    assert ALGORITHMS["grpo"].metrics(tokens)["tokens"] == 2


def test_options_change_a_row():
    """Wrong implementations: --kl-coef without an estimator is no KL at all; an option of 0 taken for one that was not given."""
    row = choose_algorithm(Grpo(model="m", algorithm="dapo", kl_coef=0.1))
    assert (row.kl, row.kl_coef, row.surrogate) == ("k3", 0.1, ALGORITHMS["dapo"].surrogate)
    assert choose_algorithm(Grpo(model="m", kl="k2", kl_coef=0.1)).kl == "k2"
    assert choose_algorithm(Grpo(model="m", entropy_coef=0.01)).entropy_coef == 0.01
    assert choose_algorithm(Grpo(model="m")) == ALGORITHMS["grpo"] and choose_algorithm(Sft(model="m")) == ALGORITHMS["sft"]


@pytest.mark.parametrize("name", ["ppoo", "sft"])
def test_an_unknown_row_is_an_error(name):
    with pytest.raises(UserError, match=f"--algorithm: expected one of grpo, dr_grpo, dapo, gspo, cispo, rloo; got '{name}'"):
        choose_algorithm(Grpo(model="m", algorithm=name))
