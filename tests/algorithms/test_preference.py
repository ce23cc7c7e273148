"""The table of preference losses: each row is its equation, in value and gradient, alone and through model,
packing and micro-batches.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from configs import configured
from preferences import BASELINE, EQUATIONS, LABELLED, Side, nls, ours, packed, random_side, restated
from runs import decoder, drift, gradient, learner_of, logp, relative
from torch import Tensor

from fastrl.algorithms.preference import PREFERENCES, Preference, Scores
from fastrl.batch.types import Batch
from fastrl.config import Dpo
from fastrl.config.dpo import TRL_NAMES
from fastrl.data.encode import Sample
from fastrl.data.pairs import LabelledSample, Unit
from fastrl.errors import UserError
from fastrl.kernels._chunks import LOGITS_BYTES
from fastrl.methods.dpo.batches import pack_units
from fastrl.methods.dpo.objective import UnitObjective
from fastrl.methods.dpo.options import choose_preference
from fastrl.train.learner import Learner

F64 = torch.float64
CHOSEN, REJECTED = (5, 1, 3, 8), (2, 7, 3, 1)  # tokens
GOOD = (True, False, False, True)


def row_of(name: str) -> Preference:
    row = PREFERENCES[name]
    return row.with_params(baseline=BASELINE) if row.mismatched else row


# --- the equations ----------------------------------------------------------------------------------
def test_every_row_has_its_equation():
    assert EQUATIONS.keys() | LABELLED.keys() == PREFERENCES.keys()
    assert {n for n, row in PREFERENCES.items() if not row.paired} == LABELLED.keys()


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0], ids=["policy is the reference", "near", "far"])
@pytest.mark.parametrize("name", PREFERENCES)
def test_a_row_is_its_equation(name, spread):
    """Wrong implementations: sums for means or means for sums; chosen and rejected swapped; robust DPO for
    cDPO; a margin inside beta; a penalty with the other sign; the reference in a row that has none; the tail
    counted from the longer side.
    """
    row = row_of(name)
    if row.paired:
        sides = [random_side(CHOSEN, spread), random_side(REJECTED, spread)]
        got, want = ours(row, sides), restated(EQUATIONS[name], sides)
    else:
        sides = [random_side(CHOSEN, spread)]
        got, want = ours(row, sides, GOOD), restated(LABELLED[name], sides, torch.tensor(GOOD))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PREFERENCES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_extreme_inputs_stay_finite(name, dtype):
    """Margins of hundreds of nats either way, and completions of probability 1 (log-prob 0, where ORPO's odds
    are infinite).

    Wrong implementations: log(sigmoid(x)) of two calls, log(1 - p) of p = 1, exp() without a bound.
    """
    row = row_of(name)
    for c, r in ((-1e-9, -400.0), (-400.0, -1e-9), (0.0, 0.0), (0.0, -3.0), (-3.0, 0.0)):
        one = [
            Side(
                torch.full((1, 2), x, dtype=dtype),
                torch.full((1, 2), -1.0, dtype=dtype),
                torch.ones(1, 2, dtype=torch.bool),
            )
            for x in (c, r)
        ]
        loss, grad = ours(row, one if row.paired else one[:1], (True, False))
        assert torch.isfinite(loss) and torch.isfinite(grad).all(), (c, r)
        assert loss.dtype == dtype


# beta 0.1 unless said: log-ratios .5 and -.3, log-probs -3.8 and -1.9, lengths 4 and 2 -> loss, derivatives
# by the two
GOLDEN = {
    "dpo": ({}, 0.653947, (-0.048001, 0.048001)),
    "cdpo": ({}, 0.661947, (-0.038001, 0.038001)),
    "robust": ({}, 0.643947, (-0.060501, 0.060501)),
    "hinge": ({}, 0.92, (-0.1, 0.1)),
    "ipo": ({}, 22.325625, (-2.3625, 4.725)),
    "dpo_norm": ({"beta": 2.0}, 0.455492, (-0.182932, 0.365864)),
    "apo_zero": ({}, 0.980003, (-0.024984, 0.024994)),
    "apo_down": ({}, 0.992508, (0.000024, 0.02496)),
    "bco": ({"beta": 0.1}, 1.346719, (-0.04875, 0.04925)),
    "nca": ({"beta": 0.1}, 1.366819, (-0.023125, 0.024625)),
    "sppo": ({"beta": 0.1}, 42.34, (-9.0, 9.4)),
    "exo": ({}, 2.623969, (-0.170396, 0.170396)),
    "discopop": ({"beta": 0.1}, 0.877901, (-0.009628, 0.009628)),
    "simpo": ({}, 1.313262, (-0.365529, 0.731059)),
    "orpo": ({}, 1.019315, (-0.270383, 0.040766)),
    "cpo": ({}, 1.742653, (-0.304736, 0.054736)),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_hand_worked_vectors(name):
    params, loss, slopes = GOLDEN[name]
    row = PREFERENCES[name].with_params(**params)
    score, logp = (torch.tensor(x, dtype=F64, requires_grad=True) for x in ((0.5, -0.3), (-3.8, -1.9)))
    seen = score if row.reference else logp
    length = torch.tensor((4.0, 2.0), dtype=F64)
    value = row.per_unit(Scores(seen, logp, length, torch.tensor((True, False)), torch.ones(2)))
    assert value.item() == pytest.approx(loss, abs=1e-6)
    assert torch.autograd.grad(value.sum(), seen)[0].tolist() == pytest.approx(slopes, abs=1e-6)


def test_hand_worked_kto():
    """z0 = 0.2: desirable .492501, undesirable .487503, and no gradient through the baseline."""
    score = torch.tensor((0.5, -0.3), dtype=F64, requires_grad=True)
    row = PREFERENCES["kto"].with_params(baseline=0.2, desirable_weight=2.0)
    value = row.per_unit(Scores(score, score, torch.ones(2), torch.tensor((True, False)), torch.ones(2)))
    assert value.tolist() == pytest.approx([2 * 0.492501, 0.487503], abs=2e-6)
    assert torch.autograd.grad(value.sum(), score)[0].tolist() == pytest.approx(
        [-2 * 0.024994, 0.024984], abs=2e-6
    )


@pytest.mark.parametrize(
    ("name", "loss"), [("dpo", math.log(2)), ("ipo", 25.0), ("apo_zero", 1.0), ("bco", 2 * math.log(2))]
)
def test_at_the_reference(name, loss):
    """The first step's loss; DPO's gradient there is -beta/2 per token of the chosen side, beta/2 of the
    rejected one.
    """
    sides = [random_side(CHOSEN, 0.0), random_side(REJECTED, 0.0)]
    value, grad = ours(PREFERENCES[name], sides)
    assert value.item() == pytest.approx(loss, abs=1e-12)
    if name == "dpo":
        assert (
            grad.abs().tolist() == pytest.approx([0.05 / 4] * grad.numel()) and grad[: CHOSEN[0]].lt(0).all()
        )


def test_the_best_policy_of_a_bandit_is_the_closed_form():
    """Infinite data from a Bradley-Terry judge over five answers: DPO ends at pi = ref exp(r / beta) / Z.

    Wrong implementations: a loss that saturates, beta on the wrong side, a margin of logits for log-ratios.
    """
    reward, ref, beta = (
        torch.tensor((1.0, 0.2, -0.5, 0.0, 0.7), dtype=F64),
        torch.randn(5, dtype=F64).log_softmax(0),
        0.5,
    )
    theta = torch.zeros(5, dtype=F64, requires_grad=True)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    wins = torch.tensor([torch.sigmoid(reward[i] - reward[j]) for i, j in pairs], dtype=F64)
    row = PREFERENCES["dpo"].with_params(beta=beta)
    solver = torch.optim.LBFGS(
        [theta], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        rho = theta.log_softmax(0) - ref
        each = row.per_unit(
            Scores(rho[torch.tensor(pairs).view(-1)], rho, torch.ones(1), torch.ones(1), torch.ones(1))
        )
        loss = (wins * each).mean()
        loss.backward()
        return loss

    solver.step(closure)
    assert torch.allclose(theta.log_softmax(0), (ref + reward / beta).log_softmax(0), atol=1e-6)


# --- through the model ------------------------------------------------------------------------------
def sample(prompt: list[int], completion: list[int]) -> Sample:
    return Sample(prompt + completion, [False] * len(prompt) + [True] * len(completion))


PAIRS: list[Unit] = [
    (LabelledSample(sample([3, 4, 5], [6, 7, 1]), True), LabelledSample(sample([3, 4, 5], [8, 1]), False)),
    (LabelledSample(sample([9], [10, 11, 12, 13, 1]), True), LabelledSample(sample([9], [14, 1]), False)),
    (
        LabelledSample(sample([15, 16], [1]), True),
        LabelledSample(sample([15, 16], [17, 18, 19, 20, 1]), False),
    ),
    (
        LabelledSample(sample([21, 22, 23, 24], [25, 26, 1]), True),
        LabelledSample(sample([21, 22, 23, 24], [27, 28, 1]), False),
    ),
]


def a_batch(row: Preference, units: list[Unit] = PAIRS) -> Batch:
    """The pairs, or their completions one by one, with a reference model's log-probs; float64."""
    units = units if row.paired else [(one,) for unit in units for one in unit]
    batch = pack_units(units, len(units), torch.device("cpu"))
    other = decoder(seed=1)
    baseline = torch.full(batch.mask.shape, BASELINE, dtype=F64) if row.mismatched else None
    return replace(
        batch,
        ref_logp=logp(other, batch, 1.0).double(),
        baseline=baseline,
        weight=batch.weight.double(),
    )


