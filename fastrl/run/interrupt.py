"""Stopping between two steps: Ctrl-C, SIGTERM, a closed terminal, a reader that left, or a time limit.

The first signal asks: the step is finished and saved, and the program exits with 128 + its number.  Its
handler says so at once, with a plain write to standard error, which may interrupt any other output.  A second
Ctrl-C or SIGTERM stops in the middle of the step, and so does a step that outlives its grace: a reward that
hangs would otherwise keep the run, and its place in the queue, for ever.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Self, TextIO

from fastrl.errors import Interrupted
from fastrl.parallel.world import World

Handler = Callable[[int, FrameType | None], object] | int | None  # what signal.signal takes and returns
ASKS = (signal.SIGINT, signal.SIGTERM)  # a second one of these stops at once
SIGNALS = (*ASKS, signal.SIGHUP)  # a shell and the kernel both send SIGHUP, so that two of them are one
# torchrun hands on the Ctrl-C that a terminal has sent to its processes already: this soon, it is the same, s
ECHO = 2.0
UNWIND = 10.0  # what a run that stops at once has for closing its files, before the process ends, s


class Interrupt:
    """A request to stop, or to save, as a context manager around the training loop.

    max_seconds   also ask to stop once the block has run this long; 0 means no limit
    save_seconds  ask for a checkpoint this long after the last one; 0 means never
    grace         seconds after SIGTERM or SIGHUP until the block is left without waiting; 0 waits for ever
    world         where there are several processes, the first one speaks
    """

    def __init__(
        self,
        max_seconds: float = 0.0,
        *,
        save_seconds: float = 0.0,
        grace: float = 0.0,
        world: World | None = None,
    ) -> None:
        self.max_seconds, self.save_seconds, self.grace = max_seconds, save_seconds, grace
        self.signal = 0  # what all processes agreed to stop for: the number of a signal
        self.save_due = False
        self._world = world or World()
        self._pid = os.getpid()
        self._first, self._when = 0, 0.0  # this process's signal, and when it came
        self._overdue = False
        self._doing, self._loses = "finishing the step", "what is not saved"
        self._timers: list[threading.Timer] = []

    def __enter__(self) -> Self:
        self._began = self._saved = time.monotonic()
        self._old: dict[int, Handler] = {}
        # only the main thread may set handlers
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                ignored = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
                if not ignored:  # nohup asks that a closed terminal changes nothing
                    self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Interrupted):
            _end_workers()
        for timer in self._timers:
            timer.cancel()
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def doing(self, what: str, loses: str) -> None:
        """What a signal is answered with: what is finished first, and what stopping at once would lose."""
        self._doing, self._loses = what, loses

    def saved(self) -> None:
        """A checkpoint has been written: the next is due `save_seconds` from now."""
        self._saved = time.monotonic()

    def asked(self, world: World) -> bool:
        """Whether to stop now: if one process asks, all stop; the others would hang in a collective."""
        return self.agreed(world)

    def agreed(self, world: World) -> bool:
        """What `asked` says; the first process's clock alone decides whether a checkpoint is due."""
        now = time.monotonic()
        out_of_time = 0 < self.max_seconds <= now - self._began
        due = world.is_main and 0 < self.save_seconds <= now - self._saved
        number, late, save = world.max(float(self._first), float(out_of_time), float(due))
        self.signal, self.save_due = int(number), save > 0
        return number > 0 or late > 0

    def reader_left(self) -> None:
        """Nobody reads the program's output any more, as in `fastrl sft ... | head`: stop like SIGPIPE."""
        self._first = self._first or signal.SIGPIPE

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return left_to_parent(number)
        now = time.monotonic()
        repeated = number in ASKS and self._first in ASKS
        if repeated and self._world.size > 1 and now - self._when < ECHO and not self._overdue:
            return
        if repeated or self._overdue:
            self._stop_now(number)
        if number in ASKS or not self._first:
            self._first, self._when = number, now
            self._ask(number)

    def _ask(self, number: int) -> None:
        """Say what will happen, and start the clock of the grace."""
        again = f"again stops now and loses {self._loses}"
        limited = self.grace > 0 and number != signal.SIGINT
        if limited:
            again = f"after {self.grace:g} s, or again, it stops now and loses {self._loses}"
            self._after(self.grace, self._expire)
        self._say(f"{signal.Signals(number).name}: {self._doing}; {again}")

    def _expire(self) -> None:
        """From the timer's thread: a signal to the main thread, which may be waiting in a system call."""
        self._overdue = True
        main = threading.main_thread().ident
        if main is not None:
            signal.pthread_kill(main, self._first)

    def _stop_now(self, number: int) -> None:
        self._say(f"{signal.Signals(number).name}: stopping now, without {self._loses}")
        self._after(UNWIND, lambda: os._exit(128 + number))
        _end_workers()
        raise Interrupted(number)

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, action)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def _say(self, text: str) -> None:
        """A line on standard error.  A handler may run in the middle of a print, so it never touches
        sys.stderr.
        """
        if not self._world.is_main:
            return
        with contextlib.suppress(OSError):
            start = "\r\x1b[K" if os.isatty(2) else ""  # over the progress bar
            os.write(2, f"{start}fastrl: {text}\n".encode())


def _end_workers() -> None:
    """End the workers that user code has started: its pools, and python at its end, would wait for them."""
    for process in multiprocessing.active_children():
        process.terminate()


def left_to_parent(number: int) -> None:
    """A signal in a worker that was forked inside user code: Ctrl-C, which a terminal sends to all, is the
    parent's, and whatever else comes ends the worker.
    """
    if number != signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


# --- a terminal that goes away ----------------------------------------------------------------------
class _Outlasting:
    """A text stream that goes on silently where writing fails: a training run's files hold all it says."""

    def __init__(self, stream: TextIO, failed: Callable[[OSError], None]) -> None:
        self._stream, self._failed = stream, failed

    def write(self, text: str) -> int:
        with self._tolerant():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._tolerant():
            self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._failed(error)
            with contextlib.suppress(OSError, AttributeError):  # of a stream that is no file
                nowhere = os.open(os.devnull, os.O_WRONLY)  # for what is buffered, and for all that follows
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


@contextlib.contextmanager
def outlasting_terminal(stop: Interrupt) -> Iterator[None]:
    """Inside, output that cannot be written raises nothing.  The terminal of a detached run may be closed; a
    reader that leaves the pipe of standard output asks to stop.
    """

    def failed(error: OSError) -> None:
        if error.errno == errno.EPIPE:
            stop.reader_left()

    out, err = sys.stdout, sys.stderr
    with (
        contextlib.redirect_stdout(_Outlasting(out, failed)),
        contextlib.redirect_stderr(_Outlasting(err, lambda error: None)),
    ):
        yield
