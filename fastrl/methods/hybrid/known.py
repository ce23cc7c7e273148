"""What is known of a prompt beside its rewards: its demonstration, or a chosen and a rejected completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastrl.config import Hybrid
from fastrl.data.check import check_budget, check_tokens
from fastrl.data.encode import Sample, encode_all
from fastrl.data.messages import template_columns
from fastrl.data.rows import Row, read_rows
from fastrl.errors import UserError
from fastrl.files import JsonObject, key_values, shorten
from fastrl.model.language import LanguageConfig, Tokenizer
from fastrl.tasks import Task
from fastrl.tasks.extras import TaskWithMistakes, has_mistakes
from fastrl.tasks.task import TRAIN

Demonstrations = Callable[[Sequence[int]], list[Sample | None]]  # numbers of prompts -> their demonstrations
Pairs = Callable[[Sequence[int]], list[tuple[Sample | None, ...]]]  # -> their chosen and rejected completions


class Pair(NamedTuple):
    """A prompt's two completions; None for one that is not known."""

    where: str
    prompt: object
    chosen: object
    rejected: object
    extras: JsonObject


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Turns rows of prompts with completions into samples, and refuses what the model cannot take."""

    config: Hybrid
    tokenizer: Tokenizer
    model: LanguageConfig

    def __call__(self, rows: Sequence[Row]) -> list[Sample | None]:
        """The samples of rows, None where a completion is empty."""
        context = self.model.max_position_embeddings
        limit = min(self.config.max_tokens or context, context)

        known = [row for row in rows if row.fields["completion"]]
        samples = encode_all(known, self.tokenizer, max_tokens=limit)
        for row, sample in zip(known, samples, strict=True):
            check_tokens(sample.tokens, row.where, self.model.vocab_size)
            check_budget(len(sample.tokens), row.where, self.config.micro_tokens)

        present = iter(samples)
        return [next(present) if row.fields["completion"] else None for row in rows]

    def pairs(self, pairs: Sequence[Pair]) -> list[tuple[Sample | None, ...]]:
        """The chosen and the rejected completion of each prompt."""
        rows = [row for pair in pairs for row in _sides(pair)]
        samples = self(rows)
        return list(zip(samples[::2], samples[1::2], strict=True))


def demonstrations_of_prompts(encode: PromptEncoder, task: Task | None) -> Demonstrations:
    """The demonstration of each prompt of `load_prompts`; None where there is none, or an empty one.

    Every line of a dataset is checked before training.
    """
    config = encode.config
    if config.dataset is not None:
        rows = read_rows(config.dataset, key_values(config.columns, "--columns"))
        if rows[0].kind != "prompt-completion":
            raise UserError(
                f"{rows[0].where}: expected a completion column, the demonstrations, "
                f"got {', '.join(rows[0].fields)}"
            )
        known = encode(rows)
        return lambda numbers: [known[number] for number in numbers]

    if task is None:
        raise UserError(
            "--task or --dataset: expected one of them, to have demonstrations to learn from; got neither"
        )
    return _demonstrations_of(task, encode)


def _demonstrations_of(task: Task, encode: PromptEncoder) -> Demonstrations:
    def demonstrations(numbers: Sequence[int]) -> list[Sample | None]:
        rows = []
        for number in numbers:
            example = task.example(TRAIN, number)
            extras = template_columns(example.fields)
            fields = {**extras, "prompt": example.prompt, "completion": example.demo}
            rows.append(Row(f"{task.name} {TRAIN}[{number}]", "prompt-completion", fields))
        return encode(rows)

    return demonstrations


def pairs_of_prompts(encode: PromptEncoder, task: Task | None) -> Pairs:
    """The chosen and the rejected completion of each prompt of `load_prompts`, None for one that is empty.

    A dataset has them in its columns, and every line is checked before training; a task's are a demonstration
    and a wrong answer.
    """
    config = encode.config
    if config.dataset is not None:
        rows = read_rows(config.dataset, key_values(config.columns, "--columns"))
        known = encode.pairs([_pair_of_row(row) for row in rows])
        return lambda numbers: [known[number] for number in numbers]

    if task is None:
        raise UserError("--task or --dataset: expected one of them, to have pairs to learn from; got neither")
    if not has_mistakes(task):
        raise UserError(
            f"--task: expected a task with wrong answers to pair with its demonstrations, got {task.name}; "
            "give a --dataset with the columns prompt, chosen and rejected"
        )
    return _pairs_of(task, encode)


def _pair_of_row(row: Row) -> Pair:
    fields = row.fields
    if not {"prompt", "chosen", "rejected"} <= fields.keys():
        raise UserError(
            f"{row.where}: expected the columns prompt, chosen and rejected, got {', '.join(fields)}"
        )
    extras = template_columns(fields)
    return Pair(row.where, fields["prompt"], fields["chosen"], fields["rejected"], extras)


def _pairs_of(task: TaskWithMistakes, encode: PromptEncoder) -> Pairs:
    def pairs(numbers: Sequence[int]) -> list[tuple[Sample | None, ...]]:
        found = []
        for number in numbers:
            example = task.example(TRAIN, number)
            wrong = task.mistakes(example, 1, number)
            where = f"{task.name} {TRAIN}[{number}]"
            extras = template_columns(example.fields)
            found.append(Pair(where, example.prompt, example.demo, wrong[0] if wrong else None, extras))
        return encode.pairs(found)

    return pairs


def _sides(pair: Pair) -> list[Row]:
    """A row for each side.  Raises UserError for sides that do not fit their prompt, or are equal."""
    rows = []
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if side and type(side) is not type(pair.prompt):
            raise UserError(
                f"{pair.where}: {name}: expected what follows the prompt, text or messages like it, "
                f"got {shorten(side, 80)}"
            )
        fields = {**pair.extras, "prompt": pair.prompt, "completion": side or ""}
        rows.append(Row(f"{pair.where}: {name}", "prompt-completion", fields))

    if pair.chosen and pair.chosen == pair.rejected:
        raise UserError(
            f"{pair.where}: chosen, rejected: expected two different completions, "
            f"got {shorten(pair.chosen, 80)} twice"
        )
    return rows
