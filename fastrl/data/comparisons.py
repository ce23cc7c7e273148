"""What reward models learn from: lines of a dataset to groups of scored sequences, with TRL's columns.

    {"chosen", "rejected"} or {"prompt", "chosen", "rejected"}   a pair; "margin" beside them is how far apart
    their rewards should be {"prompt", "completions", "scores"} or "ranks" for "scores"  a ranked group; the
    best rank is the lowest, equal ones are ties
    {"prompt", "completion", "label"}                            a completion that is right or wrong (or right
                                                                 with a probability)
    {"prompt", "completions", "labels"}                          a completion's steps, each right or wrong

Prompts and completions are text, or lists of chat messages through the tokenizer's chat template; a reward is
read at a sequence's last token, its end-of-sequence token, or at the last token of every step.  A line that
cannot be used is an error that names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.data.pairs import prompt_of
from fastrl.data.rows import Row, encode_all, encode_prompt, read_table
from fastrl.errors import UserError
from fastrl.files import shorten

SEPARATOR = "\n"  # what ends a step; the last step ends in the end-of-sequence token


class Form(NamedTuple):
    """A way to write a group down: its columns, and what a loss must learn from to take it (see
    `RewardLoss.data`).
    """

    columns: tuple[str, ...]
    data: str


FORMS = {  # the first form whose columns are all there
    "pair": Form(("chosen", "rejected"), "compared"),
    "scores": Form(("prompt", "completions", "scores"), "compared"),
    "ranks": Form(("prompt", "completions", "ranks"), "compared"),
    "steps": Form(("prompt", "completions", "labels"), "steps"),
    "verdict": Form(("prompt", "completion", "label"), "verdict"),
}


@dataclass(frozen=True, slots=True)
class Statement:
    """A line of a dataset, or an example of a task, before it is tokens.

    prompt       text or messages; None where the completions hold it already
    completions  texts or messages: a group's; or the texts of one completion's steps
    """

    where: str
    data: str
    prompt: Any
    completions: list[Any]
    target: list[float]
    margin: float | None = None
    columns: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences whose scores are compared or judged together.

    tokens   each sequence's tokens
    at       for each sequence, the positions of its tokens at which a score is read
    target   one number per score, in order (see `Judged`)
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


@dataclass(frozen=True, slots=True)
class Packed:
    """Groups on a device: tokens (T,), cu_seqlens (S+1,) int32, and the rows (N,) of T at which scores are
    read.
    """

    groups: Sequence[Group]
    tokens: Tensor
    cu_seqlens: Tensor
    at: Tensor


def pack(groups: Sequence[Group], device: torch.device | str = "cpu") -> Packed:
    """The groups' sequences end to end."""
    sequences = [s for g in groups for s in g.tokens]
    ends = [0]
    for sequence in sequences:
        ends.append(ends[-1] + len(sequence))
    places = [
        start + p for start, at in zip(ends, (a for g in groups for a in g.at), strict=False) for p in at
    ]
    tokens = torch.tensor([t for s in sequences for t in s], dtype=torch.int64, device=device)
    cu = torch.tensor(ends, dtype=torch.int32, device=device)
    return Packed(groups, tokens, cu, torch.tensor(places, dtype=torch.int64, device=device))


# --- reading ----------------------------------------------------------------------------------------
def read_statements(
    path: str | Path, data: str, columns: Mapping[str, str] | None = None, *, margins: bool = True
) -> list[Statement]:
    """Every line of a .jsonl, .json or .parquet file, all in one of the FORMS for `data`.

    Raises UserError naming the line: other columns, values of another type, a margin where `margins` says
    that none is taken.
    """
    return [_statement(fields, where, data, margins) for where, fields in read_table(path, columns)]


def _statement(fields: dict[str, Any], where: str, data: str, margins: bool) -> Statement:
    fitting = {name: form.columns for name, form in FORMS.items() if form.data == data}
    name = next((n for n, columns in fitting.items() if all(c in fields for c in columns)), None)
    if name is None:
        wanted = " or ".join(" + ".join(columns) for columns in fitting.values())
        got = ", ".join(map(repr, fields)) or "none"
        raise UserError(
            f"{where}: expected the columns {wanted}; "
            f"got {got} (other columns need another --algorithm, or --columns)"
        )
    completions, target = _judged(name, fields, where)
    for text in completions:
        _said(text, "completions", where, steps=data == "steps")
    if fields.get("prompt") is not None:
        _said(fields["prompt"], "prompt", where)
    prompt = fields.get("prompt")
    # else there is no prompt to find
    if name == "pair" and (prompt is not None or fields["chosen"][:1] == fields["rejected"][:1]):
        prompt, *completions = prompt_of(Row(where, name, fields))
    margin = fields.get("margin")
    if margin is not None and not margins:
        raise UserError(
            f"{where}: margin: expected none, which this --algorithm takes no notice of; "
            "use bradley_terry, or drop the column"
        )
    if margin is not None:
        _number(margin, "margin", where)
    return Statement(where, data, prompt, completions, target, margin, fields)