def a_learner(row: Preference, micro_tokens: int = 10**6) -> Learner[Batch]:
    model = decoder(dtype=F64)
    drift(model, 0.02)
    return learner_of(UnitObjective(model, row), model, micro_tokens)


@pytest.mark.parametrize("name", PREFERENCES)
def test_through_the_model_it_is_the_equation_on_padded_sequences(name, monkeypatch):
    """Wrong implementations: a prompt's tokens in the loss, a shift by one token, sequences that see each
    other, a pair cut by a micro-batch, denominators of the micro-batch, a pair's order lost in it.
    """
    row = PREFERENCES[name]
    batch = a_batch(row)
    trained = a_learner(row)
    model, ends = trained.objective.model, batch.cu_seqlens.tolist()
    rows, refs = [], []
    for a, b in pairwise(ends):  # each sequence alone, with the whole softmax
        logp = (
            (model(batch.tokens[a:b]) @ model.head_weight.T)
            .log_softmax(-1)[:-1]
            .gather(1, batch.tokens[a + 1 : b, None])
            .squeeze(1)
        )
        live = batch.mask[a + 1 : b]
        rows.append(logp[live])
        refs.append(batch.ref_logp[a + 1 : b][live])
    logp, ref = (
        torch.nn.utils.rnn.pad_sequence(x, batch_first=True, padding_value=-1.0) for x in (rows, refs)
    )
    mask = torch.arange(logp.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
    if row.paired:
        loss = EQUATIONS[name](*(Side(logp[i::2], ref[i::2], mask[i::2]) for i in (0, 1))).mean()
    else:
        loss = LABELLED[name](Side(logp, ref, mask), torch.tensor([True, False] * 4)).mean()
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    metrics, got = gradient(trained, batch)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-10) and relative(got, want) < 1e-10
    monkeypatch.setitem(LOGITS_BYTES, "cpu", 4 * 31 * 3)
    cut, h = gradient(a_learner(row, micro_tokens=14), batch)
    assert relative(h, got) < 1e-12 and cut == pytest.approx(metrics, rel=1e-12, abs=1e-14)
    order = [4, 5, 0, 1, 6, 7, 2, 3] if row.paired else [5, 2, 0, 7, 1, 3, 6, 4]
    moved, g = gradient(a_learner(row), batch.select(order))
    assert relative(g, got) < 1e-12 and moved == pytest.approx(metrics, rel=1e-12, abs=1e-14)


