"""Training reward models: a step is the same however it is cut, a run resumes, its data is split by prompt,
its scores are rewards.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from configs import configured
from contexts import context_of
from judging import grads, reward_model, token_groups
from runs import (
    assert_same_run,
    grpo,
    learner_of,
    leave_gradient,
    lines,
    stop_after,
    tokenizer,
    write_model,
)

import fastrl.trainer
from fastrl import cli
from fastrl.algorithms.reward import REWARD_LOSSES
from fastrl.config import Grpo, HeldOut, Optim, Reward
from fastrl.config.parse import resolve
from fastrl.errors import UserError
from fastrl.methods.reward.evaluation import judge_held_out
from fastrl.methods.reward.method import comparisons
from fastrl.methods.reward.objective import RewardBatch, ScoreObjective, packs
from fastrl.methods.reward.options import choose_reward_loss
from fastrl.model.reward import RewardModel
from fastrl.report.report import build
from fastrl.rewards.functions import load_reward
from fastrl.tasks import Cards
from fastrl.tasks.cards.mistakes import KINDS, of_each_kind
from fastrl.train.learner import Learner


def run(folder: Path, name: str = "run", **changes) -> Reward:
    """A run of a few steps on the card game's pairs."""
    options = {
        "model": write_model(folder),
        "task": "cards",
        "task_options": ("k=2",),
        "output_dir": str(folder / name),
        "steps": 6,
        "prompts": 6,
        "micro_tokens": 128,
        "optim": Optim(lr=1e-2),
        "eval": HeldOut(prompts=8, every=3),
    }
    return configured(Reward, **options | changes)


def learner(
    model: RewardModel, name: str, micro_tokens: int = 10**6, optim: Optim | None = None
) -> Learner[RewardBatch]:
    row = replace(REWARD_LOSSES[name], center=0.1 if REWARD_LOSSES[name].compares else 0.0)
    return learner_of(ScoreObjective(model, row), model, micro_tokens, optim)


def batch(name: str, groups) -> RewardBatch:
    return RewardBatch(groups, float(sum(REWARD_LOSSES[name].units(g.target) for g in groups)))


def gradient(model: RewardModel, name: str, it: RewardBatch, micro_tokens: int = 10**6):
    metrics = leave_gradient(learner(model, name, micro_tokens), it)
    found = grads(model)
    for p in model.parameters():
        p.grad = None
    return metrics, found


# --- a step -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_cutting_order_and_processes_do_not_matter(name):
    """In float64.  Wrong implementations: denominators of the micro-batch; a group cut in two, whose halves
    compare less; scores taken for another group's; the centring averaged twice.
    """
    model, groups = reward_model(dtype=torch.float64), token_groups(name)
    model.double()
    whole, g = gradient(model, name, batch(name, groups))
    assert g.norm() > 1e-3
    for it, budget in ((batch(name, groups), 30), (batch(name, groups[::-1]), 40)):
        cut, h = gradient(model, name, it, budget)
        assert (h - g).norm() < 1e-12 * g.norm()
        assert cut == pytest.approx(whole, rel=1e-12)
    total = batch(name, groups).total
    a, b = (gradient(model, name, RewardBatch(part, total)) for part in (groups[:3], groups[3:]))
    assert (a[1] + b[1] - g).norm() < 1e-12 * g.norm() and a[0]["loss"] + b[0]["loss"] == pytest.approx(
        whole["loss"], rel=1e-12
    )


def test_groups_are_never_split():
    groups = token_groups("bradley_terry", 9)
    seen = [(some, packed.groups) for some, packed in packs(groups, 40, "cpu")]
    assert len(seen) > 2 and sorted(i for some, _ in seen for i in some) == list(range(9))
    assert all(list(held) == [groups[i] for i in some] for some, held in seen)


