"""The command `fastrl generate`: complete the prompts of a file or of standard input.

The output file holds one JSON object per completion, in the order of the prompts: "index" (of the prompt,
from 0), "sample" (of its n completions, from 0), "prompt", "completion", "finish_reason" and "logp" (nats,
one per token).  Beside FILE lies FILE.config.yaml, the configuration that wrote it.

A completion's randomness depends on the seed and index * n + sample, and every run cuts the prompts into the
same chunks: --resume adds to a file exactly what the interrupted run would have written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fastrl.batch.types import Rollouts
from fastrl.config import Generate
from fastrl.config.parse import dump, load
from fastrl.data.check import check_room
from fastrl.data.encode import encode_prompt
from fastrl.data.tokenizer import Tokenizer
from fastrl.errors import UserError
from fastrl.files import Json, JsonObject, as_object, decode, parse_json, shorten
from fastrl.model.adapter import load_model
from fastrl.model.folder import model_folder
from fastrl.model.tokenizer import load_tokenizer
from fastrl.parallel.device import resolve_device, set_threads
from fastrl.parallel.world import World, init_world
from fastrl.run.kernels import say_kernels
from fastrl.run.listed import read_prompt_rows
from fastrl.run.lock import claimed
from fastrl.run.log import replace_text, writing
from fastrl.sampler import SAMPLERS, SamplingParams
from fastrl.tasks import Prompt

CHUNK = 64  # prompts that are completed and written together: an interrupted run keeps its finished chunks
# options that may change over --resume
MAY_CHANGE = (
    "prompts",
    "output",
    "resume",
    "device",
    "threads",
    "sampling.max_tokens_in_flight",
)


def run(config: Generate) -> None:
    """Complete every prompt `n` times; write a JSON line (on a terminal, a paragraph) per completion.

    Under torchrun the processes share the chunks of prompts, and the first one writes: the file has the bytes
    that a single process would have written.

    Raises UserError for prompts that cannot be completed, an output file that exists or that another process
    writes, and one that --resume cannot continue.
    """
    world = init_world()
    # what the output's record names stays the same model when a run goes on
    config = dataclasses.replace(config, model=str(model_folder(config.model)))
    path = Path(config.output)
    stream = config.output == "-" or (path.exists() and not path.is_file())  # a device takes any number
    with nullcontext() if stream else claimed(path, "--output", world):
        world.from_main(lambda: _check_output(config))
        _generate(config, path, world)


def _generate(config: Generate, path: Path, world: World) -> None:
    set_threads(config.threads)
    device, dtype = resolve_device(config.device, config.dtype)
    trust = config.trust_remote_code
    model = load_model(config.model, dtype=dtype, device=device, seed=config.seed, trust=trust)
    if world.is_main:
        say_kernels(model)
    template = config.chat_template
    tokenizer = load_tokenizer(config.tokenizer, config.model, template=template, trust=trust)
    sampler = SAMPLERS[config.sampler](model, tokenizer, config.sampling)
    params = SamplingParams(
        n=config.n,
        max_new_tokens=config.max_new_tokens,
        temperature=config.sampling.temperature,
        top_k=config.sampling.top_k,
        top_p=config.sampling.top_p,
        min_p=config.sampling.min_p,
        seed=config.seed,
    )

    prompts = []
    encoded = []
    for where, row in _listed(config, world):
        prompts.append(row["prompt"])
        encoded.append(_encode(where, row, tokenizer, model.config.max_position_embeddings))

    rows = 0 if config.output == "-" else world.from_main(lambda: _begin(config, path, prompts))
    done = rows // config.n
    with ExitStack() as stack:
        out = stack.enter_context(_output(config, path, world))
        progress = stack.enter_context(
            GenerateProgress(config, len(prompts), done, hidden=out.isatty(), quiet=not world.is_main)
        )
        terminal = world.from_main(out.isatty)
        complete = rows == len(prompts) * config.n
        begun = done if complete else done // CHUNK * CHUNK
        chunks = range(begun, len(prompts), CHUNK)
        for turn in range(0, len(chunks), world.size):
            texts = []
            for first in chunks[turn : turn + world.size][world.rank : world.rank + 1]:
                part = slice(first, first + CHUNK)
                offset = first * config.n
                rollouts = sampler.generate(
                    encoded[part], params, sequence_offset=offset, on_tokens=progress.tokens
                )
                written = _texts(prompts[part], rollouts, first, config.n, terminal=terminal)
                texts = written[max(0, rows - offset) :]
            _write(out, "".join(world.gather(texts)), config)
            last = chunks[turn : turn + world.size][-1]
            progress.prompts(min(last + CHUNK, len(prompts)), int(world.sum(progress.sampled)[0]))


# --- prompts ----------------------------------------------------------------------------------------
def read_prompts(path: str) -> Iterator[tuple[str, Prompt]]:
    """(`file:line`, prompt) of every row of `read_prompt_rows`."""
    for where, row in read_prompt_rows(path):
        yield where, row["prompt"]


def _encode(
    where: str,
    row: JsonObject,
    tokenizer: Tokenizer,
    context: int,
) -> list[int]:
    tokens = encode_prompt(row["prompt"], tokenizer, where=where, columns=row)
    check_room(len(tokens), where, context)
    return tokens


def _listed(config: Generate, world: World) -> Iterable[tuple[str, JsonObject]]:
    """The prompts' rows, with where each stands; standard input is read once, by the first process."""
    if config.prompts != "-":
        return read_prompt_rows(config.prompts)
    return world.from_main(lambda: list(read_prompt_rows(config.prompts)))