def test_swapped_sides_are_another_loss():
    row = PREFERENCES["dpo"]
    batch = a_batch(row)
    swapped = [i ^ 1 for i in range(8)]
    (a, _), (b, _) = gradient(a_learner(row), batch), gradient(a_learner(row), batch.select(swapped))
    assert abs(a["loss"] - b["loss"]) > 1e-3


def test_metrics_under_trls_names():
    """Wrong implementations: rewards without beta, per token, or of padded rows; accuracy of the log-probs;
    means over micro-batches.
    """
    row = PREFERENCES["dpo"]
    sides = [random_side(CHOSEN, 0.5), random_side(REJECTED, 0.5)]
    tokens, logp = packed(sides, (True, False), 4)
    entropy = torch.rand(logp.shape, dtype=F64)
    got = row.merge([row.measure(tokens.with_(logp, entropy)).tolist()])
    w, r = sides
    assert got == pytest.approx(
        {
            "num_tokens": sum(CHOSEN) + sum(REJECTED),
            "entropy": entropy.mean().item(),
            "nll_loss": (-w.s / w.n).mean().item(),
            "rewards/chosen": 0.1 * w.rho.mean().item(),
            "rewards/rejected": 0.1 * r.rho.mean().item(),
            "rewards/margins": 0.1 * (w.rho - r.rho).mean().item(),
            "rewards/accuracies": (w.rho > r.rho).double().mean().item(),
            "logps/chosen": w.s.mean().item(),
            "logps/rejected": r.s.mean().item(),
        }
    )


