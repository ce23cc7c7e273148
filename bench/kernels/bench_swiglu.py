"""swiglu: silu(gate) times up, from (T, 2F)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu

from fastrl import ops
from fastrl.bench.common import (
    BOTH,
    Bench,
    Case,
    Cost,
    Data,
    Draw,
    Function,
    cases,
    compiled,
    only,
    peer,
    plain,
)

CASES = cases(
    "T F",
    tiny=(5, 12),
    quick=(256, 512),
    cpu=[(2048, 4864)],
    cuda=[(16384, 14336), (8192, 3072), (32768, 3072)],
    slice={"T": 64},
)


def data(case: Case) -> Data:
    (T, F), draw = case.sizes("T F"), Draw(case)
    return Data({"gate_up": draw.normal(T, 2 * F)}, wrt=("gate_up",), upstream=(draw.normal(T, F),))


def cost(case: Case) -> Cost:
    """Two columns in and one out; the backward reads three and writes two.  No matrix products."""
    T, F = case.sizes("T F")
    return Cost(T * F * case.itemsize * (8 if case.mode == BOTH else 3))


def eager(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return silu(gate) * up


def liger(case: Case) -> Function:
    only(case.device == "cuda", "Liger's kernel is Triton: CUDA only")
    fused = peer("liger_kernel.transformers.functional", "liger_swiglu")
    return lambda gate_up: fused(*gate_up.chunk(2, -1))


PROVIDERS = {
    "fastrl": plain(ops.swiglu),
    "eager": plain(eager),
    "torch.compile": compiled(eager),
    "liger": liger,
}
BENCH = Bench(
    op="swiglu", cases=CASES, data=data, cost=cost, providers=PROVIDERS, truth=plain(eager), registry="swiglu"
)
