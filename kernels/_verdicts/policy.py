"""Cases of the ops on vectors of tokens and samples, and of the end of a decode step: gae, group_advantage,
policy_loss, perturb_init, perturb_step and advance.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.kernels._advance import Pages, Records, Rows
from fastrl.kernels._policy_arguments import RATIOS, Columns, Options
from fastrl.kernels._verdicts.case import (
    ROWS,
    Arguments,
    Case,
    Check,
    Few,
    Make,
    first_ends,
    first_rows,
    rows,
)
from fastrl.kernels.surrogates import KLS, SURROGATES


# --- gae --------------------------------------------------------------------------------------------
def gae(m: Make) -> Iterator[Case]:
    most = [3, 0, 140] if m.small else [1, 129, 0, 300, 128, 5]
    for lengths, masked in product(([1], [2, 0, 1], most), (False, True)):
        T = sum(lengths)
        live = m.flags(T) if masked else torch.ones(T, dtype=torch.bool, device=m.device)
        reward, value = (torch.where(live, x, torch.nan) for x in (m.normal(T), m.normal(T)))
        mask = live if masked else live[:0]
        args = (reward, value, m.ends(*lengths), mask, 0.99, 0.95)
        yield Case(f"lengths={'+'.join(map(str, lengths))}{' mask' * masked}", "forward", args, floor=1e-6)


GAE = Check(gae)


# --- group_advantage --------------------------------------------------------------------------------
FORMS = (  # baseline, scale, shape
    ("mean", "std", "linear"),
    ("leave_one_out", "none", "linear"),
    ("max", "range", "linear"),
    ("none", "batch_std", "linear"),
    ("mean", "std", "rank"),
    ("mean", "std", "softmax"),
)
GROUPS = ((1, 5), (3, 7), (8, 40), (16, 5), (100, 3), (1500, 2))  # samples of a group, groups


def group_advantage(m: Make) -> Iterator[Case]:
    no_ids = m.tensor([])
    for (size, count), (baseline, scale, shape) in product(GROUPS[: 2 if m.small else None], FORMS):
        S = size * count
        reward = m.normal(S)
        reward[m.flags(S, 0.25)] = 0.5
        reward[m.flags(S, 0.1)] = torch.nan
        how = (baseline, scale, shape, 1e-4, True, 0.5)
        name = f"size={size} groups={count} {baseline} {scale} {shape}"
        yield Case(name, "forward", (reward, no_ids, size, *how), floor=2e-6)
        ids = m.ints(0, count, S) * (1 << 33)
        yield Case(f"{name} ids", "forward", (reward, ids, 0, *how), floor=2e-6)


def _cut_groups(args: Arguments) -> Arguments:
    reward, group, size, *how = args
    kept = min(len(reward), ROWS * size) if size else min(len(reward), 64)
    return (reward[:kept], group[:kept], size, *how)


GROUP_ADVANTAGE = Check(
    group_advantage,
    {
        "forward": Few(
            lambda reward, group, size, baseline, scale, shape, *rest: (
                size.bit_length(),
                size > 0,
                shape,
                scale == "batch_std",
            ),
            _cut_groups,
        )
    },
)


# --- policy_loss ------------------------------------------------------------------------------------
FLAGS = ((), ("mask",), ("entropy",), ("mask", "entropy", "ref_logp", "correction"))


def policy_loss(m: Make) -> Iterator[Case]:
    forms: list[tuple[str, str, str, tuple[str, ...]]]
    forms = [(s, r, k, FLAGS[3]) for s, r, k in product(("clip", "cispo"), RATIOS, ("", "k3"))]
    forms += [(s, "token", "", FLAGS[2]) for s in SURROGATES]
    forms += [("clip", "token", k, FLAGS[3]) for k in (list(KLS)[:3] if m.small else KLS)]
    forms += [("clip", ratio, "", flags) for ratio, flags in product(RATIOS, FLAGS)]
    for T, form in product((5,) if m.small else (1, 3, 514), dict.fromkeys(forms)):
        surrogate, ratio, kl, flags = form
        name = f"T={T} {surrogate} {ratio} {kl or 'no'} KL {'+'.join(flags)}".rstrip()
        yield Case(name, "forward", (_columns(m, T, ratio, kl, flags), _options(*form)), floor=2e-6)


def _columns(m: Make, T: int, ratio: str, kl: str, flags: tuple[str, ...]) -> Columns:
    """The columns that are there; masked-out tokens hold NaN in all of them."""
    none = m.single(0)
    mask = m.flags(T) if "mask" in flags else none.bool()
    logp = -m.single(T).abs()
    columns = {
        "logp": logp,
        "old_logp": logp - m.single(T, scale=0.5),
        "advantage": m.single(T),
        "weight": m.single(T).abs() / T,
        "entropy": m.single(T).abs() if "entropy" in flags else none,
        "ref_logp": logp - m.single(T, scale=0.3) if kl or "ref_logp" in flags else none,
        "correction": 0.5 + m.single(T).abs() if "correction" in flags else none,
    }
    if mask.numel():
        columns = {n: torch.where(mask, x, torch.nan) if x.numel() else x for n, x in columns.items()}
    ends = m.ends(T // 3, 0, T - T // 3) if ratio == "sequence" else none
    return Columns(**columns, mask=mask, cu_seqlens=ends)


def _options(surrogate: str, ratio: str, kl: str, flags: tuple[str, ...]) -> Options:
    params = tuple(SURROGATES[surrogate].params.values())
    return Options(surrogate, params, ratio, kl, 0.3 if kl else 0.0, 0.2 if "entropy" in flags else 0.0)


def _policy_variant(c: Columns, o: Options) -> tuple[object, ...]:
    return o.surrogate, o.ratio, o.kl, *(x.numel() > 0 for x in c[5:8]), c.entropy.numel() > 0


def _cut_columns(args: Arguments) -> Arguments:
    c, o = args
    ends = first_ends(c.cu_seqlens) if o.ratio == "sequence" else c.cu_seqlens
    return c._make([*(first_rows(x) for x in c[:8]), ends]), o


POLICY_LOSS = Check(policy_loss, {"forward": Few(_policy_variant, _cut_columns)})


# --- perturb ----------------------------------------------------------------------------------------
RADIUS = {"l2": 0.5, "linf": 0.2, "l1": 2.0}
SCOPES = ("token", "sequence", "batch")
LENGTHS = (4, 0, 5)


def _balls(m: Make) -> Iterator[tuple[int, str, str, bool]]:
    widths = [7, *([] if m.small else [896]), *filter(None, [m.widths.D])]
    for D, norm, scope in product(widths, RADIUS, SCOPES):
        for masked in (scope == "token",) if m.small else (False, True):
            yield D, norm, scope, masked


def perturb_init(m: Make) -> Iterator[Case]:
    for D, norm, scope, masked in _balls(m):
        T = sum(LENGTHS)
        ends = m.ends(*LENGTHS) if scope == "sequence" else m.tensor([], torch.int32)
        mask = m.flags(T if masked else 0)
        args = (m.normal(T, D), ends, mask, RADIUS[norm], norm, scope, 1234567890123)
        yield Case(f"D={D} {norm} {scope}{' mask' * masked}", "forward", args)


def perturb_step(m: Make) -> Iterator[Case]:
    for D, norm, scope, masked in _balls(m):
        T = sum(LENGTHS)
        ends = m.ends(*LENGTHS) if scope == "sequence" else m.tensor([], torch.int32)
        delta, grad, mask = m.single(T, D, scale=0.1), m.single(T, D), m.flags(T if masked else 0)
        grad[T - 1, D // 2] = torch.inf  # moves as if it were 0
        embeds = (m.single(T, D), m.empty(T, D, dtype=torch.float32)) if masked else (None, None)
        args = (delta, grad, ends, mask, 0.3, RADIUS[norm], norm, scope, *embeds)
        writes = (0, 9) if masked else (0,)
        yield Case(f"D={D} {norm} {scope}{' mask' * masked}", "forward", args, writes=writes, floor=2e-6)


def _perturb_cut(kept: tuple[int, ...], ends: int) -> Few:
    cut_rows, cut_both = rows(*kept), rows(*kept, ends=(ends,))

    def cut(args: Arguments) -> Arguments:
        return cut_both(args) if args[ends].numel() else cut_rows(args)

    def variant(x: Tensor, *rest: object) -> tuple[object, ...]:
        words = tuple(y for y in rest if isinstance(y, str))
        there = tuple(y.numel() > 0 for y in rest if isinstance(y, Tensor))
        return x.shape[-1], x.ndim, *words, *there

    return Few(variant, cut)


def _flat_cut(few: Few, writes: tuple[int, ...]) -> Few:
    return Few(few.variant, few.cut, writes)


PERTURB_INIT = Check(perturb_init, {"forward": _perturb_cut((0, 2), 1)})
PERTURB_STEP = Check(perturb_step, {"forward": _flat_cut(_perturb_cut((0, 1, 3, 8, 9), 2), (0, 9))})


# --- advance ----------------------------------------------------------------------------------------
BATCHES = (1, 3, 33, 64, 257)  # 33 and 64: a block with copies of warps
CAPACITY = 32  # tokens a sequence may have


class Draw(NamedTuple):
    """What `sample` returns."""

    token: Tensor
    logp: Tensor
    behaviour_logp: Tensor
    entropy: Tensor


def advance(m: Make) -> Iterator[Case]:
    pages = dict.fromkeys((4, m.widths.page or 4))
    for B, page in product(BATCHES[:3] if m.small else BATCHES, pages):
        state = _decoding(m, B, page)
        args = (*state, m.tensor([7, 3, -1]), m.tensor([17]), m.tensor([100]), page)
        name = f"B={B} page={page}"
        yield Case(name, "forward", args, writes=(1, 2, 3, 6), defined=_but_the_pad_row)
        _, rows, records, _ = state
        key = m.ints(0, 2**62, len(records.length))
        yield Case(f"{name} newest", "newest", (rows.length, rows.table, rows.seq, key, page))


def _but_the_pad_row(outputs: list[Tensor]) -> list[Tensor]:
    """Rows and pages as they are; the records without their last row, which all dead rows write to."""
    a, b = len(Rows._fields), len(Rows._fields) + len(Records._fields)
    return [x[:-1] if a <= i < b else x for i, x in enumerate(outputs)]


def _decoding(m: Make, B: int, page: int) -> tuple[Draw, Rows, Records, Pages]:
    """B rows of random lengths, most alive, each on pages of its own; the last record is the pad row's."""
    S, C = B + 7, max(CAPACITY, 2 * page)
    length = m.ints(2, C - 1, B)
    drawn = torch.minimum(m.ints(0, 9, B), length - 1)
    until = torch.minimum(length + m.ints(1, 9, B), torch.full_like(length, C))
    N = -(-C // page)
    own = torch.arange(N, device=m.device) < ((length - 1) // page + 1)[:, None]
    used = int(own.sum())
    table = torch.zeros(B, N, dtype=torch.int32, device=m.device)
    table[own] = torch.arange(1, used + 1, dtype=torch.int32, device=m.device)
    seq = torch.randperm(S, generator=m.generator)[:B].to(m.device)
    rows = Rows(seq, length, drawn, drawn + m.ints(1, 4, B), until, m.ints(0, 9, B), m.flags(B, 0.8), table)

    zeros = torch.zeros(S + 1, C, device=m.device)
    floats = [zeros.clone() for _ in range(3)]
    whole = zeros[:, 0].long()
    logp, behaviour, entropy = floats
    lists = zeros.bool(), zeros.int(), whole, whole.to(torch.int8)
    records = Records(zeros.long(), logp, behaviour, entropy, *lists)
    P = used + B + 5
    refs = torch.full((P + 1,), -1, dtype=torch.int32, device=m.device)
    refs[: used + 1] = 1
    free = torch.arange(P + 1, dtype=torch.int32, device=m.device).flip(0)
    draw = Draw(m.ints(0, 9, B), m.single(B), m.single(B), m.single(B))
    return draw, rows, records, Pages(free, m.tensor([P - used]), refs)


ADVANCE = Check(advance)


CHECKS = {
    "gae": GAE,
    "group_advantage": GROUP_ADVANTAGE,
    "policy_loss": POLICY_LOSS,
    "perturb_init": PERTURB_INIT,
    "perturb_step": PERTURB_STEP,
    "advance": ADVANCE,
}
