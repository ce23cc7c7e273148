"""The interpreter itself, on hand-written PTX: what it must report, and what it must not.

Each kernel is a few instructions around one fault; beside it stands the same kernel without the fault.
"""

from __future__ import annotations

import numpy as np
import pytest

from ptx.formats import LANES
from ptx.machine import Machine, Schedule
from ptx.memory import Global
from ptx.ops import decode
from ptx.ops.approximations import BOUNDS, Bound, at_bound, sides
from ptx.ops.bulk import TensorMap
from ptx.parse import Fault, parse
from ptx.races import (
    DISAGREE,
    EARLY_READ,
    EARLY_WRITE,
    READ_AFTER_WRITE,
    UNFENCED,
    UNINITIALISED,
    WRITE_AFTER_READ,
    WRITE_AFTER_WRITE,
)

ORDERS = ("up", "down", "random")
HEAD = """
.visible .entry kernel(.param .u64 .ptr .global data, .param .align 64 .b8 map[128])
.reqntid {threads}
{{
    .reg .pred %p<9>; .reg .b32 %r<40>; .reg .b64 %rd<9>; .reg .b16 %rs<9>;
    .shared .align 1024 .b8 box[4096];
    ld.param.b64 %rd1, [data];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    shl.b32 %r2, %r1, 2;
    mov.b32 %r3, box;
    add.s32 %r4, %r3, %r2;
    xor.b32 %r5, %r1, 32;
    shl.b32 %r5, %r5, 2;
    add.s32 %r5, %r3, %r5;
    {body}
    ret;
}}
"""


def run(
    body: str,
    *,
    threads: int = 64,
    order: str = "up",
    words: int = 64,
    grid: int = 1,
    cluster: int = 1,
    dependent: bool = False,
):
    """(what is found, the global words, initially 0 ..) of threads that know

    %r1 their number, %rd3 and %r4 their words of global and shared memory, %r5 that of the other warp.
    """
    data = np.arange(words, dtype=np.uint32)
    kernel = parse(HEAD.format(threads=threads, body=body))["kernel"]
    memory = Global()
    region = memory.add("data", data.ctypes.data, data.nbytes)
    region.before = np.arange(data.nbytes) < data.nbytes // 2
    blob = data.ctypes.data.to_bytes(8, "little").ljust(192, b"\0")
    with np.errstate(all="ignore"):
        how = {"cluster": cluster, "dependent": dependent}
        machine = Machine(kernel, memory, decode, Schedule(order=order), **how)
        machine.descriptors[64] = TensorMap(data.ctypes.data, (2, 32), (32, 1), (2, 32), 4, 128)
        machine.launch((grid, 1, 1), threads, 0, blob, {"data": 0, "map": 64})
    return {what for what, _, _ in machine.findings.counts}, data


STORE, OTHER = "st.shared.b32 [%r4], %r1;", "ld.shared.b32 %r6, [%r5]; st.global.b32 [%rd3], %r6;"
SYNC = "bar.sync 0;"


@pytest.mark.parametrize("order", ORDERS)
def test_a_barrier_orders_shared_memory(order):
    """Wrong: bytes without their history, a barrier that orders nothing."""
    found, data = run(STORE + SYNC + OTHER, order=order)
    assert found == set() and (data == np.arange(64) ^ 32).all()
    assert run(STORE + OTHER, order=order)[0] & {READ_AFTER_WRITE, WRITE_AFTER_READ}


@pytest.mark.parametrize("order", ORDERS)
def test_a_second_round_needs_a_second_barrier(order):
    """Wrong: readers that are forgotten at the store that follows."""
    again = STORE + SYNC + OTHER
    assert WRITE_AFTER_READ in run(again + again.replace("%r1;", "%r2;"), order=order)[0]
    assert run(again + SYNC + again, order=order)[0] == set()


def test_unwritten_shared_memory():
    assert UNINITIALISED in run("ld.shared.b32 %r6, [%r4];")[0]


def test_replicated_stores_are_benign_until_somebody_reads():
    """Wrong: the same value from two warps as a race; a third warp's read before a barrier as none."""
    same = "st.shared.b32 [%r3], 7;"
    read = "setp.lt.u32 %p1, %r1, 64; @!%p1 ld.shared.b32 %r6, [%r3];"
    write = "setp.lt.u32 %p1, %r1, 64; @%p1 " + same
    assert run(same)[0] == set()
    assert run(same + "ld.shared.b32 %r6, [%r3];")[0] == set()  # each of them has written what it reads
    assert READ_AFTER_WRITE in run(write + read, threads=96)[0]
    assert run(write + SYNC + read, threads=96)[0] == set()
    assert WRITE_AFTER_WRITE in run("shr.u32 %r7, %r1, 5; st.shared.b32 [%r3], %r7;")[0]


