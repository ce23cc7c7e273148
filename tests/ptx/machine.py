"""Blocks of warps that run PTX, in an order that is chosen to find faults.

A warp holds one program counter as long as its lanes agree; after a branch that they do not, the lanes that
are behind run first, and meet the others again at the same instruction.  Warps take turns as a schedule says,
and stop where they wait: at barriers, and for copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ptx.barriers import Barrier, ClusterBarrier, MemoryBarrier
from ptx.formats import LANE, LANES, RAW, Array, Mask
from ptx.memory import GARBAGE, Global, Region, shared_region
from ptx.parse import Fault, Instruction, Kernel
from ptx.races import NOTHING, Clock, Findings, States, View

Run = Callable[["Warp", Mask | None], object]
JUMP, LEAVE, OTHER = range(3)
LIMIT = 30_000_000  # instructions of a launch: more is a loop without an end


@dataclass(slots=True)
class Lanes:
    """Lanes at the same instruction; `mask` None: all 32."""

    at: int
    mask: Mask | None


@dataclass(frozen=True, slots=True)
class Decoded:
    run: Run | None
    kind: int
    target: int
    guard: str | None
    negated: bool
    together: bool  # all lanes of the warp execute it at once
    source: Instruction


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How warps take turns: "up" and "down", one to its next barrier, then the next; "random"."""

    order: str
    seed: int = 0
    late: bool = True  # asynchronous copies land when they are waited for; else at once
    garbage: int = GARBAGE


class Warp:
    """32 lanes, their registers, and what they have seen of other agents."""

    def __init__(self, number: int, block: Block) -> None:
        self.number, self.block = number, block
        live = number * LANES + LANE < block.threads
        self.groups = [Lanes(0, None if live.all() else live)]
        self.registers: dict[str, Array] = {}
        self.waiting: object = None
        self.agent = f"block {block.number} warp {number}"
        self.clock, self.seen, self.fenced = 0, NOTHING, NOTHING
        self.view = View(self.agent, 0, NOTHING, NOTHING)
        self.copies = Copies(f"copies of {self.agent}")
        self.bulk = Copies(f"bulk copies of {self.agent}")
        self.products = Copies(f"products of {self.agent}")
        self.arrivals = 0  # at the barrier of the cluster
        self.alone = True  # the launch before has ended

    @property
    def active(self) -> Mask:
        out = np.zeros(LANES, bool)
        for group in self.groups:
            out |= True if group.mask is None else group.mask
        return out

    def know(self, seen: Clock, fenced: Clock) -> None:
        """Go on having seen that."""
        self.clock += 1
        self.seen, self.fenced = seen, fenced
        self.view = View(self.agent, self.clock, seen, fenced)

    def everything(self) -> Clock:
        """What it has seen, and its own past."""
        return {**self.seen, self.agent: self.clock}

    def beside(self, agent: str, clock: int, asynchronous: bool = False) -> View:
        """What works beside the warp, begun now."""
        return View(agent, clock, self.everything(), self.fenced, asynchronous)


class Copies:
    """Asynchronous work of a warp in groups, landed in order."""

    def __init__(self, agent: str) -> None:
        self.agent = agent
        self.closed = 0  # groups
        self.open: list[Callable[[], None]] = []
        self.queue: list[list[Callable[[], None]]] = []

    @property
    def clock(self) -> int:
        """Of what joins the open group."""
        return self.closed + 1

    def close(self) -> None:
        self.closed += 1
        self.queue.append(self.open)
        self.open = []

    def wait(self, warp: Warp, left: int) -> None:
        """Until at most `left` groups are under way."""
        while len(self.queue) > left:
            for land in self.queue.pop(0):
                land()
        done = self.closed - len(self.queue)
        warp.know({**warp.seen, self.agent: done}, warp.fenced)


