"""A CUDA device without a GPU, for one question: where does the host wait for the device, or sort for it?

    with FakeCuda() as cuda:
        cuda.place(model)          # its parameters and buffers are on the device from here on
        learner.update(batch, 0)
    assert cuda.waits == []

Tensors stay in the host's memory and every operation runs on the CPU.  A storage that has been *placed*, made
with device="cuda", or computed from one that is there, counts as on the device: `x.device`, `x.is_cuda` and
`x.is_cpu` say so, hence the code under test takes its CUDA branches.

What it sees, each as a `Wait` with the place in fastrl that asked for it:

* reading values: .item(), .tolist(), .numpy(), bool(), int(), float(), equal, allclose, printing;
* results whose size only the device knows: nonzero, masked_select, indexing by a bool mask, unique, bincount,
  repeat_interleave without output_size, where(condition);
* copies that block: .cpu(), .to(), .copy_(), torch.tensor(values, device="cuda"), new_tensor, indexing a
  device tensor with a list or a host tensor; not those from pinned memory, nor those to the host, that are
  non_blocking;
* torch.cuda.synchronize, and Event and Stream.synchronize.

It also refuses, as CUDA would, an operation on tensors of both kinds, and a host tensor that is read or
written while a copy of it is on its way (no event was waited for since).  `sorts` lists the writes by index
that deterministic mode turns into a sort.

What it cannot see: what C++ does inside one operation (an op that waits by itself and is not listed above), a
device asked for by C++ code, pageable buffers of the driver, waits of the allocator, torch.Generator("cuda"),
and kernels: Triton and csrc do not run here, attention is taken for flash attention, which waits for nothing,
and a decode step runs as it is, not as a graph.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from host_patches import CUDA as CUDA
from host_patches import OPAQUE, patch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrl.kernels import _backend

SOURCES = tuple(str(Path(__file__).parents[2] / folder) for folder in ("fastrl", "kernels"))

# --- what waits, what sorts ----------------------------------------------------------------------------
READS = ("_local_scalar_dense", "equal", "is_nonzero", "allclose")
SIZES = (
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
    "bincount",
)
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
SORTED = (
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "_unsafe_index_put",
    "index_copy",
    "index_copy_",
    "index_add",
    "index_add_",
    "scatter",
    "scatter_",
    "scatter_add",
    "scatter_add_",
    "put",
    "put_",
)


@dataclass(frozen=True)
class Wait:
    """What the host waited for, and which line of fastrl asked for it."""

    what: str
    where: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class InFlight(AssertionError):
    """A host tensor was touched while it is being copied."""


def _caller() -> str:
    frame = sys._getframe(1)
    outside = "outside fastrl"
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(SOURCES):
            path = Path(name).relative_to(Path(__file__).parents[2])
            return f"{path}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return outside


def _name(func: Any) -> str:
    return func._schema.name.split("::")[1]


def _body(func: Any) -> Callable[..., Any]:
    """The Python function behind an op of fastrl."""
    name = _name(func)
    known = OPDEFS.get(f"fastrl::{name}")
    if known is not None:
        return known._init_fn
    own = getattr(sys.modules[f"fastrl.kernels.{name}"], "_forward", None)
    return own or (lambda x, *rest: _backend.pick(name, x, "forward")(x, *rest))


class _Storages:
    """A set of storages.  A weak reference keeps its address from being used again."""

    def __init__(self) -> None:
        self.known: dict[int, StorageWeakRef] = {}

    def add(self, x: Tensor) -> None:
        storage = _plain(x).untyped_storage()
        self.known[storage._cdata] = StorageWeakRef(storage)

    def discard(self, x: Tensor) -> None:
        self.known.pop(_plain(x).untyped_storage()._cdata, None)

    def __contains__(self, x: Tensor) -> bool:
        return _plain(x).untyped_storage()._cdata in self.known


def _plain(x: Tensor) -> Tensor:
    """What a functorch transform has wrapped."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x


