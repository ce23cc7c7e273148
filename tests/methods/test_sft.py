"""Options of supervised fine-tuning: label smoothing, z-loss, NEFTune, weights of lines; against whole
softmaxes in float64.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from runs import (
    DEMONSTRATIONS,
    assert_same_run,
    decoder,
    demonstrations,
    gradient,
    learner_of,
    lines,
    relative,
    sft,
    straight_and_resumed,
    tokenizer,
)
from torch import Tensor

import fastrl.trainer
from fastrl.batch.types import Batch
from fastrl.config import Eval, Sft
from fastrl.data.encode import Sample
from fastrl.errors import UserError
from fastrl.methods.sft.batches import DemonstrationEncoder, Demonstrations
from fastrl.methods.sft.batches import demonstrations as load_demonstrations
from fastrl.methods.sft.objective import SupervisedObjective, neftune_noise, noise_key
from fastrl.methods.sft.options import choose_supervised
from fastrl.model.decoder import Decoder
from fastrl.parallel.world import World
from fastrl.train.learner import Learner
from fastrl.train.objective import PolicyObjective

F64 = torch.float64


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing the plots takes longer than these runs."""
    monkeypatch.setattr(fastrl.trainer.report, "build", lambda folder: None)


def trained(model: Decoder, micro_tokens: int = 10**6, **options: float) -> Learner[Batch]:
    row = choose_supervised(Sft(model="m", seed=3, **options))
    plain = PolicyObjective(model, row.policy)
    return learner_of(SupervisedObjective(plain, row) if options else plain, model, micro_tokens)


def from_config(config: Sft, task: Any = None) -> Any:
    """What the options name to imitate: indices -> samples."""
    return load_demonstrations(DemonstrationEncoder(config, tokenizer(), 48, 31), task)[0]


def restated(
    model: Decoder, batch: Batch, smoothing: float = 0.0, z: float = 0.0, noise: Any = None
) -> Tensor:
    """Each sequence alone, through all its logits; the mean over loss tokens, weighed as the batch says."""
    total = torch.zeros((), dtype=F64)
    for i, (a, b) in enumerate(pairwise(batch.cu_seqlens.tolist())):
        tokens, live = batch.tokens[a:b], batch.mask[a + 1 : b]
        x = model.embed(tokens)
        x = x if noise is None else x + noise(i, b - a, x.shape[1])
        logits = (model(tokens, embeds=x) @ model.head_weight.T)[:-1]
        logp, lse = logits.log_softmax(-1), logits.logsumexp(-1)
        target = torch.full_like(logp, smoothing / logp.shape[1])
        target.scatter_add_(1, tokens[1:, None], torch.full_like(logp[:, :1], 1 - smoothing))
        each = -(target * logp).sum(1) + z * lse.square()
        total = total + (each * batch.weight[a + 1 : b])[live].sum()
    return total


def against(learner: Learner[Batch], batch: Batch, want: Tensor) -> None:
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(want, learner.weights.weights)])
    metrics, got = gradient(learner, batch)
    assert metrics["loss"] == pytest.approx(want.item(), rel=1e-6) and relative(got, exact) < 1e-6


@pytest.mark.parametrize(("smoothing", "z"), [(0.1, 0.0), (0.0, 0.02), (0.2, 0.01)])
def test_smoothing_and_z_loss_are_their_equations(smoothing, z):
    """Wrong implementations: the rest spread over the other V - 1 tokens; lse for lse^2; masked tokens in the
    z-loss; a mean over a micro-batch.
    """
    model, batch = decoder(dtype=F64), demonstrations().collect(0, 0).batches[0]
    learner = trained(model, 6, label_smoothing=smoothing, z_loss=z)
    against(learner, batch, restated(model, batch, smoothing, z))
    entropy = gradient(learner, batch)[0]["entropy"]
    assert entropy == pytest.approx(gradient(trained(model), batch)[0]["entropy"], rel=1e-6), (
        "statistics are of the plain distribution"
    )


