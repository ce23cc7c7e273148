"""A run's log: metrics.jsonl, samples.jsonl, TensorBoard events, and progress on the terminal.

metrics.jsonl holds one JSON object per line.  Every line has "step" (int, optimizer steps done) and "time" (s
since the run began, continued by a resume); evaluations are lines of their own, with metrics that start with
"eval/".  Metrics that depend on the clock are named "time", "time/...", "eval/time" or "perf/..."; all others
are equal in two runs of one configuration, resumed or not.  JSON has no NaN or infinity: such a number is
written as null.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from fastrl.errors import UserError
from fastrl.files import Json, JsonObject, shorten
from fastrl.report.metric import progress
from fastrl.report.metrics import all_metrics

METRICS, SAMPLES, REWARDS = "metrics.jsonl", "samples.jsonl", "rewards.json"
EVENTS = "events.out.tfevents.*"
# everything that a run writes besides checkpoints
LOGS = (
    METRICS,
    SAMPLES,
    EVENTS,
    "config.yaml",
    "environment.txt",
    REWARDS,
    "report.html",
    "plots",
)
LONGEST = 1000  # characters of the text of another value
MAX_DEPTH = 20  # of values within values that a line holds; deeper ones are written as text
# without a terminal: about this many progress lines per run, and the longest time between two of them, s
PLAIN_LINES, PLAIN_SECONDS = 20, 30.0


class RunLog:
    """The log of one run; a context manager that closes the files and the progress bar whatever happens.

    folder       created; a new run (resume_step None) moves an earlier run's logs, but not its checkpoints,
                 to folder/previous-N
    resume_step  continue the files after this step, without lines of later steps or a truncated last line
    texts        file name -> text to write into the folder: config.yaml, environment.txt
    quiet        write the files and show nothing
    enabled      False on every rank but the first: all methods do nothing
    """

    def __init__(
        self,
        folder: str | Path,
        total_steps: int,
        *,
        name: str = "grpo",
        resume_step: int | None = None,
        texts: Mapping[str, str] | None = None,
        quiet: bool = False,
        enabled: bool = True,
        console: Console | None = None,
    ) -> None:
        self.folder, self.total, self.name, self.enabled = Path(folder), total_steps, name, enabled
        self._console = console or Console(quiet=quiet, highlight=False)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._start = resume_step or 0
        self._began = time.monotonic()
        self._last_line = -math.inf  # time of the last progress line without a terminal
        self._first_step: tuple[int, float] | None = None  # this process's first step, and its time
        if not enabled:
            return

        self.folder.mkdir(parents=True, exist_ok=True)
        if resume_step is None:
            self._set_aside()
        else:
            for file in (METRICS, SAMPLES):
                self._began -= keep_until(self.folder / file, resume_step)
        for file, text in (texts or {}).items():
            replace_text(self.folder / file, text)

        self._metrics = (self.folder / METRICS).open("a", encoding="utf-8")
        self._samples = (self.folder / SAMPLES).open("a", encoding="utf-8")
        purge = None if resume_step is None else resume_step + 1
        self._board = SummaryWriter(str(self.folder), purge_step=purge)

    def __enter__(self) -> Self:
        if self.enabled and self._console.is_terminal and not self._console.quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self._console,
                refresh_per_second=4,
                speed_estimate_period=3600,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self.name,
                total=self.total,
                completed=self._start,
                shown="",
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.stop()
        for file in (self._metrics, self._samples, self._board):
            try:
                file.close()
            except OSError:  # of a full disk, which has been reported
                if kind is None:
                    raise

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record optimizer step `step` (counted from 1) and show it.

        Raises TypeError for a metric that is not a Python number.
        """
        if not self.enabled:
            return
        self._record(step, metrics)
        shown = progress(all_metrics(), metrics)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, shown=shown)
        elif self._due(step):
            self._print(f"{self.name} step {step}/{self.total}  {shown}  {self._eta(step)}")

    def eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record an evaluation after `step` optimizer steps; names get the prefix "eval/" if they lack it.

        A metric K with K_lo and K_hi beside it is reported and drawn with that interval.
        """
        if not self.enabled:
            return
        named = {k if k.startswith("eval/") else f"eval/{k}": v for k, v in metrics.items()}
        self._record(step, named)
        shown = []
        for key in named:
            if not key.endswith(("_lo", "_hi")) and not key.startswith("eval/time"):
                shown.append(_with_interval(key, named))
        self._print(f"{self.name} eval at step {step}  " + "  ".join(shown))

    def samples(self, step: int, rows: Sequence[Mapping[str, Json]]) -> None:
        """Append sample completions (prompt, completion, reward, ...) of `step` to samples.jsonl."""
        if self.enabled:
            _append(self._samples, [{"step": step, **row} for row in rows])

    def message(self, text: str) -> None:
        """Print a line on the terminal, above the progress bar if there is one; nothing for no text."""
        if self.enabled and text:
            self._print(text)

    def _record(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            if not isinstance(value, int | float):
                raise TypeError(
                    f"metric {key!r}: expected a Python number, got {type(value).__name__}; "
                    "call .item() once per step"
                )
        clock = round(time.monotonic() - self._began, 3)
        self._check_folder()
        _append(self._metrics, [{"step": step, "time": clock, **metrics}])
        for key, value in metrics.items():
            self._board.add_scalar(key, value, step)

    def _check_folder(self) -> None:
        """Raise UserError where the files that are written to are not in the folder any more: what follows
        would be lost, and what stands there may be another run's.
        """
        path = self.folder / METRICS
        ours = os.fstat(self._metrics.fileno())
        there = path.stat() if path.exists() else None
        # a remote file system may give a file another number, but not another size
        if there is None or (there.st_ino != ours.st_ino and there.st_size != ours.st_size):
            raise UserError(
                f"{path}: removed or replaced while the run was writing to it, which ends the run; "
                "start it again in a folder of its own"
            )

    def _due(self, step: int) -> bool:
        """Whether to print a progress line: at the first step, the last, and a bounded number between."""
        now = time.monotonic()
        every = max(1, math.ceil(self.total / PLAIN_LINES))
        overdue = now - self._last_line >= PLAIN_SECONDS  # always at the first step
        due = overdue or step >= self.total or step % every == 0
        if due:
            self._last_line = now
        return due

    def _eta(self, step: int) -> str:
        """Time to the end at the pace since this process's first step, whose own time includes warming up."""
        now = time.monotonic()
        if self._first_step is None:
            self._first_step = (step, now)
        first, began = self._first_step
        done = step - first
        if done <= 0:
            return ""
        left = max(0, self.total - step)
        return f"ETA {_duration((now - began) / done * left)}"

    def _print(self, text: str) -> None:
        self._console.print(
            text.rstrip(),
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    def _set_aside(self) -> None:
        """Move an earlier run's logs to the first free previous-N."""
        old = [path for pattern in LOGS for path in self.folder.glob(pattern)]
        if self.folder / METRICS not in old:
            return
        number = 1
        while (aside := self.folder / f"previous-{number}").exists():
            number += 1
        aside.mkdir()
        for path in old:
            path.rename(aside / path.name)
        self.message(f"{self.folder} held the logs of an earlier run; they are in {aside} now")


def keep_until(path: Path, step: int) -> float:
    """Drop the lines of `path` (JSON lines) after `step`, and a truncated last line, atomically.

    Returns the "time" of the last line kept, s, or 0 without one.
    """
    if not path.exists():
        return 0.0
    kept = []
    seconds = 0.0
    for line in path.read_text(encoding="utf-8").splitlines():
        row = _row(line)
        if row is not None and row["step"] <= step:
            kept.append(f"{line}\n")
            seconds = max(seconds, float(row.get("time", 0.0)))
    replace_text(path, "".join(kept))
    return seconds


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a crash leaves either the old one or the new one.

    Raises UserError naming the file, where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.new")
    with writing(path, len(text.encode())):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: Path, size: int) -> Iterator[None]:
    """Inside, an OSError becomes a UserError that names the file and what was to be written, `size` bytes."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: {size:,} bytes could not be written ({reason})") from error


def _row(line: str) -> JsonObject | None:
    """The object of a line, or None unless it is one with a step."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _append(file: TextIO, rows: Iterable[Mapping[str, Json]]) -> None:
    text = ""
    for row in rows:
        text += json.dumps(_finite(dict(row)), allow_nan=False, default=_plain) + "\n"
    with writing(Path(file.name), len(text)):
        file.write(text)
        file.flush()


def _plain(value: object) -> Json:
    """What stands for a value that JSON does not know: an array's numbers, else its text."""
    to_list = getattr(value, "tolist", None)
    return _finite(to_list()) if callable(to_list) else shorten(value, LONGEST)


def _finite(value: Json, depth: int = 0) -> Json:
    """A value that JSON can hold, whatever a user's function logged: NaN and infinity become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        return value if abs(value) < 2**63 else shorten(value)
    if depth > MAX_DEPTH:
        return shorten(value)
    if isinstance(value, dict):
        return {str(key): _finite(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, depth + 1) for item in value]
    return value


def _with_interval(key: str, metrics: Mapping[str, float]) -> str:
    text = f"{key.removeprefix('eval/')} {metrics[key]:.4g}"
    lo = metrics.get(f"{key}_lo")
    hi = metrics.get(f"{key}_hi")
    return text if lo is None or hi is None else f"{text} [{lo:.4g}, {hi:.4g}]"


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
