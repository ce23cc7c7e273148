"""What a user may pass as prompts and stops, turned into tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import cast

from fastrl.data.encode import encode_prompt
from fastrl.data.messages import Messages, template_columns
from fastrl.errors import UserError
from fastrl.files import Json, shorten
from fastrl.model.language import Tokenizer

Prompt = str | Messages | list[int]


def tokenize(prompts: Sequence[Prompt], tokenizer: Tokenizer | None, vocab_size: int) -> list[list[int]]:
    """Token lists of str, message-list or token-list prompts.  Raises UserError naming the prompt that is
    wrong.
    """
    if isinstance(prompts, str):
        raise UserError(
            f"prompts: expected a list of prompts, got the text {shorten(prompts, 60)} alone; "
            "put it into a list"
        )
    return [_tokenize_one(f"prompts[{i}]", p, tokenizer, vocab_size) for i, p in enumerate(prompts)]


def for_template(
    prompts: Sequence[Prompt], columns: Sequence[Mapping[str, Json]], tokenizer: Tokenizer | None
) -> list[Prompt]:
    """Prompts as they are, but messages as tokens where their row has `tools` or `chat_template_kwargs`,
    which their template is given.  Raises UserError as `tokenize` does.
    """
    rendered: list[Prompt] = []
    for i, (prompt, row) in enumerate(zip(prompts, columns, strict=True)):
        extras = template_columns(row)
        if extras and tokenizer is not None and _are_messages(prompt):
            prompt = encode_prompt(cast("Messages", prompt), tokenizer, where=f"prompts[{i}]", columns=extras)
        rendered.append(prompt)
    return rendered


def _are_messages(prompt: object) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def _token_ids(prompt: object) -> list[int] | None:
    """The ids of a prompt of tokens: a sequence of whole numbers, an array or a tensor of one axis."""
    if not isinstance(prompt, Sequence) and hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, str | bytes):
        return None
    if any(isinstance(t, bool) for t in prompt):
        return None
    try:
        return [index(t) for t in prompt]
    except TypeError:
        return None


def _tokenize_one(where: str, prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    ids = _token_ids(prompt)
    if ids is not None:
        tokens = ids
    elif not isinstance(prompt, str | list):
        expected = "text, a list of messages, or token ids (a list, or an array of one axis)"
        raise UserError(f"{where}: expected {expected}; got {type(prompt).__name__} {shorten(prompt, 60)}")
    elif tokenizer is None:
        raise UserError(
            f"{where}: expected a list of token ids, because the sampler has no tokenizer; "
            f"got {type(prompt).__name__}"
        )
    else:
        tokens = encode_prompt(cast("str | Messages", prompt), tokenizer, where=where)

    if not tokens:
        raise UserError(f"{where}: expected at least one token, got none")
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise UserError(f"{where}: expected token ids in [0, {vocab_size}), got {token}")
    return tokens


def stop_tokens(stop: Sequence[str | int], tokenizer: Tokenizer | None, eos: Sequence[int]) -> list[int]:
    """Token ids that end a completion: the model's `eos`, the tokenizer's, and `stop`; a string in it must be
    one token.
    """
    if isinstance(stop, str):
        raise UserError(f"stop: expected a list of stops, got the text {stop!r} alone; put it into a list")
    ids = set(eos)
    of_tokenizer = getattr(tokenizer, "eos_token_id", None)
    if of_tokenizer is not None:
        ids.add(int(of_tokenizer))
    ids.update(s if isinstance(s, int) else _stop_token(s, tokenizer) for s in stop)
    return sorted(ids)


def _stop_token(text: str, tokenizer: Tokenizer | None) -> int:
    if tokenizer is None:
        raise UserError(f"stop: expected token ids, because the sampler has no tokenizer; got {text!r}")
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) != 1:
        parts = " ".join(repr(tokenizer.decode([token])) for token in tokens[:8])
        raise UserError(
            f"stop: expected texts of one token; {text!r} is {len(tokens)} of this tokenizer ({parts}); "
            "stop at one of them, or add the text to the tokenizer as a token (see docs/tasks.md)"
        )
    return tokens[0]