def test_a_read_before_a_replicated_store_is_a_race():
    """Wrong: a store of the value that is there already as harmless; in another order it is read too late."""
    found, _ = run("ld.global.b32 %r6, [%rd1]; st.global.b32 [%rd1], 0;", order="random")
    assert found and found <= {WRITE_AFTER_READ, READ_AFTER_WRITE}


def test_lanes_that_disagree_are_noted():
    assert run("st.shared.b32 [%r3], %r1;", threads=32)[0] == {DISAGREE}


def test_blocks_are_not_ordered():
    """Wrong: a barrier of a block that orders another block."""
    found, _ = run("st.global.b32 [%rd1], %ctaid.x;".replace("%ctaid.x", "%r7"), threads=32, grid=2)
    assert found == set()  # one value
    body = "mov.u32 %r7, %ctaid.x;" + SYNC + "st.global.b32 [%rd1], %r7;"
    assert WRITE_AFTER_WRITE in run(body, threads=32, grid=2)[0]


FAULTS = {
    "out of bounds": "st.global.b32 [%rd3+4], %r1;",
    "of shared memory": "st.shared.b32 [%r4+4092], %r1;",
    "misaligned": "st.global.b32 [%rd3+2], %r1;",
    "deadlock": "setp.lt.u32 %p1, %r1, 32; @%p1 bar.sync 1, 64; @!%p1 bar.sync 2, 64;",
    "lanes": "and.b32 %r7, %r1, 1; setp.eq.u32 %p1, %r7, 0; @%p1 bar.sync 0;",
    "elsewhere": "setp.lt.u32 %p1, %r1, 9; @%p1 shfl.sync.idx.b32 %r6, %r1, 0, 31, -1;",
    "not modelled": "tcgen05.alloc %r6;",
    "is not modelled (line": "vadd.s32.s32.s32 %r6, %r1, %r1;",
    "no end": "$again: bra $again;",
}


@pytest.mark.parametrize("says", FAULTS)
def test_faults(says, monkeypatch):
    """Wrong: an access beside a tensor, a barrier that a part of a warp skips, a guessed instruction."""
    monkeypatch.setattr("ptx.machine.LIMIT", 1000)
    with pytest.raises(Fault, match=says.replace("(", r"\(")):
        run(FAULTS[says])


# --- asynchronous copies ----------------------------------------------------------------------------
COPY = "cp.async.ca.shared.global [%r4], [%rd3], 4;"
COMMIT, WAIT = "cp.async.commit_group;", "cp.async.wait_group 0;"
OWN = "ld.shared.b32 %r6, [%r4];"


def test_asynchronous_copies_are_waited_for():
    """Wrong: a copy that has landed at once; a wait that orders other warps; a group that was not closed."""
    assert run(COPY + COMMIT + WAIT + OWN)[0] == set()
    assert READ_AFTER_WRITE in run(COPY + COMMIT + OWN)[0]
    assert READ_AFTER_WRITE in run(COPY + WAIT + OWN)[0]
    assert READ_AFTER_WRITE in run(COPY + COMMIT + WAIT + OTHER)[0]
    assert run(COPY + COMMIT + WAIT + SYNC + OTHER)[0] == set()
    assert READ_AFTER_WRITE in run(COPY + COMMIT + "cp.async.wait_group 1;" + OWN)[0]


# --- the asynchronous proxy -------------------------------------------------------------------------
FENCE = "fence.proxy.async.shared::cta;"
FIRST = "setp.eq.u32 %p1, %r1, 0; mov.b64 %rd5, map; cvta.param.u64 %rd5, %rd5; mov.b32 %r9, 0;"
TILE = (
    FIRST + "@%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd5, {%r9, %r9}], [%r3];"
    "cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;"
)


@pytest.mark.parametrize("order", ORDERS)
def test_what_the_asynchronous_proxy_reads_is_fenced(order):
    """Wrong: a barrier in place of fence.proxy.async, which leaves the proxy with old bytes; a fence before
    the writes.
    """
    assert run(STORE + FENCE + SYNC + TILE, order=order)[0] == set()
    assert run(STORE + SYNC + FENCE + TILE, order=order)[0] == set()  # by who issues, after the barrier
    assert run(STORE + SYNC + TILE, order=order)[0] == {UNFENCED}
    assert run(FENCE + STORE + SYNC + TILE, order=order)[0] == {UNFENCED}


