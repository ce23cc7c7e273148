"""Margins of a model on the card game: how much it prefers a correct answer to a wrong one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastrl import ops
from fastrl.data.pairs import encode_units
from fastrl.data.rows import Row
from fastrl.methods.dpo.batches import pack_units
from fastrl.model.adapter import load_model
from fastrl.model.reward import RewardModel
from fastrl.model.tokenizer import load_tokenizer
from fastrl.tasks import Example, load_run_task
from fastrl.tasks.cards.mistakes import of_each_kind

CHUNK = 64  # pairs of one forward pass


def card_pairs(task_options: Sequence[str], split: str, count: int) -> tuple[Any, list[Row]]:
    """The task, and the first `count` hands of a split: the demonstration against one of the task's mistakes.

    The four kinds of mistakes are mixed.
    """
    task: Any = load_run_task("cards", task_options)
    rows = []
    for i in range(min(count, task.size(split))):
        example = task.example(split, i)
        (mistake,) = task.mistakes(example, 1, i)
        fields = {"prompt": example.prompt, "chosen": example.demo, "rejected": mistake}
        rows.append(Row(f"{split}[{i}]", "pair", fields))
    return task, rows


def _wrong(task: Any, example: Example, text: str) -> bool:
    return not task.verify(example, text).correct


def reward_margins(
    checkpoint: Path, task_options: Sequence[str], *, split: str, count: int
) -> dict[str, list[float]]:
    """A reward model's score of the demonstration minus that of a mistake, on CPU.

    "mixed" holds the pairs of `card_pairs`; the other entries are the kinds of mistakes.
    """
    task, rows = card_pairs(task_options, split, count)
    model = RewardModel.load(checkpoint)
    model.tokenizer = load_tokenizer(None, str(checkpoint), task.tokenizer)
    correct = model.score([(row.fields["prompt"], row.fields["chosen"]) for row in rows])

    kinds, wrong, scores = [], [], []  # of each mistake: its kind, the mistake, the demonstration's score
    for row, score in zip(rows, correct, strict=True):
        kinds.append("mixed")
        wrong.append((row.fields["prompt"], row.fields["rejected"]))
        scores.append(score)
    for i, score in enumerate(correct):
        example = task.example(split, i)
        mistakes = of_each_kind(example, partial(_wrong, task, example), split, i)
        for kind, text in mistakes.items():
            kinds.append(kind)
            wrong.append((example.prompt, text))
            scores.append(score)

    by_kind: dict[str, list[float]] = {}
    for kind, score, score_of_wrong in zip(kinds, scores, model.score(wrong), strict=True):
        by_kind.setdefault(kind, []).append(score - score_of_wrong)
    return by_kind


@torch.no_grad()
def margins(checkpoint: Path, task_options: Sequence[str], *, split: str, count: int) -> list[float]:
    """log p(demonstration) - log p(mistake) of a language model, nats, summed over tokens, on CPU."""
    task, rows = card_pairs(task_options, split, count)
    model = load_model(str(checkpoint), dtype=torch.float32, device=torch.device("cpu"))
    units = encode_units(rows, load_tokenizer(None, str(checkpoint), task.tokenizer), paired=True)
    found: list[float] = []
    for first in range(0, len(units), CHUNK):
        chunk = units[first : first + CHUNK]
        sequences = 2 * len(chunk)
        batch = pack_units(chunk, 1, torch.device("cpu"))

        at = batch.mask[1:].nonzero().squeeze(1)  # positions that predict a token of a completion
        hidden = model(batch.tokens, batch.cu_seqlens)[at]
        logp = ops.linear_logp(hidden, model.head_weight, batch.tokens[at + 1]).logp

        owner = torch.repeat_interleave(torch.arange(sequences), batch.cu_seqlens.diff().long())
        summed = torch.zeros(sequences).index_add(0, owner[at + 1], logp)
        chosen, rejected = summed.view(-1, 2).unbind(1)
        found += (chosen - rejected).tolist()
    return found
