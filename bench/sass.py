"""What the hot kernels execute per element, counted in their machine code (SASS) for sm_90.

    python -m fastrl.bench.sass [--loops] [--beside VERSION ...] [--out FILE.json] [NAME ...]

No GPU is needed.  Each row is a production call of a kernel (`bench/sass_rows.py`), compiled as its launch
would be, and its main loop: the instructions on the path of one iteration (`bench/disassembly.py`), divided
by the elements a thread handles in it.  Beside it stand the goals.

Predicted times are arithmetic, not measurements: the largest of the bytes at the copy rate of an H200 (4.3
TB/s), and of all instructions, exponentials and fp64 instructions at the rates at which its 132
multiprocessors can issue them at 1.98 GHz.  A kernel that waits for memory or barriers takes longer.

Both the newest Triton and the one a machine has decide what is executed: --beside also counts with those
installed in .triton/VERSION.  NAME limits it to rows whose label or kernel contains it; --loops
shows all loops of their kernels.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from fastrl.bench import offline
from fastrl.bench.beside import with_other
from fastrl.bench.cubin import Usage, cubins_in, disassemble, usage
from fastrl.bench.disassembly import Function, parse
from fastrl.bench.disassembly import Path as Way
from fastrl.bench.sass_rows import ROWS, Row
from fastrl.errors import UserError
from fastrl.kernels._backend import extension, use_backend

ARCH = 90
REGISTERS, WARPS, CTAS, SHARED = 65536, 64, 32, 228 << 10  # of a multiprocessor
RESERVED = 1 << 10  # bytes of shared memory a CTA takes besides its own
ASYNCHRONOUS = ("LDGSTS", "UTMALDG")  # copies into shared memory
COPY = 4.3e12  # bytes a second
CLOCK = 132 * 1.98e9  # cycles a second, of all multiprocessors together
PIPES = {"MUFU": 16, "fp64": 64}  # instructions of a thread a cycle; of all together 4 schedulers issue 128
ISSUE = 128
EXHAUSTIVE = 64  # exponentials a path may take
SHOWN = ("LDG", "STG", "shared", "MUFU", "fp32", "integer", "move", "fp64", "MMA", "barrier")
ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("kernels/_triton", "csrc/cuda", "bench/sass_rows.py", "bench/sass_calls.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """A kernel as compiled, with what its launch asks for."""

    function: Function
    usage: Usage
    threads: int
    shared: int  # bytes of a CTA

    @property
    def ctas(self) -> int:
        """CTAs that fit on a multiprocessor."""
        warps = -(-self.threads // 32)
        registers = -(-self.usage.registers // 8) * 8 * 32 * warps
        return min(REGISTERS // registers, WARPS // warps, CTAS, SHARED // (self.shared + RESERVED))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """A row of the table.  Instructions, fp64 and bytes are per element, of one pass; times are of all."""

    label: str
    kernel: str
    unit: str
    registers: int
    spill: int
    threads: int
    shared: int
    ctas: int  # on a multiprocessor
    in_flight: int  # bytes on their way to a multiprocessor
    instructions: float
    fp64: float
    bytes: float  # of global memory
    passes: int
    elements: float  # of a thread in an iteration
    path: int  # instructions of an iteration
    body: int  # all instructions of the loop
    mix: dict[str, int]  # of the path
    problem: str
    predicted_ms: dict[str, float]  # by what limits it
    goals: dict[str, str]


# --- compiled kernels -------------------------------------------------------------------------------
@functools.cache
def launched(call: object) -> dict[str, offline.Launch]:
    """The launches of a call, by kernel."""
    with offline.recorded(ARCH) as seen, use_backend("triton"):
        assert callable(call)
        call()
    return {launch.name: launch for launch in reversed(seen)}


def code_of(row: Row) -> Code:
    """Raises UserError where the call does not launch the kernel, or fastrl._C has no CUDA kernels."""
    if row.call is None:
        (function, used), (threads, dynamic) = _native(row.kernel), row.native
        return Code(function=function, usage=used, threads=threads, shared=used.shared + dynamic)
    launches = launched(row.call)
    if row.kernel not in launches:
        raise UserError(f"{row.label}: expected a launch of {row.kernel}, got {', '.join(launches)}")
    compiled = launches[row.kernel].compile()
    cubin = compiled.asm["cubin"]
    (used,) = usage(cubin).values()
    (function,) = parse(disassemble(cubin)).values()
    threads, shared = compiled.metadata.num_warps * 32, max(used.shared, compiled.metadata.shared)
    return Code(function=function, usage=used, threads=threads, shared=shared)


def _native(part: str) -> tuple[Function, Usage]:
    found = [(f, u) for f, u in _library() if part in f.name]
    if len(found) != 1:
        raise UserError(f"fastrl._C: expected one kernel named {part}, got {len(found)}; build it with nvcc")
    return found[0]


@functools.cache
def _library() -> list[tuple[Function, Usage]]:
    built = extension()
    cubins = cubins_in(Path(built.__file__)).get(f"sm_{ARCH}", []) if built else []
    return [(f, usage(c)[name]) for c in cubins for name, f in parse(disassemble(c)).items()]


# --- figures ----------------------------------------------------------------------------------------
def figures_of(row: Row) -> Figures:
    """Compile, disassemble and count one row."""
    code = code_of(row)
    loop = row.main.find(code.function)
    path, body = code.function.whole(), tuple(code.function.instructions)
    if loop is not None:
        path, body = code.function.iteration(loop), loop.body
    elements = row.elements.of(path)
    most = min(round(elements), EXHAUSTIVE)
    path = code.function.whole(most) if loop is None else code.function.iteration(loop, most)
    instructions = (len(body) if row.body else len(path)) / elements
    times = _predicted(row, path, elements, instructions)

    found = Figures(
        label=row.label,
        kernel=row.kernel,
        unit=row.unit,
        registers=code.usage.registers,
        spill=code.usage.spill,
        threads=code.threads,
        shared=code.shared,
        ctas=code.ctas,
        in_flight=_in_flight(code, path),
        instructions=round(instructions, 2),
        fp64=round(path.mix["fp64"] / elements, 2),
        bytes=round(path.moved("LDG", "LDGSTS", "STG") / elements, 2),
        passes=row.passes,
        elements=elements,
        path=len(path),
        body=len(body),
        mix=dict(path.mix.most_common()),
        problem=row.problem.name if row.problem else "",
        predicted_ms=times,
        goals={},
    )
    found.goals.update(_judged(row, found))
    return found


def _predicted(row: Row, path: Way, elements: float, instructions: float) -> dict[str, float]:
    """Milliseconds by what limits them; empty for a row without a problem."""
    if row.problem is None:
        return {}
    cycles = {name: path.mix[name] / elements / rate for name, rate in PIPES.items()}
    cycles["issue"] = instructions / ISSUE
    seconds = {name: row.problem.elements * row.passes * x / CLOCK for name, x in cycles.items() if x}
    seconds["bytes"] = row.problem.bytes * row.passes / COPY
    return {name: round(x * 1e3, 4) for name, x in seconds.items()}


def _in_flight(code: Code, path: Way) -> int:
    """Bytes on their way to a multiprocessor: the loads of an iteration, or the buffers of its copies."""
    if any(i.name in ASYNCHRONOUS for i in code.function.instructions):
        return code.shared * code.ctas
    return path.moved("LDG") * code.threads * code.ctas


def _judged(row: Row, found: Figures) -> dict[str, str]:
    """For each goal what it is, and whether it is met or by how much not."""
    values, judged = asdict(found) | {"predicted_ms": max(found.predicted_ms.values(), default=0)}, {}
    for goal in row.goals:
        missed = goal.by(values[goal.figure])
        judged[f"{goal.figure} {goal.text}"] = f"missed by {missed:.0%}" if missed else "met"
    return judged


# --- output -----------------------------------------------------------------------------------------
def line(f: Figures) -> str:
    """A row of the table."""
    mix = " ".join(f"{name} {f.mix[name]}" for name in SHOWN if f.mix.get(name))
    limit = max(f.predicted_ms, key=f.predicted_ms.__getitem__, default="")
    predicted = f"{f.predicted_ms[limit]:.3f} {limit}" if limit else ""
    goals = "; ".join(f"{goal}: {verdict}" for goal, verdict in f.goals.items())
    use = f"{f.registers:4}x{f.threads:<4} {f.shared / 1024:6.1f} {f.ctas:4} {f.in_flight / 1024:6.0f}"
    count = f"{f.instructions:9.2f}/{f.unit:6} {f.path:5}/{f.body:<5}"
    return f"{f.label:34} {use} {count} {predicted:>12}  {mix}  {goals}".rstrip()


HEAD = (
    f"{'kernel':34} {'regs':>4}x{'thr':4} {'KB':>6} {'CTAs':>4} {'KB fly':>6} {'instructions':>16} "
    f"{'path/body':11} {'predicted ms':>12}  instructions of the path; goals"
)


def readable(found: dict[str, list[dict[str, Any]]]) -> str:
    """The tables of all Tritons as text."""
    parts = []
    for version, rows in sorted(found.items()):
        parts += [f"Triton {version}", HEAD, *(line(Figures(**row)) for row in rows), ""]
    return "\n".join(parts)


def show_loops(row: Row) -> Iterator[str]:
    """Every loop of a row's kernel."""
    code = code_of(row)
    found = row.main.find(code.function)
    yield f"{row.label}: {row.kernel}, {len(code.function.instructions)} instructions"
    for loop in code.function.loops:
        path = code.function.iteration(loop, EXHAUSTIVE)
        mark = "*" if found is not None and loop.head == found.head else " "
        mix = " ".join(f"{name} {n}" for name, n in path.mix.most_common())
        yield f" {mark} at {loop.body[0].address:#x}: path {len(path)}, body {len(loop.body)}: {mix}"


def digest() -> str:
    """A hash of what the figures depend on: the kernels and the rows."""
    hashed = hashlib.sha256()
    for source in SOURCES:
        path = ROOT / source
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in (".py", ".cu", ".cuh"):
                hashed.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return hashed.hexdigest()[:12]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts of labels or kernels; default: all")
    parser.add_argument("--loops", action="store_true", help="show all loops of the kernels")
    parser.add_argument("--beside", nargs="+", default=[], metavar="VERSION", help="other Tritons")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures; the table goes beside it")
    options = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)

    rows = [r for r in ROWS if not options.names or any(n in r.label + r.kernel for n in options.names)]
    if options.loops:
        print("\n".join(text for row in rows for text in show_loops(row)))
        return 0

    print(f"Triton {triton.__version__}\n{HEAD}")
    counted = []
    for row in rows:
        counted.append(figures_of(row))
        print(line(counted[-1]), flush=True)
    found = {triton.__version__: [asdict(f) for f in counted]}
    for version in options.beside:
        found |= with_other(version, "fastrl.bench.sass", options.names)["rows"]
    if options.out:
        content = {"sources": digest(), "rows": found}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        options.out.with_suffix(".txt").write_text(readable(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
