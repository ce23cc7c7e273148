"""Reward models learn: the card game's right answers from wrong ones, and which of several solutions of a
word problem is right.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from runs import lines
from support import data_file

import fastrl.trainer
from fastrl.bench.studies import gsm8k_reward
from fastrl.bench.studies.demo import RECIPES
from fastrl.bench.studies.margins import reward_margins
from fastrl.config import AlgorithmChoice, Eval, HeldOut, Optim, Reward, Run, Sft
from fastrl.config.parse import load
from fastrl.model.reward import RewardModel
from fastrl.report.stats import wilson
from fastrl.tasks import Cards


def trained(config: Run) -> Path:
    result = fastrl.trainer.train(config)
    assert result.checkpoint is not None
    return result.checkpoint


def held_out(config: Reward) -> dict[str, float]:
    """The last evaluation of a run."""
    return [row for row in lines(config.output_dir) if "eval/accuracy" in row][-1]


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


CARDS = {
    "model": "fastrl/recipes/cards.config.json",
    "prompts": 64,
    "algorithm": AlgorithmChoice("bradley_terry", {"center": 0.01}),
    "threads": 1,
    "optim": Optim(lr=3e-3, warmup=5, schedule="linear"),
}


def pairs(task: Cards, split: str, count: int) -> Iterator[dict[str, str]]:
    """The answer to a hand against the answer to another one."""
    for i in range(count):
        example = task.example(split, i)
        others = (str(task.example(split, i + j).demo) for j in range(1, 99))
        wrong = next(text for text in others if not task.verify(example, text).correct)
        yield {"prompt": str(example.prompt), "chosen": str(example.demo), "rejected": wrong}


@pytest.mark.slow
def test_a_hands_answer_is_told_from_another_hands(tmp_path):
    """Accuracy above 0.9 on the test split's problems, which are in no training set (0.98 was measured).
    Wrong implementations: a score read before the answer's end; pairs turned round; a head that is not
    trained; a prompt that is not read: both are answers.
    """
    task = Cards(k=3, rules="b", test=0.2)
    task.tokenizer().save_pretrained(tmp_path / "tokenizer")
    data = write(tmp_path / "pairs.jsonl", pairs(task, "train", 8000))
    config = Reward(
        **CARDS,
        tokenizer=str(tmp_path / "tokenizer"),
        dataset=data,
        steps=120,
        output_dir=str(tmp_path / "run"),
        eval=HeldOut(prompts=200),
    )
    model = RewardModel.load(trained(config))
    model.tokenizer = task.tokenizer()
    rows = list(pairs(task, "test", 512))
    better, worse = (model.score([(r["prompt"], r[side]) for r in rows]) for side in ("chosen", "rejected"))
    right = sum(a > b for a, b in zip(better, worse, strict=True))
    assert wilson(right, len(rows))[0] > 0.9, right


@pytest.mark.slow
def test_the_tasks_own_mistakes_are_told_from_right_answers(tmp_path):
    """All four kinds, near misses among them: a small decoder from random weights tells them in 150 steps at
    0.82 [0.77, 0.87].
    """
    options = ("k=3", "rules=b", "test=0.2")
    config = Reward(**CARDS, task="cards", task_options=options, steps=150, output_dir=str(tmp_path / "run"))
    trained(config)
    last = held_out(config)
    assert last["eval/accuracy_lo"] > 0.7 and last["eval/ece"] < 0.15, last


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_process_rewards_tell_the_tasks_own_mistakes(tmp_path):
    """The recipes of the SFT start and of the process reward model, on the test split's problems, all kinds
    of mistakes mixed: 0.915 [0.894, 0.932] was measured on the validation split (cut short 1.00, another card
    0.89, another target 0.86, a false step 0.83).

    Wrong implementations: a score that leaves the weakest step out; steps read one token early, where nothing
    is known yet.
    """
    quiet = {"threads": 1, "eval": Eval(prompts=0)}
    sft = load(Sft, RECIPES / "cards_sft.yaml")
    start = trained(
        replace(sft, model=str(RECIPES / "cards.config.json"), output_dir=str(tmp_path / "sft"), **quiet)
    )
    recipe = load(Reward, RECIPES / "cards_process.yaml")
    end = trained(
        replace(
            recipe, model=str(start), output_dir=str(tmp_path / "run"), threads=1, eval=HeldOut(prompts=0)
        )
    )
    found = reward_margins(end, recipe.task_options, split="test", count=800)
    print({kind: sum(m > 0 for m in some) / len(some) for kind, some in found.items()})
    right = sum(m > 0 for m in found["mixed"])
    assert wilson(right, len(found["mixed"]))[0] > 0.85, right


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_right_solutions_of_unseen_word_problems_are_above_chance(tmp_path):
    """Four models' solutions of GSM8K problems, compared within a problem, held out by problem; the 95%
    interval (over problems) of the accuracy stays above one half (0.61 [0.56, 0.66] was measured).  A small
    decoder first reads the training set's own solutions.

    Wrong implementations: comparisons across problems, which learn how hard a problem is; a split by
    solution.
    """
    folder = data_file("gsm8k", "model_solutions.jsonl").parent
    data_file("gsm8k", "train.jsonl")
    gsm8k_reward.prepare(folder, tmp_path / "data")
    paths = {"tokenizer": str(tmp_path / "data/tokenizer"), "threads": 1}
    start = replace(
        load(Sft, RECIPES / "gsm8k_read.yaml"),
        dataset=str(tmp_path / "data/solutions.jsonl"),
        output_dir=str(tmp_path / "read"),
        **paths,
    )
    config = replace(
        load(Reward, RECIPES / "gsm8k_reward.yaml"),
        model=str(trained(start)),
        dataset=str(tmp_path / "data/groups.jsonl"),
        output_dir=str(tmp_path / "run"),
        **paths,
    )
    trained(config)
    last = held_out(config)
    print(
        f"accuracy {last['eval/accuracy']:.3f} [{last['eval/accuracy_lo']:.3f}, "
        f"{last['eval/accuracy_hi']:.3f}], {last}"
    )
    assert last["eval/accuracy_lo"] > 0.5, last
