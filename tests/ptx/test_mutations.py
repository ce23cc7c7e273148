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
OWN = "each warp overwrites only what it alone has read since the barrier before"
FIRST = "nothing has touched these bytes before"
EARLIER = "a barrier between has ordered the last accesses to these bytes already"
IN_PLACE = "each thread stores over what it has itself loaded; the barrier is for a narrower result"
SERIES = "Triton sets one before each of several instructions of one thread: its neighbours order the same"
INIT = "memory barriers are no bytes here: TMA finds them as they were initialised"
PACE = "it holds one group of warps back for the speed of the other, and orders nothing"
LAST = "nothing is touched behind it"

Places = dict[tuple[str, int], str]
REDUNDANT: dict[str, Places] = {
    "token_logp fp32": {},
    "decode bf16": {},
    "group_advantage batch": {},
    "linear bf16": {},
    "cuda token_logp bf16": {},
}
LONG: dict[str, Places] = {
    "linear_logp bf16 deep": {
        ("linear_logp.target", 2): SERIES,
        ("linear_logp_hopper.partial", 0): INIT,
        ("linear_logp_hopper.partial", 6): SERIES,
        ("linear_logp_hopper.partial", 14): PACE,
        ("linear_logp_hopper.partial", 23): LAST,
    },
    "cuda fused bf16": {},
    "swiglu fp32": {},
    "sample fp32 of 7": {},
    "policy_loss pg": {},
    "rms_norm fp32": {("_partials.combine", 1): OWN},
    "rope bf16 normed": {("rope.turn", 3): OWN, ("_partials.combine", 1): OWN},
    "cross_entropy fp32 softcap": {("linear_cross_entropy.backward", 0): IN_PLACE},
    "perturb l2 token": {("perturb_token.token", 9): IN_PLACE, ("perturb_token.token", 10): IN_PLACE},
    "advance of 300": {("advance.forward", 0): FIRST, ("advance.forward", 20): EARLIER},
    "cuda token_logp fp32 to bf16": {("cuda backward<__nv_bfloat16, float>", 0): LANES},
    "cuda fused fp32 two rows in a cluster": {},
}


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
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", LONG)
def test_a_missing_barrier_is_noticed_in_all_kernels(children, case):
    assert unnoticed(children, case) == set(LONG[case])
