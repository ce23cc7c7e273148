"""Cutting an optimizer step's sequences into micro-batches by a token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastrl.batch.types import Batch
from fastrl.errors import UserError


def plan(lengths: Sequence[int], budget: int, what: str = "a sequence") -> list[list[int]]:
    """Indices of the sequences in each micro-batch: first-fit decreasing, no micro-batch above `budget`
    tokens.

    Raises UserError for a sequence (`what` it is) longer than the budget: attention needs it whole.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > budget:
            raise UserError(
                f"--micro-tokens: {what} of {lengths[i]} tokens does not fit into {budget}; "
                f"raise it to at least {lengths[i]}"
            )
        spot = next((b for b, free in enumerate(room) if free >= lengths[i]), None)
        if spot is None:
            bins.append([])
            room.append(budget)
            spot = len(bins) - 1
        bins[spot].append(i)
        room[spot] -= lengths[i]
    return [sorted(b) for b in bins]


def micro_batches(batch: Batch, budget: int, unit: int = 1) -> Iterator[Batch]:
    """The micro-batches of `batch`, each at most `budget` tokens; their losses sum to the loss of the whole
    batch.

    `unit` sequences that lie next to each other (the two of a pair) stay together.
    """
    lengths, what = (
        batch.cu_seqlens.diff().tolist(),
        "a sequence" if unit == 1 else f"{unit} sequences that belong together,",
    )
    units = plan([sum(lengths[i : i + unit]) for i in range(0, len(lengths), unit)], budget, what)
    groups = [[unit * u + i for u in group for i in range(unit)] for group in units]
    if len(groups) == 1:
        yield batch
        return
    for samples in groups:
        yield batch.select(samples)
