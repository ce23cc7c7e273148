"""Datasets a user brings: JSON lines, JSON or parquet with TRL's columns, to tokens and loss masks.

    {"prompt": ..., "completion": ...}    loss on the completion           (text, or lists of chat messages)
    {"messages": [{"role", "content"}]}   loss on the assistant's turns    (through the tokenizer's chat
    template)
    {"text": ...}                         loss on everything
    {"prompt": ...}                       prompts alone: for generation and reinforcement learning

Prompt and completion are tokenised apart, so that the boundary between them is the one the sampler sees.
Nothing is truncated and nothing skipped: a line that cannot be used is a UserError that names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError

from fastrl.data.tokenizer import Tokenizer
from fastrl.errors import UserError
from fastrl.files import as_object, decode, parse_json, read_json_lines, shorten

Messages = list[dict[str, Any]]
Turns = Literal["all", "last"]
Kinds = Mapping[str, tuple[str, ...]]
KINDS: Kinds = {  # the columns that make a row of this kind; the first kind whose columns are all there
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "prompt": ("prompt",),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a dataset: where it stands (`file:line`), which of KINDS it is, and all its columns."""

    where: str
    kind: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """A sequence: its tokens, True in `mask` where one counts in the loss (never the first), and what its
    tokens weigh in means.
    """

    tokens: list[int]
    mask: list[bool]
    weight: float = 1.0


class Segment(NamedTuple):
    """A piece of a sequence's text that is tokenised by itself."""

    text: str
    trained: bool


# --- reading ----------------------------------------------------------------------------------------
def read_rows(path: str | Path, columns: Mapping[str, str] | None = None, kinds: Kinds = KINDS) -> list[Row]:
    """Every row of a .jsonl, .json or .parquet file, all of one of the `kinds`.

    `columns` renames the file's columns to the ones above: {"question": "prompt", "answer": "completion"}.
    Raises UserError naming file and line: what was expected there and what came.
    """
    rows: list[Row] = []
    for where, named in read_table(path, columns):
        rows.append(Row(where, _kind(named, where, rows[0].kind if rows else None, kinds), named))
    return rows


def read_table(
    path: str | Path, columns: Mapping[str, str] | None = None
) -> list[tuple[str, dict[str, Any]]]:
    """(`file:line`, its columns by their new names) of every row of a file, whatever its columns are;
    UserError as `read_rows`.
    """
    read = READERS.get(Path(path).suffix.lower())
    if read is None or not Path(path).is_file():
        reason = (
            f"no such file (looked in {Path.cwd()})"
            if read
            else f"expected a file ending in {', '.join(READERS)}"
        )
        raise UserError(f"dataset {path}: {reason}")
    if len(set((columns or {}).values())) < len(columns or {}):
        raise UserError(f"columns: expected each column to be read as another one, got {columns}")
    rows = [(where, _rename(fields, columns or {}, where)) for where, fields in read(Path(path))]
    if not rows:
        raise UserError(f"dataset {path}: expected at least one row, the file has none")
    return rows


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = decode(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), str(path))
    if not text.lstrip().startswith("["):
        yield from read_json_lines(path)
        return
    for number, value in enumerate(parse_json(text, str(path)), 1):
        where = f"{path}: item {number}"
        yield where, as_object(value, where)


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(
            f"dataset {path}: reading parquet needs pyarrow: pip install pyarrow, "
            "or convert the file to .jsonl"
        ) from error
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise UserError(f"dataset {path}: expected a parquet file, got {error}") from error
    for number, fields in enumerate(table.to_pylist(), 1):
        yield f"{path}: row {number}", fields


READERS = {".jsonl": read_json_lines, ".json": _read_json, ".parquet": _read_parquet}


