"""What is known of a prompt beside its rewards: its demonstration, or a chosen and a rejected completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastrl.config import Hybrid
from fastrl.data.check import check_budget, check_tokens
from fastrl.data.encode import Sample, encode_all
from fastrl.data.rows import Row, read_rows
from fastrl.errors import UserError
from fastrl.files import key_values, shorten
from fastrl.methods.grpo.prompts import TRAIN
from fastrl.tasks import Task


def demonstrations_of_prompts(
    config: Hybrid, task: Task | None, tokenizer: Any, context: int, vocab_size: int
) -> Callable[[Sequence[int]], list[Sample | None]]:
    """items(indices) -> the demonstration of each prompt of `prompts_and_rewards`, None where the task has
    none or a completion is empty.

    Every line of a dataset is checked before training.
    """
    usable = _completed(config, tokenizer, context, vocab_size)
    if config.dataset is not None:
        rows = read_rows(config.dataset, key_values(config.columns, "--columns"))
        if rows[0].kind != "prompt-completion":
            raise UserError(
                f"{rows[0].where}: expected a completion column, the demonstrations, "
                f"got {', '.join(rows[0].fields)}"
            )
        all_of_them = usable(rows)
        return lambda indices: [all_of_them[i] for i in indices]
    if task is None:
        raise UserError(
            "--task or --dataset: expected one of them, to have demonstrations to learn from; got neither"
        )
    named: Task = task

    def items(indices: Sequence[int]) -> list[Sample | None]:
        examples = [named.example(TRAIN, i) for i in indices]
        fields = [{"prompt": e.prompt, "completion": e.demo} for e in examples]
        return usable(
            [
                Row(f"{named.name} {TRAIN}[{i}]", "prompt-completion", f)
                for i, f in zip(indices, fields, strict=True)
            ]
        )

    return items


def pairs_of_prompts(
    config: Hybrid, task: Task | None, tokenizer: Any, context: int, vocab_size: int
) -> Callable[[Sequence[int]], list[tuple[Sample | None, ...]]]:
    """items(indices) -> the chosen and the rejected completion of each prompt of `prompts_and_rewards`, None
    for one that is empty.

    A dataset has them in its columns, and every line is checked before training; a task's are a demonstration
    and a wrong answer.
    """
    usable = _completed(config, tokenizer, context, vocab_size)

    def sides(pairs: Sequence[tuple[str, Any, tuple[Any, Any]]]) -> list[tuple[Sample | None, ...]]:
        rows = []
        for where, prompt, both in pairs:
            for name, side in zip(("chosen", "rejected"), both, strict=True):
                if side and type(side) is not type(prompt):
                    raise UserError(
                        f"{where}: {name}: expected what follows the prompt, "
                        f"text or messages like it, got {shorten(side, 80)}"
                    )
                rows.append(
                    Row(f"{where}: {name}", "prompt-completion", {"prompt": prompt, "completion": side or ""})
                )
            if both[0] and both[0] == both[1]:
                raise UserError(
                    f"{where}: chosen, rejected: expected two different completions, "
                    f"got {shorten(both[0], 80)} twice"
                )
        samples = usable(rows)
        return list(zip(samples[::2], samples[1::2], strict=True))

    if config.dataset is not None:
        rows = read_rows(config.dataset, key_values(config.columns, "--columns"))
        for row in rows:
            if not {"prompt", "chosen", "rejected"} <= row.fields.keys():
                raise UserError(
                    f"{row.where}: expected the columns prompt, chosen and rejected, "
                    f"got {', '.join(row.fields)}"
                )
        known = sides(
            [
                (row.where, row.fields["prompt"], (row.fields["chosen"], row.fields["rejected"]))
                for row in rows
            ]
        )
        return lambda indices: [known[i] for i in indices]
    if task is None or not hasattr(task, "mistakes"):
        raise UserError(
            f"--task: {task and task.name} has no wrong answers beside its demonstrations; "
            "give a --dataset with chosen and rejected"
        )
    named: Any = task

    def items(indices: Sequence[int]) -> list[tuple[Sample | None, ...]]:
        found = []
        for i in indices:
            example = named.example(TRAIN, i)
            wrong = named.mistakes(example, 1, i)
            found.append(
                (f"{named.name} {TRAIN}[{i}]", example.prompt, (example.demo, wrong[0] if wrong else None))
            )
        return sides(found)

    return items


def _completed(
    config: Hybrid, tokenizer: Any, context: int, vocab_size: int
) -> Callable[[Sequence[Row]], list[Sample | None]]:
    """The samples of rows of prompts with completions, None where a completion is empty."""
    limit = min(config.max_tokens or context, context)

    def usable(rows: Sequence[Row]) -> list[Sample | None]:
        known = [row for row in rows if row.fields["completion"]]
        for row, sample in zip(known, samples := encode_all(known, tokenizer, max_tokens=limit), strict=True):
            check_tokens(sample.tokens, row.where, vocab_size)
            check_budget(len(sample.tokens), row.where, config.micro_tokens)
        there = iter(samples)
        return [next(there) if row.fields["completion"] else None for row in rows]

    return usable
