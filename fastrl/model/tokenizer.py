"""Finding a run's tokenizer: the one asked for, else the model folder's, else the task's own; and what it has
in common with the model: the tokens that end a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from weakref import WeakKeyDictionary

from transformers import AutoTokenizer

from fastrl.data.encode import encode_all
from fastrl.data.rows import Row
from fastrl.data.template import check_template
from fastrl.errors import UserError, notice
from fastrl.files import BYTE_ORDER_MARK, decode
from fastrl.model.carried import OF_TOKENIZER, TEMPLATES, Files, read_carried, write_carried
from fastrl.model.folder import existing_folder, model_folder
from fastrl.model.language import LanguageConfig, Tokenizer
from fastrl.model.weights import read_json

# a tokenizer that was read from a folder -> that folder's other files, and the chat template it had there
_BROUGHT: WeakKeyDictionary[Tokenizer, tuple[Files, object]] = WeakKeyDictionary()
FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_tokenizer(
    asked: str | None,
    model: str,
    own: Callable[[], Tokenizer | None] | None = None,
    *,
    template: str | None = None,
    trust: bool = False,
) -> Tokenizer:
    """The tokenizer of folder `asked`, else of the model's folder, else `own()`: a task's.

    template  a file with the chat template that it gets in place of its own
    trust     run code that the folder brings; without it none is run

    Raises:  UserError when there is none, for files that transformers cannot read, and for a file that is no
             template.
    """
    source = None if template is None else read_template(template)
    tokenizer = _found(asked, model, own, trust)
    if source is not None:
        tokenizer.chat_template = source
    return tokenizer


def _found(
    asked: str | None, model: str, own: Callable[[], Tokenizer | None] | None, trust: bool
) -> Tokenizer:
    if asked is not None:
        what = "a folder with tokenizer files"
        return _read(existing_folder(asked, "--tokenizer", what), trust)
    if has_tokenizer(model):
        return _read(model_folder(model), trust)

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
    folder = model_folder(model)
    return folder.is_dir() and any((folder / f).exists() for f in FILES)


def _read(folder: Path, trust: bool) -> Tokenizer:
    code = _own_code(folder)
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        code = code or ("its model's" if "trust_remote_code" in str(error) else "")
        if code and not trust:
            raise UserError(
                f"--tokenizer: {folder} needs code of its own ({code}), which is not run without "
                "--trust-remote-code; read the code first"
            ) from error
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"--tokenizer: {folder} holds no tokenizer that transformers can read ({message})"
        ) from error
    _BROUGHT[tokenizer] = (read_carried(folder, OF_TOKENIZER), tokenizer.chat_template)
    return tokenizer


def _own_code(folder: Path) -> str:
    """The code that makes the folder's tokenizer, as its files name it; empty where there is none."""
    for name in ("tokenizer_config.json", "config.json"):
        path = folder / name
        named = (read_json(path).get("auto_map") or {}) if path.is_file() else {}
        code = named.get("AutoTokenizer") if isinstance(named, dict) else named
        if code:
            return ", ".join(part for part in code if part) if isinstance(code, list) else str(code)
    return ""


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer's files, and those of its own folder that transformers does not write: the same
    vocabulary in other spellings, and further chat templates unless its template was replaced.
    """
    tokenizer.save_pretrained(folder)
    files, template = _BROUGHT.get(tokenizer, ({}, None))
    replaced = tokenizer.chat_template != template
    write_carried(folder, files, without=TEMPLATES if replaced else ())


# --- end-of-sequence tokens -------------------------------------------------------------------------
class Ended(Protocol):
    """A language model or a reward model."""

    @property
    def config(self) -> LanguageConfig:
        """What holds its end-of-sequence tokens."""

    def end_with(self, tokens: tuple[int, ...]) -> None:
        """Make these the end-of-sequence tokens, of sampling and of what is saved."""


def align_ends(model: Ended, tokenizer: Tokenizer) -> None:
    """Let the model end with the tokens that training teaches: the tokenizer's end-of-sequence token, and the
    one that closes a turn of its chat template.

    What is saved then stops in other programs where it stops here.  One line says what was added.
    """
    own = model.config.eos_token_id
    taught = dict.fromkeys(t for t in (tokenizer.eos_token_id, turn_end(tokenizer)) if t is not None)
    added = [token for token in taught if token not in own and token < model.config.vocab_size]
    model.end_with((*added, *own))
    if added and own:
        names = ", ".join(f"{token} ({tokenizer.decode([token])})" for token in added)
        notice(
            f"sequences end with {names} by the tokenizer, with {', '.join(map(str, own))} by the model's "
            "files: sampling stops at all of them, and checkpoints name them all"
        )


def turn_end(tokenizer: Tokenizer) -> int | None:
    """The special token that the chat template puts behind an assistant's turn, None where there is none."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        sample = encode_all([Row("a chat template", "messages", {"messages": turns})], tokenizer)[0]
    except UserError:  # a template that asks for more than this: it is used, or refused, where there is data
        return None
    token = next(
        (t for t, counts in zip(sample.tokens[::-1], sample.mask[::-1], strict=True) if counts), None
    )
    return token if token in getattr(tokenizer, "all_special_ids", ()) else None