def test_a_step_that_compares_nothing_moves_nothing():
    """Wrong implementations: 0 / 0; AdamW steps on the momentum of the step before."""
    model = reward_model()
    trained = learner(model, "bradley_terry", optim=Optim(lr=0.1, weight_decay=0.1))
    trained.update(batch("bradley_terry", token_groups("bradley_terry")), 0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    metrics = trained.update(RewardBatch([], 0.0), 1)
    assert metrics["loss"] == metrics["num_tokens"] == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- runs -------------------------------------------------------------------------------------------
def test_a_resumed_run_is_the_run_without_a_break(tmp_path, monkeypatch):
    """Bit for bit.  Wrong implementations: a fresh head on resuming; data that starts again; the evaluation
    done twice.
    """
    straight, stopped = run(tmp_path, "straight"), run(tmp_path, "stopped")
    fastrl.trainer.train(straight)
    stop_after(monkeypatch, 4)
    assert fastrl.trainer.train(stopped).steps == 4
    monkeypatch.undo()
    fastrl.trainer.train(replace(stopped, resume=True))
    assert_same_run(straight.output_dir, stopped.output_dir, 6)
    assert lines(straight.output_dir) == lines(stopped.output_dir)
    page = Path(straight.output_dir, "report.html").read_text()
    assert (
        "Reliability" in page
        and "Histogram of rewards" in page
        and "Comparisons won" in page
        and "Cross-entropy" not in page
    )
    evaluations = [row for row in lines(straight.output_dir) if "eval/accuracy" in row]
    assert [row["step"] for row in evaluations] == [0, 3, 6] and all(
        0 <= row["eval/ece"] <= 1 for row in evaluations
    )


LINES = {  # a line of every form, by prompt
    "bradley_terry": lambda p: {"prompt": p, "chosen": "1", "rejected": "22", "margin": 0.5},
    "plackett_luce": lambda p: {"prompt": p, "completions": ["1", "22", "333"], "ranks": [1, 2, 3]},
    "outcome": lambda p: {"prompt": p, "completion": "1" if p < "5" else "22", "label": p < "5"},
    "process": lambda p: {"prompt": p, "completions": ["1", "22"], "labels": [True, False]},
}


@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_every_row_learns_from_its_own_columns(tmp_path, name):
    """And saves what it learned.  Wrong implementations: a held-out prompt trained on; a checkpoint without
    the head or the separator.
    """
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(LINES[name](f"{a}{b}")) + "\n" for a in range(10) for b in range(4)))
    config = run(
        tmp_path,
        task=None,
        task_options=(),
        dataset=str(data),
        tokenizer=None,
        algorithm=name,
        steps=30,
        holdout=0.3,
        step_separator=";" if name == "process" else None,
    )
    tok = tmp_path / "tok"
    tokenizer().save_pretrained(tok)
    result = fastrl.trainer.train(replace(config, tokenizer=str(tok)))
    rows = [row for row in lines(config.output_dir) if "loss" in row]
    assert (
        rows[-1]["loss"] < 0.5 * rows[0]["loss"] and rows[-1]["accuracy"] == 1 and rows[-1]["grad_norm"] > 0
    )
    held = [row for row in lines(config.output_dir) if "eval/accuracy" in row]
    assert held[-1]["eval/accuracy"] == 1 and held[-1]["eval/margin"] > held[0]["eval/margin"]
    model = RewardModel.load(result.checkpoint)
    assert model.steps == (";" if name == "process" else None)
    model.tokenizer = tokenizer()
    good, bad = (
        model.score([("41", text)])[0] for text in (("1", "1;22") if name == "process" else ("1", "22"))
    )
    assert good > bad


