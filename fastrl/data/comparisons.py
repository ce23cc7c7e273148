"""Data of reward models: lines of a dataset, with TRL's columns, to groups of sequences with targets.

    {"chosen", "rejected"} or {"prompt", "chosen", "rejected"}   a pair; "margin" beside them is the distance
                                                                 that their rewards should have
    {"prompt", "completions", "scores"}                          a ranked group; equal scores are ties
    {"prompt", "completions", "ranks"}                           the same by rank: the lowest is the best
    {"prompt", "completion", "label"}                            a completion that is right or wrong, or
                                                                 right with a probability
    {"prompt", "completions", "labels"}                          a completion's steps, each right or wrong

Prompts and completions are text, or lists of chat messages through the tokenizer's chat template.  A reward
is read at a sequence's last token, its end-of-sequence token, or at the last token of every step.  A line
that cannot be used is an error that names it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

from fastrl.data.encode import continuations, encode_all, encode_prompt, end_of_sequence
from fastrl.data.encoders import Keeps, Limits
from fastrl.data.messages import check_messages
from fastrl.data.pairs import prompt_of
from fastrl.data.rows import Row, Text, read_table
from fastrl.data.store import Record, Size
from fastrl.data.tokenizer import Tokenizer
from fastrl.errors import UserError
from fastrl.files import Json, JsonObject, shorten

SEPARATOR = "\n"  # ends a step; the last step ends in the end-of-sequence token


class Form(NamedTuple):
    """A way to write a group down: its columns, and which losses read it (see `RewardLoss.data`)."""

    columns: tuple[str, ...]
    data: str


FORMS = {  # the first form with all its columns present wins
    "pair": Form(("chosen", "rejected"), "compared"),
    "scores": Form(("prompt", "completions", "scores"), "compared"),
    "ranks": Form(("prompt", "completions", "ranks"), "compared"),
    "steps": Form(("prompt", "completions", "labels"), "steps"),
    "verdict": Form(("prompt", "completion", "label"), "verdict"),
}


@dataclass(frozen=True, slots=True)
class Statement:
    """A line of a dataset, or an example of a task, before it is tokenised.

    prompt       text or messages; None if the completions contain it
    completions  a group's texts or messages; or the texts of one completion's steps
    target       a number per completion, or per step
    """

    where: str
    data: str
    prompt: Text | None
    completions: Sequence[Text]
    target: list[float]
    margin: float | None = None
    columns: Mapping[str, Json] | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences with scores that are compared or judged together.

    tokens  each sequence's tokens
    at      for each sequence, the positions of the tokens at which a score is read
    target  one number per score, in order (see fastrl.algorithms.reward)
    """

    where: str
    tokens: list[list[int]]
    at: list[list[int]]
    target: list[float]
    margin: float = 0.0

    @property
    def length(self) -> int:
        """Tokens of all its sequences."""
        return sum(map(len, self.tokens))


# --- reading ----------------------------------------------------------------------------------------
def read_statements(
    path: str | Path,
    data: str,
    columns: Mapping[str, str] | None = None,
    *,
    margins: bool = True,
) -> list[Statement]:
    """Every line of a .jsonl, .json or .parquet file, all in one of the FORMS for `data`.

    Raises UserError naming the line for other columns, values of another type, and a margin unless `margins`.
    """
    return statements_of(read_table(path, columns), data, margins=margins)


def statements_of(
    table: Iterable[tuple[str, JsonObject]], data: str, *, margins: bool = True
) -> list[Statement]:
    """`read_statements` of (location, columns)."""
    return [_statement(fields, where, data, margins) for where, fields in table]


def _statement(
    fields: JsonObject,
    where: str,
    data: str,
    margins: bool,
) -> Statement:
    form = _form(fields, where, data)
    completions, target = _completions(form, fields, where)
    for completion in completions:
        _check_text(
            completion,
            "completions",
            where,
            steps=data == "steps",
        )
    prompt = fields.get("prompt")
    if prompt is not None:
        _check_text(prompt, "prompt", where)

    # sides that differ from the beginning contain no common prompt
    if form == "pair" and (prompt is not None or fields["chosen"][:1] == fields["rejected"][:1]):
        prompt, *completions = prompt_of(Row(where, form, fields))

    margin = fields.get("margin")
    if margin is not None:
        if not margins:
            advice = "use bradley_terry, or drop the column"
            raise UserError(f"{where}: margin: expected none, this --algorithm ignores it; {advice}")
        _number(margin, "margin", where)
    return Statement(
        where,
        data,
        prompt,
        completions,
        target,
        margin,
        fields,
    )


