"""Finding a run's tokenizer: the one asked for, else the model folder's, else the task's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

from fastrl.errors import UserError
from fastrl.model.language import Tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_tokenizer(
    asked: str | None, model: str, own: Callable[[], Tokenizer | None] | None = None
) -> Tokenizer:
    """The tokenizer of folder `asked`, else of the model's folder, else `own()`: a task's.

    Raises:  UserError when there is none, and for files that transformers cannot read.
    """
    if asked is not None:
        return _read(Path(asked))
    if has_tokenizer(model):
        return _read(Path(model))

    tokenizer = None if own is None else own()
    if tokenizer is None:
        raise UserError(
            f"--tokenizer: {model} has no tokenizer files and the task brings none; name a tokenizer folder"
        )
    return tokenizer


def has_tokenizer(model: str) -> bool:
    """Whether `model` is a folder with a tokenizer's files."""
    return Path(model).is_dir() and any((Path(model) / f).exists() for f in FILES)


def _read(folder: Path) -> Tokenizer:
    if not folder.is_dir():
        raise UserError(f"--tokenizer: expected a folder with tokenizer files, got {folder}")
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"--tokenizer: {folder} holds no tokenizer that transformers can read ({message})"
        ) from error
    return tokenizer
