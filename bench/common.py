"""What a benchmark file declares: cases, the tensors and the least cost of a case, and its providers.

A file bench_<op>.py holds two tables and two functions, gathered in one `Bench`:

    CASES       rows of sizes, from `cases`
    PROVIDERS   name -> builder(case) -> function of the case's arguments.  A builder raises
                Unavailable(reason) for a provider that cannot run here, and returns None for one that does
                not apply to the case.  Names that start with "fastrl" run once per implementation of the op;
                ratios refer to "eager"
    data(case)  the tensors
    cost(case)  the least bytes and FLOPs
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

FORWARD, BOTH = "forward", "forward+backward"
OURS, EAGER, COMPILE = "fastrl", "eager", "torch.compile"
ELSEWHERE = "works_elsewhere"  # attribute of functions that work in a thread hidden from the memory profiler
PRODUCTS = "products"  # a bound rather than a peer: the matrix products alone, with meaningless results

Function = Callable[..., Any]  # of the case's arguments, by name -> a tensor or a tuple of them
Sizes = tuple[int, ...]


class Unavailable(Exception):
    """A provider that cannot run here; the message is the reason shown in its row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of sizes.

    mode      FORWARD runs under no_grad, BOTH differentiates too; any other name is a whole step, under
              no_grad
    level     "tiny" (tests), "quick" (--quick on CPU) or "full"
    headline  the first full case of its device: --gpu-check runs no other, and docs/results.md shows it
    shape     letter -> size
    slice     the sizes that are replaced to measure errors against float64
    """

    device: str
    dtype: str
    mode: str
    level: str
    headline: bool
    shape: Mapping[str, int]
    slice: Mapping[str, int] = field(default_factory=dict)

    def sizes(self, letters: str) -> Sizes:
        """The sizes of `letters`, as in `T, V = case.sizes("T V")`."""
        return tuple(self.shape[a] for a in letters.split())

    @property
    def label(self) -> str:
        return " ".join(f"{a}={n}" for a, n in self.shape.items())

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    def small(self) -> Case:
        """The case at the sizes of its slice."""
        return replace(self, shape={**self.shape, **self.slice})


def cases(
    letters: str,
    *,
    tiny: Sizes,
    quick: Sizes,
    cpu: Sequence[Sizes],
    cuda: Sequence[Sizes],
    slice: Mapping[str, int],
    modes: Sequence[str] = (FORWARD, BOTH),
    cuda_dtype: str = "bfloat16",
) -> tuple[Case, ...]:
    """The table of an op: float32 on CPU, `cuda_dtype` on CUDA, each size in each mode.

    The first of a list is its headline.
    """
    rows: list[tuple[str, str, bool, Sizes]] = [("cpu", "tiny", False, tiny), ("cpu", "quick", True, quick)]
    rows += [("cpu", "full", i == 0, sizes) for i, sizes in enumerate(cpu)]
    rows += [("cuda", "full", i == 0, sizes) for i, sizes in enumerate(cuda)]

    made = []
    for device, level, headline, sizes in rows:
        shape = dict(zip(letters.split(), sizes, strict=True))
        small = {letter: min(n, shape[letter]) for letter, n in slice.items()}
        dtype = cuda_dtype if device == "cuda" else "float32"
        for mode in modes:
            case = Case(
                device=device,
                dtype=dtype,
                mode=mode,
                level=level,
                headline=headline,
                shape=shape,
                slice=small,
            )
            made.append(case)
    return tuple(made)


@dataclass(frozen=True, slots=True)
class Cost:
    """The least cost of a case.

    bytes   read and written, each input and output once
    flops   of matrix products
    tokens  that the case yields
    """

    bytes: int
    flops: int = 0
    tokens: int = 0


@dataclass(slots=True)
class Data:
    """The arguments of a case, those that are differentiated, and the upstream gradients of the outputs.

    A scalar loss has no upstream gradient.
    """

    args: dict[str, Any]
    wrt: tuple[str, ...] = ()
    upstream: tuple[Tensor, ...] = ()

    def map(self, change: Callable[[Tensor], Tensor], names: Iterable[str] | None = None) -> Data:
        """A copy with `change` applied to the named tensors (default: all, upstream gradients included)."""
        chosen = set(self.args if names is None else names)
        args = dict(self.args)
        for name, x in self.args.items():
            if name in chosen and isinstance(x, Tensor):
                args[name] = change(x)
        upstream = tuple(change(x) for x in self.upstream) if names is None else self.upstream
        return Data(args, self.wrt, upstream)

    def wide(self) -> Data:
        """The same numbers in float64."""
        return self.map(lambda x: x.detach().double() if x.is_floating_point() else x)


Builder = Callable[[Case], Function | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One op's benchmark.

    truth     builder of the definition, which runs in float64 on a slice; errors are measured against it
    registry  the op with the implementations of the fastrl rows; empty: one row, of the automatic choice
    mutates   provider -> arguments that it writes to, of which it gets its own copies
    wall      timed by the wall clock, not by device events: the function waits for the device itself
    details   (case, a provider's function, its milliseconds) -> further numbers of its row, by name and unit,
              called after all measurements
    """

    op: str
    cases: tuple[Case, ...]
    data: Callable[[Case], Data]
    cost: Callable[[Case], Cost]
    providers: Mapping[str, Builder]
    truth: Builder | None = None
    registry: str = ""
    mutates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    wall: bool = False
    details: Callable[[Case, Function, float], dict[str, float]] | None = None


