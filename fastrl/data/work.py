"""A chunk of a dataset to a batch of records: what worker processes do.  Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastrl.data.arrow import pa
from fastrl.data.chunks import Chunk
from fastrl.data.encoders import Encoder, Located
from fastrl.data.store import Size, as_batch, size_of, to_bytes
from fastrl.data.tokenizer import Tokenizer
from fastrl.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Work:
    """How chunks are encoded.

    columns  what to rename
    first    the kind of the file's first row
    """

    encoder: Encoder[Any, Any]
    tokenizer: Tokenizer
    columns: dict[str, str]
    first: str | None

    def __call__(self, chunk: Chunk) -> tuple[bytes, Size, int]:
        """(the records of a chunk's rows as an Arrow stream, their size, where the chunk ends)."""
        batch, size = self.batch(chunk)
        return to_bytes(batch), size, chunk.done

    def batch(self, chunk: Chunk) -> tuple[pa.RecordBatch, Size]:
        encoder = self.encoder
        items = encode_rows(encoder, lambda: chunk.rows(self.columns), self.tokenizer, self.first)
        records = [encoder.record(item) for item in items]
        size = size_of(records)
        if encoder.keeps == "tokens":
            return as_batch(records), size
        table = chunk.batch()
        if table is None:
            return as_batch([record._replace(tokens=()) for record in records]), size
        bare = [record._replace(tokens=(), text="") for record in records]
        return as_batch(bare, table.to_struct_array()), size


def encode_rows(
    encoder: Encoder[Any, T], rows: Callable[[], Located], tokenizer: Tokenizer, first: str | None
) -> Sequence[T]:
    """The items of rows, which `rows` reads anew at each call.

    Raises UserError for the earliest row that cannot be used, whatever is wrong with it: read and encoded at
    once, a column missing in a later row would be found before a text too long in an earlier one.
    """
    try:
        read = encoder.read(rows(), first)
        return encoder.encode(read, tokenizer) if read else []
    except UserError:
        for located in rows():
            own = encoder.read([located], first)
            first = first or encoder.kind(own[0])
            encoder.encode(own, tokenizer)
        raise
