"""What every Triton kernel compiles to: registers, shared memory, spills, width of loads and stores.

    python -m fastrl.bench.compile_table [--arch 80 90 100] [--few] [--beside VERSION ...] [OP ...]

compiles every variant that the calls of `bench/variants.py` launch.  No GPU is needed.  --few takes as many
variants of each kernel as show every value of its constexprs; --beside also compiles with the Tritons
installed in .triton/VERSION (`make .triton/3.6.0`).  The exit status is 1 if a variant does not compile,
spills without a reason stated in SPILLS, or has accesses of less than 16 bytes where its sizes allow more.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from fastrl.bench.beside import with_other
from fastrl.bench.cubin import usage
from fastrl.bench.offline import GPUS, refuse_interpreter
from fastrl.bench.variants import OPS, Variant, cover, record

WIDEST = 16  # bytes of the widest access that every architecture has
MOVE = {name: re.compile(rf"\b{name}\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b") for name in ("ld", "st")}
COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[\w.:]* [^;]*?, (0x[0-9a-f]+|\d+)[,;]")
BULK = "cp.async.bulk.tensor"  # whole tiles: TMA
SPILLS = {  # kernel -> the bytes that it may spill, whether for odd sizes only, and why they stay
    "decode_attention.split": (
        8,
        False,
        "fp32 on Triton 3.6 for sm_100 and on 3.7 for sm_80 only: one value, stored before the loop and "
        "loaded behind it",
    ),
    "linear.forward": (
        48,
        True,
        "K is odd: addresses of 2-byte loads, stored before the loop; no model has such a K",
    ),
    "perturb_token.token": (
        40,
        True,
        "D > 8192 is odd: 32 elements a thread, each with a mask, in 128 registers",
    ),
    "rope.backward": (
        8,
        False,
        "Triton 3.6 only: one value, loaded once in 472 instructions; at 96 registers ten programs share a "
        "multiprocessor, eight at the 128 that it would take",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One variant on one architecture; bytes, except the registers."""

    kernel: str
    variant: str
    arch: int
    registers: int = 0
    shared: int = 0
    spill: int = 0  # stack and local memory of a thread
    load: int = 0  # the widest
    store: int = 0
    wide: tuple[str, ...] = ()  # what must move 16 bytes at a time: "load", "store"
    failure: str = ""  # of the compiler

    @property
    def faults(self) -> list[str]:
        """Why it is not as it should be."""
        if self.failure:
            return [self.failure]
        most, odd, _ = SPILLS.get(self.kernel, (0, False, ""))
        excused = self.spill <= most and not (odd and self.wide)
        found = [f"{self.spill} bytes spilled"] if self.spill and not excused else []
        sizes = {"load": self.load, "store": self.store}
        return found + [f"{move} of {sizes[move]} bytes" for move in self.wide if sizes[move] < WIDEST]


# --- one variant ------------------------------------------------------------------------------------
def figures_of(variant: Variant) -> Figures:
    """Compile it and read the result."""
    launch = variant.launch
    compiled = launch.compile()
    (used,) = usage(compiled.asm["cubin"]).values()
    return Figures(
        kernel=launch.name,
        variant=launch.text,
        arch=launch.arch,
        registers=used.registers,
        shared=max(
            used.shared, compiled.metadata.shared
        ),  # the cubin does not count what the launch asks for
        spill=used.spill,
        load=widest(compiled.asm["ptx"], "load"),
        store=widest(compiled.asm["ptx"], "store"),
        wide=variant.moves,
    )


