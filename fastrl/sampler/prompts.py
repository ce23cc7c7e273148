"""What a user may pass as prompts and stops, turned into tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from fastrl.data.encode import encode_prompt
from fastrl.errors import UserError
from fastrl.files import shorten

Prompt = str | list[dict[str, Any]] | list[int]


def tokenize(prompts: Sequence[Prompt], tokenizer: Any, vocab_size: int) -> list[list[int]]:
    """Token lists of str, message-list or token-list prompts.  Raises UserError naming the prompt that is
    wrong.
    """
    if isinstance(prompts, str):
        raise UserError(
            f"prompts: expected a list of prompts, got the text {shorten(prompts, 60)} alone; "
            "put it into a list"
        )
    return [_one(i, p, tokenizer, vocab_size) for i, p in enumerate(prompts)]


def _one(i: int, prompt: Prompt, tokenizer: Any, vocab_size: int) -> list[int]:
    if isinstance(prompt, list) and all(isinstance(t, int) for t in prompt):
        tokens = cast("list[int]", list(prompt))
    elif tokenizer is None:
        raise UserError(
            f"prompts[{i}]: expected a list of token ids, because the sampler has no tokenizer; "
            f"got {type(prompt).__name__}"
        )
    else:
        tokens = encode_prompt(cast("str | list[dict[str, Any]]", prompt), tokenizer, where=f"prompts[{i}]")
    if not tokens:
        raise UserError(f"prompts[{i}]: expected at least one token, got none")
    if bad := [t for t in tokens if not 0 <= t < vocab_size]:
        raise UserError(f"prompts[{i}]: expected token ids in [0, {vocab_size}), got {bad[0]}")
    return tokens


def check_room(length: int, where: str, limit: int, whose: str = "the model's context") -> None:
    """Raises UserError naming `where` when a prompt of `length` tokens fills all of `limit`."""
    if length >= limit:
        raise UserError(
            f"{where}: a prompt of {length} tokens leaves no room for a completion in {whose} of {limit}"
        )


def stop_tokens(stop: Sequence[str | int], tokenizer: Any, config_eos: Sequence[int]) -> list[int]:
    """Token ids that end a completion: the end-of-sequence token(s) and `stop`, whose strings must be one
    token each.
    """
    if isinstance(stop, str):
        raise UserError(f"stop: expected a list of stops, got the text {stop!r} alone; put it into a list")
    ids = set(config_eos)
    if getattr(tokenizer, "eos_token_id", None) is not None:
        ids.add(int(tokenizer.eos_token_id))
    for s in stop:
        if isinstance(s, int):
            ids.add(s)
            continue
        if tokenizer is None:
            raise UserError(f"stop: expected token ids, because the sampler has no tokenizer; got {s!r}")
        tokens = tokenizer.encode(s, add_special_tokens=False)
        if len(tokens) != 1:
            raise UserError(
                f"stop: expected strings of one token; {s!r} is {len(tokens)} tokens of this tokenizer"
            )
        ids.add(tokens[0])
    return sorted(ids)
