"""`fastrl dpo` end to end: where its pairs and its reference come from, and that it learns, resumes, and is
the same on two processes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    assert_same_run,
    decoder,
    dpo,
    gradient,
    learner_of,
    leave_gradient,
    lines,
    relative,
    state,
    straight_and_resumed,
    tokenizer,
    write_model,
)
from torch import Tensor

import fastrl.methods.dpo.reference
import fastrl.report.report
import fastrl.trainer
from fastrl import cli
from fastrl.algorithms.preference import PREFERENCES
from fastrl.config import AlgorithmChoice, Dpo, Eval, Optim, Sft
from fastrl.config.parse import load
from fastrl.data.encode import Sample
from fastrl.data.pairs import LabelledSample, Unit
from fastrl.errors import UserError
from fastrl.methods.dpo.batches import Baseline, Preferences, mismatched, pack_units
from fastrl.methods.dpo.objective import UnitObjective
from fastrl.methods.dpo.reference import FILE, drawn, precompute
from fastrl.model.decoder import Decoder
from fastrl.parallel.world import World
from fastrl.report.plots import Picture
from fastrl.tasks import Cards
from fastrl.train.learner import Learner
from fastrl.train.objective import batch_logp
from fastrl.train.source import order
from fastrl.trainer import train

CPU = torch.device("cpu")


@pytest.fixture
def no_report(monkeypatch):
    """Drawing the plots takes longer than these runs."""
    monkeypatch.setattr(fastrl.trainer.report, "build", lambda folder: None)


def units(n: int, single: bool = False) -> list[Unit]:
    """Pairs whose prompts and completions have different lengths; or examples, every third of them good."""
    made: list[Unit] = []
    for i in range(n):
        prompt, sides = [3 + i] * (1 + i % 3), ([10 + i, 1], [20 + i % 7] * (1 + i % 4) + [1])
        both = [
            LabelledSample(Sample(prompt + c, [False] * len(prompt) + [True] * len(c)), good)
            for c, good in zip(sides, (True, False), strict=True)
        ]
        made.append((LabelledSample(both[i % 2].sample, i % 3 == 0),) if single else (both[0], both[1]))
    return made


# --- the run ----------------------------------------------------------------------------------------
def test_a_run_and_its_report(tmp_path, monkeypatch):
    """Wrong implementations: a first loss that is not ln 2; metrics missing; a loss called cross-entropy in
    the report; a reference that is trained along; log-probs of the reference computed again although they are
    in the folder.
    """
    # drawn in test_report.py
    monkeypatch.setattr(fastrl.report.report, "lines", lambda *args, title, **kwargs: Picture("", title, ""))
    result = train(dpo(tmp_path))
    run = Path(tmp_path, "run")
    rows = [r for r in lines(run) if "loss" in r]
    assert 0.69314 < rows[0]["loss"] < 0.69316 and abs(rows[0]["rewards/margins"]) < 1e-6
    names = {
        "loss",
        "num_tokens",
        "grad_norm",
        "learning_rate",
        "entropy",
        "nll_loss",
        "logps/chosen",
        "logps/rejected",
    }
    assert rows[-1].keys() == names | {"step"} | {
        f"rewards/{x}" for x in ("chosen", "rejected", "margins", "accuracies")
    }
    assert result.steps == 12 and {"eval/accuracy_greedy", "eval/well_formed"} <= lines(run)[0].keys()
    assert all(
        r["rewards/margins"] == pytest.approx(r["rewards/chosen"] - r["rewards/rejected"]) for r in rows
    )
    page = (run / "report.html").read_text()
    assert "Preference loss" in page and "Pairs ranked right" in page and "Cross-entropy" not in page
    assert (run / FILE).is_file()


@pytest.mark.parametrize("reference", ["precomputed", "live"])
def test_in_exact_mode_the_first_margin_is_exactly_zero(reference, tmp_path, no_report):
    """Policy and reference have the same bits, although they were packed with other pairs.

    Wrong implementation: the reference is computed outside exact mode."""
    train(dpo(tmp_path, exact=True, reference=reference, steps=1, prompts=9, eval=Eval()))
    (row,) = lines(tmp_path / "run")
    assert row["rewards/chosen"] == row["rewards/rejected"] == row["rewards/margins"] == 0
    assert row["rewards/accuracies"] == 0, (
        "as in TRL, a tie is not won: no pair's rewards differ, not even by rounding"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reference": "live", "algorithm": "ipo", "dtype": "bfloat16"},
        {"algorithm": "kto"},
        {"algorithm": "simpo"},
    ],
    ids=["dpo", "ipo-live-bfloat16", "kto", "simpo"],
)
def test_a_run_resumed_is_the_run(changes, tmp_path, monkeypatch, no_report):
    """Wrong implementations: a reference made of the resumed weights;
    pairs or mismatches that begin again.
    """
    straight, resumed = straight_and_resumed(monkeypatch, dpo, tmp_path, 4, steps=8, eval=Eval(), **changes)
    assert_same_run(straight.output_dir, resumed.output_dir, 8)
    first, last = (state(Path(resumed.output_dir, f"checkpoints/step_{n}")) for n in (4, 8))
    assert all(not torch.equal(first[k], last[k]) for k in first if k.startswith("trainer")), (
        "it went on training"
    )


def test_resumed_without_its_file_it_computes_the_reference_of_the_start(tmp_path, monkeypatch, no_report):
    """Wrong implementation: the reference of a run that lost its file is the checkpoint that it resumes
    at.
    """
    stopped, straight = (dpo(tmp_path, name, steps=4, eval=Eval()) for name in ("stopped", "straight"))
    train(straight)
    real = Learner.update

    def once(self: Learner, batch: Any, step: int) -> dict[str, float]:
        if step == 2:
            raise UserError("stopped")
        return real(self, batch, step)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", once)
        with pytest.raises(UserError, match="stopped"):
            train(replace(stopped, save=replace(stopped.save, every=2)))
    (Path(stopped.output_dir) / FILE).unlink()
    train(replace(stopped, resume=True))
    assert_same_run(straight.output_dir, stopped.output_dir, 4)


def test_precomputed_and_live_references_are_one(tmp_path, no_report):
    """Wrong implementations: log-probs of the item's neighbour; those of the policy;
    prompt tokens in them.
    """
    for name, reference in (("before", "precomputed"), ("live", "live")):
        train(dpo(tmp_path, name, reference=reference, steps=4, prompts=9, eval=Eval()))
    a, b = (lines(tmp_path / name) for name in ("before", "live"))
    # before the first step a pair's rewards are 0 but for rounding, which alone says which is higher;
    for row in (
        a[0],
        b[0],
    ):
        del row["rewards/accuracies"]  # it is 0 in exact mode, where there is none
        assert max(abs(row["rewards/chosen"]), abs(row["rewards/rejected"])) < 1e-6
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=1e-4, abs=1e-6)
    assert not (tmp_path / "live" / FILE).exists() and abs(b[-1]["rewards/margins"]) > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "simpo", "reference": "live"}, "--reference: simpo has no reference model"),
        (
            {"algorithm": "kto", "prompts": 1},
            "--prompts: expected at least 2 to compare each prompt with another's completion, got 1",
        ),
        ({"gamma": 0.5}, "--gamma: dpo has no such option"),
    ],
)
def test_what_cannot_run_is_refused_before_training(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(dpo(tmp_path, **changes))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_dry_run_prints_a_file_that_gives_the_same_configuration(capsys, tmp_path):
    args = [
        "dpo",
        "--model",
        "m",
        "--algorithm",
        "simpo",
        "--gamma",
        "0.5",
        "--reference",
        "none",
        "--nll-coef",
        "0.1",
    ]
    assert cli.main([*args, "--dry-run"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load(Dpo, tmp_path / "printed.yaml") == Dpo(
        model="m", algorithm=AlgorithmChoice("simpo", {"gamma": 0.5, "nll_coef": 0.1}), reference="none"
    )


# --- the reference ----------------------------------------------------------------------------------
def test_the_file_is_used_as_long_as_it_fits(tmp_path, monkeypatch):
    """Wrong implementations: another model's, dataset's or run's log-probs are taken; a file cut short is an
    error, or is read.
    """
    monkeypatch.setattr(fastrl.methods.dpo.reference, "CHUNK", 3)
    model, some = decoder(), units(8)
    asked: list[int] = []

    def logp(batch: Any) -> Tensor:
        asked.append(len(batch))
        return logp_of(decoder(), batch)

    def get(made: list[Unit] = some, indices: Any = range(1, 8), model: str = "m") -> Any:
        asked.clear()
        return precompute(
            tmp_path,
            lambda i: [made[k] for k in i],
            list(indices),
            logp,
            model=model,
            device=CPU,
            world=World(),
        )

    first = get()
    assert asked == [6, 6, 2]
    again = get()
    assert not asked and torch.equal(first.logp, again.logp) and torch.equal(first.ends, again.ends)
    batch = pack_units([some[5], some[2]], 2, CPU)
    want = logp_of(model, batch)
    for known in (first, again):
        assert torch.allclose(known([5, 2], batch), want, atol=1e-6) and (known([5, 2], batch) != 0).equal(
            batch.mask
        )
    other = [*some[:7], units(9)[8]]
    for change in ({"model": "n"}, {"made": other}, {"indices": range(8)}):
        get(**change)
        assert asked, change
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:-5])
    get(indices=range(8))
    assert asked and (tmp_path / FILE).read_bytes() == whole


def test_only_what_a_run_will_see_is_computed():
    """Wrong implementations: the whole dataset for ten steps; items that come in a later epoch forgotten."""
    assert drawn(1000, 3, 20) == sorted(order(1000, 3, 0, 20)) and drawn(8, 3, 20) == list(range(8))


def logp_of(model: Any, batch: Any) -> Tensor:
    """(T,) log-probs of the batch's loss tokens under a model."""
    return batch_logp(model, batch, micro_tokens=100, temperature=1.0)