def _rename(fields: dict[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    for old, new in columns.items():
        if old not in fields:
            raise UserError(
                f"{where}: expected a column {old!r} (to be read as {new!r}), "
                f"got {', '.join(fields) or 'no columns'}"
            )
        if new in fields and new not in columns:
            raise UserError(
                f"{where}: {old!r} cannot be read as {new!r}: the row has a column of that name already"
            )
    return {columns.get(name, name): value for name, value in fields.items()}


def _kind(fields: dict[str, Any], where: str, first: str | None, known: Kinds) -> str:
    kinds = [first] if first else list(known)
    kind = next((k for k in kinds if all(c in fields for c in known[k])), None)
    if kind is None:
        wanted = " or ".join(" + ".join(known[k]) for k in kinds)
        like = " like the lines before it" if first else "; rename others with columns"
        raise UserError(
            f"{where}: expected the columns {wanted}{like}; got {', '.join(map(repr, fields)) or 'none'}"
        )
    for column in known[kind]:
        check_value(column, fields[column], where)
    return kind


def check_value(column: str, value: Any, where: str) -> None:
    if isinstance(value, bool) if column == "label" else isinstance(value, str) and column != "messages":
        return
    if column in ("text", "label") or not isinstance(value, list):
        expected = {"text": "text", "label": "true or false", "messages": "a list of messages"}.get(
            column, "text or a list of messages"
        )
        raise UserError(
            f"{where}: {column}: expected {expected}, got {type(value).__name__} {shorten(value, 80)}"
        )
    if not value:
        raise UserError(f"{where}: {column}: expected at least one message, got an empty list")
    for i, message in enumerate(value):
        good = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not good or not (isinstance(message.get("content"), str) or message.get("tool_calls")):
            form = "{'role': ..., 'content': ...} with text in both"
            raise UserError(
                f"{where}: {column}: expected message {i} to be {form}, got {shorten(message, 80)}"
            )


# --- tokens -----------------------------------------------------------------------------------------
def encode(row: Row, tokenizer: Tokenizer, *, max_tokens: int | None = None, turns: Turns = "all") -> Sample:
    """The tokens of a row and which of them count in the loss: its completion, end-of-sequence token
    included.

    `turns`: whether all assistant turns of a conversation count, or the last alone.  The end-of-sequence
    token is appended unless the text (or the chat template) ends in it; a beginning-of-sequence token is put
    first where the tokenizer itself would.  Raises UserError naming the row: a prompt alone, an empty prompt,
    more than `max_tokens` tokens, no chat template, text the tokenizer has no tokens for.
    """
    return encode_all([row], tokenizer, max_tokens=max_tokens, turns=turns)[0]


def encode_all(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None = None,
    turns: Turns = "all",
) -> list[Sample]:
    """`encode` of every row, with one call of the tokenizer for all of them: a tenth of the time of a call
    for each.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("tokenizer: expected one with an end-of-sequence token (eos_token), it has none")
    pieces = [_segments(row, tokenizer, turns) for row in rows]
    texts = [
        (segment.text, row.where)
        for row, (segments, _) in zip(rows, pieces, strict=True)
        for segment in segments
    ]
    ids, samples = iter(_ids(texts, tokenizer)), []
    for row, (segments, chat) in zip(rows, pieces, strict=True):
        sample = _assemble(
            row,
            [(segment, next(ids)) for segment in segments],
            [] if chat else _beginning(tokenizer),
            chat,
            eos,
        )
        _check_length(len(sample.tokens), sum(sample.mask), max_tokens, row)
        samples.append(sample)
    return samples


def _assemble(
    row: Row, parts: list[tuple[Segment, list[int]]], begin: list[int], chat: bool, eos: int
) -> Sample:
    """The sequence of one row from the tokens of its segments."""
    tokens, mask = list(begin), [False] * len(begin)
    for i, (segment, ids) in enumerate(parts):
        ids = ids[1:] if i == 0 and tokens and ids[:1] == tokens else ids
        live = [segment.trained] * len(ids)
        if segment.trained and row.kind != "text":
            ids, live = _ended(ids, eos, row.where, chat, last=i == len(parts) - 1)
        tokens, mask = tokens + ids, mask + live
        if i == 0 and not tokens:
            raise UserError(
                f"{row.where}: {'text' if row.kind == 'text' else 'prompt'}: "
                "expected at least one token, got none"
            )
    if row.kind == "text" and tokens[-1] != eos:
        tokens, mask = [*tokens, eos], [*mask, True]
    mask[0] = False
    return Sample(tokens, mask)


def encode_prompt(prompt: str | Messages, tokenizer: Tokenizer, *, where: str = "prompt") -> list[int]:
    """The tokens of a prompt, exactly as `encode` puts them before a completion; chat messages end in the
    generation prompt.

    Raises UserError naming `where` for an empty prompt, no chat template, or text the tokenizer has no tokens
    for.
    """
    if isinstance(prompt, str):
        begin, ids = _beginning(tokenizer), _ids([(prompt, where)], tokenizer)[0]
        tokens = ids if begin and ids[:1] == begin else begin + ids
    else:
        check_value("prompt", prompt, where)
        tokens = _ids([(_render(prompt, tokenizer, where, generate=True), where)], tokenizer)[0]
    if not tokens:
        raise UserError(f"{where}: prompt: expected at least one token, got none")
    return tokens


def _segments(row: Row, tokenizer: Tokenizer, turns: Turns) -> tuple[list[Segment], bool]:
    """The row's text in pieces, and whether a chat template wrote it."""
    if row.kind == "text":
        return [Segment(row.fields["text"], True)], False
    if row.kind == "prompt":
        raise UserError(f"{row.where}: expected a completion to train on, got a prompt alone")
    if row.kind == "messages":
        return _conversation(row, row.fields["messages"], 0, tokenizer, turns), True
    prompt, completion = row.fields["prompt"], row.fields["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return [Segment(prompt, False), Segment(completion, True)], False
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return _conversation(row, prompt + completion, len(prompt), tokenizer, turns), True


def _conversation(
    row: Row, messages: Messages, first: int, tokenizer: Tokenizer, turns: Turns
) -> list[Segment]:
    """Messages as segments: the assistant's turns from message `first` on are trained, what stands between
    them is not.

    An opening message by the assistant is context: nothing prompts it.
    """
    trained = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= max(first, 1)]
    if not trained:
        raise UserError(
            f"{row.where}: expected an assistant message to train on, after the first; "
            f"got roles {[m['role'] for m in messages]}"
        )
    tools, segments, done = row.fields.get("tools"), [], ""
    for i in trained if turns == "all" else trained[-1:]:
        before = _render(messages[:i], tokenizer, row.where, generate=True, tools=tools)
        after = _render(messages[: i + 1], tokenizer, row.where, generate=False, tools=tools)
        if not before.startswith(done) or not after.startswith(before):
            advice = (
                'train on the last turn alone (turns="last")' if done else "use prompt and completion as text"
            )
            raise UserError(f"{row.where}: the chat template rewrites the turns before message {i}; {advice}")
        segments += [Segment(before[len(done) :], False), Segment(after[len(before) :], True)]
        done = after
    return segments


def _render(
    messages: Messages,
    tokenizer: Tokenizer,
    where: str,
    *,
    generate: bool,
    tools: list[Any] | None = None,
) -> str:
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where}: the tokenizer has no chat template for messages; use text columns, "
            "or a chat model's tokenizer"
        )
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=generate
        )
    except TemplateError as error:
        raise UserError(
            f"{where}: the chat template refuses roles {[m['role'] for m in messages]}: {error}"
        ) from error
    return str(text)


