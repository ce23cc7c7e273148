"""A chunk of a dataset to a batch of records: what worker processes do.  Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastrl.data.arrow import pa
from fastrl.data.chunks import Chunk
from fastrl.data.encoders import Encoder
from fastrl.data.store import Size, as_batch, size_of, to_bytes
from fastrl.data.tokenizer import Tokenizer


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
        rows = encoder.read(chunk.rows(self.columns), self.first)
        records = [encoder.record(item) for item in encoder.encode(rows, self.tokenizer)] if rows else []
        size = size_of(records)
        if encoder.keeps == "tokens":
            return as_batch(records), size
        table = chunk.batch()
        if table is None:
            return as_batch([record._replace(tokens=()) for record in records]), size
        bare = [record._replace(tokens=(), text="") for record in records]
        return as_batch(bare, table.to_struct_array()), size
