"""Tokenizers built from text; `save_pretrained` writes what `AutoTokenizer` reads."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
_BYTES = 256


def char_tokenizer(alphabet: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per character of `alphabet`, after <pad>=0, <eos>=1 and <unk>=2; other text becomes <unk>.

    Raises ValueError for an entry that is not a single character, or appears twice.
    """
    characters = list(alphabet)
    too_long = [c for c in characters if len(c) != 1]
    if too_long or len(set(characters)) != len(characters):
        raise ValueError(f"alphabet: expected different single characters, got {too_long or characters}")

    vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNK, *characters])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    # [\s\S] instead of `.`, which does not match newlines
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()  # joined without spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, unk_token=UNK, clean_up_tokenization_spaces=False
    )


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`: every text round-trips and each digit is a token.

    <pad> is 0 and <eos> is 1.  Raises ValueError for a `vocab_size` too small for the 256 bytes and the two
    special tokens.
    """
    least = _BYTES + 2
    if vocab_size < least:
        expected = f"at least {least} (256 bytes and 2 special tokens)"
        raise ValueError(f"vocab_size: expected {expected}, got {vocab_size}")

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )
