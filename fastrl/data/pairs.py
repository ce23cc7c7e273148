"""Preferences in TRL's columns, to tokens: pairs of completions, or completions with a label.

    {"prompt": ..., "chosen": ..., "rejected": ...}      explicit prompt  (text, or lists of chat messages)
    {"chosen": ..., "rejected": ...}                     implicit prompt: the common beginning of both sides
    {"prompt": ..., "completion": ..., "label": true}    labelled, for losses of single completions, which
                                                         also take pairs apart

Prompt and completion are tokenised apart, as everywhere (see encode.py), so that the token boundary is the
sampler's, and the same on both sides of a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fastrl.data.encode import Sample, encode_all
from fastrl.data.messages import template_columns
from fastrl.data.rows import Kinds, Row, Text, check_value
from fastrl.data.tokenizer import Tokenizer
from fastrl.errors import UserError
from fastrl.files import shorten

PAIRED: Kinds = {"pair": ("chosen", "rejected")}
LABELLED: Kinds = {"pair": ("chosen", "rejected"), "label": ("prompt", "completion", "label")}


@dataclass(frozen=True, slots=True)
class LabelledSample:
    """A prompt with a completion that is good (chosen, desirable) or bad."""

    sample: Sample
    good: bool


Unit = tuple[LabelledSample, ...]
"""What one loss term is about: a chosen and a rejected completion, in this order, or one labelled one."""


def encode_units(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    paired: bool,
    max_tokens: int | None = None,
) -> list[Unit]:
    """The units of rows read as PAIRED or LABELLED, in order; with `paired` False a pair gives two.

    Raises UserError naming the row, and the side of the pair, for whatever `encode` refuses, for equal sides,
    and for a missing implicit prompt.
    """
    parts = [part for row in rows for part in SPLIT[row.kind](row)]
    samples = encode_all([row for row, _ in parts], tokenizer, max_tokens=max_tokens)
    labelled = [LabelledSample(sample, good) for sample, (_, good) in zip(samples, parts, strict=True)]
    if paired:
        return list(zip(labelled[::2], labelled[1::2], strict=True))
    return [(one,) for one in labelled]


def _sides(row: Row) -> Iterator[tuple[Row, bool]]:
    """The chosen and the rejected completion of a pair, each with its prompt."""
    prompt, *sides = prompt_of(row)
    extras = template_columns(row.fields)
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        fields = {"prompt": prompt, "completion": side, **extras}
        yield Row(f"{row.where}: {name}", "prompt-completion", fields), name == "chosen"


def _labelled(row: Row) -> Iterator[tuple[Row, bool]]:
    yield Row(row.where, "prompt-completion", row.fields), row.fields["label"]


SPLIT: dict[str, Callable[[Row], Iterator[tuple[Row, bool]]]] = {"pair": _sides, "label": _labelled}


# --- prompts ----------------------------------------------------------------------------------------
def prompt_of(row: Row) -> tuple[Text, Text, Text]:
    """(prompt, chosen, rejected) of a pair.

    Without a prompt column, the prompt is the common beginning of both sides, and each side is what follows
    it.  As in TRL, a text prompt beside conversations that begin with the same messages is taken for a copy
    of them.
    """
    chosen = row.fields["chosen"]
    rejected = row.fields["rejected"]
    prompt = row.fields.get("prompt")
    where = f"{row.where}: chosen, rejected"
    if type(chosen) is not type(rejected):
        raise UserError(f"{where}: expected both to be text or both lists of messages, got one of each")
    if chosen == rejected:
        raise UserError(f"{where}: expected two different completions, got {shorten(chosen, 80)} twice")

    shared = _shared(chosen, rejected)
    is_copy = isinstance(prompt, str) and isinstance(chosen, list) and shared
    if prompt is not None and not is_copy:
        check_value("prompt", prompt, row.where)
        return prompt, chosen, rejected
    if not shared:
        raise UserError(
            f"{where}: expected them to begin with the same prompt, or a prompt column; got neither"
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _shared(chosen: Text, rejected: Text) -> int:
    """Number of messages, or characters, at the beginning of both sides that are their prompt.

    Text is cut before the last space that both share, so that no word is cut in two; if that leaves nothing,
    after the last common character.
    """
    n = min(len(chosen), len(rejected))
    for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)):
        if a != b:
            n = i
            break
    if isinstance(chosen, list):
        return n
    return max((i for i, c in enumerate(chosen[:n]) if c.isspace()), default=0) or n