def _form(fields: JsonObject, where: str, data: str) -> str:
    """The form of a line, a key of FORMS."""
    forms = {name: form.columns for name, form in FORMS.items() if form.data == data}
    for name, columns in forms.items():
        if all(column in fields for column in columns):
            return name
    wanted = " or ".join(" + ".join(columns) for columns in forms.values())
    present = ", ".join(map(repr, fields)) or "none"
    raise UserError(
        f"{where}: expected the columns {wanted}; "
        f"got {present} (other columns need another --algorithm, or --columns)"
    )


def _completions(form: str, fields: JsonObject, where: str) -> tuple[Sequence[Text], list[float]]:
    """A line's completions and their targets."""
    if form == "pair":
        return [fields["chosen"], fields["rejected"]], [1.0, 0.0]
    if form == "verdict":
        return [fields["completion"]], [_number(fields["label"], "label", where, lo=0.0, hi=1.0)]

    column = FORMS[form].columns[-1]
    completions = fields["completions"]
    values = fields[column]
    ok = isinstance(completions, list) and isinstance(values, list)
    if not ok or not completions or len(completions) != len(values):
        expected = "two lists of one length, at least 1"
        got = shorten(values, 80)
        raise UserError(f"{where}: completions, {column}: expected {expected}; got {got}")

    bounds = {"lo": 0.0, "hi": 1.0} if form == "steps" else {}
    numbers = [_number(value, column, where, **bounds) for value in values]
    return completions, [-v for v in numbers] if form == "ranks" else numbers


def _number(
    value: Json,
    column: str,
    where: str,
    lo: float = -math.inf,
    hi: float = math.inf,
) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value) or not lo <= value <= hi:
        kind = "true or false, or a number from 0 to 1" if hi == 1.0 else "a finite number"
        raise UserError(f"{where}: {column}: expected {kind}, got {shorten(value, 80)}")
    return float(value)


def _check_text(
    value: Json,
    column: str,
    where: str,
    *,
    steps: bool = False,
) -> None:
    """Raises UserError unless `value` is text or, except for a step, a list of messages."""
    if isinstance(value, str):
        return
    messages = isinstance(value, list) and bool(value) and all(isinstance(m, dict) for m in value)
    if messages and not steps:
        check_messages(column, value, where)
    if steps or not messages:
        expected = "the text of a step" if steps else "text or a list of messages"
        got = f"{type(value).__name__} {shorten(value, 80)}"
        raise UserError(f"{where}: {column}: expected {expected}, got {got}")


# --- tokens -----------------------------------------------------------------------------------------
def encode_statements(
    statements: Sequence[Statement],
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None = None,
    separator: str = SEPARATOR,
) -> list[Group]:
    """The groups' tokens, and the positions at which their scores are read.

    Raises UserError as `encode_all` does.
    """
    scored_at_end = [s for s in statements if s.data != "steps"]
    rows = [_row(s, completion) for s in scored_at_end for completion in s.completions]
    encoded = iter(encode_all(rows, tokenizer, max_tokens=max_tokens, turns="last") if rows else [])

    groups = []
    for s in statements:
        if s.data == "steps":
            groups.append(_encode_steps(s, tokenizer, max_tokens, separator))
            continue
        tokens = [next(encoded).tokens for _ in s.completions]
        at = [[len(sequence) - 1] for sequence in tokens]
        groups.append(Group(s.where, tokens, at, s.target, s.margin or 0.0))
    return groups


def _row(s: Statement, completion: Text) -> Row:
    columns = dict(s.columns or {})
    if s.prompt is not None:
        fields = {**columns, "prompt": s.prompt, "completion": completion}
        return Row(s.where, "prompt-completion", fields)
    kind = "text" if isinstance(completion, str) else "messages"
    return Row(s.where, kind, {**columns, kind: completion})


