"""Stopping between two steps: Ctrl-C, SIGTERM, or a time limit."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

from fastrl.parallel.world import World

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """A request to stop, as a context manager around the training loop.

    The first SIGINT or SIGTERM asks the loop to stop after its step; a second one ends it at once.

    max_seconds   also ask once the block has run this long; 0 means no limit
    """

    def __init__(self, max_seconds: float = 0.0) -> None:
        self.max_seconds = max_seconds
        self._signalled = False

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        # only the main thread may set handlers
        in_main = threading.current_thread() is threading.main_thread()
        self._old = {s: signal.signal(s, self._handle) for s in SIGNALS} if in_main else {}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def asked(self, world: World) -> bool:
        """Whether to stop now: if one process asks, all stop; the others would hang in a collective."""
        elapsed = time.monotonic() - self._began
        out_of_time = 0 < self.max_seconds <= elapsed
        (asked,) = world.max(float(self._signalled or out_of_time))
        return asked > 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            raise KeyboardInterrupt
        self._signalled = True
