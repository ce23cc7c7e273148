"""Where agents meet: barriers of a block, of a cluster, and in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ptx.formats import LANES
from ptx.parse import Fault, Instruction
from ptx.races import NOTHING, Clock, joined

if TYPE_CHECKING:
    from ptx.machine import Block, Machine, Warp


class Barrier:
    """A numbered barrier of a block: `expected` threads, or None: all that have not ended."""

    def __init__(self, block: Block, number: int) -> None:
        self.block, self.number = block, number
        self.expected: int | None = None
        self.arrived: list[tuple[Clock, Clock]] = []
        self.sleepers: list[tuple[Warp, Callable[[], None]]] = []

    def __repr__(self) -> str:
        return f"barrier {self.number} of block {self.block.number}"

    def arrive(self, w: Warp, expected: int | None, wake: Callable[[], None] | None) -> None:
        """`wake`: called when all are there, for a warp that waits."""
        if self.arrived and expected != self.expected:
            raise Fault(f"{self}: {w.agent} expects {expected} threads, others {self.expected}")
        self.expected = expected
        self.arrived.append((w.everything(), w.fenced))
        w.know(w.seen, w.fenced)
        if wake is not None:
            w.waiting = self
            self.sleepers.append((w, wake))
        self.check()

    def check(self) -> None:
        needed = len(self.block.live) * LANES if self.expected is None else self.expected
        if not self.arrived or len(self.arrived) * LANES < needed:
            return

        seen = joined(*(s for s, _ in self.arrived))
        fenced = joined(*(f for _, f in self.arrived))
        sleepers = self.sleepers
        self.arrived, self.sleepers = [], []
        for w, wake in sleepers:
            w.waiting = None
            w.know(seen, fenced)
            wake()


class ClusterBarrier:
    """barrier.cluster: arrive and wait are two instructions."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.phase = 0
        self.arrived: dict[str, tuple[Clock, Clock]] = {}
        self.passed: list[tuple[Clock, Clock]] = []
        self.sleepers: list[Warp] = []

    def __repr__(self) -> str:
        return "the barrier of the cluster"

    def arrive(self, w: Warp, release: bool) -> None:
        if w.agent in self.arrived:
            raise Fault(f"{w.agent} arrives twice at {self}")
        self.arrived[w.agent] = (w.everything(), w.fenced) if release else (NOTHING, NOTHING)
        w.know(w.seen, w.fenced)
        w.arrivals += 1
        self.check()

    def wait(self, w: Warp) -> None:
        if w.arrivals > len(self.passed):
            w.waiting = self
            self.sleepers.append(w)
            return
        self._pass(w)

    def check(self) -> None:
        live = [w for b in self.machine.blocks for w in b.live]
        if not live or any(w.agent not in self.arrived for w in live):
            return
        seen = joined(*(s for s, _ in self.arrived.values()))
        fenced = joined(*(f for _, f in self.arrived.values()))
        self.passed.append((seen, fenced))
        self.arrived = {}
        sleepers, self.sleepers = self.sleepers, []
        for w in sleepers:
            w.waiting = None
            self._pass(w)

    def _pass(self, w: Warp) -> None:
        if w.arrivals == 0:
            raise Fault(f"{w.agent} waits at {self} without arriving")
        seen, fenced = self.passed[w.arrivals - 1]
        w.know(joined(w.seen, seen), joined(w.fenced, fenced))


class MemoryBarrier:
    """An mbarrier: phases that end when all have arrived and all expected bytes have landed."""

    def __init__(self, count: int, where: str) -> None:
        self.count, self.left = count, count
        self.where = where
        self.bytes = 0  # expected, less those that have landed
        self.phase = 0
        self.agent = f"copies that {where} counts"
        self.seen: Clock = NOTHING
        self.fenced: Clock = NOTHING
        self.passed: tuple[Clock, Clock] = (NOTHING, NOTHING)
        self.landings: list[Callable[[], None]] = []  # copies under way
        self.sleepers: list[Warp] = []

    def __repr__(self) -> str:
        return self.where

    def arrive(self, w: Warp, count: int, i: Instruction) -> None:
        self.seen, self.fenced = joined(self.seen, w.everything()), joined(self.fenced, w.fenced)
        w.know(w.seen, w.fenced)
        self.left -= count
        if self.left < 0:
            raise Fault(f"{self}: more arrivals than its count of {self.count} ({i})")
        self.settle()

    def expect(self, size: int) -> None:
        self.bytes += size

    def landed(self, size: int) -> None:
        self.bytes -= size
        self.settle()

    def settle(self) -> None:
        """End the phase, if nothing is missing."""
        if self.left or self.bytes:
            return
        self.phase += 1
        self.left = self.count
        self.passed = (joined(self.seen, {self.agent: self.phase}), self.fenced)
        sleepers, self.sleepers = self.sleepers, []
        for w in sleepers:
            w.waiting = None

    def try_wait(self, w: Warp, parity: int) -> bool:
        """Whether the phase of that parity has ended; if not, the warp sleeps until the next one does."""
        while self.landings and self.phase % 2 == parity:
            self.landings.pop(0)()
        if self.phase % 2 == parity:
            w.waiting = self
            self.sleepers.append(w)
            return False
        seen, fenced = self.passed
        w.know(joined(w.seen, seen), joined(w.fenced, fenced))
        return True
