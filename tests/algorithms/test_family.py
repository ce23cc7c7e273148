"""The GRPO family on random and edge inputs, without a model: rows, corrections, sequence weights,
advantages, options.

tests/helpers/family.py restates the equations; tests/algorithms/test_algorithms.py checks the same rows
through model, packing and denominators.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from configs import configured
from family import OBJECTIVES, RESTATED, Rect
from rects import F64, loss_and_slope, pack, rect, vector
from torch import Tensor

from fastrl.algorithms import ALGORITHMS, Algorithm
from fastrl.algorithms.advantage import ADVANTAGES, COMBINE
from fastrl.algorithms.correction import CORRECTIONS, merge_mismatch, mismatch
from fastrl.algorithms.prepare import drop_stale, gamma_weight
from fastrl.batch.types import Tokens
from fastrl.config import Grpo
from fastrl.errors import UserError
from fastrl.methods.grpo.options import choose_algorithm


def want(b: Rect, name: str, correction: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    leaf = b.logp.clone().requires_grad_()
    loss = -OBJECTIVES[name](
        Rect(leaf, torch.where(b.mask, b.old, 0), b.mask, b.advantage, b.budget, correction)
    )
    (slope,) = torch.autograd.grad(loss, leaf, allow_unused=True, materialize_grads=True)
    return loss.detach(), slope


SMALL = {"gspo": 2e-3, "luspo": 8e-3}  # spreads at which some ratios are clipped and some are not
CASES: dict[str, dict[str, Any]] = {
    "random": {"lengths": [5, 1, 8, 3], "advantage": [1.3, -0.7, -2.1, 0.4]},
    "zero advantage": {"lengths": [5, 2], "advantage": [0.0, 0.0]},
    "one token": {"lengths": [1], "advantage": [-1.0]},
    "some of length 0": {"lengths": [4, 0, 3, 0], "advantage": [1.0, 2.0, -1.0, 0.0]},
    "all clipped above": {"lengths": [3, 4], "advantage": [1.0, 2.0], "spread": 0.01, "shift": 1.5},
    "all clipped below": {"lengths": [3, 4], "advantage": [-1.0, -2.0], "spread": 0.01, "shift": -1.5},
    "group of one": {"lengths": [6], "advantage": [0.9]},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_row_is_its_equation(name, case):
    """Wrong implementations: a detach that is missing (CISPO, VESPO) or too much (GMPO's clipped tokens,
    GSPO); sums for means; a denominator of padded or empty sequences; min over the wrong sides where the
    advantage is negative; padding that is looked at.
    """
    given = {"spread": SMALL.get(name, 0.4)} | CASES[case]
    b = rect(**given)
    got, exact = loss_and_slope(b, ALGORITHMS[name]), want(b, name)
    torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-12)
    if case == "zero advantage":
        assert not got[1].any()
    if case == "random" and "low" in ALGORITHMS[name].surrogate.params and name not in ("cispo", "two_sided"):
        assert not got[1][b.mask].all() and got[1].any(), "some are clipped, some are not"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_first_update_of_every_row_is_the_policy_gradient(name):
    """With the old weights every method's derivative is -advantage x aggregate, to the last bits: 4/tau of
    SAPO, phi(1) = 1 of VESPO.

    Wrong implementation: a ratio to anything but the old policy.
    """
    b = rect([5, 1, 8, 3], [1.3, -0.7, -2.1, 0.4], spread=0.0)
    tokens = pack(b, ALGORITHMS[name])
    slope = loss_and_slope(b, ALGORITHMS[name])[1][b.mask]
    torch.testing.assert_close(slope, -tokens.advantage * tokens.weight, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_cutting_and_order_change_nothing(name):
    """Wrong implementations: statistics of a micro-batch in a sequence's weight; sums by place instead of by
    sequence.
    """
    row = replace(
        ALGORITHMS[name], correction=CORRECTIONS["token_mask" if name == "vespo" else "sequence_truncate"]
    )
    row = replace(row, prepare=(*row.prepare, partial(drop_stale, threshold=0.1)))
    b = rect([5, 1, 8, 3, 2], [1.3, -0.7, -2.1, 0.4, -1.0], spread=SMALL.get(name, 0.4))
    whole = loss_and_slope(b, row)
    for parts in ([[3, 0, 4, 2, 1]], [[1, 4], [0], [3, 2]]):
        cut = [loss_and_slope(b, row, part) for part in parts]
        torch.testing.assert_close(sum(x[0] for x in cut), whole[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(sum(x[1] for x in cut), whole[1], rtol=1e-12, atol=1e-14)


# --- corrections ------------------------------------------------------------------------------------
def restated_correction(name: str, s: Tensor, mask: Tensor) -> Tensor:
    total = torch.where(mask, s, 0).sum(1, keepdim=True)
    whole, mean, token = (
        total.exp().expand_as(s),
        (total / mask.sum(1, keepdim=True)).exp().expand_as(s),
        s.exp(),
    )
    return {
        "token_truncate": token.clamp(max=2),
        "token_mask": torch.where((token >= 0.5) & (token <= 2), token, 0),
        "sequence_truncate": whole.clamp(max=2),
        "sequence_mask": torch.where(whole <= 3, whole, 0),
        "geometric_mask": torch.where((mean >= 0.999) & (mean <= 1.001), token.clamp(max=2), 0),
    }[name]


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("name", ["grpo", "gspo", "gmpo", "rloo"])
def test_corrections_weigh_the_policy_term(name, correction):
    """Trainer against recorded is the weight, policy against trainer the ratio.

    Wrong implementations: the whole way counted in both (double counting); masked ratios set to 1; a mean for
    the product; a weight that is differentiated; the KL weighed too.
    """
    lengths = [5, 1, 8, 3]
    b = rect(lengths, [1.3, -0.7, -2.1, 0.4], spread=SMALL.get(name, 0.4))
    plain = loss_and_slope(b, ALGORITHMS[name])
    s = torch.where(
        b.mask, torch.randn(b.logp.shape, generator=torch.Generator().manual_seed(1), dtype=F64) * 0.5, 0
    )
    s[0] /= 2000  # one sequence whose geometric mean is inside
    row = replace(ALGORITHMS[name], correction=CORRECTIONS[correction])
    kappa = restated_correction(correction, s, b.mask)
    assert kappa[b.mask].unique().numel() > 1
    upfront = row.correction(pack(replace(b, old=b.old - s), row).with_(pack(b, row).old_logp, None))
    torch.testing.assert_close(upfront.correction, kappa[b.mask], rtol=1e-12, atol=0)
    columns = {"correction": kappa, "sampler_logp": b.old - s}
    got = loss_and_slope(b, row, **columns)
    torch.testing.assert_close(got[1], torch.where(b.mask, plain[1] * kappa, 0), rtol=1e-10, atol=1e-12)
    # else a padded loss spreads the mean of the tokens' weights
    if name in ("grpo", "rloo") or "sequence" in correction:
        torch.testing.assert_close(got, want(b, name, kappa), rtol=1e-10, atol=1e-12)
    # the pass before any update: logp is the trainer's
    first = replace(b, logp=b.old.nan_to_num(0), old=b.old - s)
    same = replace(b, logp=first.logp)
    torch.testing.assert_close(
        loss_and_slope(first, row), loss_and_slope(same, row, **columns), rtol=1e-10, atol=1e-12
    )
    with_kl = replace(row, kl="k2", kl_coef=0.3)
    ref = b.logp - 0.1
    kl = loss_and_slope(b, with_kl, ref_logp=ref, **columns)[1] - loss_and_slope(b, row, **columns)[1]
    torch.testing.assert_close(kl[b.mask], 0.3 * 0.1 * pack(b, row).weight, rtol=1e-9, atol=1e-12)


LOGP = vector(-1, -0.5, -2, -0.3, -0.7, -1.2)
OLD = LOGP - vector(0.5, 0, -0.5, 0.22, 0.2, -0.8)
DRIFT = vector(0.05, -0.05, 0.1, 0, 0, 0.9)  # old_logp - sampler's
A6 = vector(1, 1, 1, 1, -1, -1)
CU = torch.tensor([0, 4, 6], dtype=torch.int32)
GOLDEN = {  # row, correction, weight of the tokens, loss, slopes
    "gmpo": ("gmpo", None, "mean", -0.062809, (0, -0.128807, -0.128807, -0.128807, 0.226209, 0)),
    "TIS": (
        "bnpo",
        CORRECTIONS["token_truncate"],
        "token",
        -0.210279,
        (0, -0.158538, -0.111720, 0, 0.203567, 0),
    ),
    "IcePop": (
        "bnpo",
        CORRECTIONS["token_mask"],
        "token",
        -0.476945,
        (0, -0.158538, -0.111720, 0, 0.203567, 0),
    ),
    "seq-mask": (
        "bnpo",
        replace(CORRECTIONS["sequence_mask"], low=0.5, high=2.0),
        "token",
        -0.737984,
        (0, -0.184195, -0.11172, 0, 0, 0),
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_vectors(case):
    """Hand-worked numbers that neither side of the other tests computed."""
    name, correction, how, loss, slopes = GOLDEN[case]
    weight = vector(*[1 / 6] * 6) if how == "token" else vector(*[1 / 8] * 4, *[1 / 4] * 2)
    tokens = Tokens(
        old_logp=OLD - DRIFT if correction else OLD, advantage=A6, weight=weight, cu_seqlens=CU, live=6
    )
    tokens = correction(tokens.with_(OLD, None)) if correction else tokens
    row = replace(ALGORITHMS[name], correction=correction)
    value, pull = torch.func.vjp(lambda x: row.loss(tokens.with_(x, None)), LOGP)
    assert value.item() == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(pull(torch.ones_like(value))[0], vector(*slopes), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "phi"),
    [(1, 1, 1), (0.5, 1, 1.12042), (2, 1, 0.19915), (2, -1, 1.08268), (1, -1, 1)],
)
def test_vespo_weights(ratio, advantage, phi):
    """Wrong implementations: k and lambda by the other sign; phi not normalised to 1 at 1; a geometric mean
    for the product.
    """
    zero = torch.zeros(2, dtype=F64)
    tokens = Tokens(
        old_logp=zero,
        advantage=vector(advantage, advantage),
        weight=zero,
        cu_seqlens=torch.tensor([0, 2]),
        live=2,
    )
    # the ratio before any update, and as a correction
    for split in (
        (math.log(ratio), 0.0),
        (0.0, math.log(ratio)),
    ):
        at = replace(tokens, correction=vector(math.exp(split[1]), 1.0)).with_(vector(split[0], 0), None)
        assert gamma_weight(at, ALGORITHMS["vespo"].surrogate).tolist() == pytest.approx([phi] * 2, abs=1e-5)


def test_stale_sequences_are_masked_only_where_the_advantage_is_negative():
    """Wrong implementations: the sign of the drift turned round; the sum for the mean; against the trainer
    instead of the recorded.
    """
    recorded = vector(-1, -1, -1, -1, -1, -1)
    tokens = Tokens(
        old_logp=recorded - 9,
        sampler_logp=recorded,
        advantage=vector(-1, -1, 1, 1, -1, -1),
        weight=recorded,
        cu_seqlens=torch.tensor([0, 2, 4, 6]),
        live=6,
        correction=vector(1, 2, 3, 4, 5, 6),
    ).with_(recorded - vector(0.9, 0.3, 0.9, 0.3, 0.4, 0.5), None)
    assert drop_stale(tokens, ALGORITHMS["grpo"].surrogate, threshold=0.5).tolist() == [0, 0, 3, 4, 5, 6]


def test_mismatch_of_parts_is_that_of_the_whole():
    """Wrong implementations: means of means; the largest of the last part; a k3 of the other direction; an
    ESS that is averaged.
    """
    row = ALGORITHMS["grpo"]
    b = rect([5, 1, 8], [1.0, -1.0, 1.0])
    parts = [
        mismatch(pack(b, row, part).with_(torch.cat([b.logp[i][b.mask[i]] for i in part]), None))
        for part in ([0], [2, 1])
    ]
    empty = mismatch(Tokens(old_logp=vector(), advantage=vector(), weight=vector()).with_(vector(), None))
    got = merge_mismatch(torch.stack([*parts, empty]))
    s = b.d[b.mask]
    w = s.exp()
    assert got == pytest.approx(
        {
            "sampler_diff_mean": s.abs().mean().item(),
            "sampler_diff_max": s.abs().max().item(),
            "sampler_kl": (w - 1 - s).mean().item(),
            "sampler_ess": (w.sum() ** 2 / (14 * w.square().sum())).item(),
            "correction_min": 1,
            "correction_mean": 1,
            "correction_max": 1,
        }
    )
    assert merge_mismatch(empty[None]) == {}


# --- advantages -------------------------------------------------------------------------------------
REWARDS = vector(0.2, 1, 0.5, 0.5, 0, 0, 0, 0, 1, 0, 0, 1)  # the second group all equal
LENGTHS = vector(3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8)


@pytest.mark.parametrize("name", RESTATED)
def test_advantages_restated(name):
    """Wrong implementations: whitening over samples instead of tokens; alpha by groups of one reward sign; a
    biased deviation; the group's mean left in the others' deviation.
    """
    R, L = REWARDS.view(3, 4), LENGTHS.view(3, 4)
    expected = RESTATED[name](R, L)
    expected[1] = expected[1] if "whiten" in name else 0  # where PyTorch's 0 / 0 is nan
    torch.testing.assert_close(
        ADVANTAGES[name](REWARDS, 4, LENGTHS).view(3, 4), expected, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("name", ADVANTAGES)
def test_unscored_and_equal_rewards(name):
    """Wrong implementations: None counted as 0; a group of one scored sample with its raw reward; rounding
    turned into a signal.
    """
    R = vector(0.3, math.nan, 0.7, 0.1, 0.1, math.nan, math.nan, math.nan, 0.1, 0.1, 0.1, 0.1)
    got = ADVANTAGES[name](R, 4, LENGTHS)
    assert got.isfinite().all() and not got[R.isnan()].any()
    assert (
        not ADVANTAGES[name](vector(*[0.1] * 4), 4).any()
        and not ADVANTAGES[name](vector(*[math.nan] * 4), 4).any()
    )
    if not ADVANTAGES[name].whole_batch:
        assert not got[4:].any()
        alone = ADVANTAGES[name](vector(0.3, 0.7, 0.1), 3)
        torch.testing.assert_close(got[torch.tensor([0, 2, 3])], alone, rtol=1e-10, atol=1e-12)


def test_whitened_advantages_sum_to_nothing_over_tokens():
    got = ADVANTAGES["whiten"](REWARDS, 1, LENGTHS)
    assert (got * LENGTHS).sum().abs() < 1e-10 and ADVANTAGES["whiten"].least == 1


@pytest.mark.parametrize("k", [2, 3, 4])
def test_max_at_k_is_an_unbiased_gradient_of_pass_at_k(k):
    """Over all outcomes of n = 4 tries of a coin of p = 0.3: E[sum A_i d log p(x_i)] = d pass@k / d theta, p
    = sigmoid(theta).

    Wrong implementation: a baseline that depends on the sample (the group's mean).
    """
    n, p = 4, 0.3
    advantage, gradient = ADVANTAGES["max_at_k"].with_params(k=k), 0.0
    for outcome in itertools.product((0.0, 1.0), repeat=n):
        chance = math.prod(p if x else 1 - p for x in outcome)
        gradient += chance * sum(
            a * (x - p) for a, x in zip(advantage(vector(*outcome), n).tolist(), outcome, strict=True)
        )
    assert gradient == pytest.approx(k * (1 - p) ** (k - 1) * p * (1 - p), rel=1e-10)
    R = torch.rand(3, 6, dtype=F64)
    torch.testing.assert_close(  # type: ignore[call-arg]
        advantage(R.flatten(), 6).view(3, 6), RESTATED["max_at_k"](R, R, k), rtol=1e-10, atol=1e-12
    )


def test_max_at_k_by_hand():
    """Two right of eight at k = 4: three of the other seven miss the other right one with 4/7, so each adds
    4/8 * 4/7 to pass@4, and the wrong ones nothing; of the whole group only the best adds what it is above
    the second.

    Wrong implementation: draws that may hold the sample twice.
    """
    right = ADVANTAGES["max_at_k"].with_params(k=4)(vector(1, 0, 0, 1, 0, 0, 0, 0), 8)
    assert right.tolist() == pytest.approx([2 / 7, 0, 0, 2 / 7, 0, 0, 0, 0])
    assert ADVANTAGES["max_at_k"](vector(0.2, 1, 0.5, 0.5), 4).tolist() == pytest.approx([0, 0.5, 0, 0])


def test_max_rl_refuses_negative_rewards():
    with pytest.raises(UserError, match=r"--advantage max_rl: expected rewards of 0 or more, got -1"):
        ADVANTAGES["max_rl"](vector(1, -1), 2)


def test_several_rewards():
    """GDPO: every reward normalised in its group, then the weighted sum whitened over the batch.

    Wrong implementations: weights applied before the deviation divides them away; None as 0; a whitening
    within the group.
    """
    parts = torch.stack([REWARDS, vector(5, 1, math.nan, 3, 2, 2, 2, 2, math.nan, 1, 2, 6)])
    parts[:, 8] = math.nan
    weight, zscore = vector(1, 0.5), ADVANTAGES["zscore"]
    total = (weight[:, None] * parts.nan_to_num(0)).sum(0)
    total[8] = math.nan
    got = COMBINE["sum_then_normalize"](parts, weight, zscore, 4, LENGTHS)
    torch.testing.assert_close(got, zscore(total, 4), rtol=1e-12, atol=0)
    each = []
    for part, w in zip(parts, weight, strict=True):
        for row in part.view(3, 4):
            known = row[~row.isnan()]
            each.append((w * (row - known.mean()) / (known.std() + 1e-4)).nan_to_num(0))
    x = torch.cat(each).view(2, 12).sum(0)
    known = torch.arange(12) != 8
    want = ((x - x[known].mean()) / (x[known].std() + 1e-4)).where(known, torch.zeros(12, dtype=F64))
    want[4:8] = 0  # equal in both: exactly nothing
    torch.testing.assert_close(
        COMBINE["normalize_then_sum"](parts, weight, zscore, 4, LENGTHS), want, rtol=1e-9, atol=1e-12
    )


# --- options ----------------------------------------------------------------------------------------
def chosen(**options: Any) -> Algorithm:
    return choose_algorithm(configured(Grpo, model="m", **options))


def test_options_reach_their_columns():
    """Wrong implementations: --epsilon that leaves the other bound; options applied before the preset; an
    upper bound for CISPO relative to 1; GMPO's sizes of log-ratios taken for bounds of ratios, or refused at
    1, where those end.
    """
    params = {
        name: dict(chosen(**options).surrogate.params)
        for name, options in {
            "both": {"epsilon": 0.1},
            "high": {"algorithm": "grpo", "epsilon_high": 0.3},
            "two": {"epsilon": 0.1, "epsilon_high": 0.3},
            "delta": {"delta": 2.0},
            "cispo": {"algorithm": "cispo", "epsilon_high": 2.0},
            "verl": {"semantics": "verl", "epsilon": 0.1},
        }.items()
    }
    inf = math.inf
    assert params == {
        "both": {"low": 0.1, "high": 0.1, "cap": inf},
        "high": {"low": 0.2, "high": 0.3, "cap": inf},
        "two": {"low": 0.1, "high": 0.3, "cap": inf},
        "delta": {"low": 0.2, "high": 0.2, "cap": 2.0},
        "cispo": {"low": 0.0, "high": 2.0},
        "verl": {"low": 0.1, "high": 0.1, "cap": 3.0},
    }
    log_units = chosen(algorithm="gmpo", epsilon=0.5, epsilon_high=1.5).surrogate.params
    assert [1 - log_units["low"], 1 + log_units["high"]] == pytest.approx([math.exp(-0.5), math.exp(1.5)])
    row = chosen(
        advantage="softmax", correction="token_truncate", correction_max=1.5, off_policy_mask_threshold=0.5
    )
    assert (row.advantage, row.correction, row.level) == (
        ADVANTAGES["softmax"],
        replace(CORRECTIONS["token_truncate"], high=1.5),
        "sequence",
    )
    assert (
        chosen(correction="token_mask").level == "token"
        and chosen(correction="sequence_mask").level == "sequence"
    )
    assert (
        chosen(scale_rewards="batch").advantage.whole_batch
        and chosen(scale_rewards="none").advantage.params["scale"] == "none"
    )
    assert chosen(algorithm="pass_at_k", pass_k=3).advantage.params == {"k": 3}
    assert chosen(algorithm="dapo", advantage="max_at_k", pass_k=3).advantage.params == {"k": 3}


REFUSED = [
    (
        {"algorithm": "rloo", "epsilon": 0.1},
        "--epsilon: rloo has no such option; take an --algorithm that has it: grpo, .*, max_rl",
    ),
    (
        {"algorithm": "cispo", "epsilon": 0.1},
        "--epsilon: cispo has no such option; take an --algorithm that has it: grpo, dr_grpo, .*",
    ),
    ({"algorithm": "sapo", "delta": 4.0}, "--delta: sapo has no such option"),
    ({"algorithm": "gmpo", "delta": 4.0}, "--delta: gmpo has no such option"),
    (
        {"delta": 1.1},
        r"--delta: cap: expected more than 1 \+ high = 1.2, got 1.1; give a larger one, or none",
    ),
    ({"epsilon": 0.0}, "--epsilon: expected a positive number, got 0"),
    (
        {"kl_coef": -0.1},
        "--kl-coef: expected a number of 0 or more; below 0 the policy would be driven away .*; got -0.1",
    ),
    ({"entropy_coef": math.inf}, "--entropy-coef: expected a finite number, got inf"),
    ({"kl": "k2"}, "--kl: k2 has no effect at --kl-coef 0; give --kl-coef, or leave --kl out"),
    ({"algorithm": "drgrpo"}, "--algorithm: expected one of grpo, .*; got 'drgrpo'; did you mean 'dr_grpo'"),
    (
        {"advantage": "bset"},
        "--advantage: expected one of zscore, center, .*; got 'bset'; did you mean 'best'",
    ),
    (
        {"advantage": "rank", "scale_rewards": "none"},
        "--scale-rewards: the advantage of grpo has no scale; take an --advantage that has one:",
    ),
    (
        {"pass_k": 2},
        "--pass-k: grpo has no such option; take .* has it: pass_at_k, any with --advantage max_at_k",
    ),
    (
        {"algorithm": "pass_at_k", "advantage": "zscore", "pass_k": 2},
        "--pass-k: only --advantage max_at_k has it",
    ),
    (
        {"algorithm": "pass_at_k", "pass_k": 1},
        r"--pass-k: expected 2 to --group \(8\), got 1; for 1 take --algorithm rloo",
    ),
    ({"correction": "tis"}, "--correction: expected one of token_truncate, .*; got 'tis'"),
    (
        {"correction_max": 2.0},
        "--correction-min, --correction-max: expected a --correction to bound, got none",
    ),
    (
        {"correction": "token_mask", "correction_max": 0.1},
        "--correction-min, --correction-max: expected 0 <= min < max, got 0.5 and 0.1",
    ),
    (
        {"algorithm": "vespo", "correction": "sequence_mask"},
        "--correction: vespo sums .* take token_truncate or token_mask",
    ),
    (
        {"off_policy_mask_threshold": 0.0},
        "--off-policy-mask-threshold: expected a positive number of nats per token, got 0",
    ),
    ({"semantics": "tlr"}, "--semantics: expected one of paper, trl, verl, nemo; got 'tlr'"),
    (
        {"semantics": "verl", "algorithm": "luspo"},
        "--semantics: verl has no luspo; leave it out, or take one of its own: grpo, .*, gpg",
    ),
    (
        {"semantics": "nemo", "kl": "k2", "kl_coef": 0.1},
        "--kl: expected an estimator of --semantics nemo: k3; got k2",
    ),
    (
        {"semantics": "trl", "kl": "k1", "kl_coef": 0.1},
        "--kl: expected an estimator of --semantics trl: k3, k3_is; got k1",
    ),
]


@pytest.mark.parametrize(
    ("options", "message"), REFUSED, ids=lambda x: ",".join(x) if isinstance(x, dict) else ""
)
def test_options_that_do_not_go_together_are_refused(options, message):
    """Wrong implementation: an option that is silently ignored."""
    with pytest.raises(UserError, match=message):
        chosen(**options)
