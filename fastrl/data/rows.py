"""A user's dataset: JSON lines, JSON or parquet with TRL's columns, read to rows.

    {"prompt": ..., "completion": ...}    loss on the completion           (text, or lists of chat messages)
    {"messages": [{"role", "content"}]}   loss on the assistant's turns    (by the tokenizer's chat template)
    {"text": ...}                         loss on everything
    {"prompt": ...}                       prompts alone: for generation and reinforcement learning

Nothing is skipped: a line that cannot be used is a UserError that names it.  encode.py makes tokens of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastrl.data.messages import Messages, check_messages, unpadded
from fastrl.errors import UserError
from fastrl.files import (
    BYTE_ORDER_MARK,
    Json,
    JsonObject,
    as_object,
    decode,
    hub_advice,
    parse_json,
    read_json_lines,
    shorten,
)

if TYPE_CHECKING:
    from pyarrow import RecordBatch, Table
    from pyarrow.parquet import ParquetFile

Text = str | Messages  # a prompt or a completion
Kinds = Mapping[str, tuple[str, ...]]
KINDS: Kinds = {  # the columns that make a row of this kind; the first kind with all its columns present wins
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "prompt": ("prompt",),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a dataset: its location (`file:line`), its kind (a key of KINDS), and all its columns."""

    where: str
    kind: str
    fields: JsonObject


def read_rows(path: str | Path, columns: Mapping[str, str] | None = None, kinds: Kinds = KINDS) -> list[Row]:
    """Every row of a .jsonl, .json or .parquet file, all of one of the `kinds`.

    `columns` renames the file's columns: {"question": "prompt", "answer": "completion"}.  Raises UserError
    naming file and line: what was expected there and what came.
    """
    return check_rows(read_table(path, columns), kinds)


def check_rows(
    table: Iterable[tuple[str, JsonObject]], kinds: Kinds = KINDS, first: str | None = None
) -> list[Row]:
    """The rows of (location, columns); `first` is the kind of the rows before them, if there are any."""
    rows: list[Row] = []
    for where, fields in table:
        kind = _kind(fields, where, first, kinds)
        rows.append(Row(where, kind, fields))
        first = first or kind
    return rows


def read_table(path: str | Path, columns: Mapping[str, str] | None = None) -> list[tuple[str, JsonObject]]:
    """(`file:line`, renamed columns) of every row of a file, whatever its columns are.

    Raises UserError as `read_rows` does.
    """
    check_file(path, columns or {})
    rows = list(each_row(path, columns or {}))
    if not rows:
        raise empty(path)
    return rows


def each_row(path: str | Path, columns: Mapping[str, str]) -> Iterator[tuple[str, JsonObject]]:
    """The rows of `read_table`, one by one: those before a line that cannot be read are given."""
    reader = READERS[Path(path).suffix.lower()]
    return named(reader(Path(path)), columns, padded=reader is _read_parquet)


def check_file(path: str | Path, columns: Mapping[str, str]) -> None:
    """Raises UserError for a file that is not there or of no known kind, and for two columns of one name."""
    if Path(path).suffix.lower() not in READERS:
        advice = hub_advice(str(path), "--dataset", "dataset")
        raise UserError(f"dataset {path}: expected a file ending in {', '.join(READERS)}{advice}")
    if not Path(path).is_file():
        raise UserError(f"dataset {path}: no such file (looked in {Path.cwd()})")
    if len(set(columns.values())) < len(columns):
        raise UserError(f"columns: expected a different new name for each column, got {columns}")


def named(
    table: Iterable[tuple[str, JsonObject]], columns: Mapping[str, str], *, padded: bool
) -> Iterator[tuple[str, JsonObject]]:
    """Rows with their columns renamed; without the nulls that a columnar file pads objects with."""
    for where, fields in table:
        renamed = _rename(fields, columns, where)
        yield where, unpadded(renamed) if padded else renamed


def empty(path: str | Path) -> UserError:
    """What is wrong with a file without rows."""
    return UserError(f"dataset {path}: expected at least one row, the file has none")


