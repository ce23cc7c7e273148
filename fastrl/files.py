"""What a user names by path: Python objects in their own files (`my_task.py:MyTask`), and JSON lines."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from fastrl.errors import UserError, nearest

_NOT_THE_USERS = tuple(
    f"{Path(p).resolve()}{os.sep}"
    for p in (Path(__file__).parent, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
)


def load_object(spec: str, option: str) -> Any:
    """The object named by `file.py:name`; `option` is what the user typed it for (`--task`), for the
    messages.

    Raises UserError for another form, a missing file, a file that fails when run, and a name it does not
    define.
    """
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise UserError(f"{option}: expected a file and a name in it, like my_file.py:MyName; got {spec!r}")
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{option}: no file {path} (looked in {Path.cwd()})")
    module = _module(file.resolve(), option)
    if not hasattr(module, name):
        own = [
            n
            for n, v in vars(module).items()
            if not n.startswith("_") and getattr(v, "__module__", None) == module.__name__
        ]
        raise UserError(
            f"{option}: {path} defines no {name!r}{nearest(name, own)}; it defines: "
            f"{', '.join(own) or 'nothing'}"
        )
    return getattr(module, name)


def call_user(what: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, where the function is the user's: whatever it raises becomes a UserError.

    The message holds the exception and the file:line of the user's own innermost frame; the cause is kept for
    --debug.
    """
    try:
        return function(*args, **kwargs)
    except Exception as error:  # the one boundary to code that may raise anything
        raise UserError(f"{what} raised {type(error).__name__}: {error}\n  at {_where(error)}") from error


def read_json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, object) of every line that is not blank.

    Raises UserError naming file and line for text that is not UTF-8, not JSON, or not an object.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no file {path} (looked in {Path.cwd()})")
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            where = f"{path}:{number}"
            line = decode(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, where).strip()
            if line:
                yield where, as_object(parse_json(line, where), where)


def decode(raw: bytes, where: str) -> str:
    """The text of UTF-8 bytes; UserError naming `where` for anything else."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: expected UTF-8 text, got byte {raw[error.start]:#04x} at column {error.start + 1}"
        ) from error


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; UserError naming `where` and the place in it for anything else."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: expected a JSON object, got {shorten(text)} ({error.msg} at column {error.colno})"
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deeply; an integer of thousands of digits
        raise UserError(f"{where}: expected a JSON object, got {shorten(text)} ({error})") from error


def as_object(value: Any, where: str) -> dict[str, Any]:
    """`value` if it is a JSON object; UserError naming `where` otherwise."""
    if not isinstance(value, dict):
        raise UserError(
            f"{where}: expected a JSON object like {{'prompt': ..., 'completion': ...}}, got {shorten(value)}"
        )
    return value


def shorten(value: Any, limit: int = 160) -> str:
    """The repr of `value`, its middle left out beyond `limit` characters."""
    text = repr(value)
    keep = (limit - 5) // 2
    return text if len(text) <= limit else f"{text[:keep]} ... {text[-keep:]}"


def _module(file: Path, option: str) -> ModuleType:
    stamp = file.stat()  # one file names one module, until it is edited
    digest = hashlib.sha256(f"{file} {stamp.st_mtime_ns} {stamp.st_size}".encode()).hexdigest()[:12]
    name = f"fastrl_user_{file.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, f"{file} ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is being run
    sys.path.insert(0, str(file.parent))  # so that it can import its neighbours, as a script can
    try:
        call_user(f"{option}: {file.name}", spec.loader.exec_module, module)
    except UserError:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(file.parent))
    return module


def _where(error: Exception) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    users = [f for f in frames if not f.filename.startswith((*_NOT_THE_USERS, "<"))]
    frame = (users or frames)[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
