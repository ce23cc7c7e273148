"""Chunks of rows: how many bytes of logits are alive at once, and how N rows are cut.

    CPU    64 MiB.  Chunks of one size, which takes half of that or 128 rows; the last one has the rest.
    CUDA   a sixteenth of the device's memory, in whole steps of 256 MiB: 8.5 GiB on an H200, 4.75 GiB on an
           80 GB H100.  As few chunks as that allows, nearly equal, of whole tiles of 128 rows: on an H200
           8192 tokens of a vocabulary of 151,936 in float32 are one chunk.

Fewer chunks are faster because each reads and writes all of dW and runs a partial last wave of tiles.  The
memory that a device has sets the budget, not what is free at the moment: chunks, and with them the bits of a
sum, are the same in every run and on every rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

LOGITS_BYTES = {"cpu": 1 << 26}  # default budgets that do not depend on the device's memory
SHARE = 16  # of a CUDA device's memory, the part that logits may take
STEP = 1 << 28  # bytes that a budget is a multiple of: drivers differ in what they reserve


class Policy(NamedTuple):
    """How a type of device cuts rows.

    useful   rows from which products run at full speed: of the default budget, a chunk takes half or so many
    tile     chunks are nearly equal multiples of so many rows; 0: all as large as they may be, but the last
    padding  a row of logits starts at a multiple of so many elements
    once     the first chunk writes the gradient of the weight, in the weight's dtype if it is the only one;
             otherwise every chunk adds to zeros
    """

    useful: int = 0
    tile: int = 0
    padding: int = 1
    once: bool = False


POLICIES = {"cpu": Policy(useful=128), "cuda": Policy(tile=128, padding=16, once=True)}
_OTHER = Policy(useful=128)


def policy(device: torch.device) -> Policy:
    return POLICIES.get(device.type, _OTHER)


def logits_budget(device: torch.device, given: int | None = None, default: int | None = None) -> int:
    """Bytes of logits that may be alive at once: the caller's, or `default`, or that of the device."""
    if given or default:
        return given or default or 0
    if device.type in LOGITS_BYTES:
        return LOGITS_BYTES[device.type]
    return share_of(_memory(device)) if device.type == "cuda" else LOGITS_BYTES["cpu"]


def share_of(memory: int) -> int:
    """The default budget of a CUDA device with so many bytes of memory."""
    return max(STEP, memory // SHARE // STEP * STEP)


def _memory(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory)


# what torch.compiler.assume_constant_result does, without importing the compiler: 1.5 s of every start
vars(_memory)["_dynamo_marked_constant"] = True


def rows_that_fit(V: int, itemsize: int, device: torch.device, budget: int) -> int:
    """Rows of logits, padded as they are in memory, in `budget` bytes."""
    padding = policy(device).padding
    return budget // (-(-V // padding) * padding * itemsize)


def chunk_rows(
    V: int, itemsize: int, device: torch.device, given: int | None = None, default: int | None = None
) -> int:
    """The most rows of logits in one chunk, at least one.

    They fill the caller's budget; of a default budget they take no more than is useful.
    """
    most = rows_that_fit(V, itemsize, device, logits_budget(device, given, default))
    useful = policy(device).useful
    if useful and not given:
        most = min(most, max(most // 2, useful))
    return max(1, most)


def spans(N: int, most: int, device: torch.device, *, full_last: bool = False) -> list[slice]:
    """Rows [0, N) as consecutive chunks of at most `most`.

    full_last=True: on a device that balances chunks, the last one is as large as it may be, for a caller who
    keeps its logits and recomputes the others.
    """
    if most >= N:
        return [slice(0, N)] if N else []
    tile = policy(device).tile
    most = most // tile * tile if tile and most >= tile else most
    if full_last and tile:
        others = -(-(N - most) // tile) * tile
        return _ends([*_balanced(others, most, tile), N - others])
    return _ends(_balanced(N, most, tile))


def _balanced(N: int, most: int, tile: int) -> list[int]:
    """Sizes that add up to N: whole tiles, one more in the first chunks; the last may be part of one."""
    if not tile or most < tile:
        return [min(most, N - a) for a in range(0, N, most)]
    tiles = -(-N // tile)
    count = -(-tiles // (most // tile))
    sizes = [(tiles // count + (i < tiles % count)) * tile for i in range(count)]
    if sizes:
        sizes[-1] -= tiles * tile - N
    return sizes


def _ends(sizes: list[int]) -> list[slice]:
    parts, a = [], 0
    for size in sizes:
        parts.append(slice(a, a + size))
        a += size
    return parts