def _ended(ids: list[int], eos: int, where: str, chat: bool, *, last: bool) -> tuple[list[int], list[bool]]:
    """A trained segment with its end-of-sequence token: appended once at the last, and nothing after one
    counts.
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
    if last:  # a template's newline after it is never generated
        return ids[:end], [True] * end
    return ids, [True] * end + [False] * (len(ids) - end)


def _ids(texts: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of each (text, where it stands)."""
    rows: list[list[int]] = (
        tokenizer([text for text, _ in texts], add_special_tokens=False)["input_ids"] if texts else []
    )
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown != tokenizer.eos_token_id:
        for ids, (text, where) in zip(rows, texts, strict=True):
            if unknown in ids:
                raise UserError(f"{where}: the tokenizer has no tokens for part of {shorten(text)}")
    return rows


@lru_cache(maxsize=8)
def _beginning(tokenizer: Tokenizer) -> list[int]:
    """[bos] when the tokenizer puts one before every text, else []."""
    alone = tokenizer.encode("")
    return alone[:1] if tokenizer.bos_token_id is not None and alone[:1] == [tokenizer.bos_token_id] else []


def _check_length(length: int, trained: int, max_tokens: int | None, row: Row) -> None:
    if max_tokens is not None and length > max_tokens:
        parts = (
            "" if row.kind == "text" else f" ({length - trained} of the prompt, {trained} of the completion)"
        )
        raise UserError(
            f"{row.where}: {length} tokens{parts}, but a sequence may have {max_tokens}; "
            "shorten or drop the line, or raise --max-tokens"
        )