# --- files ------------------------------------------------------------------------------------------
def _read_json(path: Path) -> Iterator[tuple[str, JsonObject]]:
    text = decode(path.read_bytes().removeprefix(BYTE_ORDER_MARK), str(path))
    if not text.lstrip().startswith("["):
        yield from read_json_lines(path)
        return
    for number, value in enumerate(parse_json(text, str(path)), 1):
        where = f"{path}: item {number}"
        yield where, as_object(value, where)


def _read_parquet(path: Path) -> Iterator[tuple[str, JsonObject]]:
    with parquet_file(path) as file:
        table = file.read()
    yield from rows_of_arrow(table, path, 1)


@contextmanager
def parquet_file(path: str | Path) -> Iterator[ParquetFile]:
    """An open parquet file; what fails inside is a UserError that names it."""
    from pyarrow import ArrowException, parquet  # a tenth of a second, for those who have such files

    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (ArrowException, OSError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"dataset {path}: expected a parquet file, got {problem}") from error


def rows_of_arrow(
    table: Table | RecordBatch, path: str | Path, first: int
) -> Iterator[tuple[str, JsonObject]]:
    """(`file: row`, columns) of rows, the first of which is number `first` of its file."""
    try:
        rows = table.to_pylist()
    except UNREADABLE as error:
        number, problem = _unreadable(table, first)
        yield from rows_of_arrow(table.slice(0, number - first), path, first)  # may have an earlier fault
        raise UserError(f"{path}: row {number}: {problem}") from error
    for number, fields in enumerate(rows, first):
        yield f"{path}: row {number}", fields


# what Arrow raises for a value that Python has no form of: text that is not UTF-8, a date after the year 9999
UNREADABLE = (ValueError, OverflowError, KeyError)


def _unreadable(table: Table | RecordBatch, first: int) -> tuple[int, str]:
    """The first row that cannot be read, and its column with what is wrong."""
    found = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        for number, value in enumerate(column, first):
            try:
                value.as_py()
            except UNREADABLE as error:
                found.append((number, f"{name}: expected a value that Python can hold, got {error}"))
                break
    return min(found, key=lambda one: one[0], default=(first, "a value cannot be read"))


READERS = {".jsonl": read_json_lines, ".json": _read_json, ".parquet": _read_parquet}


# --- columns ----------------------------------------------------------------------------------------
def _rename(fields: JsonObject, columns: Mapping[str, str], where: str) -> JsonObject:
    for old, new in columns.items():
        if old not in fields:
            present = ", ".join(fields) or "no columns"
            raise UserError(f"{where}: expected a column {old!r} (to be read as {new!r}), got {present}")
        if new in fields and new not in columns:
            raise UserError(
                f"{where}: {old!r} cannot be read as {new!r}: the row has a column of that name already"
            )
    return {columns.get(name, name): value for name, value in fields.items()}


def _kind(
    fields: JsonObject,
    where: str,
    first: str | None,
    known: Kinds,
) -> str:
    """The row's kind, after checking its columns; `first` is the kind of the rows before it."""
    candidates = [first] if first else list(known)
    kind = next((k for k in candidates if all(column in fields for column in known[k])), None)
    if kind is None:
        wanted = " or ".join(" + ".join(known[k]) for k in candidates)
        context = " like the lines before it" if first else "; rename others with columns"
        present = ", ".join(map(repr, fields)) or "none"
        raise UserError(f"{where}: expected the columns {wanted}{context}; got {present}")

    for column in known[kind]:
        check_value(column, fields[column], where)
    return kind


_EXPECTED = {"text": "text", "label": "true or false", "messages": "a list of messages"}


def check_value(column: str, value: Json, where: str) -> None:
    """Raises UserError unless `value` has the type that `column` asks for."""
    if column == "label" and isinstance(value, bool):
        return
    if column not in ("label", "messages") and isinstance(value, str):
        return
    if column in ("text", "label") or not isinstance(value, list):
        expected = _EXPECTED.get(column, "text or a list of messages")
        got = f"{type(value).__name__} {shorten(value, 80)}"
        raise UserError(f"{where}: {column}: expected {expected}, got {got}")

    check_messages(column, value, where)
