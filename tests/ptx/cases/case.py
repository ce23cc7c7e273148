"""A case: what to run, what should come out, how far off it may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.kernels._backend import pick, use_backend

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NONE = torch.empty(0)
ROUNDING = {F32: 2.0**-23, BF16: 2.0**-8, F16: 2.0**-11}  # half of the last place of 1, for 16 bits


Interpreted = Callable[..., Any]  # as launch.interpreted


@dataclass(frozen=True, slots=True)
class Output:
    """One result: its truth, and its budget where the largest of the truth is 1 or less, else times that."""

    want: Tensor
    budget: float


@dataclass(frozen=True, slots=True)
class Case:
    run: Callable[[], Sequence[Tensor]]
    outputs: list[Output]
    interpreted: Interpreted | None = None  # launch.interpreted, unless its launches come from elsewhere


Build = Callable[[], Case]


def case(
    run: Callable[[], Sequence[Tensor]],
    want: Sequence[Tensor],
    budgets: Sequence[float],
    interpreted: Interpreted | None = None,
) -> Case:
    return Case(run, [Output(w, b) for w, b in zip(want, budgets, strict=True)], interpreted)


def kernel(op: str, name: str, like: Tensor) -> Callable[..., Any]:
    """The Triton implementation of an op, which a user's call would come to."""
    with use_backend("triton", op):
        return pick(op, like, name)


def doubled(*tensors: Tensor) -> list[Tensor]:
    """In float64 where they are floating-point."""
    return [t.double() if t.is_floating_point() else t for t in tensors]


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, infinite where one is finite and the other is another infinity or NaN."""
    a, b = got.detach().double(), want.detach().double()
    if a.shape != b.shape:
        return float("inf")
    finite = torch.isfinite(a) & torch.isfinite(b)
    if not ((a == b) | (a.isnan() & b.isnan()) | finite).all():
        return float("inf")
    difference = (a - b)[finite].abs()
    return float(difference.max()) if difference.numel() else 0.0


def allowed(output: Output) -> float:
    largest = output.want.double().nan_to_num(0.0, 0.0, 0.0).abs()
    return output.budget * max(1.0, float(largest.max()) if largest.numel() else 0.0)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    x, y = (t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(x, y)
