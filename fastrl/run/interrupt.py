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
    """Inside the `with` block, the first SIGINT or SIGTERM asks the loop to stop after its step; a second one
    ends it at once.

    max_seconds   ask as well once the block has run this long; 0 never
    """

    def __init__(self, max_seconds: float = 0.0) -> None:
        self.max_seconds, self._signalled = max_seconds, False

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._main = threading.current_thread() is threading.main_thread()  # only there may handlers be set
        self._old = {s: signal.signal(s, self._handle) for s in SIGNALS} if self._main else {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def asked(self, world: World) -> bool:
        """Whether to stop now; one process's wish is everyone's, so that none waits for another for ever."""
        late = self.max_seconds > 0 and time.monotonic() - self._began >= self.max_seconds
        return world.max(float(self._signalled or late))[0] > 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            raise KeyboardInterrupt
        self._signalled = True
