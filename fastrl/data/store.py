"""Encoded items of a dataset in one Arrow file, mapped into memory: any of them is read as from a list.

Every command's items are kept in the same four columns (see `Record`); encoders.py says what is in them.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrl.data.arrow import pa

Floats = NDArray[np.float64]
ROW = "row"  # a fifth column: rows as a columnar file had them


class Record(NamedTuple):
    """One item as it is stored.

    tokens   of each sequence
    marks    positions in each sequence
    numbers  of the item
    text     JSON, or nothing
    row      a row of a columnar file, whose values JSON does not have
    """

    tokens: Sequence[Sequence[int]] = ()
    marks: Sequence[Sequence[int]] = ()
    numbers: Sequence[float] = ()
    text: str = ""
    row: dict[str, object] | None = None


@dataclass(frozen=True, slots=True)
class Size:
    """What is known of some items without reading them.

    rows, tokens  how many
    sequence      tokens of the longest sequence
    item          tokens of the largest item, all its sequences together
    token         the largest token
    """

    rows: int = 0
    tokens: int = 0
    sequence: int = 0
    item: int = 0
    token: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(
            self.rows + other.rows,
            self.tokens + other.tokens,
            max(self.sequence, other.sequence),
            max(self.item, other.item),
            max(self.token, other.token),
        )


def size_of(records: Sequence[Record]) -> Size:
    """The size of records."""
    lengths = [[len(tokens) for tokens in record.tokens] for record in records]
    totals = [sum(own) for own in lengths]
    longest = max(chain.from_iterable(lengths), default=0)
    sequences = chain.from_iterable(record.tokens for record in records)
    token = max((max(tokens) for tokens in sequences if tokens), default=0)
    return Size(len(lengths), sum(totals), longest, max(totals, default=0), token)


def first_numbers(records: Sequence[Record]) -> Floats:
    """(N,) the first of each record's numbers."""
    return np.array([record.numbers[0] for record in records], np.float64)


# --- writing ----------------------------------------------------------------------------------------
def as_batch(records: Sequence[Record], rows: pa.StructArray | None = None) -> pa.RecordBatch:
    """Records as a batch of the file; `rows` are those of a columnar file."""
    numbers = [record.numbers for record in records]
    texts = [record.text for record in records]
    columns = {
        "tokens": _nested([record.tokens for record in records]),
        "marks": _nested([record.marks for record in records]),
    }
    columns["numbers"] = pa.array(numbers, pa.list_(pa.float64()))
    columns["text"] = pa.array(texts, pa.large_string())
    if rows is not None:
        columns[ROW] = rows
    return pa.record_batch(columns)


def _nested(values: Sequence[Sequence[Sequence[int]]]) -> pa.ListArray:
    """Lists of lists, by their offsets: ten times as fast as value by value."""
    inner = list(chain.from_iterable(values))
    flat = np.fromiter(chain.from_iterable(inner), np.int32, sum(map(len, inner)))
    lists = pa.ListArray.from_arrays(_ends(inner), pa.array(flat))
    return pa.ListArray.from_arrays(_ends(values), lists)


def _ends(values: Sequence[Sequence[object]]) -> pa.Array:
    return pa.array(np.fromiter(accumulate(map(len, values), initial=0), np.int32, len(values) + 1))


def to_bytes(batch: pa.RecordBatch) -> bytes:
    """A batch as a process sends it to another."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    sent: bytes = sink.getvalue().to_pybytes()
    return sent


def write(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Write batches, one at a time in memory."""
    writer = None
    try:
        for batch in batches:
            writer = writer or pa.ipc.new_stream(str(path), batch.schema)
            writer.write_batch(batch)
    finally:
        if writer is not None:
            writer.close()


# --- reading ----------------------------------------------------------------------------------------
class Table:
    """The records of a file, by number."""

    def __init__(self, path: Path) -> None:
        self.parts = [_Part(batch) for batch in pa.ipc.open_stream(pa.memory_map(str(path)))]
        self.starts = list(accumulate((part.batch.num_rows for part in self.parts), initial=0))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, number: int) -> Record:
        if not 0 <= number < len(self):
            raise IndexError(number)
        part = bisect_right(self.starts, number) - 1
        return self.parts[part].record(number - self.starts[part])

    def __iter__(self) -> Iterator[Record]:
        return (self[number] for number in range(len(self)))

    def first_numbers(self) -> Floats:
        """(N,) the first of each record's numbers."""
        return np.concatenate([part.numbers[part.ends[:-1]] for part in self.parts])

    def digest(self) -> str:
        """A digest of all tokens, marks and numbers; 1 GB/s."""
        found = hashlib.sha256()
        for part in self.parts:
            for array in (*part.tokens.arrays(), *part.marks.arrays(), part.ends, part.numbers):
                found.update(f"{len(array)} ".encode())
                found.update(memoryview(array).cast("B") if len(array) else b"")
        return found.hexdigest()


class _Part:
    """One batch of the file; its columns are views of the mapped memory, made when they are first read."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch
        self.tokens = _Lists(batch.column("tokens"))
        self.marks = _Lists(batch.column("marks"))
        numbers = batch.column("numbers")
        self.ends, self.numbers = numbers.offsets.to_numpy(), numbers.values.to_numpy()
        self.text = batch.column("text")
        self.row = batch.column(ROW) if ROW in batch.schema.names else None

    def record(self, i: int) -> Record:
        numbers = self.numbers[self.ends[i] : self.ends[i + 1]].tolist()
        row = None if self.row is None else self.row[i].as_py()
        return Record(self.tokens[i], self.marks[i], numbers, self.text[i].as_py(), row)


class _Lists:
    """A column of lists of lists of int32."""

    def __init__(self, column: pa.ListArray) -> None:
        inner = column.values
        self.outer, self.inner = column.offsets.to_numpy(), inner.offsets.to_numpy()
        self.values = inner.values.to_numpy()

    def arrays(self) -> tuple[NDArray[np.int32], ...]:
        """All that it holds."""
        return self.outer, self.inner, self.values

    def __getitem__(self, i: int) -> list[list[int]]:
        ends = self.inner[self.outer[i] : self.outer[i + 1] + 1].tolist()
        return [self.values[a:b].tolist() for a, b in pairwise(ends)]
