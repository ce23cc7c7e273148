"""Which accesses are ordered, and what each byte of memory has been through.

Order is kept as vector clocks.  An agent is a warp, or what works beside it: its asynchronous copies, its
tensor-core products, the copies that a memory barrier counts.  A barrier joins what its agents have seen.
Two accesses of one byte, one of them a write, race unless the later agent has seen the earlier one.

A byte's history (last writers, readers since) is one number, an index of `States`; few histories exist at a
time, so that the state of 500 bytes is usually one transition.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ptx.formats import Array, Mask
from ptx.memory import Index, Region
from ptx.parse import Instruction

Clock = Mapping[str, int]  # agent -> how much of it has been seen
UNTOUCHED, GIVEN = 0, 1  # states: nobody has written it; the host has
NOTHING: Clock = {}

# how findings are called
UNINITIALISED = "reads what nobody wrote"
READ_AFTER_WRITE = "reads what another agent writes, without a barrier between"
WRITE_AFTER_READ = "writes what another agent reads, without a barrier between"
WRITE_AFTER_WRITE = "writes what another agent writes, without a barrier between"
UNFENCED = "asynchronous proxy meets a write of the generic proxy without fence.proxy.async between"
EARLY_READ = "reads what the launch before may still write: griddepcontrol.wait has not passed"
EARLY_WRITE = "writes while the launch before may still run: griddepcontrol.wait has not passed"
DISAGREE = "lanes write different values to one address"


class Write(NamedTuple):
    agent: str
    clock: int
    asynchronous: bool  # by the asynchronous proxy: TMA


class State(NamedTuple):
    """What a byte has been through since the last barrier that all have passed."""

    written: bool
    writers: tuple[Write, ...]  # several where all wrote the same value
    readers: tuple[tuple[str, int], ...]


class Step(NamedTuple):
    state: int
    finding: str | None
    other: str | None  # the agent on the other side


@dataclass(slots=True)
class View:
    """An agent at a moment: what it is, and what it has seen."""

    agent: str
    clock: int
    seen: Clock
    fenced: Clock  # the writes of the generic proxy that the asynchronous proxy sees
    asynchronous: bool = False
    reads: dict[int, Step] = field(default_factory=dict)
    writes: dict[int, Step] = field(default_factory=dict)

    def after(self, agent: str, clock: int) -> bool:
        return agent == self.agent or self.seen.get(agent, -1) >= clock

    def unfenced(self, write: Write) -> bool:
        if not self.asynchronous or write.asynchronous:
            return False
        return self.fenced.get(write.agent, -1) < write.clock


def joined(*clocks: Clock) -> Clock:
    """What one of them or another has seen."""
    out = dict(clocks[0])
    for clock in clocks[1:]:
        if clock is clocks[0]:
            continue
        for agent, n in clock.items():
            if n > out.get(agent, -1):
                out[agent] = n
    return out


class Findings:
    """What is wrong, each once with the number of times."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str, str]] = Counter()

    def add(self, what: str, where: str, i: Instruction) -> None:
        self.counts[what, where, str(i)] += 1

    def lines(self) -> list[str]:
        """The faults."""
        return self._told(lambda what: what != DISAGREE)

    def notes(self) -> list[str]:
        """What is undefined by the book, though every GPU so far does one and the same."""
        return self._told(lambda what: what == DISAGREE)

    def _told(self, wanted: Callable[[str], bool]) -> list[str]:
        counts = self.counts.most_common()
        return [f"{what} [{where}] {at} (x{n})" for (what, where, at), n in counts if wanted(what)]


class States:
    """The histories of bytes, and the findings of the accesses to them."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        first = (State(False, (), ()), State(True, (), ()))
        self.all: list[State] = list(first)
        self.number: dict[State, int] = {s: n for n, s in enumerate(first)}

    def read(self, region: Region, index: Index, view: View, i: Instruction) -> None:
        self._move(region, index, view.reads, lambda s: self._after_read(s, view), i, None)

    def write(self, region: Region, index: Index, view: View, i: Instruction, same: Mask | None) -> None:
        """`same`: the bytes that are what they were, as replicated stores of one value leave them."""
        self._move(region, index, view.writes, lambda s: self._after_write(s, view), i, same)

    def wrote(self) -> Mask:
        """By state, whether an agent has written."""
        return np.array([bool(s.writers) for s in self.all])

    def _move(
        self,
        region: Region,
        index: Index,
        known: dict[int, Step],
        transition: Callable[[int], Step],
        i: Instruction,
        same: Mask | None,
    ) -> None:
        states = region.states[index]
        first = int(states[0])
        if (states == first).all():
            region.states[index] = self._step(first, region, index, known, transition, i, same, None)
            return

        old, place = np.unique(states, return_inverse=True)
        new = [
            self._step(int(s), region, index, known, transition, i, same, place == n)
            for n, s in enumerate(old)
        ]
        region.states[index] = np.array(new, np.int32)[place]

    def _step(
        self,
        state: int,
        region: Region,
        index: Index,
        known: dict[int, Step],
        transition: Callable[[int], Step],
        i: Instruction,
        same: Mask | None,
        part: Array | None,
    ) -> int:
        """The next state of the bytes of one access that are in `state`."""
        step = known.get(state)
        if step is None:
            step = known[state] = transition(state)
        if step.finding is None:
            return step.state
        if (
            step.finding is WRITE_AFTER_WRITE
            and same is not None
            and (same if part is None else same[part]).all()
        ):
            return self._shared(state, step)
        self.findings.add(step.finding, f"{region.name}, against {step.other}", i)
        return step.state

    def _shared(self, state: int, step: Step) -> int:
        """Replicated stores of one value: all of them are writers, for who reads it later."""
        before, after = self.all[state], self.all[step.state]
        return self._intern(State(True, before.writers + after.writers, before.readers))

    def _after_read(self, number: int, view: View) -> Step:
        state = self.all[number]
        finding, other = None if state.written else UNINITIALISED, "nobody"
        own = any(w.agent == view.agent for w in state.writers)
        for w in state.writers:
            if not own and not view.after(w.agent, w.clock):
                finding, other = READ_AFTER_WRITE, w.agent
            elif view.unfenced(w):
                finding, other = UNFENCED, w.agent

        later = tuple(r for r in state.readers if not view.after(*r) and r[0] != view.agent)
        readers = tuple(sorted((*later, (view.agent, view.clock))))
        written = True  # said once
        return Step(self._intern(State(written, state.writers, readers)), finding, other)

    def _after_write(self, number: int, view: View) -> Step:
        state = self.all[number]
        finding, other = None, None
        for w in state.writers:
            if view.unfenced(w):
                finding, other = UNFENCED, w.agent
        for w in state.writers:
            if not view.after(w.agent, w.clock):
                finding, other = WRITE_AFTER_WRITE, w.agent
        owners = {w.agent for w in state.writers}
        for agent, clock in sorted(state.readers, key=lambda r: r[0] not in owners):
            if not view.after(agent, clock):
                # who has written the same value reads it, whoever else writes it
                finding, other = WRITE_AFTER_WRITE if agent in owners else WRITE_AFTER_READ, agent

        write = Write(view.agent, view.clock, view.asynchronous)
        return Step(self._intern(State(True, (write,), ())), finding, other)

    def _intern(self, state: State) -> int:
        found = self.number.get(state)
        if found is None:
            found = self.number[state] = len(self.all)
            self.all.append(state)
        return found