def _judged(name: str, fields: dict[str, Any], where: str) -> tuple[list[Any], list[float]]:
    """A line's completions and what is said of them."""
    if name == "pair":
        return [fields["chosen"], fields["rejected"]], [1.0, 0.0]
    if name == "verdict":
        return [fields["completion"]], [_number(fields["label"], "label", where, lo=0.0, hi=1.0)]
    column = FORMS[name].columns[-1]
    completions, values = fields["completions"], fields[column]
    fine = isinstance(completions, list) and isinstance(values, list)
    if not fine or not completions or len(completions) != len(values):
        raise UserError(
            f"{where}: completions, {column}: expected two lists of one length, at least 1; "
            f"got {shorten(values, 80)}"
        )
    bounds = {"lo": 0.0, "hi": 1.0} if name == "steps" else {}
    numbers = [_number(v, column, where, **bounds) for v in values]
    return completions, [-v for v in numbers] if name == "ranks" else numbers


def _number(value: Any, column: str, where: str, lo: float = -math.inf, hi: float = math.inf) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value) or not lo <= value <= hi:
        kind = "true or false, or a number from 0 to 1" if hi == 1.0 else "a finite number"
        raise UserError(f"{where}: {column}: expected {kind}, got {shorten(value, 80)}")
    return float(value)


def _said(value: Any, column: str, where: str, *, steps: bool = False) -> None:
    messages = (
        isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)
    )
    if not isinstance(value, str) and (steps or not messages):
        expected = "the text of a step" if steps else "text or a list of messages"
        raise UserError(
            f"{where}: {column}: expected {expected}, got {type(value).__name__} {shorten(value, 80)}"
        )


# --- tokens -----------------------------------------------------------------------------------------
def encode_statements(
    statements: Sequence[Statement],
    tokenizer: Any,
    *,
    max_tokens: int | None = None,
    separator: str = SEPARATOR,
) -> list[Group]:
    """The groups' tokens, and the positions at which their scores are read.  Raises UserError as
    `data.encode_all` does.
    """
    by_steps = [s for s in statements if s.data == "steps"]
    whole = [s for s in statements if s.data != "steps"]
    rows = [_row(s, completion) for s in whole for completion in s.completions]
    encoded = iter(encode_all(rows, tokenizer, max_tokens=max_tokens, turns="last") if rows else [])
    made = {}
    for s in whole:
        tokens = [next(encoded).tokens for _ in s.completions]
        made[id(s)] = Group(s.where, tokens, [[len(t) - 1] for t in tokens], s.target, s.margin or 0.0)
    for s in by_steps:
        made[id(s)] = _steps(s, tokenizer, max_tokens, separator)
    return [made[id(s)] for s in statements]


def _row(s: Statement, completion: Any) -> Row:
    if s.prompt is not None:
        return Row(
            s.where, "prompt-completion", {**(s.columns or {}), "prompt": s.prompt, "completion": completion}
        )
    kind = "text" if isinstance(completion, str) else "messages"
    return Row(s.where, kind, {**(s.columns or {}), kind: completion})


def _steps(s: Statement, tokenizer: Any, max_tokens: int | None, separator: str) -> Group:
    """One sequence: every step with its separator tokenised by itself, the last one with the end-of-sequence
    token instead.
    """
    last, eos = len(s.completions) - 1, tokenizer.eos_token_id
    if eos is None:
        raise UserError("tokenizer: expected one with an end-of-sequence token (eos_token), it has none")
    tokens, at = encode_prompt(s.prompt, tokenizer, where=s.where), []
    pieces = tokenizer(
        [c if i == last else c + separator for i, c in enumerate(s.completions)], add_special_tokens=False
    )["input_ids"]
    for i, piece in enumerate(pieces):
        if (
            tokenizer.unk_token_id is not None
            and tokenizer.unk_token_id != eos
            and tokenizer.unk_token_id in piece
        ):
            raise UserError(
                f"{s.where}: the tokenizer has no tokens for part of {shorten(s.completions[i] + separator)}"
            )
        tokens = [*tokens, *piece, *([eos] if i == last else [])]
        at.append(len(tokens) - 1)
    if max_tokens is not None and len(tokens) > max_tokens:
        raise UserError(
            f"{s.where}: {len(tokens)} tokens, but a sequence may have {max_tokens}; "
            "shorten the line, or raise --max-tokens"
        )
    return Group(s.where, [tokens], [at], s.target)
