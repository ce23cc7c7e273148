"""What every Triton kernel compiles to: registers, shared memory, spills, width of loads and stores.

    python -m fastrl.bench.compile_table [--all] [--out FILE.json] [NAME ...]

compiles each production variant (the `COMPILE` table beside the kernels) for sm_90, with --all for sm_80,
sm_90 and sm_100.  No GPU is needed.  The exit status is 1 if a variant spills, or has accesses of less than
16 bytes where its sizes allow more.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fastrl.kernels._triton
from fastrl.errors import UserError
from fastrl.kernels._launch import Spec

HOPPER, ALL = (90,), (80, 90, 100)
WIDE = 16  # bytes of the widest load that every architecture has
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
MOVE = {name: re.compile(rf"\b{name}\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b") for name in ("ld", "st")}
COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[\w.:]* [^;]*?, (0x[0-9a-f]+|\d+)[,;]")
BULK = "cp.async.bulk.tensor"  # whole tiles: TMA


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One variant on one architecture; `spill` is stack and local memory; bytes, except the registers."""

    kernel: str
    case: str
    arch: int
    registers: int
    shared: int
    spill: int
    load: int
    store: int
    wide: tuple[str, ...]

    @property
    def faults(self) -> list[str]:
        """Spills and narrow accesses."""
        found = [f"{self.spill} bytes spilled"] if self.spill > 0 else []
        for move in self.wide:
            size = getattr(self, move)
            if size < WIDE:
                found.append(f"{move} of {size} bytes")
        return found


def specs() -> Iterator[tuple[str, Spec]]:
    """(module, variant) of every kernel file.  Raises UserError under Triton's interpreter."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise UserError("TRITON_INTERPRET: expected it unset, the interpreter compiles nothing")
    for module in sorted(m.name for m in pkgutil.iter_modules(fastrl.kernels._triton.__path__)):
        table = getattr(importlib.import_module(f"fastrl.kernels._triton.{module}"), "COMPILE", ())
        yield from ((module, spec) for spec in table)


def compile_for(spec: Spec, arch: int) -> Any:
    """Triton's compiled kernel: `.asm` holds its PTX and cubin."""
    triton, backend = importlib.import_module("triton"), importlib.import_module("triton.backends.compiler")
    names = spec.kernel.arg_names
    source = importlib.import_module("triton.compiler").ASTSource(
        fn=spec.kernel,
        signature=spec.signature,
        constexprs={(names.index(n),): value for n, value in spec.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in spec.hints},
    )
    return triton.compile(source, target=backend.GPUTarget("cuda", arch, 32), options=dict(spec.options))


def usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, shared memory and spilled bytes of a cubin.

    Raises UserError where Triton's cuobjdump cannot read it.
    """
    nvidia = Path(importlib.import_module("triton.backends.nvidia").__file__ or "").parent
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(nvidia / "bin" / "cuobjdump"), "-res-usage", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
    found = USAGE.search(done.stdout)
    if found is None:
        raise UserError(
            f"cuobjdump: expected the resource usage of a kernel, got {done.stdout + done.stderr!r}"
        )
    registers, stack, shared, local = map(int, found.groups())
    return registers, shared, stack + local


def widest(ptx: str, move: str) -> int:
    """Bytes of the widest access to global memory; a tile moved by TMA counts as 16."""
    instruction = {"load": "ld", "store": "st"}[move]
    sizes = [int(lanes or 1) * int(bits) // 8 for lanes, bits in MOVE[instruction].findall(ptx)]
    if move == "load":
        sizes += [int(size, 0) for size in COPY.findall(ptx)]
        sizes += [WIDE] * (f"{BULK}.2d.shared" in ptx)
    return max(sizes, default=0)


def figures_of(name: str, spec: Spec, arch: int) -> Figures:
    """Compile one variant and read the result."""
    compiled = compile_for(spec, arch)
    registers, shared, spill = usage(compiled.asm["cubin"])
    kernel = f"{name}.{spec.kernel.__name__.removesuffix('_kernel')}"
    load, store = (widest(compiled.asm["ptx"], move) for move in ("load", "store"))
    shared = max(shared, compiled.metadata.shared)  # the cubin does not count memory requested at the launch
    return Figures(
        kernel=kernel,
        case=spec.case,
        arch=arch,
        registers=registers,
        shared=shared,
        spill=spill,
        load=load,
        store=store,
        wide=spec.wide,
    )


def _side_by_side(jobs: Sequence[tuple[str, Spec, int]], processes: int) -> Iterator[Figures]:
    """`figures_of` every job, in order; in forked processes, because kernels cannot be pickled."""
    global _jobs
    _jobs = jobs
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_job, range(len(jobs)))


_jobs: Sequence[tuple[str, Spec, int]] = ()  # inherited by forked processes


def _job(i: int) -> Figures:
    return figures_of(*_jobs[i])


# --- output -----------------------------------------------------------------------------------------
def line(f: Figures) -> str:
    """A row of the table."""
    return (
        f"{f.kernel:30} {f.case:34} sm_{f.arch:<4} {f.registers:9} {f.shared:8} {f.spill:6} {f.load:5} "
        f"{f.store:6}  {'; '.join(f.faults)}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a variant spills or is too narrow."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="kernel files, such as token_logp; default: all"
    )
    parser.add_argument("--all", action="store_true", help="sm_80, sm_90 and sm_100 instead of sm_90 alone")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="compiles at a time; default: the processor's threads",
    )
    options = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are decorated, by the import below
    print(f"{'kernel':30} {'case':34} {'arch':7} registers   shared  spill  load  store")
    jobs = []
    for name, spec in specs():
        if not options.names or name in options.names:
            jobs += [(name, spec, arch) for arch in (ALL if options.all else HOPPER) if arch in spec.archs]

    rows = []
    for figures in _side_by_side(jobs, options.jobs):
        rows.append(figures)
        print(line(figures), flush=True)
    bad = sum(bool(f.faults) for f in rows)
    print(f"{len(rows)} variants, {bad} with spills or narrow accesses")
    if options.out:
        content = {"rows": [asdict(f) | {"faults": f.faults} for f in rows]}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