def trainer(row: Any, world: World | None = None) -> Learner[Any]:
    model = decoder()
    return learner_of(UnitObjective(model, row), model, world=world)


# --- the source -------------------------------------------------------------------------------------
def baseline(policy: Any, frozen: Any) -> Baseline:
    return Baseline(lambda batch: logp_of(policy, batch), lambda batch: logp_of(frozen, batch), 100)


def source(name: str, world: World | None = None, count: int = 5, **more: Any) -> Preferences:
    row, other = PREFERENCES[name], decoder(seed=1)
    made = units(7, single=not row.paired)
    given: dict[str, Any] = {
        "baseline": baseline(decoder(), other),
        "reference": (lambda indices, batch: logp_of(other, batch)) if row.reference else None,
    }
    return Preferences(
        lambda i: [made[k] for k in i],
        7,
        row,
        count=count,
        seed=2,
        device=CPU,
        world=world or World(),
        **given | more,
    )


def test_mismatched_completions():
    """Wrong implementations: a prompt with its own completion; a mask of the other prompt's length."""
    a, b, c = (
        Sample([i] * p + [9 + i] * n, [False] * p + [True] * n)
        for i, (p, n) in enumerate(((1, 2), (3, 1), (2, 4)))
    )
    got = mismatched([a, b, c], 5)
    assert [s.tokens for s in got] == [[0, 11, 11, 11, 11], [1, 1, 1, 9, 9], [2, 2, 10]]
    assert [s.mask for s in got] == [
        [False, True, True, True, True],
        [False] * 3 + [True] * 2,
        [False, False, True],
    ]
    assert [s.tokens for s in mismatched([a, c], 3)] == [[0, 11, 11], [2, 2, 9]]


