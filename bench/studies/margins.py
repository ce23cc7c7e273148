"""What a model makes of pairs of a right and a wrong answer to the card game: which of them it prefers, and
by how much.
"""

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
    """The task, and the first `count` hands of a split: the demonstration against one of the task's own
    mistakes, its four kinds mixed.
    """
    task: Any = load_run_task("cards", task_options)
    examples = [task.example(split, i) for i in range(min(count, task.size(split)))]
    return task, [
        Row(
            f"{split}[{i}]",
            "pair",
            {"prompt": e.prompt, "chosen": e.demo, "rejected": task.mistakes(e, 1, i)[0]},
        )
        for i, e in enumerate(examples)
    ]


def _wrong(task: Any, example: Example, text: str) -> bool:
    return not task.verify(example, text).correct


def reward_margins(
    checkpoint: Path, task_options: Sequence[str], *, split: str, count: int
) -> dict[str, list[float]]:
    """A reward model's score of the demonstration less that of a mistake, on CPU: "mixed", the pairs of
    `card_pairs`, and by kind.
    """
    task, rows = card_pairs(task_options, split, count)
    model = RewardModel.load(checkpoint)
    model.tokenizer = load_tokenizer(None, str(checkpoint), task.tokenizer)
    right = model.score([(r.fields["prompt"], r.fields["chosen"]) for r in rows])
    pairs = [
        ("mixed", r.fields["prompt"], r.fields["rejected"], better)
        for r, better in zip(rows, right, strict=True)
    ]
    for i, better in enumerate(right):
        example = task.example(split, i)
        kinds = of_each_kind(example, partial(_wrong, task, example), split, i)
        pairs += [(kind, example.prompt, text, better) for kind, text in kinds.items()]
    worse = model.score([(prompt, text) for _, prompt, text, _ in pairs])
    out: dict[str, list[float]] = {}
    for (kind, _, _, better), score in zip(pairs, worse, strict=True):
        out.setdefault(kind, []).append(better - score)
    return out


@torch.no_grad()
def margins(checkpoint: Path, task_options: Sequence[str], *, split: str, count: int) -> list[float]:
    """log p(demonstration) - log p(mistake) under a language model, nats, summed over tokens, on CPU."""
    task, rows = card_pairs(task_options, split, count)
    model = load_model(str(checkpoint), dtype=torch.float32, device=torch.device("cpu"))
    out: list[float] = []
    every = encode_units(rows, load_tokenizer(None, str(checkpoint), task.tokenizer), paired=True)
    for first in range(0, len(every), CHUNK):
        units = every[first : first + CHUNK]
        batch = pack_units(units, 1, torch.device("cpu"))
        at = batch.mask[1:].nonzero().squeeze(1)
        logp = ops.linear_logp(
            model(batch.tokens, batch.cu_seqlens)[at], model.head_weight, batch.tokens[at + 1]
        ).logp
        sequence = torch.repeat_interleave(torch.arange(2 * len(units)), batch.cu_seqlens.diff().long())[
            at + 1
        ]
        chosen, rejected = torch.zeros(2 * len(units)).index_add(0, sequence, logp).view(-1, 2).unbind(1)
        out += (chosen - rejected).tolist()
    return out
