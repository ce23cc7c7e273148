"""What a user names by path (Python objects in their own files, JSON lines) or writes as key=value text."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from fastrl.errors import UserError, nearest
from fastrl.user import module_name

T = TypeVar("T")
Json = Any  # a JSON value: nothing is known of it until it is checked
JsonObject = dict[str, Json]

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
WITH_COMMAS = re.compile(r"\w+=[^\s,=\[\]{}]*(,\s*\w+=[^\s,=\[\]{}]*)+")  # a=b,c=d
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NOT_USER_CODE = tuple(
    f"{Path(p).resolve()}{os.sep}"
    for p in (Path(__file__).parent, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
)


# --- Python objects ---------------------------------------------------------------------------------
def load_object(spec: str, option: str) -> Any:
    """The object that `file.py:name` refers to; `option` (`--task`) is named in error messages.

    Raises UserError for another form, a missing file, a file that fails when run, and an undefined name.
    """
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise UserError(f"{option}: expected a file and a name in it, like my_file.py:MyName; got {spec!r}")
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{option}: no file {path} (looked in {Path.cwd()})")

    module = _module(file.resolve(), option)
    if not hasattr(module, name):
        defined = [
            n
            for n, value in vars(module).items()
            if not n.startswith("_") and getattr(value, "__module__", None) == module.__name__
        ]
        known = ", ".join(defined) or "nothing"
        raise UserError(f"{option}: {path} defines no {name!r}{nearest(name, defined)}; it defines: {known}")
    return getattr(module, name)


def call_user(what: str, function: Callable[..., T], /, *args: object, **kwargs: object) -> T:
    """Call a function that the user wrote; whatever it raises becomes a UserError.

    The message holds the exception and the innermost frame of the user's own code; the cause is kept for
    --debug.  A UserError says where it is from already.
    """
    try:
        return function(*args, **kwargs)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the one boundary to code that may raise anything
        raise UserError(f"{what} raised {type(error).__name__}: {error}\n  at {_where(error)}") from error


def _module(file: Path, option: str) -> ModuleType:
    name = module_name(file)  # an edited file is another module
    known = sys.modules.get(name)
    return known or call_user(f"{option}: {file.name}", importlib.import_module, name)


def location(function: object) -> str:
    """` (file:line)` of a function; the empty string for what has no code of its own."""
    inner = inspect.unwrap(function) if callable(function) else function
    code = getattr(inner, "__code__", None)
    return f" ({code.co_filename}:{code.co_firstlineno})" if code else ""


def _where(error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    in_user_code = [f for f in frames if not f.filename.startswith((*_NOT_USER_CODE, "<"))]
    frame = (in_user_code or frames)[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"


# --- text -------------------------------------------------------------------------------------------
def key_values(texts: Sequence[str], option: str) -> dict[str, str]:
    """{"key": "value"} of key=value texts.  Raises UserError naming the option."""
    values = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UserError(f"{option}: expected key=value, got {text!r}")
        if WITH_COMMAS.fullmatch(text):
            apart = text.replace(",", " ")
            raise UserError(f"{option}: expected blanks between them, got {text!r}; write {option} {apart}")
        values[key] = value
    return values


def shorten(value: object, limit: int = 160) -> str:
    """The repr of `value`; beyond `limit` characters its middle is left out."""
    text = _repr(value)
    keep = (limit - 5) // 2
    return text if len(text) <= limit else f"{text[:keep]} ... {text[-keep:]}"


def _repr(value: object) -> str:
    try:
        return repr(value)
    except Exception as error:  # a repr of the user's own, or an integer of more digits than Python prints
        return f"<{type(value).__name__} whose repr raises {type(error).__name__}>"


# --- JSON -------------------------------------------------------------------------------------------
def read_json_lines(path: str | Path) -> Iterator[tuple[str, JsonObject]]:
    """(`file:line`, object) of every line that is not blank.

    Raises UserError naming file and line for text that is not UTF-8, not JSON, or not an object.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no file {path} (looked in {Path.cwd()})")
    with file.open("rb") as lines:
        yield from parse_json_lines(lines, path)


