"""Checks of encoded rows against the model: tokens that it has, and lengths that fit a pass."""

from __future__ import annotations

from collections.abc import Sequence

from fastrl.errors import UserError


def check_tokens(tokens: Sequence[int], where: str, vocab_size: int) -> None:
    """Raises UserError, naming `where`, for a token outside the model's vocabulary."""
    largest = max(tokens)
    if largest >= vocab_size:
        raise UserError(
            f"{where}: the tokenizer gives token {largest}, but the model's vocabulary has {vocab_size}; "
            "use the tokenizer that belongs to the model"
        )


def check_budget(
    length: int,
    where: str,
    micro_tokens: int,
    what: str = "sequence",
) -> None:
    """Raises UserError, naming `where`, for `what` if it is longer than a micro-batch."""
    if length > micro_tokens:
        raise UserError(
            f"{where}: a {what} of up to {length} tokens exceeds a pass; "
            f"raise --micro-tokens ({micro_tokens}) to at least {length}"
        )


def check_room(length: int, where: str, limit: int, limit_name: str = "the model's context") -> None:
    """Raises UserError naming `where` when a prompt of `length` tokens fills all of `limit`."""
    if length >= limit:
        raise UserError(
            f"{where}: a prompt of {length} tokens leaves no room for a completion in {limit_name} of {limit}"
        )