def test_held_out_prompts_are_not_trained_on(tmp_path):
    """Wrong implementation: a split by line, which puts one prompt on both sides."""
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(
            json.dumps({"prompt": f"{i % 20}>", "chosen": f"{i}", "rejected": "="}) + "\n" for i in range(80)
        )
    )
    config = run(tmp_path, task=None, dataset=str(data), holdout=0.3)
    model = reward_model()
    row = REWARD_LOSSES["bradley_terry"]
    data = comparisons(context_of(config, row, model)).data
    held = {s.prompt for _, s in data.held_out()}
    train = {tokenizer().decode(g.tokens[0]).partition(">")[0] + ">" for g in data.items(range(data.size))}
    assert 2 <= len(held) < 18 and not held & train and len(held | train) == 20
    with pytest.raises(
        UserError,
        match=r"--holdout: none of the 80 lines .* into the 0% held out; raise it, or turn evaluation off",
    ):
        comparisons(context_of(replace(config, holdout=0.0), row, model))


def test_the_task_gives_a_right_answer_against_different_wrong_ones():
    """Wrong implementations: a "wrong" answer that is another right one; one kind of mistake only; another
    one at every call.
    """
    task = Cards(k=3)
    kinds = set()
    for i in range(40):
        example = task.example("train", i)
        wrong = task.mistakes(example, 3, i)
        assert len(set(wrong)) == 3 and wrong == task.mistakes(example, 3, i)
        levels = [task.verify(example, text) for text in wrong]
        assert not any(s.correct for s in levels) and task.verify(example, example.demo).correct
        kinds |= {s.message.split()[0] for s in levels}
        each = of_each_kind(example, lambda text, e=example: not task.verify(e, text).correct, i)
        assert list(each) == [k.__name__ for k in KINDS] and not any(
            task.verify(example, text).correct for text in each.values()
        )
    assert len(kinds) > 4 and len(KINDS) == 4


# --- what is measured -------------------------------------------------------------------------------
def test_held_out_numbers_worked_by_hand():
    """Wrong implementations: calibration of pairs one way round only, where every outcome is 1; tied answers
    compared; an interval that takes the pairs of one prompt for independent.
    """
    a, b = token_groups("bradley_terry", 4)[2:4]
    a, b = (
        replace(a, tokens=[], at=[], target=[2.0, 1.0, 1.0]),
        replace(b, tokens=[], at=[], target=[1.0, 0.0]),
    )
    metrics, table = judge_held_out(REWARD_LOSSES["bradley_terry"], [a, b], [[1.0, 0.0, 2.0], [0.5, 0.25]])
    p = [1 / (1 + math.exp(-z)) for z in (1.0, -1.0, 0.25)]
    assert metrics["eval/accuracy"] == pytest.approx((1 / 2 + 1) / 2) and metrics[
        "eval/margin"
    ] == pytest.approx(0.25 / 3)
    bins = {round(x.predicted, 6): (x.size, x.observed) for x in table["bins"]}
    assert bins == {
        round(1 - p[0], 6): (2, 0.5),
        round(1 - p[2], 6): (1, 0.0),
        round(p[2], 6): (1, 1.0),
        round(p[0], 6): (2, 0.5),
    }
    assert metrics["eval/ece"] == pytest.approx((4 * abs(p[0] - 0.5) + 2 * (1 - p[2])) / 6)
    assert metrics["eval/accuracy_lo"] == 0 and metrics["eval/accuracy_hi"] == 1, (
        "two prompts alone say nothing"
    )
    assert (table["better"], table["worse"]) == ([1.0, 0.5], [0.0, 2.0, 0.25])
    v = [replace(a, target=[y]) for y in (1.0, 0.0, 0.0)]
    metrics, _ = judge_held_out(REWARD_LOSSES["outcome"], v, [[2.0], [-1.0], [3.0]])
    assert metrics["eval/accuracy"] == pytest.approx(2 / 3) and metrics["eval/margin"] == pytest.approx(0.0)


def test_a_broken_rewards_file_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "loss": 0.5}\n')
    (tmp_path / "rewards.json").write_text('{"step": 1}')
    with pytest.raises(UserError, match=r"rewards\.json: expected what an evaluation writes"):
        build(tmp_path)