@contextmanager
def _output(config: Generate, path: Path, world: World) -> Iterator[TextIO]:
    """Where completions go; what the other processes write goes nowhere."""
    if config.output == "-" and world.is_main:
        yield sys.stdout
    else:
        file = (path if world.is_main else Path(os.devnull)).open("a", encoding="utf-8")
        try:
            yield file
        except BaseException:
            with suppress(OSError):  # of a full disk, which is what is being reported
                file.close()
            raise
        file.close()


def _write(out: TextIO, text: str, config: Generate) -> None:
    """Write completions.  Raises UserError naming the file where that fails."""
    with nullcontext() if config.output == "-" else writing(Path(config.output), len(text)):
        out.write(text)
        out.flush()


# --- the output file --------------------------------------------------------------------------------
def _check_output(config: Generate) -> None:
    """Refuse, before the model is loaded, to overwrite a file or to resume without one."""
    path = Path(config.output)
    if config.resume and config.output == "-":
        raise UserError("--resume: expected the --output file of the interrupted run, got the terminal")
    if config.resume and not path.is_file():
        raise UserError(f"--resume: no file {path}; start without --resume")
    if not config.resume and config.output != "-" and path.is_file():
        raise UserError(f"--output: {path} exists already; continue it with --resume, or name another file")


def _begin(config: Generate, path: Path, prompts: Sequence[Prompt]) -> int:
    """Prepare the file for appending; returns the number of completions that it holds."""
    if not config.resume:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() or not path.exists():  # not beside /dev/null
            replace_text(_config_path(path), dump(config))
        return 0

    _check_settings(config, path)
    rows, size = _complete_rows(path, prompts, config.n)
    with path.open("r+b") as file:
        file.truncate(size)
    if rows == len(prompts) * config.n:
        print(f"{path} is complete: nothing is left to do", file=sys.stderr)
    return rows


def _config_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.config.yaml")


def _check_settings(config: Generate, path: Path) -> None:
    """Raises UserError naming the first option that differs from those the file was written with."""
    written = _config_path(path)
    if not written.is_file():
        raise UserError(
            f"--resume: expected {written}, the configuration that wrote {path}, got no such file; "
            "write to another file"
        )
    before = _flat(dataclasses.asdict(load(Generate, written)))
    for name, value in _flat(dataclasses.asdict(config)).items():
        if name not in MAY_CHANGE and before[name] != value:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"--resume: {path} was written with {option} {before[name]}, got {value}; "
                "write to another file"
            )


