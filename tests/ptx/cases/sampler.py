"""The sampler's ops: sample, advance; and the perturbations."""

from __future__ import annotations

import copy
from functools import partial
from typing import NamedTuple

import torch

from fastrl.kernels import advance as stepping
from fastrl.kernels import perturb as perturbing
from fastrl.kernels import sample as drawing
from fastrl.kernels.advance import Pages, Records, Rows
from fastrl.kernels.sample import Sample
from ptx.cases.case import BF16, F16, F32, Build, Case, case, kernel


def sample(
    dtype: torch.dtype, B: int, V: int, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Case:
    """The first row is greedy."""
    x, tau = (2 * torch.randn(B, V)).to(dtype), torch.rand(B) + 0.5
    tau[0] = 0
    key = (torch.randint(2**62, (B,)), torch.randint(2**62, (B,)), torch.randint(2**32, (B,)))
    filters = (top_k, top_p, min_p)
    want = drawing.reference(x.double(), *key, tau.double(), *filters)
    run = partial(kernel, "sample", "forward", x)
    return case(lambda: run()(x, *key, tau, *filters), want, (0, 1e-5, 1e-5, 1e-5))


# --- advance ----------------------------------------------------------------------------------------
PAGE, COLUMNS, SEQUENCES = 4, 32, 40


class Step(NamedTuple):
    """The arguments of a call of advance."""

    draw: Sample
    rows: Rows
    records: Records
    pages: Pages
    stops: torch.Tensor
    version: torch.Tensor
    total: torch.Tensor
    page: int


def step_of(B: int) -> Step:
    """Rows at random lengths, most alive, each on its own pages."""
    S = max(SEQUENCES, B)
    length = torch.randint(2, COLUMNS - 1, (B,))
    drawn = torch.minimum(torch.randint(0, 9, (B,)), length - 1)
    until = torch.minimum(length + torch.randint(1, 9, (B,)), torch.tensor(COLUMNS))
    own = torch.arange(COLUMNS // PAGE) < ((length - 1) // PAGE + 1)[:, None]
    used = int(own.sum())
    table = torch.zeros(B, COLUMNS // PAGE, dtype=torch.int32)
    table[own] = torch.arange(1, used + 1, dtype=torch.int32)
    budget, last = drawn + torch.randint(1, 4, (B,)), torch.randint(0, 9, (B,))
    rows = Rows(torch.randperm(S)[:B], length, drawn, budget, until, last, torch.rand(B) < 0.8, table)
    P = used + B + 5
    refs = torch.full((P + 1,), -1, dtype=torch.int32)
    refs[: used + 1] = 1
    pages = Pages(torch.arange(P + 1, dtype=torch.int32).flip(0), torch.tensor([P - used]), refs)
    draw = Sample(torch.randint(0, 9, (B,)), *(torch.randn(B) for _ in range(3)))
    one = torch.tensor([17])
    return Step(draw, rows, _records(S), pages, torch.tensor([7, 3, -1]), one, one + 83, PAGE)


def _records(S: int) -> Records:
    tokens, lengths = torch.zeros(S + 1, COLUMNS, dtype=torch.int64), torch.zeros(S + 1, dtype=torch.int64)
    floats = [torch.zeros(S + 1, COLUMNS) for _ in range(3)]
    return Records(tokens, *floats, tokens.bool(), tokens.int(), lengths, lengths.to(torch.int8))


def results(step: Step) -> list[torch.Tensor]:
    """What a step writes, without the pad row of the records."""
    return [*step.rows, *(r[:-1] for r in step.records), *step.pages, step.total]


def advance(B: int) -> Case:
    """Where the newest tokens go, and a step."""
    start = step_of(B)
    want = copy.deepcopy(start)
    key = torch.randint(2**62, (len(want.records.length),))
    newest = (start.rows.length, start.rows.table, start.rows.seq, key, PAGE)
    places = stepping.reference_newest(*newest)
    stepping.reference(*want)

    def run() -> list[torch.Tensor]:
        ours = copy.deepcopy(start)
        found = kernel("advance", "newest", ours.draw.logp)(*newest)
        kernel("advance", "forward", ours.draw.logp)(*ours)
        return [*found, *results(ours)]

    return case(run, (*places, *results(want)), (0,) * (4 + len(results(want))))


# --- perturbations ----------------------------------------------------------------------------------
RADII = {"l2": 0.2, "linf": 0.05, "l1": 0.5}


def perturb(
    norm: str, scope: str, T: int, D: int, *, dtype: torch.dtype = F32, add: bool = True, masked: bool = True
) -> Case:
    """A start, and a step; one token has a gradient that is not finite."""
    delta, grad, embeds = 0.1 * torch.randn(T, D), torch.randn(T, D).to(dtype), torch.randn(T, D).to(dtype)
    if T > 2:
        grad[T // 2, D // 2] = torch.inf
    mask = torch.rand(T) > 0.1 if masked else torch.empty(0, dtype=torch.bool)
    ends = [0, 1, 1, (T + 1) // 2, T] if scope == "sequence" else []
    cu, radius = torch.tensor(ends, dtype=torch.int32), RADII[norm]
    start = perturbing.reference_init(delta, cu, mask, 0.7, norm, scope, 2**40 + 3)
    moved = delta.double()
    perturbing.reference_step(moved, grad.double(), cu, mask, 0.3, radius, norm, scope)

    def run() -> list[torch.Tensor]:
        ours, sum_ = delta.clone(), torch.empty(T, D)
        given = (embeds, sum_) if add else (None, None)
        kernel("perturb_step", "forward", ours)(ours, grad, cu, mask, 0.3, radius, norm, scope, *given)
        first = kernel("perturb_init", "forward", delta)(delta, cu, mask, 0.7, norm, scope, 2**40 + 3)
        return [ours, sum_, first] if add else [ours, first]

    want = (moved, embeds.double() + moved, start) if add else (moved, start)
    return case(run, want, (1e-6, 1e-6, 1e-9) if add else (1e-6, 1e-9))


CASES: dict[str, Build] = {
    "sample fp32": partial(sample, F32, 2, 1000),
    "sample fp32 of 7": partial(sample, F32, 3, 7),
    "sample bf16 top_k": partial(sample, BF16, 2, 600, top_k=50),
    "sample fp32 top_p": partial(sample, F32, 2, 300, top_p=0.9),
    "sample fp16 all filters": partial(sample, F16, 2, 300, 40, 0.8, 0.01),
    "advance of 16": partial(advance, 16),
    "advance of 40": partial(advance, 40),
    "advance of 300": partial(advance, 300),
    "perturb l2 token": partial(perturb, "l2", "token", 6, 70),
    "perturb l2 sequence": partial(perturb, "l2", "sequence", 4, 70, dtype=BF16),
    "perturb l2 batch": partial(perturb, "l2", "batch", 5, 300, masked=False),
    "perturb linf token": partial(perturb, "linf", "token", 6, 70, add=False),
    "perturb linf batch": partial(perturb, "linf", "batch", 6, 70, dtype=BF16),
    "perturb l1 token": partial(perturb, "l1", "token", 3, 70),
    "perturb l1 sequence": partial(perturb, "l1", "sequence", 4, 70),
}
LONG: dict[str, Build] = {
    "sample bf16 of several blocks": partial(sample, BF16, 2, 17000),
    "sample of 1": partial(sample, F32, 3, 1),
    "sample of 1 filtered": partial(sample, F32, 3, 1, 1, 0.5, 0.1),
    "advance of 33": partial(advance, 33),
    "advance of 64": partial(advance, 64),
    "advance of 1300": partial(advance, 1300),
    "perturb linf sequence": partial(perturb, "linf", "sequence", 6, 70),
    "perturb l1 batch": partial(perturb, "l1", "batch", 6, 70),
    "perturb l2 token wide": partial(perturb, "l2", "token", 3, 1500, dtype=BF16),
    "perturb l2 batch wide": partial(perturb, "l2", "batch", 5, 1030, dtype=BF16),
    "perturb l1 token wide": partial(perturb, "l1", "token", 2, 3000),
    "perturb l1 sequence wide": partial(perturb, "l1", "sequence", 5, 1100, dtype=BF16),
    "perturb of one element": partial(perturb, "l1", "token", 1, 1),
}