def test_uniform_logits_by_hand():
    """V = 31 equal logits of 0: ln V whatever the smoothing, and z ln^2 V on top."""
    model = decoder(dtype=F64)
    with torch.no_grad():
        model.norm.zero_()
    batch = demonstrations().collect(0, 0).batches[0]
    assert gradient(trained(model, label_smoothing=0.3, z_loss=0.5), batch)[0]["loss"] == pytest.approx(
        math.log(31) + 0.5 * math.log(31) ** 2, rel=1e-6
    )


def test_no_option_is_the_plain_learner():
    model, batch = decoder(), demonstrations().collect(0, 0).batches[0]
    (a, g), (b, h) = (gradient(t, batch) for t in (trained(model), trained(model, neftune_alpha=0.0)))
    assert a == b and torch.equal(g, h)


# --- NEFTune --------------------------------------------------------------------------------------------
def test_noise_is_that_of_the_paper():
    """alpha = 5, L = 100, D = 64 is 0.0625.  Wrong implementations: normal noise; a bound by L alone; the
    same noise at every step.
    """
    noise = neftune_noise(100, 64, 5.0, noise_key(0, 1, 2), torch.device("cpu"))
    assert noise.shape == (100, 64) and 0.0624 < noise.abs().max() <= 0.0625
    assert float(noise.mean()) == pytest.approx(0, abs=1e-3) and float(noise.std()) == pytest.approx(
        0.0625 / 3**0.5, rel=0.02
    )
    assert torch.equal(noise, neftune_noise(100, 64, 5.0, noise_key(0, 1, 2), torch.device("cpu")))
    others = [
        neftune_noise(100, 64, 5.0, noise_key(*key), torch.device("cpu"))
        for key in ((1, 1, 2), (0, 2, 2), (0, 1, 3), (1, 0, 2))
    ]
    assert not any(torch.equal(noise, other) for other in others)


def at_step(batch: Batch, step: int) -> Batch:
    """The batch of all demonstrations with the keys that seed 3 has at `step`."""
    keys = torch.tensor([noise_key(3, step, place) for place in range(len(batch))])
    return replace(batch, number=keys.repeat_interleave(batch.cu_seqlens.diff().long()))


def test_a_step_with_noise_is_its_equation_however_it_is_cut():
    """Wrong implementations: noise by the place in the micro-batch; the padded length for L; noise on hidden
    states; prompts left out.
    """
    model, batch = decoder(dtype=F64), demonstrations().collect(0, 0).batches[0]
    learner = trained(model, 6, neftune_alpha=8.0)
    batch = at_step(batch, 4)

    def noise(i: int, length: int, width: int) -> Tensor:
        return neftune_noise(length, width, 8.0, noise_key(3, 4, i), torch.device("cpu")).double()

    against(learner, batch, restated(model, batch, noise=noise))
    backwards = batch.select([2, 1, 0])
    whole = trained(model, neftune_alpha=8.0)
    assert relative(gradient(whole, backwards)[1], gradient(learner, batch)[1]) < 1e-12
    backwards = at_step(batch, 5).select([2, 1, 0])
    assert relative(gradient(whole, backwards)[1], gradient(learner, batch)[1]) > 1e-3


def test_places_are_of_the_step_in_any_process():
    """Wrong implementation: numbers that begin again in each process, so that two sequences get one noise."""
    parts = [demonstrations(World(rank, 2)) for rank in range(2)]
    for part in parts:
        part.world = type("Alone", (World,), {"sum": lambda self, *x: list(x)})(part.world.rank, 2)
    numbers = [part.collect(0, 0).batches[0].number for part in parts]
    assert torch.cat(numbers).unique().tolist() == [0, 1, 2]
    assert demonstrations().collect(0, 0).batches[0].number.unique_consecutive().tolist() == [0, 1, 2]


def test_consecutive_steps_go_through_the_whole_data():
    """Wrong implementation: a step that begins one line after the last began, so that lines come again."""
    taken: list[int] = []

    def items(some: Any) -> list[Sample]:
        taken.extend(some)
        return [DEMONSTRATIONS[i % len(DEMONSTRATIONS)] for i in some]

    policy = choose_supervised(Sft(model="m")).policy
    source = Demonstrations(
        items, 6, count=2, algorithm=policy, seed=0, device=torch.device("cpu"), world=World()
    )
    for step in range(3):
        source.collect(step, 0)
    assert sorted(taken) == list(range(6))


