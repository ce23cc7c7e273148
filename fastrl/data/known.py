"""What is known of prompts to sample from beside their rewards: completions, any of which may be missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from fastrl.data.check import check_budget, check_tokens
from fastrl.data.encode import Sample, encode_all
from fastrl.data.encoders import Keeps, Limits, changes, sample_of
from fastrl.data.messages import template_columns
from fastrl.data.rows import KINDS, Row, check_rows
from fastrl.data.store import Record, Size
from fastrl.data.tokenizer import Tokenizer
from fastrl.errors import UserError
from fastrl.files import JsonObject, shorten

Located = Iterable[tuple[str, JsonObject]]  # (`file:line`, columns)
Known = Sample | None  # a prompt with its completion; None where it has none


class Pair(NamedTuple):
    """A prompt's two completions; None for one that is not known."""

    where: str
    prompt: object
    chosen: object
    rejected: object
    extras: JsonObject


def encode_known(rows: Sequence[Row], tokenizer: Tokenizer, limits: Limits) -> list[Known]:
    """The samples of rows, None where a completion is empty.  Raises UserError for one beyond the limits."""
    known = [row for row in rows if row.fields["completion"]]
    samples = encode_all(known, tokenizer, max_tokens=limits.max_tokens)
    for row, sample in zip(known, samples, strict=True):
        check_tokens(sample.tokens, row.where, limits.vocab_size)
        check_budget(len(sample.tokens), row.where, limits.micro_tokens)

    present = iter(samples)
    return [next(present) if row.fields["completion"] else None for row in rows]


def encode_known_pairs(
    pairs: Sequence[Pair], tokenizer: Tokenizer, limits: Limits
) -> list[tuple[Known, ...]]:
    """The chosen and the rejected completion of each prompt."""
    rows = [row for pair in pairs for row in _sides(pair)]
    samples = encode_known(rows, tokenizer, limits)
    return list(zip(samples[::2], samples[1::2], strict=True))


# --- datasets ---------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class DemonstrationEncoder:
    """The completion of each prompt."""

    limits: Limits
    keeps: ClassVar[Keeps] = "tokens"

    def identity(self) -> JsonObject:
        return {}

    def fits(self, size: Size) -> bool:
        return self.limits.fit(size, together=False)

    def read(self, table: Located, first: str | None) -> list[Row]:
        rows = check_rows(table, KINDS, first)
        for row in rows:
            if row.kind != "prompt-completion":
                raise UserError(
                    f"{row.where}: expected a completion column, the demonstrations, "
                    f"got {', '.join(row.fields)}"
                )
        return rows

    def kind(self, row: Row) -> str:
        return row.kind

    def encode(self, rows: Sequence[Row], tokenizer: Tokenizer) -> list[Known]:
        return encode_known(rows, tokenizer, self.limits)

    def record(self, item: Known) -> Record:
        return _record([item])

    def item(self, record: Record) -> Known:
        return _known(record)[0]


@dataclass(frozen=True, slots=True)
class KnownPairEncoder:
    """A chosen and a rejected completion of each prompt."""

    limits: Limits
    keeps: ClassVar[Keeps] = "tokens"

    def identity(self) -> JsonObject:
        return {}

    def fits(self, size: Size) -> bool:
        return self.limits.fit(size, together=False)

    def read(self, table: Located, first: str | None) -> list[Row]:
        return check_rows(table, KINDS, first)

    def kind(self, row: Row) -> str:
        return row.kind

    def encode(self, rows: Sequence[Row], tokenizer: Tokenizer) -> list[tuple[Known, ...]]:
        return encode_known_pairs([_pair_of_row(row) for row in rows], tokenizer, self.limits)

    def record(self, item: tuple[Known, ...]) -> Record:
        return _record(item)

    def item(self, record: Record) -> tuple[Known, ...]:
        return tuple(_known(record))


def _record(samples: Sequence[Known]) -> Record:
    """One that is missing has no tokens: every other has its end-of-sequence token at least."""
    tokens = [[] if sample is None else sample.tokens for sample in samples]
    return Record(tokens, [[] if sample is None else changes(sample.mask) for sample in samples])


def _known(record: Record) -> list[Known]:
    both = zip(record.tokens, record.marks, strict=True)
    return [sample_of(list(tokens), marks) if tokens else None for tokens, marks in both]


# --- pairs ------------------------------------------------------------------------------------------
def _pair_of_row(row: Row) -> Pair:
    fields = row.fields
    if not {"prompt", "chosen", "rejected"} <= fields.keys():
        raise UserError(
            f"{row.where}: expected the columns prompt, chosen and rejected, got {', '.join(fields)}"
        )
    extras = template_columns(fields)
    return Pair(row.where, fields["prompt"], fields["chosen"], fields["rejected"], extras)


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