class Block:
    """The warps of a block, its shared memory and its barriers."""

    def __init__(self, number: int, index: tuple[int, int, int], threads: int, shared: Region) -> None:
        self.number, self.index, self.threads, self.shared = number, index, threads, shared
        self.rank = 0  # in its cluster
        self.barriers: dict[int, Barrier] = {}
        self.memory_barriers: dict[int, MemoryBarrier] = {}
        self.warps = [Warp(n, self) for n in range(-(-threads // LANES))]

    @property
    def live(self) -> list[Warp]:
        return [w for w in self.warps if w.groups]


def _union(a: Mask | None, b: Mask | None) -> Mask | None:
    if a is None or b is None or (a | b).all():
        return None
    return a | b


class Machine:
    """Runs one kernel over a grid, and keeps the findings.

    `bias`: which way approximations err, see ops/approximations.py.  `dependent`: it may begin before the
    launch before it has ended, and waits for that by griddepcontrol.wait.
    """

    def __init__(
        self,
        kernel: Kernel,
        memory: Global,
        decode: Callable[[Machine, Instruction], Run],
        schedule: Schedule,
        *,
        cluster: int = 1,
        bias: str = "mixed",
        dependent: bool = False,
    ) -> None:
        self.kernel, self.memory, self.schedule = kernel, memory, schedule
        self.cluster, self.bias, self.dependent = cluster, bias, dependent
        self.random = np.random.default_rng(schedule.seed)
        self.findings = Findings()
        self.states = States(self.findings)
        self.instructions = 0
        self.executed: set[int] = set()  # the instructions that ran
        self.descriptors: dict[int, object] = {}  # address of a tensor map -> it
        self.released: dict[int, Clock] = {}  # address of an atomic with acq_rel -> what it has handed on
        self.dynamic_at = -(-kernel.static // 128) * 128
        self.code = [self._decoded(decode, i) for i in kernel.code]

    def _decoded(self, decode: Callable[[Machine, Instruction], Run], i: Instruction) -> Decoded:
        kind = {"bra": JUMP, "ret": LEAVE, "exit": LEAVE}.get(i.name, OTHER)
        run = decode(self, i) if kind == OTHER else None
        target = self.kernel.target(i) if kind == JUMP else 0
        together = kind == OTHER and (".sync" in i.op or i.name in ("bar", "mma", "ldmatrix", "stmatrix"))
        return Decoded(run, kind, target, i.guard, i.negated, together, i)

    # --- a launch ---
    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        dynamic: int,
        parameters: bytes,
        offsets: dict[str, int],
    ) -> None:
        self.grid, self.threads = grid, threads
        self.parameters, self.offsets = parameters, offsets
        blocks = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        size = self.dynamic_at + dynamic
        for first in range(0, len(blocks), self.cluster):
            self.blocks = []
            for rank in range(self.cluster):
                shared = shared_region(f"shared memory of rank {rank}", size, self.schedule.garbage)
                block = Block(first + rank, blocks[first + rank], threads, shared)
                block.rank = rank
                self.blocks.append(block)
            self.cluster_barrier = ClusterBarrier(self)
            self._run_cluster()

    def _run_cluster(self) -> None:
        warps = [w for b in self.blocks for w in b.warps]
        for w in warps:
            w.alone = not self.dependent
        if self.schedule.order == "down":
            warps.reverse()
        while any(w.groups for w in warps):
            ready = [w for w in warps if w.groups and w.waiting is None]
            if not ready:
                raise Fault(f"deadlock: {'; '.join(self._stuck(warps))}")
            for warp, turns in self._turns(ready):
                self._advance(warp, turns)

    def _turns(self, ready: list[Warp]) -> Iterator[tuple[Warp, int]]:
        """Who runs, and for how many instructions."""
        if self.schedule.order != "random":
            yield ready[0], LIMIT
            return
        turns = 2 ** int(self.random.integers(0, 9))
        yield ready[int(self.random.integers(len(ready)))], turns

    def _stuck(self, warps: list[Warp]) -> list[str]:
        left = [w for w in warps if w.groups][:4]
        return [f"{w.agent} waits for {w.waiting} at {self.code[w.groups[0].at - 1].source}" for w in left]

    def _advance(self, w: Warp, turns: int) -> None:
        """Run a warp until it waits, ends, or has had its turns."""
        code = self.code
        while turns and w.groups and w.waiting is None:
            turns -= 1
            lanes = w.groups[0] if len(w.groups) == 1 else self._behind(w)
            i = code[lanes.at]
            self.executed.add(lanes.at)
            self.instructions += 1
            lanes.at += 1
            mask = lanes.mask
            if i.guard is not None:
                mask = self._guarded(w, i, mask)
                if mask is False:
                    continue
            if i.run is not None:
                i.run(w, mask)
            elif i.kind == JUMP:
                self._jump(w, lanes, mask, i.target)
            else:
                self._leave(w, lanes, mask)
        if self.instructions > LIMIT:
            raise Fault(f"no end after {LIMIT} instructions, at {code[w.groups[0].at].source}")

    def _guarded(self, w: Warp, i: Decoded, mask: Mask | None) -> Mask | bool | None:
        """The lanes whose predicate holds; False: none."""
        chosen = w.registers.get(i.guard or "")
        if chosen is None:
            raise Fault(f"a predicate that nobody set: {i.guard} ({i.source})")
        if i.negated:
            chosen = ~chosen
        if mask is not None:
            chosen = chosen & mask
        n = np.count_nonzero(chosen)
        return chosen if 0 < n < LANES else None if n else False

    def _behind(self, w: Warp) -> Lanes:
        """The lanes to run next: those behind, except that at a `.sync` instruction they wait for others."""
        merged: dict[int, Lanes] = {}
        for lanes in sorted(w.groups, key=lambda g: g.at):
            if lanes.at not in merged:
                merged[lanes.at] = lanes
                continue
            merged[lanes.at].mask = _union(merged[lanes.at].mask, lanes.mask)
        w.groups = list(merged.values())
        if len(w.groups) == 1:
            return w.groups[0]
        return next((g for g in w.groups if not self.code[g.at].together), w.groups[0])

    def _jump(self, w: Warp, lanes: Lanes, mask: Mask | None, target: int) -> None:
        rest = self._rest(lanes, mask)
        if rest is not None:
            w.groups.append(Lanes(lanes.at, rest))
            lanes.mask = mask
        lanes.at = target

    def _leave(self, w: Warp, lanes: Lanes, mask: Mask | None) -> None:
        rest = self._rest(lanes, mask)
        if rest is None:
            w.groups = [g for g in w.groups if g is not lanes]
        else:
            lanes.mask = rest
        if not w.groups:
            self._ended(w)

    def _rest(self, lanes: Lanes, mask: Mask | None) -> Mask | None:
        """The lanes that are not in `mask`, if there are any."""
        if mask is None or mask is lanes.mask:
            return None
        rest = ~mask if lanes.mask is None else lanes.mask & ~mask
        return rest if rest.any() else None

    def _ended(self, w: Warp) -> None:
        """Barriers no longer wait for it; the shared memory that its copies read is gone."""
        if w.bulk.queue or w.bulk.open:
            self.findings.add("ends with bulk copies under way", w.agent, self.code[-1].source)
            w.bulk.close()
            w.bulk.wait(w, 0)
        for barrier in w.block.barriers.values():
            barrier.check()
        self.cluster_barrier.check()

    # --- registers ---
    def put(self, w: Warp, name: str, mask: Mask | None, value: Array) -> None:
        """Write a register where the mask says."""
        if mask is not None:
            old = w.registers.get(name)
            if old is None:
                old = (
                    np.zeros(LANES, value.dtype)
                    if value.dtype == bool
                    else self.rubbish(value.dtype.itemsize)
                )
            if old.dtype is not value.dtype:
                old = old.view(value.dtype) if old.itemsize == value.itemsize else old.astype(value.dtype)
            value = np.where(mask, value, old)
        w.registers[name] = value

    def rubbish(self, size: int) -> Array:
        """What a register holds that nobody wrote."""
        return np.full(
            LANES, int.from_bytes(bytes([self.schedule.garbage ^ 0x66]) * size, "little"), RAW[size]
        )
