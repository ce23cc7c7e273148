"""Compiled kernels as files: what they use of a multiprocessor, and their machine code as text.

The tools are those that come with Triton: cuobjdump and nvdisasm.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton.backends.nvidia

from fastrl.errors import UserError

USAGE = re.compile(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True, slots=True)
class Usage:
    registers: int  # of a thread
    shared: int  # bytes of a CTA, without what the launch asks for
    spill: int  # bytes of stack and local memory of a thread


def usage(cubin: bytes) -> dict[str, Usage]:
    """By kernel.  Raises UserError where cuobjdump cannot read it."""
    text = _run("cuobjdump", cubin, "-res-usage")
    found = {name: _usage(*map(int, numbers)) for name, *numbers in USAGE.findall(text)}
    if not found:
        raise UserError(f"cuobjdump: expected the resource usage of a kernel, got {text!r}")
    return found


def disassemble(cubin: bytes) -> str:
    """The machine code of every kernel, as text."""
    return _run("nvdisasm", cubin, "-c")


def cubins_in(library: Path) -> dict[str, list[bytes]]:
    """The cubins that a compiled library carries, by their architecture: "sm_90"."""
    found: dict[str, list[bytes]] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [_tool("cuobjdump"), "-xelf", "all", str(library.resolve())]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        for path in sorted(Path(folder).glob("*.cubin")):  # library.1.sm_90.cubin
            found.setdefault(path.suffixes[-2].removeprefix("."), []).append(path.read_bytes())
    return found


def _usage(registers: int, stack: int, shared: int, local: int) -> Usage:
    return Usage(registers, shared, stack + local)


def _tool(name: str) -> str:
    return str(Path(triton.backends.nvidia.__file__ or "").parent / "bin" / name)


def _run(name: str, cubin: bytes, *options: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([_tool(name), *options, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{name}: expected a cubin that it can read, got {done.stderr.strip()!r}")
    return done.stdout