def widest(ptx: str, move: str) -> int:
    """Bytes of the widest access to global memory; a tile moved by TMA counts as 16."""
    instruction = {"load": "ld", "store": "st"}[move]
    sizes = [int(lanes or 1) * int(bits) // 8 for lanes, bits in MOVE[instruction].findall(ptx)]
    if move == "load":
        sizes += [int(size, 0) for size in COPY.findall(ptx)]
        sizes += [WIDEST] * (f"{BULK}.2d.shared" in ptx)
    return max(sizes, default=0)


# --- all of them ------------------------------------------------------------------------------------
def compile_all(variants: Sequence[Variant], processes: int) -> Iterator[Figures]:
    """The figures of each variant, in order; in forked processes, because kernels cannot be pickled."""
    global _jobs
    _jobs = variants
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        for variant, job in zip(variants, [pool.submit(_job, i) for i in range(len(variants))], strict=True):
            yield _result(variant, job)


_jobs: Sequence[Variant] = ()  # inherited by forked processes


def _job(i: int) -> Figures:
    return figures_of(_jobs[i])


def _result(variant: Variant, job: Future[Figures]) -> Figures:
    error = job.exception()
    if error is None:
        return job.result()
    while error.__cause__ is not None:
        error = error.__cause__
    failure = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    launch = variant.launch
    return Figures(kernel=launch.name, variant=launch.text, arch=launch.arch, failure=failure)


# --- output -----------------------------------------------------------------------------------------
HEAD = f"{'kernel':28} {'arch':6} registers  shared spill load store  variant"


def line(f: Figures) -> str:
    """A row of the table."""
    use = f"{f.registers:9} {f.shared:7} {f.spill:5} {f.load:4} {f.store:5}"
    faults = f"   <-- {'; '.join(f.faults)}" if f.faults else ""
    return f"{f.kernel:28} sm_{f.arch:<3} {use}  {f.variant}{faults}"


def summary(rows: Sequence[Figures]) -> dict[str, Any]:
    """Counts by architecture, and every failure, spill and narrow access."""
    return {
        "variants": {f"sm_{arch}": n for arch, n in sorted(Counter(f.arch for f in rows).items())},
        "kernels": len({f.kernel for f in rows}),
        "faults": [asdict(f) | {"faults": f.faults} for f in rows if f.faults],
        "spills": [asdict(f) | {"why": SPILLS[f.kernel][2]} for f in rows if f.spill and not f.faults],
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("names", nargs="*", metavar="OP", help=f"{', '.join(OPS)}; default: all")
    parser.add_argument("--arch", nargs="+", type=int, default=[90], choices=tuple(GPUS), metavar="N")
    parser.add_argument("--few", action="store_true", help="a part of the variants")
    parser.add_argument("--beside", nargs="+", default=[], metavar="VERSION", help="other Tritons")
    parser.add_argument(
        "--triton-cache", action="store_true", help="only fill Triton's cache; show what does not compile"
    )
    parser.add_argument("--out", type=Path, help="a JSON file for what was found")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compiles at a time")
    options = parser.parse_args(argv)
    unknown = set(options.names) - set(OPS)
    if unknown:
        parser.error(f"OP: expected {', '.join(OPS)}; got {', '.join(sorted(unknown))}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a variant is not as it should be."""
    options = arguments(argv)
    refuse_interpreter()
    torch.set_num_threads(1)  # what runs between two launches is small
    variants = [v for arch in options.arch for v in record(arch, options.names)]
    if options.few:
        variants = cover(variants)

    print(f"Triton {triton.__version__}\n{HEAD}", flush=True)
    rows = []
    for figures in compile_all(variants, options.jobs):
        rows.append(figures)
        if figures.failure or not options.triton_cache:
            print(line(figures), flush=True)
    found = {triton.__version__: {"all": not options.few} | summary(rows)}
    print(f"{len(rows)} variants, {len(found[triton.__version__]['faults'])} not as they should be")

    same = [*options.names, "--arch", *map(str, options.arch), *["--few"] * options.few]
    for version in options.beside:
        found |= with_other(version, "fastrl.bench.compile_table", [*same, "--jobs", str(options.jobs)])
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.triton_cache:
        return int(any(f.failure for f in rows))
    return int(any(table["faults"] for table in found.values()))


if __name__ == "__main__":
    sys.exit(main())