def parse_json_lines(
    lines: Iterable[bytes], path: str | Path, first: int = 1
) -> Iterator[tuple[str, JsonObject]]:
    """`read_json_lines` of some lines of a file, the first of which is number `first`."""
    for number, raw in enumerate(lines, first):
        where = f"{path}:{number}"
        if number == 1:
            raw = raw.removeprefix(BYTE_ORDER_MARK)
        line = decode(raw, where).strip()
        if line:
            yield where, as_object(parse_json(line, where), where)


def decode(raw: bytes, where: str) -> str:
    """The text of UTF-8 bytes.  Raises UserError naming `where` for other bytes."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        column = error.start + 1
        raise UserError(f"{where}: expected UTF-8 text, got byte {byte:#04x} at column {column}") from error


def parse_json(text: str, where: str) -> Json:
    """The value of a JSON text.  Raises UserError naming `where` and the column for other text."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at column {error.colno}"
        raise UserError(f"{where}: expected a JSON object, got {shorten(text)} ({problem})") from error
    except (RecursionError, ValueError) as error:  # nested too deeply; an integer of thousands of digits
        raise UserError(f"{where}: expected a JSON object, got {shorten(text)} ({error})") from error
    if _SURROGATE.search(text):  # escapes of half a character pass as JSON, and fail as text
        check_text(value, where)
    return value


def check_text(value: Json, where: str) -> None:
    """Raises UserError naming `where` if a text in `value` has half of a surrogate pair: no character."""
    if isinstance(value, str):
        half = next((c for c in value if "\ud800" <= c <= "\udfff"), None)
        if half is not None:
            place = value.index(half)
            expected = "text of whole characters"
            at = f"at character {place + 1} of {shorten(value, 60)}"
            got = f"half of a surrogate pair, \\u{ord(half):04x}, {at}"
            raise UserError(
                f"{where}: expected {expected}, got {got}; write the character itself, or drop it"
            )
    elif isinstance(value, dict):
        for name, item in value.items():
            check_text(name, where)
            check_text(item, f"{where}: {name}")
    elif isinstance(value, list):
        for item in value:
            check_text(item, where)


def as_object(value: Json, where: str) -> JsonObject:
    """`value` if it is a JSON object.  Raises UserError naming `where` otherwise."""
    if not isinstance(value, dict):
        example = "{'prompt': ..., 'completion': ...}"
        raise UserError(f"{where}: expected a JSON object like {example}, got {shorten(value)}")
    return value


# --- names of the Hugging Face Hub ------------------------------------------------------------------
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_KINDS = {"model": "", "dataset": "--repo-type dataset "}


def hub_advice(name: str, option: str, kind: str = "model") -> str:
    """What to type instead of a name that may be one of the Hugging Face Hub: `; ...`, or the empty string.

    kind  "model" or "dataset"
    """
    is_file = Path(name).suffix in (".json", ".jsonl", ".yaml", ".yml", ".toml", ".py", ".parquet", ".csv")
    if not _HUB_NAME.fullmatch(name) or is_file or Path(name).exists():
        return ""
    cached = _cached(name, kind)
    inside = "" if kind == "model" else "/FILE"
    if cached is not None:
        return (
            "; names of the Hugging Face Hub are not resolved, but it is in its cache: "
            f"{option} {cached}{inside}"
        )
    folder = name.rpartition("/")[2]
    file = f"{folder}{inside}"
    return (
        "; names of the Hugging Face Hub are not resolved: if it is one, "
        f"`hf download {_KINDS[kind]}{name} --local-dir {folder}`, then {option} {file}"
    )


def _cached(name: str, kind: str) -> Path | None:
    """The newest snapshot of a name in the Hugging Face cache, if it has files."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    root = Path(named or Path(home) / "hub").expanduser()
    snapshots = root / f"{kind}s--{name.replace('/', '--')}" / "snapshots"
    wanted = "config.json" if kind == "model" else "*"
    whole = [path for path in snapshots.glob("*") if next(path.glob(wanted), None) is not None]
    return max(whole, key=lambda path: path.stat().st_mtime, default=None)
