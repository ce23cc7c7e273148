"""The first launch of a compiled form that no case has run: tried on a few of the caller's rows.

Small cases do not cover every width.  Each part of an implementation that has passed is therefore called
through a `Guarded`: it knows the forms that have run, and one that it does not know is compared with the
reference on at most four of the call's own rows before the call.  Where that cannot be done (inside a graph
capture, under torch.compile or a transform) the call runs the reference, and nothing is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastrl.kernels._registry import Implementation, exact_blocks, registered
from fastrl.kernels._verdicts.case import Arguments, Case, Few, Sizes, tensors
from fastrl.kernels._verdicts.checks import CHECKS
from fastrl.kernels._verdicts.judge import FAILURES, Outcome, judge
from fastrl.kernels._verdicts.table import TABLE, Key, Run

PLAIN = (Tensor, torch.nn.Parameter)
FIRST = Sizes(T=(), V=(), repeats=2)

Found = Callable[[Key, str, Outcome], None]  # told of each first launch


def eager(x: Tensor) -> bool:
    """Whether a check may run now, beside a call on `x`: nobody traces, transforms or captures."""
    c = torch._C
    if torch.compiler.is_compiling() or c._are_functorch_transforms_active():
        return False
    if c._len_torch_dispatch_stack() or type(x) not in PLAIN:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


@dataclass(slots=True)
class Guarded:
    """A part of an implementation that has passed; called like the part."""

    key: Key
    part: str
    run: Run
    few: Few
    found: Found
    known: set[Hashable] = field(default_factory=set)
    bad: set[Hashable] = field(default_factory=set)

    def __call__(self, *args: Any) -> Any:
        form = self.few.variant(*args)
        return self.run(*args) if form in self.known else self._unknown(form, args)

    def _unknown(self, form: Hashable, args: Arguments) -> Any:
        if variant_text(self.part, form) in TABLE.verdicts[self.key].variants:
            self.known.add(form)
            return self.run(*args)
        if form not in self.bad and eager(tensors(args)[0]):
            self._first_launch(form, args)
        return self.run(*args) if form in self.known else self._reference(form, args)

    def _first_launch(self, form: Hashable, args: Arguments) -> None:
        outcome = self._try(args)
        (self.bad if outcome.reason else self.known).add(form)
        self.found(self.key, variant_text(self.part, form), outcome)

    def _try(self, args: Arguments) -> Outcome:
        with torch.no_grad():
            case = Case("first launch", self.part, self.few.cut(args), writes=self.few.writes)
            implementations = registered(self.key[0])
            ours, reference = (implementations[name].parts for name in (self.key[1], "reference"))
            try:
                return judge(case, ours, reference, FIRST)
            except FAILURES as error:
                return Outcome(one_line(error))

    def _reference(self, form: Hashable, args: Arguments) -> Any:
        reference = registered(self.key[0])["reference"]
        if exact_blocks and tensors(args)[0].device.type not in reference.exact:
            raise RuntimeError(
                f"{self.key[0]}: exact mode needs the {self.key[1]} kernel, whose form "
                f"{variant_text(self.part, form)} is not proven on this device"
            )
        return reference.parts[self.part](*args)


def variant_text(part: str, form: Hashable) -> str:
    return f"{part} {form}"


def one_line(error: BaseException) -> str:
    """An exception as one line of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def guarded(key: Key, impl: Implementation, found: Found) -> Mapping[str, Run]:
    """The parts of an implementation that has passed, behind their guards."""
    few = CHECKS[key[0]].few
    return {
        name: Guarded(key, name, run, few[name], found) if name in few else run
        for name, run in impl.parts.items()
    }