def test_a_tile_is_stored_as_its_swizzle_says():
    """Wrong: rows in order; the exchange of 16-byte pieces left out."""
    _, data = run(STORE + FENCE + SYNC + TILE)
    at = np.arange(64) * 4
    assert (data == (at ^ ((at >> 7 & 7) << 4)) // 4).all()


def test_shared_memory_is_kept_until_a_tile_is_stored():
    """Wrong: a bulk copy that has read its source at once."""
    late = TILE.replace("cp.async.bulk.wait_group 0;", "")
    assert WRITE_AFTER_READ in run(STORE + FENCE + SYNC + late + SYNC + STORE)[0]
    assert "bulk copies under way" in " ".join(run(STORE + FENCE + SYNC + late)[0])


# --- clusters ---------------------------------------------------------------------------------------
MEET = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
NEIGHBOUR = (
    "mov.u32 %r7, %cluster_ctarank; xor.b32 %r7, %r7, 1; mapa.shared::cluster.u32 %r8, %r4, %r7;"
    "ld.shared::cluster.b32 %r6, [%r8];"
)


@pytest.mark.parametrize("order", ORDERS)
def test_a_cluster_meets(order):
    """Wrong: blocks of a cluster taken for ordered; a relaxed arrival that publishes; a block that leaves
    while its neighbour still reads its memory.
    """
    kept = {"threads": 32, "grid": 2, "cluster": 2, "order": order}
    assert run(STORE + MEET + NEIGHBOUR + MEET, **kept)[0] == set()
    assert run(STORE + SYNC + NEIGHBOUR + MEET, **kept)[0]
    assert run(STORE + MEET.replace("arrive", "arrive.relaxed") + NEIGHBOUR + MEET, **kept)[0]
    assert run(STORE + MEET + NEIGHBOUR, **kept)[0] or order == "random"


def test_a_dependent_launch_waits_for_the_one_before():
    """Wrong: a wait after the load; none at all; weights that must wait, though nobody writes them."""
    load, store = "ld.global.b32 %r6, [%rd1+{}];", "st.global.b32 [%rd3], %r1;"
    wait = "griddepcontrol.wait;"
    assert run(load.format(0) + wait, dependent=True)[0] == {EARLY_READ}
    assert run(load.format(128) + wait + SYNC + load.format(0), dependent=True)[0] == set()
    assert run(store + wait, dependent=True)[0] == {EARLY_WRITE}
    assert run(wait + store, dependent=True)[0] == run(store)[0] == set()


# --- approximations ---------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", ["up", "down", "mixed"])
@pytest.mark.parametrize("name", ["ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh"])
def test_approximations_err_up_to_their_bound_and_no_further(name, bias):
    """Wrong: two units in the last place for all; an error past the bound; one that is always small."""
    functions = {
        "ex2": np.exp2,
        "lg2": np.log2,
        "rcp": lambda x: 1 / x,
        "rsqrt": lambda x: x**-0.5,
        "sqrt": np.sqrt,
        "tanh": np.tanh,
    }
    x = np.exp(np.random.default_rng(0).normal(size=4096)).astype(np.float32)
    exact = functions[name](x.astype(np.float64))
    bound = BOUNDS[name, "f32"]
    got = at_bound(exact, bound, x.astype(np.float64), sides(bias, x.view(np.uint32)))
    parts = _parts(bound, x.astype(np.float64), exact, got)
    assert parts.max() <= 1 and parts.max() > 0.9 and np.median(parts) > 0.3
    off = got.astype(np.float64) - exact
    assert bias == "mixed" or (off >= 0).mean() in (0, 1) or abs((off > 0).mean() - (bias == "up")) < 0.3


def _parts(bound: Bound, x: np.ndarray, exact: np.ndarray, got: np.ndarray) -> np.ndarray:
    """The errors as parts of what the bound allows."""
    nearest = exact.astype(np.float32)
    allowed = np.abs(exact) * bound.relative
    if bound.absolute is not None:
        allowed = np.maximum(allowed, bound.absolute(x))
    true = exact
    if bound.ulp:
        allowed, true = bound.ulp * np.spacing(np.abs(nearest)), nearest.astype(np.float64)
    return np.abs(got.astype(np.float64) - true) / allowed


def test_lanes_of_a_warp():
    """Wrong: divergent lanes that do not meet again; a shuffle of the wrong lane."""
    body = """
        and.b32 %r7, %r1, 1; setp.eq.u32 %p1, %r7, 0;
        @%p1 bra $even;
        add.u32 %r6, %r1, 100;
        bra.uni $meet;
    $even:
        mov.u32 %r6, %r1;
    $meet:
        shfl.sync.bfly.b32 %r8, %r6, 1, 31, -1;
        st.global.b32 [%rd3], %r8;
    """
    _, data = run(body, threads=LANES, words=LANES)
    lane = np.arange(LANES) ^ 1
    assert (data == lane + 100 * (lane & 1)).all()
