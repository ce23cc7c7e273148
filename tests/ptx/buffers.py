"""The tensors of a launch as memory: what each byte is for, and whether anybody has written it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ptx.formats import Mask
from ptx.memory import Global, bytes_at
from ptx.races import UNTOUCHED

EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class Fresh(TorchDispatchMode):
    """Remembers which buffers came from torch.empty, and which of their bytes kernels have written since.

    A torch operation that writes to one counts as writing all of it.  Fresh memory is filled with a value
    that no kernel may use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, Mask] = {}  # address of a storage -> which of its bytes are written
        self.kept: list[Any] = []  # so that no address is used twice
        self.last: dict[int, Mask] = {}  # what the last launch wrote

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in EMPTY and isinstance(out, Tensor) and out.device.type == "cpu":
            self._add(out)
        elif self.bytes:
            self._forget(func, args, kwargs or {})
        return out

    def unwritten(self, address: int) -> Mask | None:
        written = self.bytes.get(address)
        return None if written is None else ~written

    def written(self, memory: Global, wrote: Mask) -> None:
        """After a launch: what it wrote is no longer fresh.  `wrote`: whether a state is after a write."""
        self.last = {region.base: wrote[region.states] for region in memory.regions}
        for region in memory.regions:
            if region.base in self.bytes:
                self.bytes[region.base] |= region.states != UNTOUCHED

    def _add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if not storage.nbytes():
            return
        bytes_at(storage.data_ptr(), storage.nbytes())[:] = 0xF7
        self.bytes[storage.data_ptr()] = np.zeros(storage.nbytes(), bool)
        self.kept.append(storage)

    def _forget(self, func: Any, args: Any, kwargs: Any) -> None:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._check(argument, value)
        for argument in func._schema.arguments:
            if argument.name in kwargs:
                self._check(argument, kwargs[argument.name])

    def _check(self, argument: Any, value: Any) -> None:
        info = argument.alias_info
        if info is not None and info.is_write and isinstance(value, Tensor):
            self.bytes.pop(value.untyped_storage().data_ptr(), None)


def memory_of(tensors: dict[str, Tensor], fresh: Fresh) -> Global:
    """The storages of tensors, each once, named after the first tensor in it."""
    memory = Global()
    by_address: dict[int, list[tuple[str, Tensor]]] = {}
    for name, t in tensors.items():
        if t.untyped_storage().nbytes():
            by_address.setdefault(t.untyped_storage().data_ptr(), []).append((name, t))

    for address, inside in by_address.items():
        size = inside[0][1].untyped_storage().nbytes()
        region = memory.add("/".join(n for n, _ in inside), address, size)
        region.writable = covered(size, [t for _, t in inside])
        region.before = fresh.last.get(address)
        unwritten = fresh.unwritten(address)
        if unwritten is not None:
            region.states[unwritten] = UNTOUCHED
    return memory


def covered(size: int, tensors: list[Tensor]) -> Mask:
    """Which bytes of a storage lie in one of the tensors."""
    mask = torch.zeros(size, dtype=torch.bool)
    for t in tensors:
        if t.numel():
            item = t.element_size()
            shape, strides = (*t.shape, item), (*(s * item for s in t.stride()), 1)
            mask.as_strided(shape, strides, t.storage_offset() * item).fill_(True)
    return mask.numpy()
