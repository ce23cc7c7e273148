"""Rows to tokens and loss masks.

Prompt and completion are tokenised apart, so that the boundary between them is the one the sampler sees.
Nothing is truncated: a row that is too long is a UserError that names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from jinja2 import TemplateError

from fastrl.data.rows import Messages, Row, Text, check_value
from fastrl.data.tokenizer import Tokenizer
from fastrl.errors import UserError
from fastrl.files import Json, shorten

Turns = Literal["all", "last"]


@dataclass(frozen=True, slots=True)
class Sample:
    """A sequence.

    mask    True where a token counts in the loss (never the first token)
    weight  weight of the sequence's tokens in means
    """

    tokens: list[int]
    mask: list[bool]
    weight: float = 1.0


class Segment(NamedTuple):
    """A piece of a sequence's text that is tokenised by itself."""

    text: str
    trained: bool


def encode(
    row: Row,
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None = None,
    turns: Turns = "all",
) -> Sample:
    """A row's tokens and loss mask: its completion counts, end-of-sequence token included.

    `turns` says whether all assistant turns of a conversation count, or only the last.  The end-of-sequence
    token is appended unless the text (or the chat template) ends in it; a beginning-of-sequence token comes
    first if the tokenizer itself puts one there.

    Raises UserError naming the row for a prompt alone, an empty prompt, more than `max_tokens` tokens, a
    missing chat template, and text that the tokenizer has no tokens for.
    """
    return encode_all([row], tokenizer, max_tokens=max_tokens, turns=turns)[0]


def encode_all(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None = None,
    turns: Turns = "all",
) -> list[Sample]:
    """`encode` of every row in one call of the tokenizer: ten times as fast as a call per row."""
    eos = end_of_sequence(tokenizer)
    pieces = [_segments(row, tokenizer, turns) for row in rows]
    texts = []
    for row, (segments, _) in zip(rows, pieces, strict=True):
        texts += [(segment.text, row.where) for segment in segments]
    ids = iter(_ids(texts, tokenizer))

    samples = []
    for row, (segments, chat) in zip(rows, pieces, strict=True):
        parts = [(segment, next(ids)) for segment in segments]
        begin = [] if chat else _beginning(tokenizer)
        sample = _assemble(row, parts, begin, chat, eos)
        _check_length(
            len(sample.tokens),
            sum(sample.mask),
            max_tokens,
            row,
        )
        samples.append(sample)
    return samples


def encode_prompt(prompt: Text, tokenizer: Tokenizer, *, where: str = "prompt") -> list[int]:
    """A prompt's tokens, the same that `encode` puts before a completion.

    Chat messages end in the generation prompt.  Raises UserError naming `where` for an empty prompt, a
    missing chat template, and text that the tokenizer has no tokens for.
    """
    if isinstance(prompt, str):
        begin = _beginning(tokenizer)
        ids = _ids([(prompt, where)], tokenizer)[0]
        tokens = ids if begin and ids[:1] == begin else begin + ids
    else:
        check_value("prompt", prompt, where)
        text = _render(prompt, tokenizer, where, generate=True)
        tokens = _ids([(text, where)], tokenizer)[0]
    if not tokens:
        raise UserError(f"{where}: prompt: expected at least one token, got none")
    return tokens


def end_of_sequence(tokenizer: Tokenizer) -> int:
    """The tokenizer's end-of-sequence token.  Raises UserError if it has none."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("tokenizer: expected one with an end-of-sequence token (eos_token), it has none")
    return eos


# --- segments ---------------------------------------------------------------------------------------
def _segments(row: Row, tokenizer: Tokenizer, turns: Turns) -> tuple[list[Segment], bool]:
    """The row's text in pieces, and whether a chat template wrote it."""
    if row.kind == "text":
        return [Segment(row.fields["text"], True)], False
    if row.kind == "prompt":
        raise UserError(f"{row.where}: expected a completion to train on, got a prompt alone")
    if row.kind == "messages":
        return _conversation(row, row.fields["messages"], 0, tokenizer, turns), True

    prompt = row.fields["prompt"]
    completion = row.fields["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return [Segment(prompt, False), Segment(completion, True)], False
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    messages = prompt + completion
    return _conversation(row, messages, len(prompt), tokenizer, turns), True


def _conversation(
    row: Row,
    messages: Messages,
    first: int,
    tokenizer: Tokenizer,
    turns: Turns,
) -> list[Segment]:
    """Messages as segments: the assistant's turns from message `first` on are trained, the rest is context.

    An assistant's opening message is context too, because no prompt comes before it.
    """
    trained = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= max(first, 1)]
    if not trained:
        roles = [m["role"] for m in messages]
        raise UserError(
            f"{row.where}: expected an assistant message to train on, after the first; got roles {roles}"
        )

    tools = row.fields.get("tools")
    segments = []
    done = ""
    for i in trained if turns == "all" else trained[-1:]:
        before = _render(
            messages[:i],
            tokenizer,
            row.where,
            generate=True,
            tools=tools,
        )
        after = _render(
            messages[: i + 1],
            tokenizer,
            row.where,
            generate=False,
            tools=tools,
        )
        if not before.startswith(done) or not after.startswith(before):
            advice = "use prompt and completion as text"
            if done:
                advice = 'train on the last turn alone (turns="last")'
            raise UserError(f"{row.where}: the chat template rewrites the turns before message {i}; {advice}")

        segments.append(Segment(before[len(done) :], False))
        segments.append(Segment(after[len(before) :], True))
        done = after
    return segments