# --- the device -----------------------------------------------------------------------------------------
class FakeCuda(TorchDispatchMode):
    """See above.  `waits` and `sorts` are in the order in which they happened."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self.sorts: list[Wait] = []
        self.device, self.pinned, self.flying = _Storages(), _Storages(), _Storages()
        self.unplaced = _Storages()  # made inside autograd, which does not say where
        self.patches = pytest.MonkeyPatch()
        self.depth = 0
        self.suspended = False  # while something stands for a kernel: its tensors are the host's

    def place(self, *things: Any) -> None:
        """Move tensors, modules, and what dataclasses and containers hold, to the device, for nothing."""
        for thing in things:
            for x in _tensors_of(thing):
                self.device.add(x)

    def copy(self, x: Tensor) -> Tensor:
        """A copy on the device, for nothing."""
        out = x.detach().clone()
        self.device.add(out)
        return out

    def holds(self, x: Tensor) -> bool:
        """Whether a tensor counts as on the device."""
        return x in self.device

    def pin(self, x: Tensor) -> None:
        """Its memory is pinned."""
        self.pinned.add(x)

    def is_pinned(self, x: Tensor) -> bool:
        """Whether it is."""
        return x in self.pinned

    def touched(self, x: Tensor, what: str) -> None:
        """Refuse to touch a host tensor whose copy is on its way."""
        if x in self.flying:
            raise InFlight(f"{what}: a host tensor is used while its copy is on its way, at {_caller()}")

    def wait(self, what: str) -> None:
        """Note a wait of the host; it ends every copy on its way."""
        self.waits.append(Wait(what, _caller()))
        self.flying = _Storages()

    @contextlib.contextmanager
    def kernel(self) -> Iterator[None]:
        """What runs inside stands for a kernel, which sees memory and no device."""
        before, self.suspended = self.suspended, True
        try:
            yield
        finally:
            self.suspended = before

    # --- entering ---
    def __enter__(self) -> FakeCuda:
        if self.depth == 0:
            patch(self, self.patches)
        self.depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.depth -= 1
        if self.depth == 0:
            self.patches.undo()

    # --- operations ---
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.suspended:
            return func(*args, **kwargs)
        if func.namespace == "fastrl" and _name(func) not in OPAQUE:
            with self:  # its parts are seen
                return _body(func)(*args, **kwargs)

        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = [self.holds(x) for x in given]
        self._check(func, args, given, here)
        if any(here):
            self._count(func, args, kwargs, here)
        with self.kernel():
            out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if any(here) and _name(func) not in READS and not self._fills_host(func, args):
            self.place(*made)
        elif not given:
            for x in made:
                self.unplaced.add(x)
        return out

    def _fills_host(self, func: Any, args: Any) -> bool:
        return _name(func) == "copy_" and not self.holds(args[0])

    def _check(self, func: Any, args: Any, given: list[Tensor], here: list[bool]) -> None:
        """Refuse operations over both kinds of tensors, and touching what is being copied."""
        name = _name(func)
        for x, on_device in zip(given, here, strict=True):
            if not on_device and x in self.flying and name not in ("view", "detach", "slice", "alias"):
                if name == "copy_" and x is not args[0]:
                    continue
                self.touched(x, name)
        if name in ("copy_", *INDEXED):
            return
        host = [x for x, on_device in zip(given, here, strict=True) if not on_device and x.ndim]
        for x in host:
            if any(here) and x in self.unplaced:
                self.device.add(x)
        if any(here) and not all(self.holds(x) for x in host):
            raise RuntimeError(
                f"{name}: expected all tensors on one device, got some of both, at {_caller()}"
            )

    def _count(self, func: Any, args: Any, kwargs: Any, here: list[bool]) -> None:
        name = _name(func)
        if name in READS or name in SIZES:
            self.wait(name)
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.wait("repeat_interleave without output_size")
        elif name == "copy_":
            self._count_copy(args[0], args[1], kwargs.get("non_blocking", len(args) > 2 and args[2]))
        elif name in INDEXED:
            self._count_index(name, args)
        if torch.are_deterministic_algorithms_enabled() and self._sorts(name, args, kwargs):
            self.sorts.append(Wait(name, _caller()))

    def _sorts(self, name: str, args: Any, kwargs: Any) -> bool:
        if name not in SORTED or not self.holds(args[0]):
            return False
        if name in ("scatter", "scatter_"):
            return any(isinstance(x, Tensor) for x in (*args[3:], *kwargs.values()))
        return not (name in INDEXED and self._is_masked_fill(args))

    def _is_masked_fill(self, args: Any) -> bool:
        """A bool mask and one value: a fill, without an index."""
        masks = all(i is None or i.dtype == torch.bool for i in args[1])
        return masks and args[2].numel() == 1 and not (len(args) > 3 and args[3])

    def _count_index(self, name: str, args: Any) -> None:
        if "put" in name and self._is_masked_fill(args):
            return
        for index in args[1]:
            if index is not None and not self.holds(index):
                self.wait(f"{name}: an index on the host")
            elif index is not None and index.dtype == torch.bool:
                self.wait(f"{name} by a bool mask")
        if "put" in name and not self.holds(args[2]) and args[2].ndim:
            self.wait(f"{name}: values on the host")

    def _count_copy(self, target: Tensor, source: Tensor, non_blocking: bool) -> None:
        if self.holds(target) == self.holds(source):
            return
        host = source if self.holds(target) else target
        if non_blocking and host in self.pinned:
            self.flying.add(host)
        else:
            self.wait("copy_ between host and device")

    # --- copies asked for by name ---
    def moved(self, x: Tensor, to_device: bool, non_blocking: bool, what: str) -> Tensor:
        """`x` on the other side."""
        with self.kernel():
            out = x.detach().clone()
        if to_device:
            self.device.add(out)
        elif non_blocking:
            self.pinned.add(out)
        host = x if to_device else out
        if non_blocking and host in self.pinned:
            self.flying.add(host)
        else:
            self.wait(what)
        return out


def _tensors_of(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, nn.Module):
        yield from (*thing.parameters(), *thing.buffers())
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors_of(value)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from _tensors_of(value)
    elif hasattr(thing, "__dataclass_fields__"):
        for name in thing.__dataclass_fields__:
            yield from _tensors_of(getattr(thing, name))
