"""What fastrl asks of a tokenizer, as a Protocol: any tokenizer of transformers has it."""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import Any, Protocol


class Tokenizer(Hashable, Protocol):
    """Text to token ids and back, with a chat template where the tokenizer has one."""

    chat_template: Any

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-sequence token, None where there is none."""

    @property
    def bos_token_id(self) -> int | None:
        """The token before every text, None where there is none."""

    @property
    def pad_token_id(self) -> int | None:
        """The padding token, None where there is none."""

    @property
    def unk_token_id(self) -> int | None:
        """The token that stands for text without tokens of its own, None where there is none."""

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        """The special tokens' texts by name: what a chat template calls them."""

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """The added tokens by number; each is `special` or not, and its str is its text."""

    def __call__(self, text: list[str], *, add_special_tokens: bool = True) -> Any:
        """{"input_ids": one list of token ids per text}."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of one text."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> Any:
        """The text of one list of token ids, a str."""

    def batch_decode(self, sequences: list[list[int]], *, skip_special_tokens: bool = False) -> list[str]:
        """The text of every list of token ids."""

    def get_chat_template(self, chat_template: str | None = None, tools: list[Any] | None = None) -> str:
        """The source of the template that `apply_chat_template` takes."""

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        tools: list[Any] | None = None,
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
    ) -> Any:
        """The messages as text, or as token ids with `tokenize`."""

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> object:
        """Write the tokenizer's files into a folder."""
