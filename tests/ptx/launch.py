"""Runs the sm_90 code of Triton kernels on CPU tensors, under a schedule that is made to find faults.

One op under the gate, in a process without TRITON_INTERPRET (from the repository's root):

    PYTHONPATH=.:tests .venv/bin/python my_case.py          # the newest Triton
    PYTHONPATH=.triton/3.6.0:.:tests .venv/bin/python my_case.py

    import torch
    from fastrl import ops
    from ptx.launch import SCHEDULES, interpreted

    x, y = torch.randn(3, 1000), torch.tensor([1, 2, 999])
    for name, schedule in SCHEDULES.items():
        with interpreted(schedule) as ran, ops.use_backend("triton"):
            stats = ops.token_logp(x, y, entropy=True)
        for r in ran:
            print(name, r.kernel, r.instructions, r.findings)    # no findings: a list of sentences
        print(stats.logp)                                        # compare with the float64 reference

Functions of kernels/_triton may be called directly as well.  A case that belongs into the gate is a row in a
file of tests/ptx/cases; `python -m ptx.child CASE...` runs some of them.

What is checked: every access lies within a tensor of the call and is aligned; no byte is read that nobody
wrote (torch.empty counts as unwritten); two accesses of which one writes have a barrier between them, unless
they are of one warp, or write the same value and nobody else reads it; what the asynchronous proxy touches
(TMA, wgmma) was fenced after generic writes; what a launch with launch_pdl reads of the launch before it, it
reads after griddepcontrol.wait; no deadlock.  What is not: ptxas, time, lanes of one warp
against each other, memory orders weaker than "no barrier", whether wgmma.fence is missing.  Noted only, in
`r.notes`: lanes of one store that write different values to one address, as Triton's reductions by a function
that is not symmetric to the last bit do (an fma of one side and not the other).
"""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from triton import knobs
from triton.backends.nvidia.compiler import CUDABackend

from fastrl.bench.offline import Launch, launches
from ptx.buffers import Fresh, memory_of
from ptx.machine import Machine, Schedule
from ptx.ops import decode
from ptx.ops.bulk import TensorMap
from ptx.parse import Fault, Kernel, parse

SCHEDULES = {
    "one warp at a time": Schedule(order="down", seed=1),
    "random": Schedule(order="random", seed=2, garbage=0x3A),
}
FORMATS = {
    "i1": "<B",
    "u1": "<B",
    "i8": "<b",
    "u8": "<B",
    "i16": "<h",
    "u16": "<H",
    "i32": "<i",
    "u32": "<I",
    "i64": "<q",
    "u64": "<Q",
    "fp32": "<f",
    "fp64": "<d",
}
SWIZZLES = (0, 32, 64, 128)  # bytes, by CUtensorMapSwizzle
MAP_BYTES = 128
Change = Callable[[str, str], str]  # (kernel, PTX) -> PTX


@dataclass(frozen=True, slots=True)
class Ran:
    """A launch that was interpreted."""

    kernel: str  # file.kernel
    findings: list[str]
    notes: list[str]  # see races.Findings.notes
    instructions: int  # of warps
    seconds: float
    executed: set[int]  # indices of instructions that ran
    source: Kernel


@contextlib.contextmanager
def interpreted(
    schedule: Schedule, *, bias: str = "mixed", change: Change | None = None
) -> Iterator[list[Ran]]:
    """Run every Triton launch of the `with` block in the interpreter; they are listed as they ran.

    `bias` is which way approximations err; `change` edits the PTX of a kernel before it runs.
    Raises:  Fault where the code has no meaning: out of bounds, misaligned, deadlock, not modelled.
    """
    ran: list[Ran] = []
    fresh = Fresh()

    def receive(launch: Launch) -> None:
        ran.append(_run(launch, schedule, bias, change, fresh))

    with _no_assembler(), launches(90, receive), fresh:
        yield ran


