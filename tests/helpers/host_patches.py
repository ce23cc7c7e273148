"""What helpers/host_waits.py replaces while it pretends: what never reaches a dispatch mode, that is
attributes, methods that leave torch, factories, streams, and the choice of kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastrl.kernels import _backend, _launch
from fastrl.kernels._native import build
from fastrl.sampler import engine

CUDA = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(total_memory=140 << 30, major=9, minor=0, multi_processor_count=132)
OPAQUE = ("attention", "attention_backward", "attention_prefix")  # ops of fastrl that a library's kernel runs
FACTORIES = ("zeros", "ones", "empty", "full", "arange", "eye", "rand", "randn", "randint", "linspace")
LIKE = ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like")


class Device(Protocol):
    """What is asked of the pretended device; see `FakeCuda`."""

    suspended: bool

    def holds(self, x: Tensor) -> bool: ...
    def place(self, *things: Any) -> None: ...
    def pin(self, x: Tensor) -> None: ...
    def is_pinned(self, x: Tensor) -> bool: ...
    def touched(self, x: Tensor, what: str) -> None: ...
    def wait(self, what: str) -> None: ...
    def kernel(self) -> AbstractContextManager[None]: ...
    def moved(self, x: Tensor, to_device: bool, non_blocking: bool, what: str) -> Tensor: ...


def is_cuda(device: Any) -> bool:
    """Whether this names a CUDA device."""
    return device is not None and not isinstance(device, Tensor) and torch.device(device).type == "cuda"


def patch(cuda: Device, patches: pytest.MonkeyPatch) -> None:
    """Attributes, methods and factories that never reach a dispatch mode."""
    _patch_attributes(cuda, patches)
    _patch_copies(cuda, patches)
    _patch_factories(cuda, patches)
    _patch_streams(cuda, patches)


def _patch_attributes(cuda: Device, patches: pytest.MonkeyPatch) -> None:
    def there(x: Tensor) -> bool:
        return not cuda.suspended and cuda.holds(x)

    base: Any = torch._C.TensorBase
    real = base.device
    attributes = {
        "device": lambda x: CUDA if there(x) else real.__get__(x),
        "is_cuda": there,
        "is_cpu": lambda x: not there(x),
    }
    for name, get in attributes.items():
        patches.setattr(Tensor, name, property(get), raising=False)
    patches.setattr(Tensor, "is_pinned", lambda x, *_: cuda.is_pinned(x))

    def reading(name: str) -> Callable[..., Any]:
        method = getattr(Tensor, name)

        def read(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if there(x):
                cuda.wait(f".{name}()")
            elif not cuda.suspended:
                cuda.touched(x, f".{name}()")
            with cuda.kernel():
                return method(x, *args, **kwargs)

        return read

    for name in ("tolist", "numpy", "__array__", "__repr__", "__format__"):
        patches.setattr(Tensor, name, reading(name))


def _patch_copies(cuda: Device, patches: pytest.MonkeyPatch) -> None:
    to, new_tensor = Tensor.to, Tensor.new_tensor

    def move(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if cuda.suspended:
            return to(x, *args, **kwargs)
        wanted = kwargs.pop("device", None)
        rest = list(args)
        if rest and isinstance(rest[0], Tensor):
            wanted, rest[0] = rest[0].device, rest[0].dtype
        elif rest and isinstance(rest[0], str | int | torch.device):
            wanted = rest.pop(0)
        non_blocking = bool(kwargs.get("non_blocking", False))
        if wanted is not None and is_cuda(wanted) != cuda.holds(x):
            x = cuda.moved(x, is_cuda(wanted), non_blocking, f".to({wanted})")
        dtypes = [d for d in (*rest, kwargs.get("dtype")) if isinstance(d, torch.dtype)]
        return to(x, *dtypes[:1], copy=bool(kwargs.get("copy", False))) if dtypes else x

    def pin(x: Tensor) -> Tensor:
        out = x.detach().clone()
        cuda.pin(out)
        return out

    def values(x: Tensor, data: Any, **kwargs: Any) -> Tensor:
        out = new_tensor(x, data, **kwargs)
        if not cuda.suspended and cuda.holds(x):
            cuda.wait("new_tensor of values")
            cuda.place(out)
        return out

    patches.setattr(Tensor, "to", move)
    patches.setattr(Tensor, "cpu", lambda x: move(x, "cpu"))
    patches.setattr(Tensor, "cuda", lambda x, *_, **more: move(x, "cuda", **more))
    patches.setattr(Tensor, "pin_memory", pin)
    patches.setattr(Tensor, "new_tensor", values)


def _patch_factories(cuda: Device, patches: pytest.MonkeyPatch) -> None:
    def making(real: Callable[..., Any], values: bool) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            device = kwargs.get("device")
            if cuda.suspended:
                return real(*args, **kwargs)
            if not (is_cuda(device) or kwargs.get("pin_memory")):
                with cuda.kernel():
                    out = real(*args, **kwargs)
                if any(isinstance(x, Tensor) and cuda.holds(x) for x in args[:1]):
                    cuda.place(out)
                return out
            pinned = kwargs.pop("pin_memory", False)
            if is_cuda(device):
                del kwargs["device"]
            with cuda.kernel():
                out = real(*args, **kwargs)
            if pinned:
                cuda.pin(out)
                return out
            if values:
                cuda.wait("a tensor of host values")
            cuda.place(out)
            return out

        return make

    for name in (*FACTORIES, *LIKE):
        patches.setattr(torch, name, making(getattr(torch, name), values=False))
    for name in ("tensor", "as_tensor"):
        patches.setattr(torch, name, making(getattr(torch, name), values=True))


class Stream:
    """A stream on which everything is done at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...


def _patch_streams(cuda: Device, patches: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def record(self, *args: Any) -> None: ...
        def wait(self, *args: Any) -> None: ...

        def synchronize(self) -> None:
            cuda.wait("Event.synchronize")

    def waiting(what: str) -> Callable[..., None]:
        return lambda *args: cuda.wait(what)

    stand_ins: dict[str, Any] = {
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda *args: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": waiting("torch.cuda.synchronize"),
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: PROPERTIES,
    }
    for name, stand_in in stand_ins.items():
        patches.setattr(torch.cuda, name, stand_in)
    patches.setattr(_backend, "direct", _direct)
    patches.setattr(_backend, "pick", _picking(cuda, _backend.pick))
    patches.setattr(engine, "runner", lambda step, device: step)
    patches.setattr(_launch, "_gpu", lambda device: _launch.Gpu((9, 0), 132))
    patches.setattr(build, "_obstacle", lambda device: "the device is pretended")  # the real answer is kept


def _direct(*tensors: Tensor | None, differentiable: bool = False) -> bool:
    """Ops bypass the dispatcher where they would without this mode."""
    if torch._C._are_functorch_transforms_active():
        return False
    grad = not differentiable and torch.is_grad_enabled()
    return not any(x is not None and grad and x.requires_grad for x in tensors)


def _picking(cuda: Device, real: Callable[..., Any]) -> Callable[..., Any]:
    """The choice of an implementation, with attention's taken for a kernel."""

    def pick(op: str, x: Tensor, part: str) -> Callable[..., Any]:
        if op not in OPAQUE:
            return real(op, x, part)

        def run(*args: Any) -> Any:
            with cuda.kernel():
                out = real(op, x, part)(*args)
            if cuda.holds(x):
                cuda.place(*(y for y in tree_leaves(out) if isinstance(y, Tensor)))
            return out

        return run

    return pick
