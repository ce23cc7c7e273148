"""A dataset file in chunks of about a megabyte, so that no process ever holds the whole of it.

One process cuts the file, others parse what was cut: a chunk is small to send (lines are sent as a range of
bytes), and knows the numbers of its rows, which error messages name.  A kind of file is a row of CHUNKS.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from fastrl.data.arrow import pa
from fastrl.data.rows import named, parquet_file, read_table, rows_of_arrow
from fastrl.errors import UserError
from fastrl.files import BYTE_ORDER_MARK, JsonObject, as_object, parse_json, parse_json_lines

BYTES = 1 << 20  # of text in a chunk, about
ROWS = 2048  # of a columnar file in a chunk
ITEMS = 1024  # of a JSON list in a chunk, at most
Located = Iterator[tuple[str, JsonObject]]  # (`file:line`, columns) of rows


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of a file.

    first  the number of the first of them, as error messages count
    done   bytes, or rows, of the file up to its end: for the progress bar
    span   (begin, end) in bytes, of lines
    texts  JSON of each row, of a list of objects
    table  an Arrow stream of one batch, of a columnar file
    """

    path: str
    first: int
    done: int
    span: tuple[int, int] | None = None
    texts: tuple[str, ...] = ()
    table: bytes | None = None

    def rows(self, columns: dict[str, str]) -> Located:
        """The rows, their columns renamed, one by one.  Raises UserError as `read_table` does."""
        if self.span is not None:
            with Path(self.path).open("rb") as file:
                file.seek(self.span[0])
                raw = io.BytesIO(file.read(self.span[1] - self.span[0]))
            return named(parse_json_lines(raw, self.path, self.first), columns, padded=False)
        batch = self.batch()
        if batch is None:
            return named(self._items(), columns, padded=False)
        return named(rows_of_arrow(batch, self.path, self.first), columns, padded=True)

    def batch(self) -> pa.RecordBatch | None:
        """The rows as Arrow has them, of a columnar file."""
        if self.table is None:
            return None
        return pa.ipc.open_stream(self.table).read_next_batch()

    def _items(self) -> Iterator[tuple[str, JsonObject]]:
        for number, text in enumerate(self.texts, self.first):
            where = f"{self.path}: item {number}"
            yield where, as_object(parse_json(text, where), where)


# --- kinds of files ---------------------------------------------------------------------------------
def _lines(path: str) -> Generator[Chunk, None, None]:
    begin, first = 0, 1
    with Path(path).open("rb") as file:
        while block := file.read(BYTES):
            block += file.readline()
            end = begin + len(block)
            yield Chunk(path, first, end, span=(begin, end))
            begin, first = end, first + block.count(b"\n")


def _json(path: str) -> Generator[Chunk, None, None]:
    if not _is_list(path):
        yield from _lines(path)
        return
    items = _texts(path)
    first = 1
    while texts := tuple(islice(items, ITEMS)):
        yield Chunk(path, first, first + len(texts) - 1, texts=texts)
        first += len(texts)


def _is_list(path: str) -> bool:
    """Whether a .json file is one list; else it has an object per line."""
    if Path(path).suffix.lower() != ".json":
        return False
    with Path(path).open("rb") as file:
        return file.read(BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()[:1] == b"["


def _texts(path: str) -> Iterator[str]:
    """The text of every item of a JSON list; the list is never in memory as a whole."""
    decoder = json.JSONDecoder()
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        window = _Window(file)
        try:
            window.skip("[")
            while window.peek() != "]":
                yield window.item(decoder)
                if window.peek() != "]":
                    window.skip(",")
                    window.skip_none("]")
            window.skip("]")
            if not window.peek():
                return
        except (ValueError, RecursionError):
            pass
    read_table(path)  # which names what is wrong
    raise UserError(f"{path}: expected a JSON list of objects")


class _Window:
    """The part of a text that is being parsed."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self.file, self.text, self.at, self.size = file, "", 0, BYTES

    def peek(self) -> str:
        """The next character that is not white; empty at the end."""
        while True:
            rest = self.text[self.at : self.at + 1]
            if rest and rest not in " \t\r\n":
                return rest
            if not rest and not self._more():
                return ""
            self.at += bool(rest)

    def skip(self, expected: str) -> None:
        if self.peek() != expected:
            raise ValueError(expected)
        self.at += 1

    def skip_none(self, refused: str) -> None:
        if self.peek() == refused:
            raise ValueError(refused)

    def item(self, decoder: json.JSONDecoder) -> str:
        """The text of the next value."""
        self.peek()
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
                if isinstance(value, dict | list | str) or end < len(self.text) or not self._more():
                    break
            except ValueError:
                if not self._more():
                    raise
        text = self.text[self.at : end]
        self.at, self.size = end, BYTES
        return text

    def _more(self) -> bool:
        """Read on; twice as much each time, until an item is whole."""
        block = self.file.read(self.size)
        self.text, self.at, self.size = self.text[self.at :] + block, 0, 2 * self.size
        return bool(block)


def _parquet(path: str) -> Generator[Chunk, None, None]:
    first = 1
    with parquet_file(path) as file:
        for batch in file.iter_batches(batch_size=ROWS):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema) as stream:
                stream.write_batch(batch)
            done = first + batch.num_rows - 1
            yield Chunk(path, first, done, table=sink.getvalue().to_pybytes())
            first = done + 1


CHUNKS: dict[str, Callable[[str], Generator[Chunk, None, None]]] = {
    ".jsonl": _lines,
    ".json": _json,
    ".parquet": _parquet,
}


def chunks(path: str) -> Generator[Chunk, None, None]:
    """The chunks of a dataset file, in order.  Raises UserError for a file that is not what its name says."""
    return CHUNKS[Path(path).suffix.lower()](path)


def extent(path: str) -> int:
    """What the last chunk's `done` will be; 0 where that is not known."""
    if Path(path).suffix.lower() == ".parquet":
        with parquet_file(path) as file:
            return int(file.metadata.num_rows)
    return 0 if _is_list(path) else Path(path).stat().st_size
