"""What a user may pass as prompts and stops, turned into tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastrl.data import encode_prompt
from fastrl.errors import UserError

Prompt = str | list[dict[str, Any]] | list[int]


def tokenize(prompts: Sequence[Prompt], tokenizer: Any, vocab_size: int) -> list[list[int]]:
    """Token lists of str, message-list or token-list prompts.  Raises UserError naming the prompt that is wrong."""
    return [_one(i, p, tokenizer, vocab_size) for i, p in enumerate(prompts)]


def _one(i: int, prompt: Prompt, tokenizer: Any, vocab_size: int) -> list[int]:
    if isinstance(prompt, list) and all(isinstance(t, int) for t in prompt):
        tokens = list(prompt)
    elif tokenizer is None:
        raise UserError(f"prompts[{i}]: expected a list of token ids, because the sampler has no tokenizer; got {type(prompt).__name__}")
    else:
        tokens = encode_prompt(prompt, tokenizer)
    if not tokens:
        raise UserError(f"prompts[{i}]: expected at least one token, got none")
    if bad := [t for t in tokens if not 0 <= t < vocab_size]:
        raise UserError(f"prompts[{i}]: expected token ids in [0, {vocab_size}), got {bad[0]}")
    return tokens


def stop_tokens(stop: Sequence[str | int], tokenizer: Any, config_eos: Sequence[int]) -> list[int]:
    """Token ids that end a completion: the end-of-sequence token(s) and `stop`, whose strings must be one token each."""
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
            raise UserError(f"stop: expected strings of one token; {s!r} is {len(tokens)} tokens of this tokenizer")
        ids.add(tokens[0])
    return sorted(ids)
