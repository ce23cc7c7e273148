"""Admission queue: which waiting sequences may start, in the order they were added, the samples of a prompt
next to each other.

A prompt is prefilled once, into pages of its own.  Each sample but the last shares the prompt's full pages
and copies the page after them, which is partly filled; the last sample inherits that page.  A sequence starts
only when the pages it may ever need are free, so that none is ever evicted.  All this is counted on the host,
once per sequence; tokens and pages stay on the device.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from torch import Tensor

from fastrl.sampler.state import pages_of


@dataclass(slots=True)
class RequestGroup:
    """Samples of one prompt.

    prompt   (P,) int64
    waiting  samples that have not started yet
    table    (N,) int32, pages of the prompt between its first sample's start and its last's; None before and
             after
    """

    prompt: Tensor
    waiting: int = 0
    table: Tensor | None = None

    def full_pages(self, page: int) -> int:
        """Pages that every sample shares: those filled before the prompt's last token."""
        return (len(self.prompt) - 1) // page


@dataclass(frozen=True, slots=True)
class Request:
    """A sequence to decode.

    seq         its row in the records
    group       its prompt, and the other samples of that
    length      tokens it has so far, prompt included
    drawn       tokens among them that were drawn
    budget      tokens that may be drawn
    max_length  tokens it may have
    """

    seq: int
    group: RequestGroup
    length: int
    drawn: int
    budget: int
    max_length: int


@dataclass(slots=True)
class Admission:
    """A request that starts now; with `inherits_pages` it takes the group's own pages over."""

    request: Request
    inherits_pages: bool


@dataclass(slots=True)
class Queue:
    """Waiting requests; `page` tokens a page."""

    page: int
    waiting: deque[Request] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self.waiting)

    def add(self, request: Request) -> None:
        """Put a request at the end."""
        self.waiting.append(request)
        request.group.waiting += 1

    def remove(self, seqs: set[int]) -> list[Request]:
        """Take these sequences' requests out and return them.  Their groups keep their pages."""
        removed = [request for request in self.waiting if request.seq in seqs]
        self.waiting = deque(request for request in self.waiting if request.seq not in seqs)
        for request in removed:
            request.group.waiting -= 1
        return removed

    def admit(self, rows: int, pages: int, idle: bool) -> list[Admission]:
        """The requests that start now: at most `rows`, with free `pages` for everything they may need; `idle`
        says that nothing else runs.

        With nothing running and no room beside the prompt's own pages, a sample inherits these, and the next
        one prefills them again.
        """
        admissions: list[Admission] = []
        while self.waiting and len(admissions) < rows:
            request = self.waiting[0]
            group = request.group
            follows_sibling = bool(admissions) and admissions[-1].request.group is group
            cost = self.cost(request, opens=group.table is None and not follows_sibling)
            inherits = group.waiting == 1
            if cost > pages:
                if not idle or admissions:
                    break
                inherits = True

            self.waiting.popleft()
            group.waiting -= 1
            pages -= cost
            admissions.append(Admission(request, inherits))
            if inherits and group.waiting:
                break
        return admissions

    def held(self) -> int:
        """Pages that the prompts of waiting samples have: all that are in use while nothing runs."""
        groups = {id(request.group): request.group for request in self.waiting}.values()
        return sum(group.full_pages(self.page) + 1 for group in groups if group.table is not None)

    def cost(self, request: Request, opens: bool) -> int:
        """Pages that this request may need beyond those its group holds; one that opens the group also needs
        the prompt's pages.
        """
        full = request.group.full_pages(self.page)
        cost = pages_of(request.max_length, self.page) - full
        if opens:
            cost += full + 1
        if request.group.waiting == 1:  # the last sample inherits the page after the full ones
            cost -= 1
        return cost
