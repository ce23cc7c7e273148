"""Token ids of many texts, word by word: each word of a text is tokenised once, then looked up.

Byte-level BPE tokenizers cut a text into words before anything else, by one of a few known expressions
(SPLITS), all of which cut between a letter and a space that a letter follows.  There the ids of a text are
those of its words, end to end, whatever comes before and after; words are kept, which is five times as fast
as tokenising every text anew.  Every other tokenizer is asked itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

from fastrl.data.tokenizer import Tokenizer
from fastrl.files import Json, JsonObject

FEW = 256  # texts in a call for which keeping words is not worth it
KEPT, LONGEST = 200_000, 24  # words that are kept, and the characters of the longest of them
BOUNDARY = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = (  # of GPT-2; of Llama 3; of Qwen 2 and 3
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}",
    rf"{_ENDINGS}|{_WORD}|\p{{N}}|{_REST}",
)
ASKED = ("transformers.tokenization_utils_base", "transformers.tokenization_utils_tokenizers")


def token_ids(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each text, without special tokens around it, as the tokenizer gives them."""
    if len(texts) >= FEW and cuts_at_words(tokenizer):
        return words_of(tokenizer).ids(texts)
    rows: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return rows


class Words:
    """The words of a tokenizer that have been met."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        if len(self.known) > KEPT:
            self.known = {}
        cut = list(map(BOUNDARY.split, texts))
        found = self.known
        new = list(set(chain.from_iterable(cut)).difference(found))
        found.update(zip(new, self._tokenised(new), strict=True))
        rows = [list(chain.from_iterable(map(found.__getitem__, words))) for words in cut]
        for word in new:
            if len(word) > LONGEST:
                del found[word]
        return rows

    def _tokenised(self, words: list[str]) -> Iterator[list[int]]:
        """The ids of each word, by the tokenizer's backend: transformers would make an object of each."""
        backend: Any = self.tokenizer
        encoded = backend.backend_tokenizer.encode_batch_fast(words, add_special_tokens=False)
        return (one.ids for one in encoded)


@lru_cache(maxsize=8)
def words_of(tokenizer: Tokenizer) -> Words:
    """The words met so far in this process."""
    return Words(tokenizer)


@lru_cache(maxsize=8)
def cuts_at_words(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer is known to cut texts at BOUNDARY whatever is around it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    asked = [
        getattr(getattr(type(tokenizer), name, None), "__module__", "")
        for name in ("__call__", "_encode_plus")
    ]
    if backend is None or any(module not in ASKED for module in asked):
        return False
    if backend.encode_special_tokens or getattr(tokenizer, "split_special_tokens", False):
        return False
    parts: JsonObject = json.loads(backend.to_str())
    model = parts["model"]
    plain = parts["truncation"] is None and parts["padding"] is None and not model.get("dropout")
    normal = parts["normalizer"] in (None, {"type": "NFC"})
    return (
        plain
        and normal
        and model["type"] == "BPE"
        and _splits(parts["pre_tokenizer"])
        and not any(_reaches_out(token) for token in parts["added_tokens"])
    )


def _splits(step: Json) -> bool:
    """Whether a pre-tokenizer cuts at BOUNDARY, whatever its other steps cut."""
    steps = step.get("pretokenizers", [step]) if step else []
    known = {"ByteLevel", "Digits", "Split"}
    if any(one["type"] not in known or one.get("add_prefix_space") for one in steps):
        return False
    return any(map(_cuts, steps)) and all(one["type"] != "Split" or _cuts(one) for one in steps)


def _cuts(step: JsonObject) -> bool:
    if step["type"] == "Split":
        pattern = step["pattern"].get("Regex")
        return pattern in SPLITS and step["behavior"] == "Isolated" and not step["invert"]
    return step["type"] == "ByteLevel" and step.get("use_regex", True)


def _reaches_out(token: JsonObject) -> bool:
    """Whether an added token depends on what is around it, or has a boundary inside."""
    around = token["lstrip"] or token["rstrip"] or token["single_word"]
    return bool(around or BOUNDARY.search(token["content"]) or token["content"].startswith(" "))
