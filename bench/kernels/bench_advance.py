"""advance: the end of a decode step for B rows: records, stop test, pages."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastrl.bench.common import FORWARD, Bench, Case, Cost, Data, Draw, cases, plain
from fastrl.kernels.advance import Pages, Records, Rows, advance, reference
from fastrl.kernels.sample import Sample

CASES = cases(
    "B C page",
    tiny=(3, 9, 4),
    quick=(16, 128, 64),
    cpu=[(64, 2048, 64)],
    cuda=[(256, 2048, 64), (1024, 2048, 64)],
    slice={},
    modes=(FORWARD,),
    cuda_dtype="float32",
)


def data(case: Case) -> Data:
    B, C, page = case.sizes("B C page")
    draw = Draw(case)
    return Data({"token": draw.below(100, B), "logp": draw.normal(B), "C": C, "page": page})


def cost(case: Case) -> Cost:
    """The draw and the state of each row are read and written once."""
    (B,) = case.sizes("B")
    return Cost(B * 120)


def _state(token: Tensor, C: int, page: int) -> tuple[Rows, Records, Pages, dict[str, Tensor]]:
    """Every row in the middle of its sequence, one in `page` at the first token of a page."""
    B, device = token.shape[0], token.device
    row = torch.arange(B, device=device)
    length = C // 2 + row % page
    zeros, ones = torch.zeros_like(row), torch.ones_like(row)
    table = torch.zeros(B, -(-C // page) + 1, dtype=torch.int32, device=device)
    rows = Rows(row, length, ones, ones * C, ones * (C + page), zeros, ones.bool(), table)
    tokens = torch.zeros(B + 1, C + page, dtype=torch.int64, device=device)
    logp, behaviour, entropy = (torch.zeros(tokens.shape, device=device) for _ in range(3))
    lengths = torch.zeros(B + 1, dtype=torch.int64, device=device)
    records = Records(
        tokens, logp, behaviour, entropy, tokens.bool(), tokens.int(), lengths, lengths.to(torch.int8)
    )
    free = torch.arange(2 * B + 1, dtype=torch.int32, device=device).flip(0)
    pages = Pages(free, torch.full((1,), 2 * B, device=device), torch.full_like(free, -1))
    numbers = {
        "stops": torch.full((4,), -1, device=device),
        "version": zeros[:1].clone(),
        "total": zeros[:1].clone(),
    }
    return rows, records, pages, numbers


Step = Callable[[Sample, Rows, Records, Pages, dict[str, Tensor], int], None]


def _stepper(step: Step) -> Callable[..., Tensor]:
    """Steps of one state, made at the first call; rows are reset, so that every call does the same work."""
    made: list[tuple[Rows, Records, Pages, dict[str, Tensor]]] = []

    def call(token: Tensor, logp: Tensor, C: int, page: int) -> Tensor:
        if not made:
            made.append(_state(token, C, page))
        rows, records, pages, numbers = made[0]
        step(Sample(token, logp, logp, logp), rows, records, pages, numbers, page)
        rows.length.sub_(1)
        pages.top.fill_(2 * token.shape[0])
        return records.logp.sum()

    return call


def _ours(
    draw: Sample, rows: Rows, records: Records, pages: Pages, numbers: dict[str, Tensor], page: int
) -> None:
    advance(draw, rows, records, pages, page=page, **numbers)


def _eager(
    draw: Sample, rows: Rows, records: Records, pages: Pages, numbers: dict[str, Tensor], page: int
) -> None:
    reference(draw, rows, records, pages, numbers["stops"], numbers["version"], numbers["total"], page)


PROVIDERS = {"fastrl": plain(_stepper(_ours)), "eager": plain(_stepper(_eager))}
BENCH = Bench(op="advance", cases=CASES, data=data, cost=cost, providers=PROVIDERS, registry="advance")
