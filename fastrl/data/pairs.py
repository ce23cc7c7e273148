"""Preferences as a user's file has them, in TRL's columns, to tokens: pairs of completions, or completions
with a label.

    {"prompt": ..., "chosen": ..., "rejected": ...}      explicit prompt     (text, or lists of chat messages)
    {"chosen": ..., "rejected": ...}                     implicit prompt: the beginning that both have in
                                                         common
    {"prompt": ..., "completion": ..., "label": true}    labelled, for losses of single examples; pairs are
    taken apart for them

Prompt and completion are tokenised apart, as everywhere (see data.py), so that the boundary token is the
sampler's, and the same on both sides of a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastrl.data.rows import Kinds, Row, Sample, check_value, encode_all
from fastrl.errors import UserError
from fastrl.files import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIRED: Kinds = {"pair": ("chosen", "rejected")}
LABELLED: Kinds = {"pair": ("chosen", "rejected"), "label": ("prompt", "completion", "label")}


@dataclass(frozen=True, slots=True)
class Judged:
    """A prompt with a completion that was called good (chosen, desirable) or bad."""

    sample: Sample
    good: bool


Unit = tuple[Judged, ...]
"""What one loss is about: a chosen and a rejected completion, in this order, or one labelled completion."""


def encode_units(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, paired: bool, max_tokens: int | None = None
) -> list[Unit]:
    """The units of rows read as PAIRED or LABELLED, in order; with `paired` False a pair gives two.

    Raises UserError naming the row, and the side of the pair, for whatever `data.encode` refuses, for sides
    that are equal, and for an implicit prompt that is not there.
    """
    parts = [part for row in rows for part in SPLIT[row.kind](row)]
    samples = encode_all([row for row, _ in parts], tokenizer, max_tokens=max_tokens)
    judged = [Judged(sample, good) for sample, (_, good) in zip(samples, parts, strict=True)]
    return list(zip(judged[::2], judged[1::2], strict=True)) if paired else [(one,) for one in judged]


def _sides(row: Row) -> Iterator[tuple[Row, bool]]:
    """The chosen and the rejected completion of a pair, each with its prompt."""
    prompt, *sides = prompt_of(row)
    more = {k: v for k, v in row.fields.items() if k == "tools"}
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        yield (
            Row(f"{row.where}: {name}", "prompt-completion", {"prompt": prompt, "completion": side, **more}),
            name == "chosen",
        )


def _labelled(row: Row) -> Iterator[tuple[Row, bool]]:
    yield Row(row.where, "prompt-completion", row.fields), row.fields["label"]


SPLIT: dict[str, Callable[[Row], Iterator[tuple[Row, bool]]]] = {"pair": _sides, "label": _labelled}


# --- prompts ----------------------------------------------------------------------------------------
def prompt_of(row: Row) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected) of a pair: as its columns have them, or the common beginning of both sides
    and what follows it.

    As in TRL, a text prompt beside conversations that begin with the same messages is taken for a copy of
    them.
    """
    chosen, rejected, prompt = row.fields["chosen"], row.fields["rejected"], row.fields.get("prompt")
    if type(chosen) is not type(rejected):
        raise UserError(
            f"{row.where}: chosen, rejected: expected both to be text or both lists of messages, "
            "got one of each"
        )
    if chosen == rejected:
        raise UserError(
            f"{row.where}: chosen, rejected: expected two different completions, "
            f"got {shorten(chosen, 80)} twice"
        )
    shared = _shared(chosen, rejected)
    if prompt is not None and not (isinstance(prompt, str) and isinstance(chosen, list) and shared):
        check_value("prompt", prompt, row.where)
        return prompt, chosen, rejected
    if not shared:
        raise UserError(
            f"{row.where}: chosen, rejected: expected them to begin with the same prompt, "
            "or a prompt column; got neither"
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _shared(chosen: Any, rejected: Any) -> int:
    """How many messages, or characters, of both sides are their prompt.

    Text is cut before the last space that both have in common, so that no word is cut in two; where that
    leaves nothing, behind the last common character.
    """
    n = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    if isinstance(chosen, list):
        return n
    return max((i for i, c in enumerate(chosen[:n]) if c.isspace()), default=0) or n
