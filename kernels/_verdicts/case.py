"""What a check of an op consists of, as data: cases with their inputs, and what of a call a first launch of a
new variant is tried on.

The rows of all ops are gathered in `checks.py`.  A case calls one part of an implementation, exactly as the
op does; its truth is the same part of the op's reference on the same numbers in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

ROWS = 4  # of the caller's, on which the first launch of a variant is tried
Arguments = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Widths:
    """The sizes of the caller's model, beside the fixed ones; 0 where it has none.

    D width, F MLP width, H query heads, K key/value heads, E head width, page tokens of a cache page, V
    vocabulary.
    """

    D: int = 0
    F: int = 0
    H: int = 0
    K: int = 0
    E: int = 0
    page: int = 0
    V: int = 0

    def text(self) -> str:
        """As in D=896 F=4864; empty where nothing is given."""
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name))


@dataclass(frozen=True, slots=True)
class Sizes:
    """The fixed sizes: tokens, vocabularies, and repetitions of a call that must give the same bits."""

    T: tuple[int, ...] = (1, 3, 257)
    V: tuple[int, ...] = (7, 1000, 4112, 50257)
    repeats: int = 20
    ulps: float = 1.0


FULL = Sizes()
# for Triton's interpreter, which truncates where a GPU rounds
SMALL = Sizes(T=(1, 3), V=(7, 300), repeats=2, ulps=4.0)


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a part.

    args     its arguments: tensors, named tuples of tensors, numbers
    writes   places of the arguments that the part writes
    scratch  places of the arguments that it may use as scratch memory
    over     (place of an output, place of the argument over whose memory it may lie): both ways, same bits
    floor    an absolute error that is allowed whatever PyTorch's own error is
    defined  the outputs -> the parts of them that are defined
    """

    name: str
    part: str
    args: Arguments
    writes: tuple[int, ...] = ()
    scratch: tuple[int, ...] = ()
    over: tuple[int, int] | None = None
    floor: float = 0.0
    defined: Callable[[list[Tensor]], list[Tensor]] = list


@dataclass(slots=True)
class Make:
    """What the rows build their inputs with: seeded numbers on the device, and the sizes to take."""

    dtype: torch.dtype
    device: torch.device
    sizes: Sizes = FULL
    widths: Widths = field(default_factory=Widths)
    seed: int = 0
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.seed)

    @property
    def small(self) -> bool:
        """Whether the cases are for Triton's interpreter, which takes milliseconds a program."""
        return self.sizes is SMALL

    @property
    def dots(self) -> bool:
        """Whether matrix products of this dtype can be run: the interpreter's are wrong in bf16."""
        return not (self.small and self.dtype == torch.bfloat16)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Gaussian numbers of the case's dtype, or of another."""
        x = torch.randn(shape, generator=self.generator) * scale
        return x.to(self.device, dtype or self.dtype)

    def single(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Gaussian numbers in fp32, as statistics are."""
        return self.normal(*shape, dtype=torch.float32, scale=scale)

    def ints(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        x = torch.randint(low, high, shape, generator=self.generator)
        return x.to(self.device, dtype)

    def flags(self, n: int, share: float = 0.7) -> Tensor:
        """(n,) bool, this share of them True."""
        return (torch.rand(n, generator=self.generator) < share).to(self.device)

    def ends(self, *lengths: int) -> Tensor:
        """(S+1,) int32 ends of sequences of these lengths."""
        cu = torch.tensor([0, *lengths]).cumsum(0)
        return cu.to(self.device, torch.int32)

    def tensor(self, values: object, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """NaN everywhere: a part that should write it has to."""
        return torch.full(shape or (0,), torch.nan, dtype=dtype or self.dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class Few:
    """How the first launch of a compiled form that no case has run is tried.

    variant  arguments -> what the compiled form depends on
    cut      arguments -> the same call on at most `ROWS` of its rows
    writes   as in `Case`
    """

    variant: Callable[..., Hashable]
    cut: Callable[[Arguments], Arguments]
    writes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Check:
    """How an op is checked: its cases, and its variants by part; a part without a `Few` has one form only."""

    cases: Callable[[Make], Iterator[Case]]
    few: Mapping[str, Few] = field(default_factory=dict)


def rows(*places: int, ends: tuple[int, ...] = ()) -> Callable[[Arguments], Arguments]:
    """A `cut` that keeps the first rows of the arguments at `places`, and of sequences with these `ends`."""

    def cut(args: Arguments) -> Arguments:
        kept = list(args)
        for i in places:
            kept[i] = first_rows(args[i])
        for i in ends:
            kept[i] = first_ends(args[i])
        return tuple(kept)

    return cut


def first_rows(x: Any) -> Any:
    return x[:ROWS] if isinstance(x, Tensor) else x


def first_ends(x: Tensor) -> Tensor:
    return x.clamp(max=ROWS)


def each_tensor(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`x` with every tensor in it changed: a tensor, a (named) tuple or a list of them, anything else."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(each_tensor(y, change) for y in x))
    if isinstance(x, tuple | list):
        return type(x)(each_tensor(y, change) for y in x)
    return x


def tensors(x: Any) -> list[Tensor]:
    """The tensors in `x`, in order."""
    found: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        found.append(t)
        return t

    each_tensor(x, note)
    return found


def replaced(case: Case, **changes: Any) -> Case:
    return dataclasses.replace(case, **changes)
