"""What each command keeps of a dataset's rows: how they are read, encoded, and stored.

An encoder is sent to worker processes, so that it holds plain options; what it makes of some rows does not
depend on the others.  Its limits (`Limits`) only refuse rows: an encoded dataset serves runs of other limits
as long as it is within theirs, which `fits` says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, TypeVar

from fastrl.data.check import check_budget, check_room, check_tokens
from fastrl.data.encode import Sample, encode_all, encode_prompts
from fastrl.data.pairs import LABELLED, PAIRED, LabelledSample, Unit, encode_units
from fastrl.data.rows import KINDS, Row, check_rows, named
from fastrl.data.store import Record, Size
from fastrl.data.tokenizer import Tokenizer
from fastrl.data.turns import Turns
from fastrl.errors import UserError
from fastrl.files import JsonObject, shorten

R = TypeVar("R")  # a row that has been read
T = TypeVar("T")  # an encoded item
Keeps = Literal["tokens", "rows"]
Located = Iterable[tuple[str, JsonObject]]  # (`file:line`, columns)


class Encoder(Protocol[R, T]):
    """Rows to items, and items to records and back.

    keeps  what a file of its records holds: the items' tokens, or the rows that they were
    """

    keeps: ClassVar[Keeps]

    def identity(self) -> JsonObject:
        """Everything that its items depend on besides the rows and the tokenizer; not its limits."""

    def fits(self, size: Size) -> bool:
        """Whether items of this size pass its checks."""

    def read(self, table: Located, first: str | None) -> Sequence[R]:
        """Rows, their columns checked; `first` is the kind of the file's first row."""

    def kind(self, row: R) -> str | None:
        """What kind of row that is, where all of a file have to be of one."""

    def encode(self, rows: Sequence[R], tokenizer: Tokenizer) -> Sequence[T]:
        """The items of rows.  Raises UserError, naming the row, for one that cannot be used."""

    def record(self, item: T) -> Record:
        """How an item is stored."""

    def item(self, record: Record) -> T:
        """The item that was stored so."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a row may have: tokens of a sequence, of what is passed at once, and the model's vocabulary."""

    max_tokens: int
    micro_tokens: int
    vocab_size: int

    def fit(self, size: Size, *, together: bool) -> bool:
        """Whether items of this size are within the limits; `together`: sequences of an item share a pass."""
        passed = size.item if together else size.sequence
        return (
            size.sequence <= self.max_tokens and passed <= self.micro_tokens and size.token < self.vocab_size
        )


# --- masks ------------------------------------------------------------------------------------------
def changes(mask: Sequence[bool]) -> list[int]:
    """Where a mask changes, its first value taken to be False."""
    found = []
    values = bytes(mask)
    at = values.find(1)
    while at >= 0:
        found.append(at)
        at = values.find(1 - values[at], at)
    return found


def mask_of(marks: Sequence[int], length: int) -> list[bool]:
    """The mask that changes at `marks`."""
    mask: list[bool] = []
    value = False
    for mark in (*marks, length):
        mask += [value] * (mark - len(mask))
        value = not value
    return mask


def sample_of(tokens: list[int], marks: Sequence[int], weight: float = 1.0) -> Sample:
    """A stored sequence."""
    return Sample(tokens, mask_of(marks, len(tokens)), weight)


# --- demonstrations ---------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class SampleEncoder:
    """Demonstrations to learn from: one sequence each, weighted by a column if they are to be."""

    limits: Limits
    turns: Turns = "all"
    weighted: bool = False
    keeps: ClassVar[Keeps] = "tokens"

    def identity(self) -> JsonObject:
        return {"turns": self.turns, "weighted": self.weighted}

    def fits(self, size: Size) -> bool:
        return self.limits.fit(size, together=True)

    def read(self, table: Located, first: str | None) -> list[Row]:
        return check_rows(table, KINDS, first)

    def kind(self, row: Row) -> str:
        return row.kind

    def encode(self, rows: Sequence[Row], tokenizer: Tokenizer) -> list[Sample]:
        samples = encode_all(rows, tokenizer, max_tokens=self.limits.max_tokens, turns=self.turns)
        for row, sample in zip(rows, samples, strict=True):
            check_tokens(sample.tokens, row.where, self.limits.vocab_size)
            check_budget(len(sample.tokens), row.where, self.limits.micro_tokens)
        if not self.weighted:
            return samples
        return [replace(s, weight=_weight(row)) for row, s in zip(rows, samples, strict=True)]

    def record(self, item: Sample) -> Record:
        return Record([item.tokens], [changes(item.mask)], [item.weight])

    def item(self, record: Record) -> Sample:
        return sample_of(list(record.tokens[0]), record.marks[0], record.numbers[0])


