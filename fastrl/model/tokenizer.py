"""Finding a run's tokenizer: the one asked for, else the model folder's, else the task's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from fastrl.errors import UserError
from fastrl.tasks import Task

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_tokenizer(asked: str | None, model: str, task: Task | None) -> Any:
    """The tokenizer of folder `asked`, of the model's folder, or of the task.  Raises UserError when there is
    none.
    """
    if asked is not None:
        return _from(Path(asked))
    if has_tokenizer(model):
        return _from(Path(model))
    own = task.tokenizer() if task is not None else None
    if own is None:
        raise UserError(
            f"--tokenizer: {model} has no tokenizer files and the task brings none; name a tokenizer folder"
        )
    return own


def has_tokenizer(model: str) -> bool:
    """Whether `model` is a folder with a tokenizer's files."""
    return Path(model).is_dir() and any((Path(model) / f).exists() for f in FILES)


def _from(folder: Path) -> Any:
    if not folder.is_dir():
        raise UserError(f"--tokenizer: expected a folder with tokenizer files, got {folder}")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"--tokenizer: {folder} holds no tokenizer that transformers can read ({said})"
        ) from error
