"""Kernels that follow each other at once (programmatic dependent launch), and programs that finish each
other's work.

A kernel that is launched so may start before the one before it has ended, which hides its launch.  It waits
for the results of that kernel (and so of all before it, which waited in turn) before its first access to
memory, and then lets the next one start.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastrl.kernels._launch import gpu

LEAST_CAPABILITY = (9, 0)


@triton.jit
def after_others(CHAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait for the kernels before this one, then let the next one start."""
    if CHAIN:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def last_to_arrive(tickets, at, many):  # type: ignore[no-untyped-def]
    """Whether the `many` programs that share ticket `at` have all stored what they leave; true in one."""
    tl.debug_barrier()  # every warp has stored
    last = tl.atomic_add(tickets + at, 1, sem="acq_rel", scope="gpu") == many - 1
    if last:
        tl.store(tickets + at, 0)  # for the next launch
    return last


def chain(x: Tensor) -> dict[str, bool]:
    """The options of a launch on the device of `x` whose kernel calls `after_others`."""
    on = gpu(x)
    able = on is not None and on.capability >= LEAST_CAPABILITY
    return {"CHAIN": able, "launch_pdl": able}