def test_ktos_baseline_is_of_the_step(monkeypatch):
    """z0 written out: the mean log-ratio over the step's mismatched pairs, and never below 0.

    Wrong implementations: the matched pairs' mean, a mean per token, a baseline of one process's share."""
    policy, frozen = decoder(), decoder(seed=1)
    made, chosen = units(7, single=True), order(7, 2, 0, 5)
    total = 0.0
    for here, before in zip(chosen, [chosen[-1], *chosen[:-1]], strict=True):
        x, y = made[here][0].sample, made[before][0].sample
        prompt, completion = x.tokens[: x.mask.index(True)], y.tokens[y.mask.index(True) :]
        for model, sign in ((policy, 1), (frozen, -1)):
            tokens = torch.tensor(prompt + completion)
            logp = (
                (model(tokens) @ model.head_weight.T)
                .log_softmax(-1)[:-1]
                .gather(1, tokens[1:, None])
                .squeeze(1)
            )
            total += sign * logp[len(prompt) - 1 :].sum().item()
    if total < 0:  # the other model is the likelier one: swap them
        policy, frozen = frozen, policy
    step = source("kto", baseline=baseline(policy, frozen)).collect(0, 0)
    assert step.metrics["kl"] == pytest.approx(abs(total) / 5, rel=1e-5) and step.metrics["kl"] > 0.01
    assert step.batches[0].baseline.unique().tolist() == pytest.approx([step.metrics["kl"]])
    assert source("kto", baseline=baseline(frozen, policy)).collect(0, 0).metrics["kl"] == 0.0


