"""Tokenizers made by the project: ordinary Hugging Face ones that lose nothing."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from fastrl.tasks.cards.task import ALPHABET
from fastrl.tasks.tokens import char_tokenizer, train_bpe

TEXTS = ["Natalia sold 48 clips.", "She sold half as many clips in May.", "How many clips did she sell?"] * 4


def test_one_token_per_character_and_back():
    """A WordLevel tokenizer without a Fuse decoder puts a space between any two characters."""
    tokenizer = char_tokenizer(ALPHABET)
    text = "a:7K3>18|7,13,3;13-7=6;6*3=18"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert [tokenizer.decode([i]) for i in ids] == list(text)
    assert (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
        tokenizer.bos_token_id,
    ) == (0, 1, 2, None)
    assert tokenizer.encode("") == [], "no special token of its own accord"


def test_unknown_characters_stay_visible():
    """A BPE model without an unknown token drops them silently; a pre-tokenizer that splits at `.` merges
    lines.
    """
    tokenizer = char_tokenizer("ab")
    assert tokenizer.encode("a?b\n b") == [3, 2, 4, 2, 2, 4]
    assert tokenizer.decode([3, 2, 4]) == "a<unk>b"
    assert tokenizer.decode([3, 4, 1, 0], skip_special_tokens=True) == "ab"


@pytest.mark.parametrize(
    "make", [lambda: char_tokenizer(ALPHABET), lambda: train_bpe(TEXTS, 300)], ids=["characters", "bpe"]
)
def test_saved_and_loaded_by_transformers(make, tmp_path):
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "1+2=3;3*4=12"
    assert loaded.encode(text) == tokenizer.encode(text) and loaded.decode(loaded.encode(text)) == text
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, tokenizer.unk_token_id)


@pytest.mark.parametrize(
    "text", ["", " ", "  two  spaces , and\n\tmore\n", "naïve 日本語 🙂", "<<48/2=24>>24", "n't 's . ?"]
)
def test_bpe_loses_nothing(text):
    """clean_up_tokenization_spaces turns ` .` into `.`; a vocabulary seen in training only cannot spell other
    scripts.
    """
    tokenizer = train_bpe(TEXTS, 280)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bpe_learns_words_and_keeps_digits_apart():
    """Merged digits make 48 and 4 different symbols, and arithmetic harder to learn."""
    tokenizer = train_bpe(TEXTS * 10, 320)
    assert len(tokenizer) <= 320
    assert len(tokenizer.encode(" clips")) == 1
    assert len(tokenizer.encode("4848")) == 4
    assert train_bpe(TEXTS * 10, 320).get_vocab() == tokenizer.get_vocab()


def test_errors():
    with pytest.raises(ValueError, match="expected different single characters"):
        char_tokenizer(["a", "bc"])
    with pytest.raises(ValueError, match="expected different single characters"):
        char_tokenizer("abca")
    with pytest.raises(ValueError, match="vocab_size: expected at least 258"):
        train_bpe(TEXTS, 100)
