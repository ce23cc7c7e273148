"""Memory as regions of bytes: the tensors of a launch, and the shared memory of its blocks."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ptx.formats import LANE, Array, Mask
from ptx.parse import Fault, Instruction

# generic addresses of shared memory: a window of 16 MiB for each block of a cluster
WINDOW, WINDOW_SIZE, WINDOWS = 0x7E0000000000, 1 << 24, 64
GARBAGE = 0xCD  # in shared memory at the start

Offsets = NDArray[np.int64]
Index = slice | Offsets


class Region:
    """Bytes that a kernel may touch, with the history of each (an index of races.States)."""

    def __init__(self, name: str, base: int, data: NDArray[np.uint8], given: bool) -> None:
        self.name, self.base, self.size = name, base, len(data)
        self.data = data
        self.states = np.full(len(data), int(given), np.int32)
        self.writable: Mask | None = None  # bytes of the tensors that were passed; None: all
        self.before: Mask | None = None  # bytes that the launch before wrote; None: none

    def of(self, offsets: Offsets, size: int) -> Index:
        """The bytes of accesses of `size` at `offsets`: a slice where they are one run."""
        first = int(offsets[0])
        if len(offsets) == 1:
            return slice(first, first + size)
        n = len(offsets)
        if int(offsets[-1]) - first == (n - 1) * size and (offsets - first == LANE[:n] * size).all():
            return slice(first, first + n * size)
        return (offsets[:, None] + np.arange(size)).reshape(-1)


def shared_region(name: str, size: int, garbage: int = GARBAGE) -> Region:
    data = np.full(size, garbage, np.uint8)
    return Region(name, 0, data, given=False)


def bytes_at(address: int, size: int) -> NDArray[np.uint8]:
    """Memory of this process as an array."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


class Global:
    """The tensors that a launch was given, by address."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.bases = np.zeros(0, np.int64)

    def add(self, name: str, address: int, size: int, given: bool = True) -> Region:
        """`given`: its contents mean something, unlike those of torch.empty."""
        region = Region(name, address, bytes_at(address, size), given)
        self.regions.append(region)
        self.regions.sort(key=lambda r: r.base)
        self.bases = np.array([r.base for r in self.regions], np.int64)
        return region

    def find(self, address: int, size: int, i: Instruction) -> Region:
        """The region of an access."""
        n = int(np.searchsorted(self.bases, address, side="right")) - 1
        if n >= 0 and address + size <= self.regions[n].base + self.regions[n].size:
            return self.regions[n]
        near = [f"{r.name} {r.base:#x}+{r.size}" for r in self.regions[max(n, 0) : n + 2]]
        raise Fault(
            f"out of bounds: {size} bytes at {address:#x}, near {' and '.join(near) or 'nothing'} ({i})"
        )

    def parts(self, addresses: Offsets, size: int, i: Instruction) -> Iterator[tuple[Region, Array | None]]:
        """The regions of accesses, each with the positions that lie in it (None: all)."""
        low, high = int(addresses.min()), int(addresses.max())
        region = self.find(low, size, i)
        if high + size <= region.base + region.size:
            yield region, None
            return
        owners = np.searchsorted(self.bases, addresses, side="right")
        for owner in np.unique(owners):
            at = np.flatnonzero(owners == owner)
            region = self.find(int(addresses[at].min()), size, i)
            self.find(int(addresses[at].max()), size, i)
            yield region, at
