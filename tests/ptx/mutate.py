"""Kernels with one barrier less: does the gate see what each barrier is for?

PYTHONPATH=.:tests python -m ptx.mutate CASE...      # a line of JSON for each
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ptx.cases.case import Build
from ptx.gate import judge
from ptx.launch import Ran
from ptx.parse import Instruction, parse

# what orders accesses: the pattern of an instruction, and what is left of it
WAITS = (
    (r"bar(rier)?\.(cta\.)?(sync|red|arrive)", ""),
    (r"barrier\.cluster\.wait", ""),
    (r"cp\.async\.wait_(group|all)", ""),
    (r"cp\.async\.bulk\.wait_group", ""),
    (r"mbarrier\.try_wait", "setp.eq.u32 {0}, 0, 0"),
    (r"wgmma\.wait_group", ""),
    (r"fence\.proxy\.async", ""),
)


@dataclass(slots=True)
class Mutant:
    """A kernel of a case without one of its barriers."""

    kernel: str
    place: int  # among the barriers of the kernel, from 0
    instruction: str
    found: str | None  # the first complaint; None: the gate does not notice


@dataclass(slots=True)
class Mutants:
    case: str
    complaints: list[str] = field(default_factory=list)  # of the case as it is
    mutants: list[Mutant] = field(default_factory=list)


def replacement(i: Instruction) -> str | None:
    """What to leave in the place of a barrier; None for another instruction."""
    if i.op.startswith(("bar.warp", "barrier.warp")):
        return None
    for pattern, rest in WAITS:
        if re.match(pattern, i.op):
            return rest.format(*i.args)
    return None


def barriers(ran: Ran) -> list[int]:
    """Indices of the barriers of a kernel that ran."""
    code = ran.source.code
    return [n for n in sorted(ran.executed) if replacement(code[n]) is not None]


def without(text: str, kernel: str, index: int) -> str:
    """The PTX of a kernel without an instruction; a wait for a cluster goes with its arrival."""
    code = parse(text)[kernel].code
    gone = {index}
    if code[index].op.startswith("barrier.cluster.wait"):
        arrivals = [n for n in range(index) if code[n].op.startswith("barrier.cluster.arrive")]
        gone.add(arrivals[-1])
    lines = text.split("\n")
    for n in gone:
        i = code[n]
        line = lines[i.line - 1]
        rest = replacement(i)
        start = line.index("@" if i.guard and not rest else i.op)
        lines[i.line - 1] = line[:start] + (rest or "") + line[line.index(";", start) :]
    return "\n".join(lines)


def mutants(name: str, build: Build, only: str = "") -> Mutants:
    """Every barrier of every kernel of a case, or of `only` one, removed once."""
    seen: dict[str, Ran] = {}
    texts: dict[str, str] = {}

    def keep(kernel: str, text: str) -> str:
        texts[kernel] = text
        return text

    out = Mutants(name, judge(name, build, change=keep, seen=seen).complaints)
    for kernel, ran in seen.items():
        if only not in ("", kernel):
            continue
        for place, index in enumerate(barriers(ran)):
            changed = without(texts[kernel], ran.source.name, index)

            def swap(of: str, text: str, kernel: str = kernel, changed: str = changed) -> str:
                return changed if of == kernel and text == texts[kernel] else text

            found = judge(name, build, change=swap, first=True).complaints
            what = ran.source.code[index]
            out.mutants.append(Mutant(kernel, place, str(what), found[0] if found else None))
    return out
