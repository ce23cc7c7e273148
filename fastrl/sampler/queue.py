"""Who waits, and who may come in: sequences in the order they were added, the samples of a prompt next to
each other.

A prompt is prefilled once, into pages of its own.  Each sample but the last shares the prompt's full pages
and copies what lies in the one after them; the last sample takes that page over.  A sequence comes in only
when the pages it may ever need are free, so that nothing is ever thrown out.  All this is counted on the
host, once per sequence; tokens and pages stay on the device.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from torch import Tensor

from fastrl.sampler.state import pages_of


@dataclass(slots=True)
class Group:
    """Samples of one prompt.

    prompt   (P,) int64
    waiting  samples that have not come in yet
    table    (N,) int32, pages of the prompt while some have and some have not; None while nobody has
    """

    prompt: Tensor
    waiting: int = 0
    table: Tensor | None = None

    def full(self, page: int) -> int:
        """Pages that every sample shares: what is filled before the prompt's last token."""
        return (len(self.prompt) - 1) // page


@dataclass(frozen=True, slots=True)
class Waiting:
    """A sequence: its number in the records, its prompt, tokens it has so far and drawn ones among them, how
    long it may become.
    """

    seq: int
    group: Group
    length: int
    drawn: int
    budget: int
    until: int


@dataclass(slots=True)
class Entry:
    """A sequence that comes in: `takes` means it is given the group's own pages."""

    who: Waiting
    takes: bool


@dataclass(slots=True)
class Queue:
    """Waiting sequences; `page` tokens a page."""

    page: int
    waiting: deque[Waiting] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self.waiting)

    def add(self, who: Waiting) -> None:
        """Put a sequence at the end."""
        self.waiting.append(who)
        who.group.waiting += 1

    def remove(self, seqs: set[int]) -> list[Waiting]:
        """Take these sequences out; what was waiting of them.  Their groups keep their pages."""
        gone = [w for w in self.waiting if w.seq in seqs]
        self.waiting = deque(w for w in self.waiting if w.seq not in seqs)
        for w in gone:
            w.group.waiting -= 1
        return gone

    def admit(self, rows: int, room: int, idle: bool) -> list[Entry]:
        """Those that come in now: at most `rows`, with `room` pages for all they may need; `idle` says that
        nothing else runs.

        With nothing running and no room beside the prompt's own pages, a sample takes these, and the next
        prefills them again.
        """
        entries: list[Entry] = []
        while self.waiting and len(entries) < rows:
            who = self.waiting[0]
            cost = self.cost(
                who, opening=who.group.table is None and not (entries and entries[-1].who.group is who.group)
            )
            takes = who.group.waiting == 1
            if cost > room:
                if not idle or entries:
                    break
                takes = True
            self.waiting.popleft()
            who.group.waiting -= 1
            room -= cost
            entries.append(Entry(who, takes))
            if takes and who.group.waiting:
                break
        return entries

    def cost(self, who: Waiting, opening: bool) -> int:
        """Pages that this sequence may need beyond those its group holds; opening the group takes its
        prompt's pages as well.
        """
        full = who.group.full(self.page)
        own = pages_of(who.until, self.page) - full
        last = who.group.waiting == 1
        return own + (full + 1 if opening else 0) - (1 if last else 0)
