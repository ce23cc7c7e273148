"""PTX text to instructions.

A kernel is a list of instructions with the labels that branches go to, the layout of its parameters, its
symbols in shared memory, and the widths of its registers.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ptx.formats import SIZES


class Fault(Exception):
    """What the code does has no meaning on a GPU, or this interpreter does not know it."""


@dataclass(slots=True)
class Instruction:
    op: str  # "ld.global.v4.b32"
    args: list[str]
    guard: str | None  # the predicate before it, and whether that is negated
    negated: bool
    line: int  # of the PTX text
    text: str
    scopes: tuple[int, ...]  # of the braces around it, outermost first

    @property
    def name(self) -> str:
        return self.op.split(".")[0]

    @property
    def mods(self) -> list[str]:
        return self.op.split(".")[1:]

    def __str__(self) -> str:
        return f"line {self.line}: {self.text[:100]}"


@dataclass(slots=True)
class Parameter:
    name: str
    kind: str
    size: int  # bytes
    align: int


@dataclass(slots=True)
class Kernel:
    name: str
    parameters: list[Parameter]
    code: list[Instruction] = field(default_factory=list)
    labels: dict[tuple[str, int], int] = field(
        default_factory=dict
    )  # (name, scope) -> index of an instruction
    tables: dict[str, list[str]] = field(default_factory=dict)  # of brx.idx: name -> labels
    symbols: dict[str, int] = field(default_factory=dict)  # in shared memory: offset, bytes
    static: int = 0  # bytes of shared memory that the symbols take
    dynamic: str | None = None  # the symbol of the shared memory that the launch asks for
    threads: int = 0  # of a block, where the kernel says so
    widths: dict[str, int] = field(default_factory=dict)  # register or prefix -> bytes; 0: a predicate

    def width(self, register: str) -> int:
        """Bytes of a register."""
        found = self.widths.get(register)
        return self.widths[register.rstrip("0123456789")] if found is None else found

    def target(self, i: Instruction, label: str = "") -> int:
        """Where a branch goes: its label, or another, of the innermost scope that has it."""
        label = label or i.args[0]
        for scope in reversed(i.scopes):
            if (label, scope) in self.labels:
                return self.labels[label, scope]
        raise Fault(f"no label {label} ({i})")

    def targets(self, i: Instruction) -> list[int]:
        """Where an indexed branch may go."""
        return [self.target(i, label) for label in self.tables[i.args[1]]]


ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*([^{]*?)\{", re.S)
SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(\[(\d*)\])?")
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(.*?)([\w$]+)(?:\[(\d+)\])?\s*$", re.S)
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)$", re.S)
THREADS = re.compile(r"\.reqntid\s+(\d+)")
LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
GUARD = re.compile(r"@(!?)(%?[\w$]+)\s+(.*)$", re.S)
LINE_DIRECTIVE = re.compile(r"\.(?:loc|file|section)\b[^\n]*\n?")


def parse(text: str) -> dict[str, Kernel]:
    """Every kernel of a PTX module, by name."""
    source = _without_comments(text)
    breaks = [m.start() for m in re.finditer("\n", source)]
    kernels = {}
    for entry in ENTRY.finditer(source):
        end = _closing(source, entry.end())
        kernel = Kernel(entry.group(1), [_parameter(p) for p in split(entry.group(2)) if p])
        if m := THREADS.search(entry.group(3)):
            kernel.threads = int(m.group(1))
        _add_symbols(kernel, source[: entry.start()], source[entry.end() : end])
        _add_code(kernel, source, entry.end(), end, breaks)
        kernels[kernel.name] = kernel
    return kernels


def split(text: str) -> list[str]:
    """The parts between commas that are in no brackets."""
    parts, depth, current = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += c
    return [*parts, current.strip()] if current.strip() else parts


def elements(operand: str) -> list[str]:
    """{a, b} -> a, b; a -> a."""
    return split(operand[1:-1]) if operand.startswith("{") else [operand]


def _without_comments(text: str) -> str:
    """The text with every line where it was."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def _closing(source: str, start: int) -> int:
    """The brace that ends what begins after an opening one."""
    depth = 1
    for m in re.compile(r"[{}]").finditer(source, start):
        depth += 1 if m.group() == "{" else -1
        if depth == 0:
            return m.start()
    raise Fault("a kernel without its closing brace")


def _parameter(text: str) -> Parameter:
    m = PARAMETER.match(" ".join(text.split()))
    if m is None:
        raise Fault(f"parameter not understood: {text}")
    align, kind, _, name, count = m.groups()
    size = SIZES[kind] * int(count or 1)
    return Parameter(name, kind, size, int(align or SIZES[kind]))


def _add_symbols(kernel: Kernel, before: str, body: str) -> None:
    """Lay out shared memory: the module's symbols, then the kernel's own, then what the launch asks for."""
    for m in (*SHARED.finditer(before), *SHARED.finditer(body)):
        align, kind, name, brackets, count = m.groups()
        if brackets == "[]":
            kernel.dynamic = name
        elif name not in kernel.symbols:
            step = int(align or SIZES[kind])
            at = -(-kernel.static // step) * step
            kernel.symbols[name] = at
            kernel.static = at + SIZES[kind] * int(count or 1)


def _add_code(kernel: Kernel, source: str, start: int, end: int, breaks: list[int]) -> None:
    scopes: list[int] = [0]
    opened, label = 0, ""
    for kind, at, text in _statements(source, start, end):
        line = bisect.bisect(breaks, at) + 1
        if kind == "{":
            opened += 1
            scopes.append(opened)
        elif kind == "}":
            scopes.pop()
        elif kind == "label":
            label = text
            kernel.labels[text, scopes[-1]] = len(kernel.code)
        elif text.startswith(".branchtargets"):
            kernel.tables[label] = split(text.removeprefix(".branchtargets").strip())
        elif text.startswith(".reg"):
            _add_registers(kernel, text)
        elif not text.startswith("."):
            kernel.code.append(_instruction(text, line, tuple(scopes)))


def _statements(source: str, start: int, end: int) -> Iterator[tuple[str, int, str]]:
    """(kind, position, text): braces of scopes, labels, and what ends in a semicolon."""
    at = start
    while at < end:
        if source[at].isspace() or source[at] == ";":
            at += 1
        elif source[at] in "{}":
            yield source[at], at, ""
            at += 1
        elif m := LINE_DIRECTIVE.match(source, at):
            at = m.end()
        elif m := LABEL.match(source, at):
            yield "label", at, m.group(1)
            at = m.end()
        else:
            stop = source.index(";", at)
            yield "statement", at, " ".join(source[at:stop].split())
            at = stop + 1


def _add_registers(kernel: Kernel, text: str) -> None:
    m = REGISTERS.match(text)
    if m is None:
        raise Fault(f"registers not understood: {text}")
    size = 0 if m.group(1) == "pred" else SIZES[m.group(1)]
    for name in split(m.group(2)):
        kernel.widths[name.split("<")[0].strip()] = size


def _instruction(text: str, line: int, scopes: tuple[int, ...]) -> Instruction:
    guard, negated = None, False
    if m := GUARD.match(text):
        negated, guard, text = bool(m.group(1)), m.group(2), m.group(3)
    op, _, rest = text.partition(" ")
    return Instruction(op, split(rest), guard, negated, line, text, scopes)
