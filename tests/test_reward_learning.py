"""Reward models learn: the card game's right answers from wrong ones, and which of several solutions of a word problem is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import lines
from support import data_file, tiny_config

import fastrl.trainer
from fastrl.config import HeldOut, Optim, Reward, Run, Sft
from fastrl.tasks.tokens import train_bpe

SOURCES = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
LONGEST = 800  # characters of a problem with a solution: at most 512 tokens


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


@pytest.mark.slow
def test_the_card_games_right_answers_are_told_from_wrong_ones(tmp_path):
    """Accuracy above 0.9 on problems that are in no training set.  Wrong implementations: a score read before the answer's end; pairs
    turned round; a head that is not trained."""
    config = Reward(
        model="fastrl/recipes/cards.config.json", task="cards", task_options=("k=2", "rules=ab", "test=0.2"), steps=240, prompts=128,
        center=0.01, threads=1, output_dir=str(tmp_path / "run"), optim=Optim(lr=3e-3, warmup=10, schedule="linear"),
        eval=HeldOut(prompts=256, split="test"),
    )  # fmt: skip
    trained(config)
    last = held_out(config)
    assert last["eval/accuracy"] > 0.9 and last["eval/accuracy_lo"] > 0.8 and last["eval/ece"] < 0.1, last


@pytest.mark.slow
def test_right_solutions_of_unseen_word_problems_are_above_chance(tmp_path):
    """Four models' solutions of GSM8K problems, compared within a problem, held out by problem; the 95% interval (over problems) of the
    accuracy stays above one half.  A small decoder first reads the training set's own solutions.

    Wrong implementations: comparisons across problems, which learn how hard a problem is; a split by solution.
    """
    written = [json.loads(line) for line in data_file("gsm8k", "train.jsonl").read_text().splitlines()]
    solved = [json.loads(line) for line in data_file("gsm8k", "model_solutions.jsonl").read_text().splitlines()]
    texts = [{"prompt": f"Question: {r['question']}\nAnswer:\n", "completion": r["answer"].replace("\n#### ", "\nA: ")} for r in written]
    groups = [
        {
            "prompt": f"Question: {r['question']}\nAnswer:\n",
            "completions": [r[s]["solution"] for s in SOURCES],
            "scores": [float(r[s]["is_correct"]) for s in SOURCES],
        }
        for r in solved
    ]
    mixed = [g for g in groups if len(set(g["scores"])) > 1 and max(len(g["prompt"] + c) for c in g["completions"]) < 2 * LONGEST]
    train_bpe([t["prompt"] + t["completion"] for t in texts], 1024).save_pretrained(tmp_path / "tokenizer")
    small = {"vocab_size": 1024, "hidden_size": 96, "intermediate_size": 256, "head_dim": 24, "max_position_embeddings": 1024}
    (tmp_path / "model.json").write_text(json.dumps(tiny_config("qwen2", **small)))
    common = {"tokenizer": str(tmp_path / "tokenizer"), "threads": 1}
    start = Sft(
        model=str(tmp_path / "model.json"), steps=250, prompts=32, output_dir=str(tmp_path / "sft"), **common,
        dataset=write(tmp_path / "sft.jsonl", (t for t in texts if len(t["prompt"] + t["completion"]) < LONGEST)),
        optim=Optim(lr=4e-3, warmup=20, schedule="linear", floor=0.1),
    )  # fmt: skip
    config = Reward(
        model=str(trained(start)), dataset=write(tmp_path / "groups.jsonl", mixed), steps=40, prompts=16, center=0.01, holdout=0.4,
        output_dir=str(tmp_path / "run"), optim=Optim(lr=1e-3, warmup=5, schedule="linear", weight_decay=0.1), **common,
    )  # fmt: skip
    trained(config)
    last = held_out(config)
    print(f"accuracy {last['eval/accuracy']:.3f} [{last['eval/accuracy_lo']:.3f}, {last['eval/accuracy_hi']:.3f}], {last}")
    assert last["eval/accuracy_lo"] > 0.5, last
