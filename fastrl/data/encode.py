"""Rows to tokens and loss masks.

Prompt and completion are tokenised apart, so that the boundary between them is the one the sampler sees.
Nothing is truncated: a row that is too long is a UserError that names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from fastrl.data.messages import NONE, Extras, Messages, extras_of, plain
from fastrl.data.rows import Row, Text, check_value
from fastrl.data.template import render
from fastrl.data.tokenizer import Tokenizer
from fastrl.data.turns import Segment, Talk, Turns, cut
from fastrl.data.words import token_ids
from fastrl.errors import UserError
from fastrl.files import Json, check_text, shorten


@dataclass(frozen=True, slots=True)
class Sample:
    """A sequence.

    mask    True where a token counts in the loss (never the first token)
    weight  weight of the sequence's tokens in means
    """

    tokens: list[int]
    mask: list[bool]
    weight: float = 1.0


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
    first: list[tuple[str, str]] = []
    rest: list[tuple[str, str]] = []
    for row, (segments, _) in zip(rows, pieces, strict=True):
        texts = [(segment.text, row.where) for segment in segments]
        first += texts[:1]
        rest += texts[1:]
    begun = iter(_ids(first, tokenizer))
    continued = iter(continuations(rest, tokenizer))

    samples = []
    for row, (segments, chat) in zip(rows, pieces, strict=True):
        parts = [(segment, next(continued if i else begun)) for i, segment in enumerate(segments)]
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


def encode_prompt(
    prompt: Text,
    tokenizer: Tokenizer,
    *,
    where: str = "prompt",
    columns: Mapping[str, Json] | None = None,
) -> list[int]:
    """A prompt's tokens, the same that `encode` puts before a completion.

    Chat messages end in the generation prompt, or, where the last one is the assistant's, in its content,
    which is to be continued.  `columns` are those of the prompt's row: its template gets `tools` and
    `chat_template_kwargs`.

    Raises UserError naming `where` for an empty prompt, a missing chat template, and text that the tokenizer
    has no tokens for.
    """
    return encode_prompts([Row(where, "prompt", {**(columns or {}), "prompt": prompt})], tokenizer)[0]


def encode_prompts(rows: Sequence[Row], tokenizer: Tokenizer) -> list[list[int]]:
    """`encode_prompt` of every row's prompt, in one call of the tokenizer."""
    texts = [(_prompt_of(row, tokenizer), row.where) for row in rows]
    encoded = []
    for row, ids in zip(rows, _ids(texts, tokenizer), strict=True):
        begin = _beginning(tokenizer) if isinstance(row.fields["prompt"], str) else []
        tokens = ids if begin and ids[:1] == begin else begin + ids
        if not tokens:
            raise UserError(f"{row.where}: prompt: expected at least one token, got none")
        encoded.append(tokens)
    return encoded


def _prompt_of(row: Row, tokenizer: Tokenizer) -> str:
    """The text of a row's prompt."""
    prompt = row.fields["prompt"]
    if isinstance(prompt, str):
        return prompt
    check_value("prompt", prompt, row.where)
    return prompt_text(plain(prompt), tokenizer, row.where, extras_of(row.fields, row.where))


