"""What a benchmark file declares: cases, the tensors of a case, what it must cost at least, and who computes
it.

A file bench_<op>.py holds three tables and a few functions, gathered in one `Bench`:

    CASES      rows of sizes, from `cases`
    PROVIDERS  name -> builder(case) -> function of the case's arguments; a builder raises Unavailable(reason)
               for what cannot run here, and returns None for what does not apply to the case.  Names that
               start with "fastrl" run once per implementation of the op; "eager" is what ratios refer to
    data(case), cost(case)
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
# an attribute of functions that work in another thread, whose memory the profiler does not see
ELSEWHERE = "works_elsewhere"
PRODUCTS = "products"  # no peer but a bound: the matrix products alone, whose results mean nothing

Function = Callable[..., Any]  # of the case's arguments, by name -> a tensor or a tuple of them
Sizes = tuple[int, ...]


class Unavailable(Exception):
    """A provider that cannot run here; the message is the reason its row gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of sizes.

    mode      FORWARD runs under no_grad, BOTH differentiates too; another name is what a whole step does,
              under no_grad
    level     "tiny" (tests), "quick" (--quick on CPU) or "full"
    headline  the first full case of its device: all that --gpu-check runs, and what docs/results.md shows
    shape     letter -> size
    slice     the sizes replaced where errors are measured against float64
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
    """The table of an op: float32 on CPU, `cuda_dtype` on CUDA, each size in each mode; the first of a list
    is its headline.
    """
    rows: list[tuple[str, str, bool, Sizes]] = [("cpu", "tiny", False, tiny), ("cpu", "quick", True, quick)]
    rows += [("cpu", "full", i == 0, sizes) for i, sizes in enumerate(cpu)]
    rows += [("cuda", "full", i == 0, sizes) for i, sizes in enumerate(cuda)]
    names = letters.split()
    return tuple(
        Case(
            device=device,
            dtype=cuda_dtype if device == "cuda" else "float32",
            mode=mode,
            level=level,
            headline=headline,
            shape=dict(zip(names, sizes, strict=True)),
            slice={a: min(n, sizes[names.index(a)]) for a, n in slice.items()},
        )
        for device, level, headline, sizes in rows
        for mode in modes
    )


@dataclass(frozen=True, slots=True)
class Cost:
    """The least a case can cost: bytes read and written (each input and output once), FLOPs of matrix
    products, tokens it yields.
    """

    bytes: int
    flops: int = 0
    tokens: int = 0


@dataclass(slots=True)
class Data:
    """The arguments of a case, those that are differentiated, and the upstream gradients of the outputs
    (none: a scalar loss).
    """

    args: dict[str, Any]
    wrt: tuple[str, ...] = ()
    upstream: tuple[Tensor, ...] = ()

    def map(self, change: Callable[[Tensor], Tensor], names: Iterable[str] | None = None) -> Data:
        """A copy with `change` applied to the named tensors (default: all, upstream gradients included)."""
        chosen = set(self.args if names is None else names)
        args = {n: change(x) if n in chosen and isinstance(x, Tensor) else x for n, x in self.args.items()}
        return Data(
            args, self.wrt, self.upstream if names is not None else tuple(change(x) for x in self.upstream)
        )

    def wide(self) -> Data:
        """The same numbers in float64."""
        return self.map(lambda x: x.detach().double() if x.is_floating_point() else x)


Builder = Callable[[Case], Function | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One op's benchmark.

    truth     builder of the definition, which is run in float64 on a slice; errors are measured against it
    registry  the op whose implementations the fastrl rows run through; empty: one row, whatever is chosen
              automatically
    mutates   provider -> arguments it writes to, of which it gets its own copies
    wall      timed by the clock on the wall, not by device events: it waits for the device itself
    details   (case, a provider's function, its milliseconds) -> further numbers of its row, by name and unit,
              once all is measured
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
    """x W^T, and two more products of the same size that have the shapes of the gradients of x and W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        logits = x @ weight.T
        ctx.save_for_backward(logits @ weight, logits.T @ x)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return ctx.saved_tensors


def products(case: Case, *, per_token: bool = False) -> Function:
    """The matrix products of a linear op over its live `rows`: one forward, three with a backward (of a
    scalar, or of (T,)).
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
    """float32, or float64 when it is that already: what a careful eager implementation computes in."""
    return x if x.dtype == torch.float64 else x.float()


class Draw:
    """Random tensors of a case: on its device, in its dtype, the same in every run."""

    def __init__(self, case: Case) -> None:
        self.device, self.dtype = torch.device(case.device), getattr(torch, case.dtype)
        self.generator = torch.Generator(self.device).manual_seed(0)

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Gaussian numbers."""
        return torch.randn(
            shape, generator=self.generator, device=self.device, dtype=dtype or self.dtype
        ).mul_(std)

    def below(self, high: int, *shape: int) -> Tensor:
        """int64 in [0, high)."""
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def ends(self, S: int, length: int) -> Tensor:
        """cu_seqlens (S+1,) int32 of S sequences of `length` tokens."""
        return torch.arange(0, S * length + 1, length, dtype=torch.int32, device=self.device)
