"""How completions are drawn, and what becomes of the last few that take long: the tail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrl.errors import UserError, require


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How completions are drawn.

    n               completions per prompt
    max_new_tokens  the longest completion, its end-of-sequence token included; in an episode of several
                    turns, all tokens of the policy
    max_length      the longest sequence, prompt and observations included; 0 is the model's context
    temperature     0 is greedy: log-probs are then reported at temperature 1
    top_k, top_p, min_p   filters, applied in this order; 0, 1 and 0 turn them off
    seed            the key of all randomness, with each sequence's number and position
    stop            further tokens, or strings of one token, that end a completion
    """

    n: int = 1
    max_new_tokens: int = 256
    max_length: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str | int, ...] = ()

    def __post_init__(self) -> None:
        require("n", self.n, self.n >= 1, "at least 1")
        require("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1")
        require("max_length", self.max_length, self.max_length >= 0, "0 or more")
        require("temperature", self.temperature, self.temperature >= 0, "0 or more")
        require("top_k", self.top_k, self.top_k >= 0, "0 or more")
        require("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        require("min_p", self.min_p, 0 <= self.min_p < 1, "in [0, 1)")
        require("seed", self.seed, -(2**63) <= self.seed < 2**63, "a 64-bit number")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """What to do with the last few sequences of a call.  Once at most `share` is unfinished and the queue is
    empty, decoding runs a nearly empty batch.

    share    of the call's sequences
    action   "cut" ends them there, as if they had reached max_new_tokens; "carry" returns them unfinished, to
             be given to a later call
    """

    share: float
    action: Literal["cut", "carry"] = "carry"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(
                f"tail.share: expected a fraction in (0, 1), got {self.share}; "
                "without a tail every sequence is finished"
            )
        if self.action not in ("cut", "carry"):
            raise UserError(f"tail.action: expected 'cut' or 'carry', got {self.action!r}")
