"""What is known of a prompt beside its rewards: its demonstration, or a chosen and a rejected completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastrl.config import Hybrid
from fastrl.data.dataset import read_items
from fastrl.data.encode import Sample
from fastrl.data.encoders import Limits
from fastrl.data.known import (
    DemonstrationEncoder,
    KnownPairEncoder,
    Pair,
    encode_known,
    encode_known_pairs,
)
from fastrl.data.messages import template_columns
from fastrl.data.rows import Row
from fastrl.errors import UserError
from fastrl.files import key_values
from fastrl.model.language import LanguageConfig, Tokenizer
from fastrl.parallel.world import World
from fastrl.tasks import Task
from fastrl.tasks.extras import TaskWithMistakes, has_mistakes
from fastrl.tasks.task import TRAIN

Demonstrations = Callable[[Sequence[int]], list[Sample | None]]  # numbers of prompts -> their demonstrations
Pairs = Callable[[Sequence[int]], list[tuple[Sample | None, ...]]]  # -> their chosen and rejected completions


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Turns rows of prompts with completions into samples, and refuses what the model cannot take."""

    config: Hybrid
    tokenizer: Tokenizer
    model: LanguageConfig

    @property
    def limits(self) -> Limits:
        """What the model can take."""
        context = self.model.max_position_embeddings
        longest = min(self.config.max_tokens or context, context)
        return Limits(longest, self.config.micro_tokens, self.model.vocab_size)

    def __call__(self, rows: Sequence[Row]) -> list[Sample | None]:
        """The samples of rows, None where a completion is empty."""
        return encode_known(rows, self.tokenizer, self.limits)

    def pairs(self, pairs: Sequence[Pair]) -> list[tuple[Sample | None, ...]]:
        """The chosen and the rejected completion of each prompt."""
        return encode_known_pairs(pairs, self.tokenizer, self.limits)


def demonstrations_of_prompts(
    encode: PromptEncoder, task: Task | None, world: World | None = None
) -> Demonstrations:
    """The demonstration of each prompt of `load_prompts`; None where there is none, or an empty one.

    Every line of a dataset is checked before training.
    """
    config = encode.config
    if config.dataset is not None:
        columns = key_values(config.columns, "--columns")
        encoder = DemonstrationEncoder(encode.limits)
        return read_items(config.dataset, encoder, encode.tokenizer, columns=columns, world=world)

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


def pairs_of_prompts(encode: PromptEncoder, task: Task | None, world: World | None = None) -> Pairs:
    """The chosen and the rejected completion of each prompt of `load_prompts`, None for one that is empty.

    A dataset has them in its columns, and every line is checked before training; a task's are a demonstration
    and a wrong answer.
    """
    config = encode.config
    if config.dataset is not None:
        columns = key_values(config.columns, "--columns")
        encoder = KnownPairEncoder(encode.limits)
        return read_items(config.dataset, encoder, encode.tokenizer, columns=columns, world=world)

    if task is None:
        raise UserError("--task or --dataset: expected one of them, to have pairs to learn from; got neither")
    if not has_mistakes(task):
        raise UserError(
            f"--task: expected a task with wrong answers to pair with its demonstrations, got {task.name}; "
            "give a --dataset with the columns prompt, chosen and rejected"
        )
    return _pairs_of(task, encode)


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