def _encode_steps(
    s: Statement,
    tokenizer: Tokenizer,
    max_tokens: int | None,
    separator: str,
) -> Group:
    """One sequence: every step is tokenised by itself, with its separator.

    The last step has the end-of-sequence token instead.
    """
    eos = end_of_sequence(tokenizer)
    last = len(s.completions) - 1
    prompt = "" if s.prompt is None else s.prompt
    tokens = encode_prompt(prompt, tokenizer, where=s.where, columns=s.columns)
    at = []
    texts = [f"{step}{separator}" if i < last else f"{step}" for i, step in enumerate(s.completions)]
    pieces = continuations([(text, s.where) for text in texts], tokenizer)
    for i, piece in enumerate(pieces):
        tokens = [*tokens, *piece]
        if i == last:
            tokens.append(eos)
        at.append(len(tokens) - 1)

    if max_tokens is not None and len(tokens) > max_tokens:
        raise UserError(
            f"{s.where}: {len(tokens)} tokens, but a sequence may have {max_tokens}; "
            "shorten the line, or raise --max-tokens"
        )
    return Group(s.where, [tokens], [at], s.target)


def check_group(group: Group, vocab_size: int, micro_tokens: int) -> None:
    """Refuse a group that the model cannot read, or not in one pass."""
    top = max(t for tokens in group.tokens for t in tokens)
    if top >= vocab_size:
        raise UserError(
            f"{group.where}: the tokenizer gives token {top}, "
            f"but the model's vocabulary has {vocab_size}; they do not belong together"
        )
    if group.length > micro_tokens:
        raise UserError(
            f"{group.where}: {group.length} tokens to compare exceed a pass; "
            f"raise --micro-tokens from {micro_tokens} to {group.length}"
        )


# --- datasets of any size ---------------------------------------------------------------------------
class Texts(NamedTuple):
    """What a log shows of a group."""

    prompt: Text | None
    completions: Sequence[Text]


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a dataset: its group, which no longer knows where it was, and its texts if it is held out."""

    group: Group
    held: Texts | None


@dataclass(frozen=True, slots=True)
class LineEncoder:
    """Lines to compare or to judge, each of a split that its prompt decides.

    data, margins, separator  see `read_statements` and `encode_statements`
    shares                    of the splits, of which all but "train" are held out
    assign                    (shares, "reward", prompt) -> a split
    """

    limits: Limits
    data: str
    margins: bool
    separator: str
    shares: Mapping[str, float]
    assign: Callable[..., str]
    keeps: ClassVar[Keeps] = "tokens"

    def identity(self) -> JsonObject:
        options = {"data": self.data, "margins": self.margins, "separator": self.separator}
        return {**options, "shares": self.shares, "assign": self.assign.__qualname__}

    def fits(self, size: Size) -> bool:
        return self.limits.fit(size, together=True)

    def read(self, table: Iterable[tuple[str, JsonObject]], first: str | None) -> list[Statement]:
        return statements_of(table, self.data, margins=self.margins)

    def kind(self, row: Statement) -> None:
        """None: a ranking may follow a pair."""

    def encode(self, rows: Sequence[Statement], tokenizer: Tokenizer) -> list[Line]:
        groups = self.groups(rows, tokenizer)
        return [Line(replace(g, where=""), self._held(s)) for g, s in zip(groups, rows, strict=True)]

    def groups(self, statements: Sequence[Statement], tokenizer: Tokenizer) -> list[Group]:
        """Groups within the limits.  Raises UserError, naming the line, for one that is not."""
        limits = self.limits
        groups = encode_statements(
            statements, tokenizer, max_tokens=limits.max_tokens, separator=self.separator
        )
        for group in groups:
            check_group(group, limits.vocab_size, limits.micro_tokens)
        return groups

    def record(self, item: Line) -> Record:
        group, held = item.group, item.held
        text = "" if held is None else json.dumps(held, ensure_ascii=False, default=str)
        return Record(group.tokens, group.at, [float(held is not None), group.margin, *group.target], text)

    def item(self, record: Record) -> Line:
        _, margin, *target = record.numbers
        tokens, at = [list(own) for own in record.tokens], [list(own) for own in record.marks]
        held = Texts(*json.loads(record.text)) if record.text else None
        return Line(Group("", tokens, at, target, margin), held)

    def _held(self, s: Statement) -> Texts | None:
        # Lines of one prompt stay together, so that no held-out prompt is trained on.
        key = s.completions[0] if s.prompt is None else s.prompt
        held = self.assign(self.shares, "reward", key) != "train"
        return Texts(s.prompt, s.completions) if held else None
