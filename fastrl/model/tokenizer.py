"""Finding a run's tokenizer: the one asked for, else the model folder's, else the task's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

from fastrl.data.template import check_template
from fastrl.errors import UserError
from fastrl.files import BYTE_ORDER_MARK, decode
from fastrl.model.language import Tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_tokenizer(
    asked: str | None,
    model: str,
    own: Callable[[], Tokenizer | None] | None = None,
    *,
    template: str | None = None,
) -> Tokenizer:
    """The tokenizer of folder `asked`, else of the model's folder, else `own()`: a task's.

    template  a file with the chat template that it gets in place of its own

    Raises:  UserError when there is none, for files that transformers cannot read, and for a file that is no
             template.
    """
    source = None if template is None else read_template(template)
    tokenizer = _found(asked, model, own)
    if source is not None:
        tokenizer.chat_template = source
    return tokenizer


def _found(asked: str | None, model: str, own: Callable[[], Tokenizer | None] | None) -> Tokenizer:
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


def read_template(path: str) -> str:
    """The chat template in a file.  Raises UserError for a missing file, and for a line that is no Jinja."""
    file = Path(path).expanduser()
    if not file.is_file():
        what = "a folder" if file.is_dir() else "no such file"
        raise UserError(f"--chat-template: expected a file with a Jinja template, got {what} {path}")
    source = decode(file.read_bytes().removeprefix(BYTE_ORDER_MARK), f"--chat-template: {path}")
    if not source.strip():
        raise UserError(f"--chat-template: expected a Jinja template in {path}, got an empty file")
    check_template(source, f"--chat-template: {path}")
    return source


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
