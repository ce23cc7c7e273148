"""The command `fastrl generate`: prompts from a file or standard input, completions to a file or the
terminal.

A file holds one JSON object per completion, in the order of the prompts: "index" (which prompt, from 0),
"sample" (which of its n completions, from 0), "prompt", "completion", "finish_reason" and "logp" (nats, one
per token).  Beside FILE lies FILE.config.yaml, the configuration that wrote it.  A completion's randomness is
keyed by the seed and index * n + sample, and prompts are completed in chunks that lie the same in every run:
what --resume adds to a file is what the run that was interrupted would have written.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fastrl.batch.types import Rollouts
from fastrl.config import Generate
from fastrl.config.parse import dump, load
from fastrl.data.encode import encode_prompt
from fastrl.errors import UserError
from fastrl.files import as_object, decode, parse_json, read_json_lines, shorten
from fastrl.model.adapter import load_model
from fastrl.model.tokenizer import load_tokenizer
from fastrl.parallel.device import resolve_device, set_threads
from fastrl.run.log import replace_text
from fastrl.sampler import SAMPLERS, SamplingParams
from fastrl.sampler.prompts import check_room

CHUNK = 64  # prompts whose completions are drawn and written together: an interrupted run keeps what it has
# options that may change over --resume
FREE = (
    "prompts",
    "output",
    "resume",
    "device",
    "threads",
    "sampling.max_tokens_in_flight",
)


def run(config: Generate) -> None:
    """Complete every prompt, `n` times each, and write one JSON line (or, on a terminal, one paragraph) per
    completion.

    Raises UserError for prompts that cannot be completed, an output file that exists, and one that --resume
    cannot continue.
    """
    _check_output(config)
    set_threads(config.threads)
    device, dtype = resolve_device(config.device, config.dtype)
    model = load_model(config.model, dtype=dtype, device=device, seed=config.seed)
    tokenizer = load_tokenizer(config.tokenizer, config.model)
    s = config.sampling
    sampler = SAMPLERS[config.sampler](model, tokenizer, s)
    params = SamplingParams(
        n=config.n,
        max_new_tokens=config.max_new_tokens,
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        min_p=s.min_p,
        seed=config.seed,
    )
    prompts = list(read_prompts(config.prompts))
    encoded = [
        _encode(where, prompt, tokenizer, model.config.max_position_embeddings) for where, prompt in prompts
    ]
    texts = [prompt for _, prompt in prompts]
    written = Path(config.output)
    rows = 0 if config.output == "-" else _begin(config, written, texts)
    with ExitStack() as stack:
        out = sys.stdout if config.output == "-" else stack.enter_context(written.open("a", encoding="utf-8"))
        told = stack.enter_context(Told(config, len(prompts), rows // config.n, hidden=out.isatty()))
        begun = rows // config.n if rows == len(prompts) * config.n else rows // config.n // CHUNK * CHUNK
        for first in range(begun, len(prompts), CHUNK):
            part = slice(first, first + CHUNK)
            rollouts = sampler.generate(
                encoded[part], params, sequence_offset=first * config.n, on_tokens=told.tokens
            )
            _write(out, texts[part], rollouts, first, config.n, skip=rows - first * config.n)
            told.prompts(min(first + CHUNK, len(prompts)))


# --- prompts ----------------------------------------------------------------------------------------
def read_prompts(path: str) -> Iterator[tuple[str, Any]]:
    """(`file:line`, prompt) of every line that is not blank; of a .jsonl file, its `prompt` column (text, or
    a list of messages).

    Raises UserError naming the line that is wrong.
    """
    if path.endswith(".jsonl"):
        for where, row in read_json_lines(path):
            if "prompt" not in row:
                raise UserError(f"{where}: expected a prompt column, got {', '.join(row) or 'none'}")
            yield where, row["prompt"]
        return
    name = "standard input" if path == "-" else path
    text = sys.stdin.read() if path == "-" else decode(Path(path).read_bytes(), path)
    yield from (
        (f"{name}:{number}", line.removesuffix("\r"))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    )


def _encode(where: str, prompt: Any, tokenizer: Any, context: int) -> list[int]:
    tokens = encode_prompt(prompt, tokenizer, where=where)
    check_room(len(tokens), where, context)
    return tokens


# --- the output file --------------------------------------------------------------------------------
def _check_output(config: Generate) -> None:
    """Refuse an output file that would be overwritten, or that there is nothing of to resume; before the
    model is loaded.
    """
    path = Path(config.output)
    if config.resume and config.output == "-":
        raise UserError("--resume: expected the --output file of the interrupted run, got the terminal")
    if config.resume and not path.is_file():
        raise UserError(f"--resume: no file {path}; start without --resume")
    if not config.resume and config.output != "-" and path.is_file():
        raise UserError(f"--output: {path} exists already; continue it with --resume, or name another file")


def _begin(config: Generate, path: Path, prompts: Sequence[Any]) -> int:
    """Make the file ready to be appended to; how many completions it holds."""
    if not config.resume:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() or not path.exists():  # not beside /dev/null
            replace_text(_beside(path), dump(config))
        return 0
    _check_settings(config, path)
    rows, size = _whole(path, prompts, config.n)
    with path.open("r+b") as file:
        file.truncate(size)
    if rows == len(prompts) * config.n:
        print(f"{path} is complete: nothing is left to do", file=sys.stderr)
    return rows


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.config.yaml")


def _check_settings(config: Generate, path: Path) -> None:
    """Raises UserError naming the first option that the file was written with and that is another now."""
    if not _beside(path).is_file():
        raise UserError(
            f"--resume: {_beside(path)}, which says how {path} was written, is not there; "
            "write to another file"
        )
    before, now = _flat(dataclasses.asdict(load(Generate, _beside(path)))), _flat(dataclasses.asdict(config))
    for name in now:
        if name not in FREE and before[name] != now[name]:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"--resume: {path} was written with {option} {before[name]}, got {now[name]}; "
                "write to another file"
            )


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _whole(path: Path, prompts: Sequence[Any], n: int) -> tuple[int, int]:
    """Completions that an interrupted run wrote whole, and their bytes; a last line without its end is not
    counted.

    Raises UserError naming the line that does not answer its prompt.
    """
    rows = size = 0
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            if not raw.endswith(b"\n"):
                break
            where = f"{path}:{number}"
            row = as_object(parse_json(decode(raw, where), where), where)
            index, sample = divmod(rows, n)
            if index >= len(prompts):
                raise UserError(
                    f"{where}: more completions than {n} of each of the {len(prompts)} prompts; "
                    "write to another file"
                )
            found, want = (
                [r.get(k) for k in ("index", "sample", "prompt")]
                for r in (row, _row(index, sample, prompts[index]))
            )
            if found != want:
                mend = "the file belongs to other prompts; write to another one"
                raise UserError(
                    f"{where}: expected index, sample and prompt {shorten(want)}, "
                    f"got {shorten(found)}: {mend}"
                )
            rows, size = rows + 1, size + len(raw)
    return rows, size


def _row(index: int, sample: int, prompt: Any) -> dict[str, Any]:
    return {"index": index, "sample": sample, "prompt": prompt}


def _write(out: TextIO, prompts: Sequence[Any], rollouts: Rollouts, first: int, n: int, *, skip: int) -> None:
    """Append a chunk's completions but for the first `skip`, which are there; `first` is the number of its
    first prompt.
    """
    text, ends = rollouts.text or [], rollouts.cu_seqlens.tolist()
    for i, completion in list(enumerate(text))[max(0, skip) :]:
        prompt = prompts[i // n]
        if out.isatty():
            out.write(f"{prompt}\n  {completion}\n")
            continue
        mine = slice(ends[i], ends[i + 1])
        logp = rollouts.logp[mine][rollouts.completion_mask[mine]]
        row = _row(first + i // n, i % n, prompt) | {
            "completion": completion,
            "finish_reason": rollouts.finish_reason[i],
        }
        out.write(json.dumps(row | {"logp": [round(x, 6) for x in logp.tolist()]}) + "\n")
    out.flush()


# --- what a person sees -----------------------------------------------------------------------------
class Told:
    """Progress on standard error: a bar where that is a terminal, else a line per chunk; a context manager.

    hidden   no bar, because the completions themselves appear on the terminal
    Leaving the block before the last prompt is done says how to continue, where there is a file to continue.
    """

    def __init__(self, config: Generate, total: int, done: int, *, hidden: bool) -> None:
        self.config, self.total, self.done, self.drawn = config, total, done, 0
        console = Console(stderr=True, highlight=False)
        self.bar: Progress | None = None
        self.task = TaskID(0)
        if console.is_terminal and not hidden:
            self.bar = Progress(
                TextColumn("generate"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("prompts  {task.fields[shown]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=console,
                refresh_per_second=4,
                redirect_stdout=False,
            )

    def __enter__(self) -> Self:
        self.began = time.perf_counter()
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, completed=self.done, shown="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        if kind is not None and self.config.output != "-":
            beside = shlex.quote(str(_beside(Path(self.config.output))))
            stdin = " with the same prompts on standard input" if self.config.prompts == "-" else ""
            where = f"{self.config.output} holds {self.done} of {self.total} prompts"
            print(
                f"{where}; continue with: fastrl generate --config {beside} --resume{stdin}", file=sys.stderr
            )

    def tokens(self, count: int) -> None:
        """The sampler has drawn `count` more tokens."""
        self.drawn += count
        if self.bar is not None:
            self.bar.update(self.task, shown=self._pace())

    def prompts(self, done: int) -> None:
        """The first `done` prompts are written."""
        self.done = done
        if self.bar is not None:
            self.bar.update(self.task, completed=done)
        else:
            print(f"{done} of {self.total} prompts  {self._pace()}", file=sys.stderr)

    def _pace(self) -> str:
        return f"{self.drawn / max(time.perf_counter() - self.began, 1e-9):,.0f} tok/s"
