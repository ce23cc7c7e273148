"""Cutting an optimizer step's sequences into micro-batches by a token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastrl.batch.types import Batch
from fastrl.errors import UserError


def plan(lengths: Sequence[int], budget: int, what: str = "a sequence") -> list[list[int]]:
    """Indices of the sequences in each micro-batch: first-fit decreasing, at most `budget` tokens each.

    Raises UserError for a sequence (`what` it is) longer than the budget: attention needs it whole.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for i in longest_first:
        length = lengths[i]
        if length > budget:
            raise UserError(
                f"--micro-tokens: {what} of {length} tokens does not fit into {budget}; "
                f"raise it to at least {length}"
            )
        spot = next((b for b, free in enumerate(room) if free >= length), None)
        if spot is None:
            bins.append([])
            room.append(budget)
            spot = len(bins) - 1
        bins[spot].append(i)
        room[spot] -= length
    return [sorted(b) for b in bins]


def micro_batches(batch: Batch, budget: int, unit: int = 1) -> Iterator[Batch]:
    """The micro-batches of `batch`, each at most `budget` tokens; their losses sum to the loss of the batch.

    `unit` sequences that lie next to each other (the two of a pair) stay together.
    """
    batch = batch.with_known()
    lengths = batch.host.cu_seqlens.diff().tolist()
    what = "a sequence" if unit == 1 else f"{unit} sequences that belong together,"
    firsts = range(0, len(lengths), unit)
    totals = [sum(lengths[i : i + unit]) for i in firsts]
    bins = plan(totals, budget, what)
    if len(bins) == 1:
        yield batch
        return
    for units in bins:
        samples = [firsts[u] + k for u in units for k in range(unit)]
        yield batch.select(samples)
