"""A pytest plugin that stands in for a GPU: `device="cuda"` makes CPU tensors, Triton kernels run in its
interpreter, and the functions of torch.cuda that tests call do nothing or answer as a device would.

    pytest -p fastrl.bench.gpu_check.fake_cuda -m gpu tests/gpu

It rehearses the tests, not the kernels: a test that passes here has no fault of its own.  What only a device
has (captured graphs, memory counts, waiting) is skipped with that reason; a test that is slow under the
interpreter is stopped without a verdict.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated

import pytest
import torch
import torch._dynamo.testing  # takes torch's own classes as types, before they are replaced

from fastrl import ops
from fastrl.kernels import _backend

SECONDS = float(os.environ.get("FASTRL_REHEARSAL_SECONDS", "10"))  # of a test
FACTORIES = (
    *(
        "arange",
        "as_tensor",
        "empty",
        "empty_like",
        "eye",
        "full",
        "full_like",
        "linspace",
        "ones",
        "ones_like",
    ),
    *("rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm", "tensor", "zeros"),
    *("zeros_like", "empty_strided"),
)
METHODS = ("to", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")
GIB = 2**30
NEEDS_A_DEVICE = {  # what a message says -> why the test cannot be rehearsed
    "CUDAGraph": "captured graphs",
    "Graphs": "captured graphs",
    "set_sync_debug_mode": "waits of the device",
    "memory_allocated": "the device's memory counts",
    "varlen": "kernels of another library",
    "Torch not compiled with CUDA": "torch.compile for a GPU",
}


def pytest_configure(config: pytest.Config) -> None:
    """Replace what makes tensors on a device, and what asks for one, for the whole session."""
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in METHODS:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    for kind in (torch.Tensor, torch.nn.Module):
        kind.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.Generator = _Generator  # type: ignore[misc]
    torch.nn.Module.to = _on_cpu(torch.nn.Module.to)  # type: ignore[method-assign]
    for name, stand_in in CUDA.items():
        setattr(torch.cuda, name, stand_in)
    _replace_compiled()


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with a CUDA device among its arguments replaced by the CPU."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(_cpu, args), **{k: _cpu(v) for k, v in kwargs.items()})

    return call


def _cpu(x: Any) -> Any:
    named = isinstance(x, str) and x.partition(":")[0] == "cuda"
    return "cpu" if named or (isinstance(x, torch.device) and x.type == "cuda") else x


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, _cpu(device))  # type: ignore[call-arg]


def _replace_compiled() -> None:
    """Where csrc/cuda would run, the reference does."""
    assert ops.implementations()
    for table in _backend._table.values():
        if "cuda" in table:
            table["cuda"] = replace(table["reference"], note=table["cuda"].note, devices=("cpu", "cuda"))


class _Anything:
    """A stream, an event or a context, of which every call is accepted."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _Anything:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., float]:
        return lambda *_, **__: 1.0


def _nothing(*_: Any, **__: Any) -> None: ...


CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda *_: "a stand-in for CUDA on the CPU",
    "get_device_capability": lambda *_: (9, 0),
    "mem_get_info": lambda *_: (4 * GIB, 8 * GIB),
    "get_sync_debug_mode": lambda: 0,
    "Stream": _Anything,
    "Event": _Anything,
    "device": _Anything,
    "stream": _Anything,
    "current_stream": _Anything,
    "is_current_stream_capturing": lambda: False,
} | dict.fromkeys(
    ("synchronize", "empty_cache", "set_device", "set_sync_debug_mode", "reset_peak_memory_stats", "_sleep"),
    _nothing,
)


# --- tests ------------------------------------------------------------------------------------------
class _TooLong(BaseException):  # not an Exception: no test may catch it
    pass


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def over(*_: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    try:
        with _time_limit(SECONDS):
            return (yield)
    except _TooLong:
        pytest.skip(f"not rehearsed to its end: over {SECONDS:.0f} s in the interpreter")
    except (AttributeError, AssertionError, RuntimeError, NotImplementedError) as error:
        reason = next((why for sign, why in NEEDS_A_DEVICE.items() if sign in str(error)), None)
        if reason is None:
            raise
        pytest.skip(f"needs a device: {reason}")