# --- builders ---------------------------------------------------------------------------------------
def plain(function: Function) -> Builder:
    """The builder of a function that is the same for every case."""
    return lambda case: function


def compiled(function: Function) -> Builder:
    """The builder of torch.compile(function), compiled for each case's own shapes."""
    return lambda case: torch.compile(function, dynamic=False)


class _Products(torch.autograd.Function):
    """x W^T, and two more products of the same size, in the shapes of the gradients of x and W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        logits = x @ weight.T
        ctx.save_for_backward(logits @ weight, logits.T @ x)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return ctx.saved_tensors


def products(case: Case, *, per_token: bool = False) -> Function:
    """The matrix products of a linear op over its live `rows`: one forward, three with a backward.

    The backward is that of a scalar or, `per_token`, of (T,).
    """

    def call(hidden: Tensor, weight: Tensor, rows: Tensor | None = None, **_: Any) -> Tensor:
        x = hidden if rows is None else hidden[rows]
        if case.mode != BOTH:
            return x @ weight.T
        scalar = _Products.apply(x, weight)
        return scalar.expand(x.shape[0]) if per_token else scalar

    return call


def peer(module: str, name: str) -> Any:
    """`name` of another project's `module`.  Raises Unavailable when it cannot be imported."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        package = module.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        raise Unavailable(f"{package} is not installed" if missing else f"{module}: {error}") from None
    except AttributeError:
        raise Unavailable(f"this version of {module} has no {name}") from None


def only(needed: bool, reason: str) -> None:
    """Raise Unavailable(reason) unless `needed` holds."""
    if not needed:
        raise Unavailable(reason)


# --- tensors ----------------------------------------------------------------------------------------
def wide(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is: what a careful eager implementation computes in."""
    return x if x.dtype == torch.float64 else x.float()


class Draw:
    """Random tensors of a case, on its device and in its dtype; the same in every run."""

    def __init__(self, case: Case) -> None:
        self.device, self.dtype = torch.device(case.device), getattr(torch, case.dtype)
        self.generator = torch.Generator(self.device).manual_seed(0)

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Gaussian numbers."""
        dtype = dtype or self.dtype
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype).mul_(std)

    def below(self, high: int, *shape: int) -> Tensor:
        """int64 in [0, high)."""
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def ends(self, S: int, length: int) -> Tensor:
        """cu_seqlens (S+1,) int32 of S sequences of `length` tokens."""
        return torch.arange(0, S * length + 1, length, dtype=torch.int32, device=self.device)