# --- weights --------------------------------------------------------------------------------------------
def weighed(weights: list[float], samples: list[Sample] = DEMONSTRATIONS, weighted: bool = True) -> Batch:
    rows = [Sample(s.tokens, s.mask, w) for s, w in zip(samples, weights, strict=True)]
    source = Demonstrations(
        lambda some: [rows[i] for i in sorted(some)],
        len(rows),
        count=len(rows),
        algorithm=choose_supervised(Sft(model="m")).policy,
        seed=0,
        device=torch.device("cpu"),
        world=World(),
        weighted=weighted,
    )
    return source.collect(0, 0).batches[0]


def test_a_weight_of_two_is_the_line_twice_and_of_zero_is_none():
    """Wrong implementations: weights not in the denominator; a mean of each line's mean; a line of weight 0
    counted as tokens.
    """
    model, few = decoder(dtype=F64), DEMONSTRATIONS
    ones = weighed([1.0] * 4, [few[0], few[1], few[1], few[2]])
    a, g = gradient(trained(model), weighed([1.0, 2.0, 1.0]))
    b, h = gradient(trained(model), ones)
    assert relative(g, h) < 1e-6 and a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    a, g = gradient(trained(model), weighed([0.5, 0.0, 0.5]))
    b, h = gradient(trained(model), weighed([1.0, 1.0], [few[0], few[2]]))
    assert relative(g, h) < 1e-6 and a["num_tokens"] == b["num_tokens"] == sum(
        sum(few[i].mask) for i in (0, 2)
    )
    assert torch.equal(weighed([1.0, 2.0, 1.0], weighted=False).weight, weighed([1.0] * 3).weight)
    assert gradient(trained(model), weighed([0.0] * 3))[0]["num_tokens"] == 0


def test_weights_come_from_a_column(tmp_path):
    data = tmp_path / "d.jsonl"
    rows = [{"prompt": "7", "completion": "8", "weight": w} for w in (0, 2, 0.5)]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = Sft(model="m", dataset=str(data), sample_weights=True)
    assert [s.weight for s in from_config(config)([0, 1, 2])] == [0.0, 2.0, 0.5]
    for bad in (-1, "2", True, None):
        data.write_text(json.dumps({"prompt": "7", "completion": "8", "weight": bad}) + "\n")
        with pytest.raises(UserError, match=r"d.jsonl:1: weight: expected a number of 0 or more, got"):
            from_config(config)
        assert from_config(Sft(model="m", dataset=str(data)))([0])[0].weight == 1


# --- runs -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing": 1.0}, "--label-smoothing: expected a share in .0, 1., got 1.0"),
        ({"z_loss": -1.0}, "--z-loss: expected a number of 0 or more"),
        ({"neftune_alpha": math.nan}, "--neftune-alpha: expected a number of 0 or more"),
        ({"sample_weights": True}, "--sample-weights: expected a --dataset with a weight column, got none"),
        (
            {"exact": True, "z_loss": 1e-3},
            "--exact: --label-smoothing and --z-loss sum a vocabulary in an order .*; leave one out",
        ),
    ],
)
def test_options_out_of_range_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        choose_supervised(Sft(**{"model": "m"} | changes))


def test_a_run_with_all_of_them_resumes_bit_for_bit(tmp_path, monkeypatch):
    """Wrong implementation: noise from a generator whose state a checkpoint does not have."""
    changes = {"steps": 6, "neftune_alpha": 5.0, "label_smoothing": 0.1, "z_loss": 1e-3, "eval": Eval()}
    straight, resumed = straight_and_resumed(monkeypatch, sft, tmp_path, 3, **changes)
    assert_same_run(straight.output_dir, resumed.output_dir, 6)
    assert all(math.isfinite(row["loss"]) for row in lines(resumed.output_dir))
