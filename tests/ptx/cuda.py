"""Runs csrc/cuda on CPU tensors: its own host code launches, and the kernels' PTX is interpreted.

nvcc compiles the sources for compute_90 with cuda_runtime.cpp in place of the CUDA runtime; a launch arrives
here with the values that a GPU would get: grid, cluster, shared memory and arguments are not restated.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from torch import Tensor

from ptx.buffers import Fresh, memory_of
from ptx.launch import Change, Ran, packed
from ptx.machine import Machine, Schedule
from ptx.ops import decode
from ptx.parse import Fault, parse

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"
FLAGS = ("-O3", "-std=c++17", "-gencode=arch=compute_90,code=compute_90", "-DFASTRL_CUDA=1")
FLAGS += ('-DFASTRL_CUDA_ARCH="90+PTX"',)
LIBRARY = "kernels.so"
RECEIVE = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.c_size_t,
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


class Compiled:
    """The host code, and the text of the kernels."""

    def __init__(self, folder: Path) -> None:
        self.host = ctypes.CDLL(str(folder / LIBRARY))
        self.texts = [path.read_text() for path in sorted(folder.glob("*.ptx"))]
        listing = subprocess.run(
            ["nm", "-D", "--defined-only", str(folder / LIBRARY)], capture_output=True, text=True, check=True
        )
        self.symbols = [line.split()[-1] for line in listing.stdout.splitlines()]

    def function(self, name: str) -> ctypes._NamedFuncPointer:
        """A function of csrc by the name it has there."""
        symbol = next(s for s in self.symbols if f"{len(name)}{name}" in s)
        return getattr(self.host, symbol)

    def text(self, kernel: str) -> str:
        return next(t for t in self.texts if f" {kernel}(" in t)


@cache
def compiled() -> Compiled:
    """Built once for each state of the sources, in Triton's cache folder."""
    files = sorted([*SOURCES.glob("*.cu*"), *SOURCES.parent.glob("*.h"), HERE / "cuda_runtime.cpp"])
    key = hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:16]
    folder = Path(os.environ["TRITON_CACHE_DIR"]).resolve() / f"cuda-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / LIBRARY).exists():
            _build(folder)
    return Compiled(folder)


def _build(folder: Path) -> None:
    sources = [str(p) for p in (*sorted(SOURCES.glob("*.cu")), HERE / "cuda_runtime.cpp")]
    command = [str(nvcc()), *FLAGS, "-Xcompiler=-fPIC", "-shared", "--cudart=none"]
    command += ["--keep", "--keep-dir=.", "-o", "unfinished.so", *sources]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc: {done.stderr[-3000:]}")
    (folder / "unfinished.so").rename(folder / LIBRARY)


class Calls:
    """Calls of csrc's functions; tensors stand for their addresses."""

    def __init__(
        self, schedule: Schedule, bias: str, change: Change | None, fresh: Fresh, clusters: int
    ) -> None:
        self.schedule, self.bias, self.change, self.fresh = schedule, bias, change, fresh
        self.clusters = clusters
        self.ran: list[Ran] = []
        self.tensors: dict[str, Tensor] = {}
        self.fault: Fault | None = None
        self.receiver = RECEIVE(self._receive)

    def __call__(self, name: str, *arguments: Tensor | int) -> None:
        """Raises Fault, as a launch does."""
        self.tensors = {f"argument {n}": a for n, a in enumerate(arguments) if isinstance(a, Tensor)}
        numbers = [_number(a) for a in arguments]
        compiled().host.set_receiver(self.receiver)
        compiled().function(name)(*(ctypes.c_int64(n) for n in numbers))
        if self.fault is not None:
            raise self.fault

    def _receive(self, name: bytes, grid, threads, shared, cluster, arguments) -> None:  # type: ignore[no-untyped-def]
        try:
            self._run(name.decode(), tuple(grid[:3]), threads, shared, cluster, arguments)
        except Fault as fault:  # raised again on the other side of the C++ in between
            self.fault = fault

    def _run(self, name, grid, threads, shared, cluster, arguments) -> None:  # type: ignore[no-untyped-def]
        text = compiled().text(name)
        kernel = parse(text if self.change is None else self.change(_plain(name), text))[name]
        values = [ctypes.string_at(arguments[n], p.size) for n, p in enumerate(kernel.parameters)]
        memory, began = memory_of(self.tensors, self.fresh), time.process_time()
        machine = Machine(kernel, memory, decode, self.schedule, cluster=cluster, bias=self.bias)
        blocks = (min(grid[0], self.clusters * cluster), *grid[1:])
        machine.launch(blocks, threads, shared, *packed(kernel, values))
        self.fresh.written(memory, machine.states.wrote())
        seconds = time.process_time() - began
        found = machine.findings
        facts = (machine.instructions, seconds, machine.executed)
        self.ran.append(Ran(_plain(name), found.lines(), found.notes(), *facts, kernel))


@cache
def _plain(symbol: str) -> str:
    """forward<float>, without namespaces and arguments."""
    done = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True)
    match = re.search(r"::(\w+<[^(]*>)\(", done.stdout)
    return f"cuda {match.group(1)}" if match else symbol


def _number(argument: Tensor | int) -> int:
    if isinstance(argument, Tensor):
        return argument.data_ptr() if argument.numel() else 0
    return argument


current: list[Calls] = []


@contextlib.contextmanager
def interpreted(
    schedule: Schedule, *, bias: str = "mixed", change: Change | None = None, clusters: int = 1 << 31
) -> Iterator[list[Ran]]:
    """As launch.interpreted, for calls by `call`.

    A launch gets at most `clusters` clusters of blocks: kernels stride by the grid, and with as many blocks
    as rows no block would come to a second row.
    """
    with Fresh() as fresh, np.errstate(all="ignore"):
        current.append(Calls(schedule, bias, change, fresh, clusters))
        try:
            yield current[-1].ran
        finally:
            current.pop()


def call(name: str, *arguments: Tensor | int) -> None:
    """A function of csrc/ops.h, such as token_logp_forward_cuda."""
    current[-1](name, *arguments)
