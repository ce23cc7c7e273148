"""SASS, NVIDIA's machine code, as text of nvdisasm: instructions, loops, and what an iteration executes.

A loop is found by its backward branches: the natural loop of the control-flow graph.  Its *body* is every
instruction in it, nested loops once.  Its *path* is what one iteration issues: of the ways from its head back
to its head, the one that moves the most bytes to and from memory with the widest accesses, of those one with
as many exponentials as the caller says an iteration takes, and of those the shortest.  Rare turns, such as
the last block of a row or the slow path of a division, do not lie on it.  Predicated instructions count, as
they take an issue slot; loops nested in it do not: they have paths of their own.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass, field

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L_x_\w+|\$\S+):")
SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)")
TARGET = re.compile(r"`\(([^)]+)\)")
LISTED = re.compile(r"BRANCH_TARGETS ([^\s\"]+)")  # where a jump to a register may lead
BRANCHES, ENDS = ("BRA", "JMP"), ("EXIT", "RET")
INDEXED = ("BRX", "JMX", "BRXU", "JMXU")  # targets in registers
JUMPS = (*BRANCHES, *ENDS, *INDEXED)
GLOBAL_LOADS, STORES = ("LDG", "LDGSTS"), ("STG",)
MEMORY = (*GLOBAL_LOADS, *STORES, "LDS", "STS", "UTMALDG", "UTMASTG", "ATOMG", "REDG")
SIZES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1}
CLASSES = {  # names that start with one of these, in order
    "LDG": ("LDG", "UTMALDG"),
    "STG": ("STG", "UTMASTG", "RED", "ATOM"),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "MUFU": ("MUFU",),
    "fp64": ("DFMA", "DMUL", "DADD", "DSETP", "DMNMX"),
    "MMA": ("HGMMA", "HMMA", "IMMA", "QGMMA", "DMMA"),
    "fp32": ("FFMA", "FADD", "FMUL", "FMNMX", "FSETP", "FSEL", "FSET", "FCHK"),
    "16 bit": ("HFMA2", "HADD2", "HMUL2", "HMNMX2", "HSETP2"),
    "convert": ("F2F", "F2I", "I2F", "F2FP", "FRND", "I2FP"),
    "move": ("MOV", "PRMT", "SEL", "CS2R", "R2UR", "S2", "UMOV", "USEL"),
    "barrier": ("BAR", "SYNCS", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "UCGABAR", "MEMBAR"),
    "shuffle": ("SHFL", "REDUX"),
    "branch": ("BRA", "BSSY", "BSYNC", "CALL", "EXIT", "RET"),
}


@dataclass(frozen=True, slots=True)
class Instruction:
    address: int
    guard: str  # "@!P0", or empty
    opcode: str  # LDG.E.128
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def moved(self) -> int:
        """Bytes a thread moves to or from memory."""
        if self.name not in MEMORY:
            return 0
        return next((SIZES[part] for part in self.opcode.split(".") if part in SIZES), 4)

    @property
    def weight(self) -> int:
        """What choosing it is worth: of two ways to move the same bytes, the one by wide accesses."""
        return self.moved * (2 if self.moved >= 16 else 1)

    @property
    def kind(self) -> str:
        """The class in CLASSES; "integer" for all others."""
        return next((k for k, names in CLASSES.items() if self.name.startswith(names)), "integer")


@dataclass(frozen=True, slots=True)
class Path:
    """What is executed from the head of a loop, or of a kernel, to its end."""

    instructions: tuple[Instruction, ...]

    def __len__(self) -> int:
        return len(self.instructions)

    @property
    def mix(self) -> Counter[str]:
        return Counter(i.kind for i in self.instructions)

    def moved(self, *names: str) -> int:
        """Bytes a thread moves by instructions of these names."""
        return sum(i.moved for i in self.instructions if i.name in names)


@dataclass(frozen=True, slots=True)
class Loop:
    head: int  # a block
    body: tuple[Instruction, ...]
    nested: bool  # it holds another loop

    def has(self, *names: str) -> bool:
        """Whether it holds an instruction of one of these names: "STG", or "STG.E.128" for that width."""
        return any(f"{i.opcode}.".startswith(f"{name}.") for i in self.body for name in names)


@dataclass
class Function:
    """One kernel."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # index of the instruction behind it

    def __hash__(self) -> int:
        return id(self)

    @functools.cached_property
    def starts(self) -> list[int]:
        """The index of each block's first instruction."""
        leaders = {0, *self.labels.values()}
        leaders |= {i + 1 for i, x in enumerate(self.instructions) if x.name in JUMPS}
        return sorted(i for i in leaders if i < len(self.instructions))

    def block(self, b: int) -> list[Instruction]:
        stop = self.starts[b + 1] if b + 1 < len(self.starts) else len(self.instructions)
        return self.instructions[self.starts[b] : stop]

    @functools.cached_property
    def edges(self) -> list[list[int]]:
        """The blocks that may follow each block.

        Raises ValueError for a jump to a register without a list of targets.
        """
        return [self._after(b) for b in range(len(self.starts))]

    def _after(self, b: int) -> list[int]:
        last, following = self.block(b)[-1], [b + 1] if b + 1 < len(self.starts) else []
        if last.name in INDEXED:
            return self._listed(last) + (following if last.guard else [])
        if last.name in ENDS:
            return following if last.guard else []
        if last.name not in BRANCHES:
            return following
        label = TARGET.search(last.operands)
        assert label is not None, last
        to = self.starts.index(self.labels[label[1]])
        conditional = last.guard or "," in last.operands or last.opcode.startswith("BRA.DIV")
        return [to, *following] if conditional else [to]

    def _listed(self, jump: Instruction) -> list[int]:
        """The blocks that the disassembler lists beside a jump to a register."""
        listed = LISTED.search(jump.operands)
        if listed is None:
            raise ValueError(f"{self.name}: {jump.opcode} at {jump.address:#x} jumps to a register")
        return [self.starts.index(self.labels[label]) for label in listed[1].split(",")]

    @functools.cached_property
    def dominators(self) -> dict[int, set[int]]:
        """For each block that can be reached, the blocks on every way to it."""
        order, before = self._reachable(), {b: [] for b in range(len(self.starts))}  # type: ignore[var-annotated]
        for b in order:
            for to in self.edges[b]:
                before[to].append(b)
        found = {b: set(order) for b in order} | {0: {0}}
        changed = True
        while changed:
            changed = False
            for b in order[1:]:
                new = {b} | set.intersection(*(found[p] for p in before[b]))
                changed |= new != found[b]
                found[b] = new
        return found

    def _reachable(self) -> list[int]:
        """Blocks in reverse postorder."""
        seen, order, stack = {0}, [], [(0, iter(self.edges[0]))]
        while stack:
            b, rest = stack[-1]
            to = next((x for x in rest if x not in seen), None)
            if to is None:
                order.append(b)
                stack.pop()
            else:
                seen.add(to)
                stack.append((to, iter(self.edges[to])))
        return order[::-1]

    @functools.cached_property
    def members(self) -> dict[int, frozenset[int]]:
        """The blocks of each loop, by its head."""
        found: dict[int, set[int]] = {}
        for b, above in self.dominators.items():
            for head in self.edges[b]:
                if head in above:
                    found.setdefault(head, {head}).update(self._into(b, head))
        return {head: frozenset(blocks) for head, blocks in found.items()}

    def _into(self, b: int, head: int) -> set[int]:
        """The blocks from which `b` is reached without passing `head`."""
        seen, stack = {head}, [b]
        while stack:
            x = stack.pop()
            if x not in seen:
                seen.add(x)
                stack += [p for p in self.dominators if x in self.edges[p]]
        return seen

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """Every loop, in the order of its head."""
        return [self._loop(head) for head in sorted(self.members)]

    def _loop(self, head: int) -> Loop:
        blocks = self.members[head]
        body = tuple(i for b in sorted(blocks) for i in self.block(b))
        return Loop(head, body, any(h != head and h in blocks for h in self.members))

    def iteration(self, loop: Loop, exponentials: int = 0) -> Path:
        """The path of one iteration."""
        blocks = self.members[loop.head]
        return self._path(loop.head, blocks, {b for b in blocks if loop.head in self.edges[b]}, exponentials)

    def whole(self, exponentials: int = 0) -> Path:
        """The path through the kernel; its loops do not count."""
        blocks = frozenset(self.dominators)
        return self._path(0, blocks, {b for b in blocks if self.block(b)[-1].name in ENDS}, exponentials)

    def _path(self, head: int, blocks: frozenset[int], last: set[int], exponentials: int) -> Path:
        """The path from `head` to a block of `last`; nested loops are passed, and not counted."""
        inner = {h: m for h, m in self.members.items() if h != head and h in blocks and m <= blocks}
        group = {b: m for m in sorted(inner.values(), key=len) for b in m}  # of the outermost
        known: dict[int, dict[tuple[int, int], Path]] = {}

        def walk(b: int) -> dict[tuple[int, int], Path]:
            """The shortest path onward by (bytes moved, exponentials)."""
            if b not in known:
                known[b] = {}  # an irreducible cycle would come back here
                members = group.get(b, frozenset({b}))
                onward = {to for x in members for to in self.edges[x]} & blocks - members - {head}
                ways = [{(0, 0): Path(())}] if members & last else []
                ways += [walk(to) for to in sorted(onward)]
                own = () if b in group else tuple(self.block(b))
                known[b] = _prefixed(own, ways, exponentials)
            return known[b]

        found = walk(head)
        return found[max(found)] if found else Path(())


def _prefixed(
    own: tuple[Instruction, ...], ways: list[dict[tuple[int, int], Path]], most: int
) -> dict[tuple[int, int], Path]:
    """The ways with a block in front, the shortest of each (bytes moved, exponentials up to `most`)."""
    bytes_, exponentials = sum(i.weight for i in own), sum(i.opcode == "MUFU.EX2" for i in own)
    found: dict[tuple[int, int], Path] = {}
    for way in ways:
        for (moved, count), rest in way.items():
            at = moved + bytes_, min(count + exponentials, most)
            if at not in found or len(rest) + len(own) < len(found[at]):
                found[at] = Path((*own, *rest.instructions))
    return found


def parse(text: str) -> dict[str, Function]:
    """The kernels of `nvdisasm -c`, by name."""
    found: dict[str, Function] = {}
    current = Function("")
    for line in text.splitlines():
        if section := SECTION.match(line):
            current = found[section[1]] = Function(section[1])
        elif label := LABEL.match(line):
            current.labels[label[1]] = len(current.instructions)
        elif read := INSTRUCTION.match(line):
            current.instructions.append(Instruction(int(read[1], 16), read[2] or "", read[3], read[4]))
    return found