@pytest.mark.parametrize("name", ["dpo", "kto", "simpo"])
def test_two_processes_have_one_step(name):
    """Their shares add up to the step of one, KTO's baseline included; here both are asked in turn, with sums
    by hand.

    Wrong implementations: denominators of the share; a mismatch that ends at the share's border; pairs drawn
    twice.
    """
    alone = source(name).collect(1, 0)
    sums: list[float] = []

    class Half(World):
        __slots__ = ()

        def sum(self, *values: float) -> list[float]:
            sums.extend(values)
            return list(values)

    parts = [source(name, Half(r, 2)).collect(1, 0) for r in range(2)]
    joined = [x for part in parts for x in part.batches[0].tokens.tolist()]
    assert joined == alone.batches[0].tokens.tolist()
    if name == "kto":
        assert max(0.0, sum(sums) / 5) == pytest.approx(alone.metrics["kl"], rel=1e-5)
    baseline = alone.batches[0].baseline
    row, found = PREFERENCES[name], []
    for batch in (alone.batches[0], *(replace(p.batches[0], baseline=baseline) for p in parts)):
        found.append(gradient(trainer(row), batch))
    assert sum(m["loss"] for m, _ in found[1:]) == pytest.approx(found[0][0]["loss"], rel=1e-5)
    assert relative(found[1][1] + found[2][1], found[0][1]) < 1e-5


def test_more_processes_than_pairs():
    """Wrong implementation: a process without a share fails on its empty batch."""

    class Third(World):
        __slots__ = ()

        def sum(self, *values: float) -> list[float]:
            return list(values)

        def gather(self, rows: list[Any]) -> list[Any]:
            return rows

        def sum_gradients(self, parameters: Any) -> None: ...

    for name in ("dpo", "kto"):
        world = Third(0, 3)
        assert len(world.share(2)) == 0
        batch = source(name, world, count=2).collect(0, 0).batches[0]
        learner = trainer(PREFERENCES[name], world)
        assert len(batch) == 0 and leave_gradient(learner, batch) == {"loss": 0, "num_tokens": 0}


# --- learning ---------------------------------------------------------------------------------------
def margin(folder: Path, split: str = "val", n: int = 200) -> tuple[float, float]:
    """Mean of log p(right answer) - log p(wrong answer), nats, over a split's pairs, and the share of pairs
    where it is positive.
    """
    model, task, words = Decoder.from_pretrained(folder), Cards(k=2), tokenizer()
    gaps = []
    with torch.no_grad():
        for i in range(min(n, task.size(split))):
            example = task.example(split, i)
            start, sums = len(words.encode(example.prompt)), []
            for answer in (example.demo, *task.mistakes(example, 1, i)):
                tokens = torch.tensor([*words.encode(example.prompt + (answer or "")), words.eos_token_id])
                logp = (
                    (model(tokens) @ model.head_weight.T)
                    .log_softmax(-1)[:-1]
                    .gather(1, tokens[1:, None])
                    .squeeze(1)
                )
                sums.append(logp[start - 1 :].sum().item())
            gaps.append(sums[0] - sums[1])
    return sum(gaps) / len(gaps), sum(g > 0 for g in gaps) / len(gaps)


@pytest.mark.slow
def test_dpo_raises_the_margin_of_right_over_wrong_answers(tmp_path, no_report):
    """From a short SFT start, on training pairs and on pairs of problems in no training set; the share ranked
    right does not fall.

    Wrong implementations: the sign of the loss, chosen for rejected; a margin won on the training pairs
    alone.
    """
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
        "intermediate_size": 128,
    }
    shared: dict[str, Any] = {"task": "cards", "task_options": ("k=2",), "seed": 1, "threads": 1}
    start = train(
        Sft(
            **shared,
            model=write_model(tmp_path, **sizes),
            output_dir=str(tmp_path / "sft"),
            steps=100,
            prompts=64,
            optim=Optim(lr=4e-3, warmup=10, schedule="linear"),
        )
    ).checkpoint
    config = Dpo(
        **shared,
        model=str(start),
        output_dir=str(tmp_path / "dpo"),
        steps=40,
        prompts=32,
        optim=Optim(lr=1e-3, warmup=5),
    )
    end = train(config).checkpoint
    assert start and end
    for split in ("train", "test"):
        (before, right), (after, more) = margin(start, split), margin(end, split)
        assert after > before + 3 and more > right - 0.05, split
    rows = lines(config.output_dir)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and rows[-1]["rewards/accuracies"] > 0.9
    assert rows[-1]["rewards/margins"] > 0.5