# --- options ----------------------------------------------------------------------------------------
def test_options_that_do_not_go_together(tmp_path, capsys):
    """Refused before any data is read, each with what to do instead."""
    for changes, message in (
        (
            {"algorithm": "bradley"},
            "--algorithm: expected one of bradley_terry, .*; got 'bradley'; did you mean 'bradley_terry'",
        ),
        (
            {"algorithm": "outcome", "center": 0.01},
            "--center: outcome has no such option; take .*: bradley_terry, plackett_luce",
        ),
        ({"center": -1.0}, "--center: expected a number of 0 or more, got -1"),
        ({"group": 1}, "--group: expected at least 2 completions"),
        ({"holdout": 1.0}, "--holdout: expected a share"),
        ({"exact": True}, "--exact: reward models sample nothing; remove the option"),
    ):
        with pytest.raises(UserError, match=message):
            choose_reward_loss(run(tmp_path, **changes))
    with pytest.raises(UserError, match=r"--step-separator: '\\n' does not join the steps of cards to '"):
        fastrl.trainer.train(run(tmp_path, algorithm="process"))
    with pytest.raises(
        UserError, match="--task: expected one with wrong answers, got gsm8k; give a --dataset"
    ):
        fastrl.trainer.train(
            run(tmp_path, "other", task="gsm8k", task_options=(), tokenizer=str(_saved_tokenizer(tmp_path)))
        )
    assert (
        resolve(Reward, ["--model", "m", "--center_rewards_coefficient", "0.01"]).algorithm.number("center")
        == 0.01
    )
    (tmp_path / "trl.yaml").write_text("model: m\ncenter_rewards_coefficient: 0.02\n")
    assert resolve(Reward, ["--config", str(tmp_path / "trl.yaml")]).algorithm.number("center") == 0.02
    assert cli.main(["reward", "--model", "m", "--eval.every", "5", "--dry-run"]) == 0
    assert "algorithm: bradley_terry" in (shown := capsys.readouterr().out) and "prompts: 256" in shown


def _saved_tokenizer(folder: Path) -> Path:
    tokenizer().save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


# --- as a reward ------------------------------------------------------------------------------------
def test_a_reward_model_rewards_a_grpo_run(tmp_path):
    """Every saved sample has the reward that the model gives its prompt and completion.  Wrong
    implementations: prompts or completions alone; in another order; a model that the policy's optimizer
    trains along; a dropped folder that becomes a reward of 0.
    """
    model = reward_model(max_position_embeddings=64)
    model.tokenizer = tokenizer()
    model.save_pretrained(tmp_path / "rm")
    tokenizer().save_pretrained(tmp_path / "rm")
    before = (tmp_path / "rm" / "model.safetensors").read_bytes()
    config: Grpo = grpo(tmp_path, steps=3, reward=(f"model:{tmp_path / 'rm'}",))
    fastrl.trainer.train(config)
    rows = [json.loads(line) for line in Path(config.output_dir, "samples.jsonl").read_text().splitlines()]
    want = model.score([(r["prompt"], r["completion"]) for r in rows])
    assert [r["reward"] for r in rows] == pytest.approx(want, abs=1e-5) and max(want) - min(want) > 0.1
    steps = [row for row in lines(config.output_dir) if "reward" in row]
    assert (
        all(row["rewards/reward_model/mean"] == pytest.approx(row["reward"]) for row in steps)
        and len(steps) == 3
    )
    assert (tmp_path / "rm" / "model.safetensors").read_bytes() == before
    for folder in (tmp_path / "nowhere", Path(config.output_dir, "checkpoints", "step_3")):
        with pytest.raises(UserError, match=r"--reward: expected the folder of a reward model .* got model:"):
            load_reward(f"model:{folder}")
    (tmp_path / "empty").mkdir()
    for spec in (f"model:{tmp_path / 'empty'}", f"implicit:{tmp_path / 'empty'},{tmp_path / 'empty'}"):
        with pytest.raises(UserError, match=r"--reward: .*empty: expected a Hugging Face model folder"):
            load_reward(spec)