def test_a_step_without_good_examples_reports_no_mean_of_them():
    """Wrong implementation: a mean over nothing written as 0."""
    row = row_of("kto")
    tokens, logp = packed([random_side((2, 3), 0.5)], (False, False), 2)
    got = row.merge([row.measure(tokens.with_(logp, None)).tolist()])
    assert (
        "rewards/rejected" in got
        and not {"rewards/chosen", "rewards/margins", "logps/chosen", "nll_loss"} & got.keys()
    )


# --- options ----------------------------------------------------------------------------------------
def test_options_change_a_row():
    """Wrong implementations: an option of 0 taken for none; TRL's names unknown;
    a row changed for everybody.
    """
    row = choose_preference(configured(Dpo, model="m", algorithm="simpo", beta=2.5, gamma=0.0, nll_coef=0.2))
    assert (dict(row.params), row.nll) == ({"beta": 2.5, "gamma": 0.0}, 0.2) and PREFERENCES["simpo"].params[
        "gamma"
    ] == 1.0
    assert choose_preference(configured(Dpo, model="m", algorithm="orpo", nll_coef=0.0)).nll == 0
    assert all(
        choose_preference(configured(Dpo, model="m", algorithm=theirs)) == PREFERENCES[name]
        for theirs, name in TRL_NAMES.items()
    )
    x = torch.tensor([0.7, -0.2], dtype=F64)
    scores = Scores(x, x, torch.ones(2), torch.tensor((True, False)), torch.ones(2))
    assert choose_preference(configured(Dpo, model="m", beta=0.5)).per_unit(scores).item() == pytest.approx(
        nls(0.5 * (x[0] - x[1])).item()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "dppo"}, "--algorithm: expected one of dpo, cdpo, .*; got 'dppo'; did you mean"),
        (
            {"gamma": 1.0},
            "--gamma: dpo has no such option; take an --algorithm that has it: simpo",
        ),
        ({"label_smoothing": 0.1}, "--label-smoothing: dpo has no such .*: cdpo, robust, exo"),
        (
            {"algorithm": "robust", "label_smoothing": 0.5},
            "--label-smoothing: expected a share above 0 and below 0.5, got 0.5",
        ),
        ({"beta": 0.0}, "--beta: expected a positive number, got 0"),
        ({"beta": math.nan}, "--beta: expected a positive number, got nan"),
        (
            {"algorithm": "kto", "nll_coef": 1.0},
            "--nll-coef: kto has no such .*: dpo, .*, orpo",
        ),
        ({"nll_coef": -1.0}, "--nll-coef: expected a number of 0 or more, got -1"),
        (
            {"reference": "none"},
            "--reference: dpo compares with a reference model; take precomputed or live, or .*: "
            "simpo, cpo, orpo",
        ),
        (
            {"algorithm": "simpo", "reference": "live"},
            "--reference: simpo has no reference model; leave it out, or take none",
        ),
        (
            {"algorithm": "kto", "reference": "precomputed"},
            "--reference: kto pairs each prompt .*; take live",
        ),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        choose_preference(configured(Dpo, model="m", **options))


def test_whole_sequences_and_a_reference_are_asked_for():
    """Wrong implementation: a chunk that cuts a sequence, or a missing reference, gives some other loss."""
    tokens, logp = packed([random_side(CHOSEN, 0.5), random_side(REJECTED, 0.5)], (True, False), 4)
    with pytest.raises(ValueError, match='evaluate the loss with level="sequence"'):
        PREFERENCES["dpo"].loss(replace(tokens, cu_seqlens=None).with_(logp, None))
    with pytest.raises(ValueError, match="ref_logp: expected the reference model's log-probs, got None"):
        PREFERENCES["dpo"].loss(replace(tokens, ref_logp=None).with_(logp, None))