def _flat(options: JsonObject, prefix: str = "") -> JsonObject:
    """Options by their dotted names."""
    flat: JsonObject = {}
    for name, value in options.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _complete_rows(path: Path, prompts: Sequence[Prompt], n: int) -> tuple[int, int]:
    """Number of complete lines in an interrupted run's file, and their bytes.

    A last line without its newline is not counted.  Raises UserError naming a line of other prompts.
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
            _check_row(row, _row(index, sample, prompts[index]), where)
            rows, size = rows + 1, size + len(raw)
    return rows, size


def _check_row(row: JsonObject, expected: JsonObject, where: str) -> None:
    got = [row.get(key) for key in expected]
    wanted = list(expected.values())
    if got != wanted:
        raise UserError(
            f"{where}: expected index, sample and prompt {shorten(wanted)}, got {shorten(got)}: "
            "the file belongs to other prompts; write to another one"
        )


def _row(index: int, sample: int, prompt: Prompt) -> JsonObject:
    return {"index": index, "sample": sample, "prompt": prompt}


def _texts(
    prompts: Sequence[Prompt],
    rollouts: Rollouts,
    first: int,
    n: int,
    *,
    terminal: bool,
) -> list[str]:
    """What is written of each of a chunk's completions: a JSON line, or a paragraph for a terminal.

    first  the index of the chunk's first prompt
    """
    written = []
    texts = rollouts.text or []
    ends = rollouts.cu_seqlens.tolist()
    for i, text in enumerate(texts):
        prompt = prompts[i // n]
        if terminal:
            written.append(f"{prompt}\n  {text}\n")
            continue

        tokens = slice(ends[i], ends[i + 1])
        logp = rollouts.logp[tokens][rollouts.completion_mask[tokens]]
        row: dict[str, Json] = _row(first + i // n, i % n, prompt)
        row["completion"] = text
        row["finish_reason"] = rollouts.finish_reason[i]
        row["logp"] = [round(x, 6) for x in logp.tolist()]
        written.append(json.dumps(row) + "\n")
    return written


# --- progress ---------------------------------------------------------------------------------------
class GenerateProgress:
    """Progress on standard error: a bar on a terminal, else a line per chunk; a context manager.

    hidden   no bar, because the terminal shows the completions themselves
    quiet    say nothing: another process does

    Leaving the block before the last prompt is done prints how to continue, if there is an output file.
    """

    def __init__(
        self,
        config: Generate,
        total: int,
        done: int,
        *,
        hidden: bool,
        quiet: bool = False,
    ) -> None:
        self.quiet = quiet
        self.config, self.total = config, total
        self.done, self.sampled, self.elsewhere = done, 0, 0
        console = Console(stderr=True, highlight=False)
        self.bar: Progress | None = None
        self.task = TaskID(0)
        if console.is_terminal and not hidden and not quiet:
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
            self.task = self.bar.add_task(
                "",
                total=self.total,
                completed=self.done,
                shown="",
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        if kind is not None and self.config.output != "-" and not self.quiet:
            output = self.config.output
            written = shlex.quote(str(_config_path(Path(output))))
            stdin = " with the same prompts on standard input" if self.config.prompts == "-" else ""
            print(
                f"{output} holds {self.done} of {self.total} prompts; "
                f"continue with: fastrl generate --config {written} --resume{stdin}",
                file=sys.stderr,
            )

    def tokens(self, count: int) -> None:
        """Count `count` more sampled tokens."""
        self.sampled += count
        if self.bar is not None:
            self.bar.update(self.task, shown=self._pace())

    def prompts(self, done: int, sampled: int) -> None:
        """Report that the first `done` prompts are written; all processes have sampled `sampled` tokens."""
        self.done = done
        self.elsewhere = sampled - self.sampled
        if self.bar is not None:
            self.bar.update(self.task, completed=done)
        elif not self.quiet:
            print(f"{done} of {self.total} prompts  {self._pace()}", file=sys.stderr)

    def _pace(self) -> str:
        seconds = max(time.perf_counter() - self.began, 1e-9)
        return f"{(self.sampled + self.elsewhere) / seconds:,.0f} tok/s"
