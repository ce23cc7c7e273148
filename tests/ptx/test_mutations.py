"""Every barrier of the kernels is there for a reason that the gate sees: a kernel without it is caught.

A barrier is bar.sync, a cluster's, a wait for asynchronous copies or products, a wait at a memory barrier, or
fence.proxy.async.  Where the gate does not notice that one is gone, the barrier is listed with the reason, by
the kernel and its place among the barriers of the kernel's PTX; who changes a kernel and comes here looks at
the PTX, and mends the kernel, the case or the list.
"""

from __future__ import annotations

import shutil

import pytest

from ptx.server import NEWEST

LANES = "only lanes of one warp meet there, and the interpreter runs a warp's lanes together"
LAST = "nothing touches the shared memory after it in this launch: the loop has come to its end"
ONE_WARP = "one warp holds all that the reduction adds up"

Places = dict[tuple[str, int], str]
REDUNDANT: dict[str, Places] = {
    "token_logp fp32": {},
    "decode bf16": {},
    "group_advantage batch": {},
    "linear bf16": {},
    "linear_logp bf16 wide tile": {},
    "cuda fused bf16": {},
    "cuda token_logp bf16": {},
    "cuda fused fp32 two rows in a cluster": {},
}
LONG: dict[str, Places] = {}


def unnoticed(children, case: str) -> set[tuple[str, int]]:
    if case.startswith("cuda") and shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH: csrc/cuda is not compiled")
    found = children[NEWEST].ask(f"mutants of {case}")
    assert found["complaints"] == [] and found["mutants"]
    return {(m["kernel"], m["place"]) for m in found["mutants"] if m["found"] is None}


@pytest.mark.parametrize("case", REDUNDANT)
def test_a_missing_barrier_is_noticed(children, case):
    """Wrong: a gate that sees races only where they change a result."""
    assert unnoticed(children, case) == set(REDUNDANT[case])


@pytest.mark.ptx
@pytest.mark.parametrize("case", LONG)
def test_a_missing_barrier_is_noticed_in_all_kernels(children, case):
    assert unnoticed(children, case) == set(LONG[case])