def _render(
    messages: Messages,
    tokenizer: Tokenizer,
    where: str,
    *,
    generate: bool,
    tools: list[Json] | None = None,
) -> str:
    if tokenizer.chat_template is None:
        advice = "use text columns, or a chat model's tokenizer"
        raise UserError(f"{where}: the tokenizer has no chat template for messages; {advice}")
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=generate
        )
    except TemplateError as error:
        roles = [m["role"] for m in messages]
        raise UserError(f"{where}: the chat template refuses roles {roles}: {error}") from error
    return str(text)


# --- tokens -----------------------------------------------------------------------------------------
def _assemble(
    row: Row,
    parts: Sequence[tuple[Segment, list[int]]],
    begin: list[int],
    chat: bool,
    eos: int,
) -> Sample:
    """The sequence of one row from the tokens of its segments."""
    tokens = list(begin)
    mask = [False] * len(begin)
    for i, (segment, ids) in enumerate(parts):
        if i == 0 and tokens and ids[:1] == tokens:
            ids = ids[1:]
        live = [segment.trained] * len(ids)
        if segment.trained and row.kind != "text":
            ids, live = _end(ids, eos, row.where, chat, last=i == len(parts) - 1)
        tokens, mask = tokens + ids, mask + live
        if i == 0 and not tokens:
            column = "text" if row.kind == "text" else "prompt"
            raise UserError(f"{row.where}: {column}: expected at least one token, got none")

    if row.kind == "text" and tokens[-1] != eos:
        tokens, mask = [*tokens, eos], [*mask, True]
    mask[0] = False
    return Sample(tokens, mask)


def _end(
    ids: list[int],
    eos: int,
    where: str,
    chat: bool,
    *,
    last: bool,
) -> tuple[list[int], list[bool]]:
    """A trained segment's tokens and mask, ended: nothing counts after its end-of-sequence token.

    The last segment gets that token if it has none.
    """
    if eos not in ids:
        ids = [*ids, eos] if last else ids
        return ids, [True] * len(ids)

    end = ids.index(eos) + 1
    if end < len(ids) and not chat:
        raise UserError(
            f"{where}: completion: expected the end-of-sequence token at its end only, "
            f"got it after {end} of {len(ids)} tokens"
        )
    if last:  # the newline that a template puts after it is never generated
        return ids[:end], [True] * end
    return ids, [True] * end + [False] * (len(ids) - end)


def _ids(texts: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of each (text, location)."""
    if not texts:
        return []
    rows: list[list[int]] = tokenizer([text for text, _ in texts], add_special_tokens=False)["input_ids"]
    for ids, (text, where) in zip(rows, texts, strict=True):
        check_known(ids, text, where, tokenizer)
    return rows


def check_known(
    ids: Sequence[int],
    text: str,
    where: str,
    tokenizer: Tokenizer,
) -> None:
    """Raises UserError naming `where` if part of `text` became the tokenizer's unknown token."""
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown != tokenizer.eos_token_id and unknown in ids:
        raise UserError(f"{where}: the tokenizer has no tokens for part of {shorten(text)}")


@lru_cache(maxsize=8)
def _beginning(tokenizer: Tokenizer) -> list[int]:
    """[bos] if the tokenizer puts one before every text, else []."""
    alone = tokenizer.encode("")
    bos = tokenizer.bos_token_id
    return alone[:1] if bos is not None and alone[:1] == [bos] else []


def _check_length(
    length: int,
    trained: int,
    max_tokens: int | None,
    row: Row,
) -> None:
    if max_tokens is None or length <= max_tokens:
        return
    parts = ""
    if row.kind != "text":
        parts = f" ({length - trained} of the prompt, {trained} of the completion)"
    raise UserError(
        f"{row.where}: {length} tokens{parts}, but a sequence may have {max_tokens}; "
        "shorten or drop the line, or raise --max-tokens"
    )
