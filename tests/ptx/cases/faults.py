"""Faults that kernels once had: the gate must still see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from unittest import mock

from torch import Tensor

from fastrl.kernels._triton import advance as kernels
from ptx.cases.case import Build, Case
from ptx.cases.sampler import advance


def four_warps(block: int) -> dict[str, object]:
    """As advance was launched: for 33 to 64 rows, two warps do the work of two others once more."""
    return {"num_warps": 4, "enable_fp_fusion": True}


def with_four_warps(B: int) -> Case:
    case = advance(B)
    return Case(partial(_run, case.run), case.outputs)


def _run(run: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    with mock.patch.object(kernels, "options", four_warps):
        return run()


FAULTS: dict[str, Build] = {
    "advance of 40 with 4 warps": partial(with_four_warps, 40),
    "advance of 64 with 4 warps": partial(with_four_warps, 64),
}