def _run(launch: Launch, schedule: Schedule, bias: str, change: Change | None, fresh: Fresh) -> Ran:
    compiled = launch.compile()
    text = compiled.asm["ptx"]
    kernel = next(iter(parse(text if change is None else change(launch.name, text)).values()))
    began = time.process_time()
    machine = _machine(launch, compiled, kernel, schedule, bias, fresh)
    try:
        _start(machine, launch, compiled)
    except Fault as fault:
        raise Fault(f"{launch.name}: {fault}") from fault
    fresh.written(machine.memory, machine.states.wrote())
    seconds = time.process_time() - began
    found, ran = machine.findings, (machine.instructions, seconds, machine.executed)
    return Ran(launch.name, found.lines(), found.notes(), *ran, kernel)


def _machine(
    launch: Launch, compiled: Any, kernel: Kernel, schedule: Schedule, bias: str, fresh: Fresh
) -> Machine:
    tensors = {n: getattr(v, "base", v) for n, v in launch.arguments.items()}
    memory = memory_of({n: t for n, t in tensors.items() if isinstance(t, Tensor)}, fresh)
    cluster = getattr(compiled.metadata, "num_ctas", 1)
    dependent = bool(launch.options.get("launch_pdl"))
    return Machine(kernel, memory, decode, schedule, cluster=cluster, bias=bias, dependent=dependent)


def _start(machine: Machine, launch: Launch, compiled: Any) -> None:
    values, maps = _values(launch, compiled)
    scratch = [b"\0" * 8] * (len(machine.kernel.parameters) - len(values))  # of Triton's own: never used
    blob, offsets = packed(machine.kernel, [*values, *scratch])
    for at, map_ in maps.items():
        machine.descriptors[offsets[machine.kernel.parameters[at].name]] = map_
    x, y, z = launch.grid
    threads = machine.kernel.threads or compiled.metadata.num_warps * 32
    machine.launch((x * machine.cluster, y, z), threads, compiled.metadata.shared, blob, offsets)


def _values(launch: Launch, compiled: Any) -> tuple[list[bytes], dict[int, TensorMap]]:
    """The parameters' bytes in order, and the tensor maps among them by position."""
    values: list[bytes] = []
    maps: dict[int, TensorMap] = {}
    swizzles = [SWIZZLES[d["swizzle"]] for d in getattr(compiled.metadata, "tensordesc_meta", None) or []]
    for name, kind in launch.signature.items():
        value = launch.arguments[name]
        if kind == "constexpr":
            continue
        if kind.startswith("tensordesc"):
            maps[len(values)] = _tensor_map(value, swizzles[len(maps)])
            values.append(b"\0" * MAP_BYTES)
            values += [struct.pack("<i", n) for n in value.shape]
            values += [struct.pack("<q", n) for n in value.strides]
        elif kind.startswith("*"):
            values.append(struct.pack("<Q", value.data_ptr()))
        else:
            values.append(struct.pack(FORMATS[kind], value))
    return values, maps


def _tensor_map(value: Any, swizzle: int) -> TensorMap:
    shape, strides = tuple(value.shape), tuple(value.strides)
    itemsize, box = value.base.element_size(), list(value.block_shape)
    if swizzle:
        box[-1] = min(box[-1], swizzle // itemsize)  # Triton loads a wide tile by several instructions
    return TensorMap(value.base.data_ptr(), shape, strides, tuple(box), itemsize, swizzle)


def packed(kernel: Kernel, values: list[bytes]) -> tuple[bytes, dict[str, int]]:
    """The parameters as a launch lays them out, and where each begins."""
    blob, offsets = b"", {}
    for p, raw in zip(kernel.parameters, values, strict=True):
        if len(raw) != p.size and not (len(raw) < p.size <= 4):
            raise Fault(f"parameter {p.name} of {kernel.name}: expected {p.size} bytes, got {len(raw)}")
        blob += b"\0" * (-len(blob) % p.align)
        offsets[p.name] = len(blob)
        blob += raw.ljust(p.size, b"\0")
    return blob, offsets


@contextlib.contextmanager
def _no_assembler() -> Iterator[None]:
    """PTX is all that is needed: leave ptxas out, and keep what is compiled so apart."""
    before = CUDABackend.make_cubin
    CUDABackend.make_cubin = lambda *args: b"none"
    try:
        with knobs.cache.scope(), np.errstate(all="ignore"):
            knobs.cache.dir = f"{knobs.cache.dir}/without-ptxas"
            yield
    finally:
        CUDABackend.make_cubin = before
