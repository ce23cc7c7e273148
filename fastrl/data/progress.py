"""How far the reading of a dataset is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

PATIENCE = 1.0  # s before anything is shown
EVERY = 10.0  # s between two lines without a terminal


class Progress:
    """Shows progress while it is entered.

    total  what `advance` counts up to; 0 where that is not known
    """

    def __init__(self, what: str, total: int = 0, console: Console | None = None) -> None:
        from rich.console import Console  # a GPU machine that only benchmarks has none

        self.what, self.total = what, total
        self.console = console or Console(highlight=False)
        self._began = self._shown = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, done: int, rows: int) -> None:
        """`done` of the total is done, and `rows` rows are."""
        now = time.monotonic()
        if now - self._began < PATIENCE:
            return
        if not self.console.is_terminal:
            if now - self._shown >= EVERY or self._shown == self._began:
                self._shown = now
                share = f", {done / self.total:.0%}" if self.total else ""
                self.say(f"{self.what}: {rows:,} rows{share}")
            return
        self._bar = self._bar or self._started()
        self._bar.update(self._bar.task_ids[0], completed=done, rows=f"{rows:,}")

    def _started(self) -> Bar:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24))
        counts = TextColumn("{task.fields[rows]} rows  ETA")
        bar = Progress(*columns, counts, TimeRemainingColumn(), console=self.console, transient=True)
        bar.add_task(self.what, total=self.total or None, rows="0")
        bar.start()
        return bar
