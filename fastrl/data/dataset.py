"""A dataset file as items to train on: any of them by number, whatever their number.

A small file is encoded here and now, and its items are a list.  A larger one is encoded chunk by chunk, by
worker processes where there are several processors, into an Arrow file that is mapped into memory and kept in
the cache: every later run with the same rows, tokenizer and options, a resumed one and every process of it
included, starts from that file.  Every row is checked before the first item is used, either way.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import date
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

from fastrl.data.arrow import pa
from fastrl.data.cache import digest, digest_of_file, find_or_make
from fastrl.data.chunks import chunks, extent
from fastrl.data.encoders import Encoder
from fastrl.data.progress import Progress
from fastrl.data.rows import check_file, each_row, empty
from fastrl.data.store import Floats, Size, Table, first_numbers, size_of, write
from fastrl.data.tokenizer import Tokenizer
from fastrl.data.work import Work, encode_rows
from fastrl.data.workers import cores, in_order, workers
from fastrl.files import JsonObject
from fastrl.parallel.world import World

T = TypeVar("T")
SMALL = 1 << 20  # bytes of a file that is encoded anew by every run: half a second
PARALLEL = 8 << 20  # bytes from which worker processes, which take a second to start, are worth it
MOST = 32  # worker processes


@dataclass(frozen=True, slots=True)
class Items(Generic[T]):
    """The items of a dataset.

    get     number -> item
    size    how many items, and their tokens
    firsts  the first of each record's numbers, of records that have some
    table   the records of a large file
    """

    get: Callable[[int], T]
    size: Size
    firsts: Callable[[], Floats]
    table: Table | None = None

    def __len__(self) -> int:
        return self.size.rows

    def __getitem__(self, number: int) -> T:
        return self.get(number)

    def __call__(self, numbers: Sequence[int]) -> list[T]:
        """The items of these numbers, in this order."""
        return [self.get(number) for number in numbers]


def read_items(
    path: str,
    encoder: Encoder[Any, T],
    tokenizer: Tokenizer,
    *,
    columns: Mapping[str, str] | None = None,
    world: World | None = None,
) -> Items[T]:
    """The items of a .jsonl, .json or .parquet file.

    columns  what to rename, {"question": "prompt"}
    world    every process of it calls this; the first one encodes, and the others map its file

    Raises UserError naming the first line that cannot be used, and why.
    """
    world = world or World()
    check_file(path, columns or {})
    if Path(path).stat().st_size <= SMALL:
        known = encode_rows(encoder, lambda: each_row(path, columns or {}), tokenizer, None)
        if not known:
            raise empty(path)
        records = [encoder.record(item) for item in known]
        return Items(known.__getitem__, size_of(records), lambda: first_numbers(records))

    job = Job(path, encoder, tokenizer, dict(columns or {}))
    made: tuple[str, JsonObject] = world.from_main(job.find_or_make)
    file = Path(made[0])
    if not file.exists():  # on another machine than the first process
        file = Path(job.find_or_make()[0])
    table = Table(file)
    return Items(lambda number: encoder.item(table[number]), Size(**made[1]), table.first_numbers, table)


@dataclass(frozen=True, slots=True)
class Job:
    """Encoding a file, or finding it encoded."""

    path: str
    encoder: Encoder[Any, Any]
    tokenizer: Tokenizer
    columns: dict[str, str]

    def find_or_make(self) -> tuple[str, JsonObject]:
        """Where the records are, and their size."""
        with Progress(f"reading {self.path}", extent(self.path)) as progress:

            def make(file: Path) -> JsonObject:
                return asdict(self._write(file, progress))

            file, size = find_or_make(
                self.key(), make, progress.say, lambda kept: self.encoder.fits(Size(**kept))
            )
        return str(file), size

    def key(self) -> str:
        """Everything that the records depend on."""
        kind = f"{type(self.encoder).__module__}.{type(self.encoder).__qualname__}"
        versions = [version(name) for name in ("transformers", "tokenizers", "jinja2")]
        file = [Path(self.path).suffix.lower(), digest_of_file(self.path)]
        made = [kind, self.encoder.identity(), sorted(self.columns.items())]
        return digest(file, made, identity_of(self.tokenizer), code(), versions)

    def _write(self, file: Path, progress: Progress) -> Size:
        total = Size()

        def batches() -> Iterator[pa.RecordBatch]:
            nonlocal total
            with closing(self.encoded(progress)) as encoded:
                for batch, size, done in encoded:
                    total += size
                    progress.advance(done, total.rows)
                    yield batch

        write(file, batches())
        if not total.rows:
            raise empty(self.path)
        return total

    def encoded(self, progress: Progress) -> Generator[tuple[pa.RecordBatch, Size, int], None, None]:
        """The batches of the file, in order."""
        size = Path(self.path).stat().st_size
        work = Work(self.encoder, self.tokenizer, self.columns, self._first())
        count = min(cores(), MOST, size // (PARALLEL // 2)) if size >= PARALLEL else 1
        sent = _pickled(work, progress) if count > 1 else None
        if sent is None:
            for chunk in chunks(self.path):
                yield *work.batch(chunk), chunk.done
            return
        with workers(count) as connections:
            for stream, own, done in in_order(connections, sent, chunks(self.path)):
                yield pa.ipc.open_stream(stream).read_next_batch(), own, done

    def _first(self) -> str | None:
        """The kind of the first row, which those of every chunk have to be."""
        with closing(chunks(self.path)) as all_chunks:
            for chunk in all_chunks:
                for located in chunk.rows(self.columns):
                    return self.encoder.kind(self.encoder.read([located], None)[0])
        return None


def _pickled(work: Work, progress: Progress) -> bytes | None:
    """The work as it is sent to a worker; None, said aloud, for a tokenizer that cannot be sent."""
    try:
        return pickle.dumps(work)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        progress.say(f"one process reads the dataset: its tokenizer cannot be sent to others ({error})")
        return None


# --- what records depend on -------------------------------------------------------------------------
@lru_cache(maxsize=1)
def code() -> str:
    """A digest of the program text that says what a row means."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def identity_of(tokenizer: Tokenizer) -> str:
    """A digest of a tokenizer's vocabulary, rules, special tokens and chat template.

    A template that writes the date makes it depend on today.
    """
    template = tokenizer.chat_template
    parts = [type(tokenizer).__qualname__, template, sorted(tokenizer.special_tokens_map.items())]
    parts += [getattr(tokenizer, name, None) for name in ("split_special_tokens", "add_prefix_space")]
    if "strftime_now" in repr(template):
        parts.append(date.today().isoformat())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return digest(parts, backend.to_str())
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return digest(parts, [(path.name, digest_of_file(path)) for path in files])