def prompt_text(messages: Messages, tokenizer: Tokenizer, where: str, extras: Extras = NONE) -> str:
    """What a model is given to answer plain messages, or to continue the last one."""
    if messages[-1]["role"] != "assistant":
        return render(messages, tokenizer, where, extras=extras, generate=True)
    if not is_open(messages):
        got = "tool calls" if messages[-1].get("tool_calls") else "no text"
        advice = "add the tool's answer, or the text to continue"
        raise UserError(
            f"{where}: prompt: expected its last message to have text to continue, got {got}; {advice}"
        )
    return render(messages, tokenizer, where, extras=extras, resume=True)


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
        check_value("messages", row.fields["messages"], row.where)
        return cut(_talk(row, plain(row.fields["messages"]), 0, turns), tokenizer), True

    prompt = row.fields["prompt"]
    completion = row.fields["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return [Segment(prompt, False), Segment(completion, True)], False
    prompt = _as_messages(prompt, "user", "prompt", row.where)
    completion = _as_messages(completion, "assistant", "completion", row.where)
    if is_open(prompt) and completion[0]["role"] == "assistant":
        return cut(_continued_talk(row, prompt, completion, turns), tokenizer), True
    return cut(_talk(row, prompt + completion, len(prompt), turns), tokenizer), True


def _as_messages(value: Text, role: str, column: str, where: str) -> Messages:
    """A prompt or a completion as plain messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    check_value(column, value, where)
    return plain(value)


def _talk(row: Row, messages: Messages, first: int, turns: Turns, opened: str = "") -> Talk:
    """The assistant's turns from message `first` on are trained, the rest is context.

    An assistant's opening message is context too, because no prompt comes before it.
    """
    trained = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= max(first, 1)]
    if not trained:
        roles = [m["role"] for m in messages]
        raise UserError(
            f"{row.where}: expected an assistant message to train on, after the first; got roles {roles}"
        )
    if turns == "last":
        opened = opened if len(trained) == 1 else ""
        trained = trained[-1:]
    return Talk(messages, trained, extras_of(row.fields, row.where), row.where, opened)


def _continued_talk(row: Row, prompt: Messages, completion: Messages, turns: Turns) -> Talk:
    """The prompt ends in the beginning of the turn that the completion goes on with: they are one message."""
    opened = prompt[-1]["content"]
    joined = {**prompt[-1], **completion[0], "content": opened + (completion[0].get("content") or "")}
    messages = [*prompt[:-1], joined, *completion[1:]]
    return _talk(row, messages, len(prompt) - 1, turns, opened)


def is_open(prompt: Messages) -> bool:
    """Whether plain messages end in the beginning of an assistant's turn, which is to be continued."""
    last = prompt[-1]
    return last["role"] == "assistant" and bool(last.get("content")) and not last.get("tool_calls")


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
            last = i == len(parts) - 1
            ids, live = _end(ids, eos, row.where, chat, last=last, closed=segment.closed)
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
    closed: bool,
) -> tuple[list[int], list[bool]]:
    """A trained segment's tokens and mask, ended: nothing counts after its end-of-sequence token.

    The last segment gets that token if it has none, and no other end.
    """
    if eos not in ids:
        ids = [*ids, eos] if last and not closed else ids
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
    try:
        rows = token_ids([text for text, _ in texts], tokenizer)
    except TypeError:
        for text, where in texts:  # the one that is no text
            check_text(text, where)
        raise
    for ids, (text, where) in zip(rows, texts, strict=True):
        check_known(ids, text, where, tokenizer)
    return rows


def continuations(texts: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of each (text, location) that goes on where another text ended.

    Tokenizers like SentencePiece put a space before every text, which is in neither: there each text is
    tokenised behind a short one, whose tokens are then dropped.
    """
    anchors = _anchors(tokenizer)
    if not anchors:
        return _ids(texts, tokenizer)
    found: dict[int, list[int]] = {}
    for anchor in anchors:
        left = [i for i in range(len(texts)) if i not in found]
        ahead = tokenizer.encode(anchor, add_special_tokens=False)
        rows = _ids([(anchor + texts[i][0], texts[i][1]) for i in left], tokenizer)
        for i, ids in zip(left, rows, strict=True):
            if ids[: len(ahead)] == ahead:
                found[i] = ids[len(ahead) :]

    for i, (text, where) in enumerate(texts):
        if i not in found:
            problem = f"the tokenizer joins {shorten(text)} to any text before it"
            raise UserError(f"{where}: {problem}; begin it with another character, or use one text column")
    return [found[i] for i in range(len(texts))]


@lru_cache(maxsize=8)
def _anchors(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Texts that what follows rarely joins, where the tokenizer puts a space before texts; else none."""
    found = []
    for probe in ("e", "t", "0"):  # some tokenizers have few letters
        alone = tokenizer.encode(probe, add_special_tokens=False)
        for anchor in ("\n", "=", ":", ".", probe):
            ahead = tokenizer.encode(anchor, add_special_tokens=False)
            both = tokenizer.encode(anchor + probe, add_special_tokens=False)
            known = tokenizer.unk_token_id not in both
            if known and ahead and both[: len(ahead)] == ahead and len(both) > len(ahead):
                if both[len(ahead) :] == alone:
                    return ()
                found.append(anchor)
        if found:
            break
    return tuple(found)


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