def _weight(row: Row) -> float:
    value = row.fields.get("weight")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(
            f"{row.where}: weight: expected a number of 0 or more, got {shorten(value)}; "
            "or leave --sample-weights out"
        )
    return float(value)


# --- preferences ------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class UnitEncoder:
    """Units of preference losses: pairs, or completions with a label.  A pair taken apart is two units."""

    limits: Limits
    paired: bool
    keeps: ClassVar[Keeps] = "tokens"

    def identity(self) -> JsonObject:
        return {"paired": self.paired}

    def fits(self, size: Size) -> bool:
        return self.limits.fit(size, together=True)

    def read(self, table: Located, first: str | None) -> list[Row]:
        return check_rows(table, PAIRED if self.paired else LABELLED, first)

    def kind(self, row: Row) -> str:
        return row.kind

    def encode(self, rows: Sequence[Row], tokenizer: Tokenizer) -> list[Unit]:
        encoded = encode_units(rows, tokenizer, paired=self.paired, max_tokens=self.limits.max_tokens)
        each = len(encoded) // len(rows)  # 2 where pairs were taken apart
        for i, unit in enumerate(encoded):
            self._check(unit, rows[i // each].where)
        return encoded

    def record(self, item: Unit) -> Record:
        samples = [one.sample for one in item]
        marks = [changes(sample.mask) for sample in samples]
        return Record([sample.tokens for sample in samples], marks, [float(one.good) for one in item])

    def item(self, record: Record) -> Unit:
        parts = zip(record.tokens, record.marks, record.numbers, strict=True)
        return tuple(LabelledSample(sample_of(list(t), m), good > 0) for t, m, good in parts)

    def _check(self, unit: Unit, where: str) -> None:
        for one in unit:
            check_tokens(one.sample.tokens, where, self.limits.vocab_size)
        length = sum(len(one.sample.tokens) for one in unit)
        check_budget(length, where, self.limits.micro_tokens, "pair" if self.paired else "sequence")


# --- prompts ----------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class PromptRow:
    """A row with a prompt to sample from: all of its columns, and how many tokens the prompt has."""

    fields: JsonObject
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Prompts to sample from, with their rows' columns; their tokens are counted, not kept.

    context  of the model, tokens; the limit of a sequence may be lower
    columns  the file's columns to rename
    """

    limits: Limits
    context: int
    max_new_tokens: int
    columns: Mapping[str, str]
    keeps: ClassVar[Keeps] = "rows"

    def identity(self) -> JsonObject:
        return {}

    def fits(self, size: Size) -> bool:
        longest = min(size.sequence + self.max_new_tokens, self.context)
        fits = size.sequence < self.limits.max_tokens and longest <= self.limits.micro_tokens
        return fits and size.token < self.limits.vocab_size

    def read(self, table: Located, first: str | None) -> list[Row]:
        return check_rows(table, KINDS, first)

    def kind(self, row: Row) -> str:
        return row.kind

    def encode(self, rows: Sequence[Row], tokenizer: Tokenizer) -> list[PromptRow]:
        for row in rows:
            if "prompt" not in row.fields:
                present = ", ".join(row.fields)
                raise UserError(f"{row.where}: expected a prompt column to sample from, got {present}")
        encoded = encode_prompts(rows, tokenizer)
        for row, tokens in zip(rows, encoded, strict=True):
            self._check(len(tokens), tokens, row.where)
        return [PromptRow(row.fields, tokens) for row, tokens in zip(rows, encoded, strict=True)]

    def record(self, item: PromptRow) -> Record:
        return Record([item.tokens], text=json.dumps(item.fields, ensure_ascii=False, default=str))

    def item(self, record: Record) -> PromptRow:
        if record.row is None:
            return PromptRow(json.loads(record.text), ())
        ((_, fields),) = named([("", record.row)], self.columns, padded=True)
        return PromptRow(fields, ())

    def _check(self, length: int, tokens: Sequence[int], where: str) -> None:
        limit = self.limits.max_tokens
        check_room(length, where, limit, "the model's context" if limit == self.context else "--max-tokens")
        check_tokens(tokens, where, self.limits.vocab_size)
        check_budget(min(length + self.max_new_tokens, self.context), where, self.limits.micro_tokens)
