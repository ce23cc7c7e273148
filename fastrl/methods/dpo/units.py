"""Units to learn preferences from: pairs or labelled examples, of a dataset or a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastrl.config import Dpo
from fastrl.data import encoders
from fastrl.data.dataset import read_items
from fastrl.data.encoders import Limits
from fastrl.data.messages import template_columns
from fastrl.data.pairs import Unit
from fastrl.data.rows import Row
from fastrl.errors import UserError
from fastrl.files import key_values
from fastrl.methods.dpo.batches import Items
from fastrl.model.language import LanguageConfig, Tokenizer
from fastrl.parallel.world import World
from fastrl.tasks import Task
from fastrl.tasks.extras import TaskWithMistakes, has_mistakes
from fastrl.tasks.task import TRAIN


@dataclass(frozen=True, slots=True)
class UnitEncoder:
    """Turns rows into units of a run, and refuses what its model cannot take."""

    config: Dpo
    paired: bool
    tokenizer: Tokenizer
    model: LanguageConfig

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        context = self.model.max_position_embeddings
        return min(self.config.max_tokens or context, context)

    @property
    def encoder(self) -> encoders.UnitEncoder:
        """What is made of rows, whoever does it."""
        limits = Limits(self.longest, self.config.micro_tokens, self.model.vocab_size)
        return encoders.UnitEncoder(limits, self.paired)

    def __call__(self, rows: Sequence[Row]) -> list[Unit]:
        """The units of rows.  Raises UserError, naming the row, for one that cannot be trained on."""
        return self.encoder.encode(rows, self.tokenizer)


def load_units(encode: UnitEncoder, task: Task | None, world: World | None = None) -> tuple[Items, int]:
    """Pairs, or labelled examples, and how many there are; every line of a dataset is checked before
    training.

    Raises:  UserError where there is nothing to compare.
    """
    config = encode.config
    if config.dataset is not None:
        columns = key_values(config.columns, "--columns")
        known = read_items(config.dataset, encode.encoder, encode.tokenizer, columns=columns, world=world)
        return known, len(known)

    if task is None:
        raise UserError(
            "--dataset or --task: expected one of them, to have preferences to train on; got neither"
        )
    if not has_mistakes(task):
        raise UserError(
            f"--task: {task.name} has no wrong answers to prefer its demonstrations to; give a --dataset"
        )
    sides = 1 if encode.paired else 2
    return _units_of(task, encode, sides), task.size(TRAIN) * sides


def _units_of(task: TaskWithMistakes, encode: UnitEncoder, sides: int) -> Items:
    """A task's demonstrations against its mistakes; with two `sides` each pair is two labelled examples."""

    def items(indices: Sequence[int]) -> list[Unit]:
        rows = [_pair(task, index // sides) for index in indices]
        encoded = encode(rows) if rows else []
        if sides == 1:
            return encoded
        return [encoded[2 * n + index % 2] for n, index in enumerate(indices)]

    return items


def _pair(task: TaskWithMistakes, index: int) -> Row:
    example, where = task.example(TRAIN, index), f"{task.name} {TRAIN}[{index}]"
    wrong = task.mistakes(example, 1, index)
    if example.demo is None or not wrong:
        raise UserError(
            f"{where}: expected a demonstration and a wrong answer, "
            f"got {example.demo!r} and {wrong}; give a --dataset"
        )
    sides = {"prompt": example.prompt, "chosen": example.demo, "rejected": wrong[0]}
    return Row(where, "pair", {**template_columns(example.fields), **sides})
