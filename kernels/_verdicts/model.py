"""Cases of the decoder's ops: rms_norm, rope, swiglu, linear, decode_attention and decoder_layer."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.kernels._budget import ULP
from fastrl.kernels._layer import LayerWeights
from fastrl.kernels._verdicts.case import ROWS, Arguments, Case, Check, Few, Make, first_rows, rows

EPS = 1e-6
MODEL_D = (7, 896, 8208)  # widths; the widest rows are walked
MODEL_F = (7, 1000, 4864)
HEADS = ((4, 2, 8), (3, 3, 6), (14, 2, 64), (8, 8, 128))  # H, K, E
PAGES = (16, 64)


def widths(fixed: tuple[int, ...], own: int) -> tuple[int, ...]:
    """The fixed widths and the caller's."""
    return (*fixed, own) if own and own not in fixed else fixed


def heads(m: Make) -> tuple[tuple[int, int, int], ...]:
    own, fixed = (m.widths.H, m.widths.K, m.widths.E), HEADS[:2] if m.small else HEADS
    return (*fixed, own) if all(own) and own not in fixed else fixed


# --- rms_norm ---------------------------------------------------------------------------------------
def rms_norm(m: Make) -> Iterator[Case]:
    for T, D in product(m.sizes.T, widths((7, 130) if m.small else MODEL_D, m.widths.D)):
        name = f"T={T} D={D}"
        x, w, residual = m.normal(T, D), 1 + m.normal(D, scale=0.2), m.normal(T, D)
        yield Case(name, "forward", (x, w, EPS))
        # r is of the rounded sum, which float64 does not round
        yield Case(name, "add", (x, residual, w, EPS), floor=ULP[m.dtype])
        r = (x.float().square().mean(-1, keepdim=True) + EPS).rsqrt()
        yield Case(name, "backward", (m.normal(T, D), x, w, r))
        yield Case(name, "add_backward", (m.normal(T, D), m.normal(T, D), x, w, r))


RMS_NORM = Check(
    rms_norm,
    {
        "forward": Few(lambda x, w, eps: (x.shape[-1], w.dtype), rows(0)),
        "add": Few(lambda x, residual, w, eps: (x.shape[-1], w.dtype), rows(0, 1)),
        "backward": Few(lambda dy, x, w, r: (x.shape[-1], w.dtype), rows(0, 1, 3)),
        "add_backward": Few(lambda dy, dh, x, w, r: (x.shape[-1], w.dtype), rows(0, 1, 2, 4)),
    },
)


# --- rope -------------------------------------------------------------------------------------------
POSITIONS = 40


def _angles(m: Make, E: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(POSITIONS).double()[:, None] * 100.0 ** -(torch.arange(0, E, 2) / E)
    return angle.cos().to(m.device, torch.float32), angle.sin().to(m.device, torch.float32)


def rope(m: Make) -> Iterator[Case]:
    norms_of = ((False, False), (True, True), (True, False))
    for T, (H, K, E), (on_q, on_k) in product(m.sizes.T[-1:] if m.small else m.sizes.T, heads(m), norms_of):
        name = f"T={T} H={H} K={K} E={E}{' q_norm' * on_q}{' k_norm' * on_k}"
        fused = m.normal(T, H + 2 * K, E)  # views of a projection, as the decoder has them
        q, k, v = fused.split((H, K, K), 1)
        norms = [1 + m.normal(E, scale=0.2) if on else m.normal(0) for on in (on_q, on_k)]
        turn = (m.ints(0, POSITIONS, T), *_angles(m, E), *norms, EPS)
        yield Case(name, "forward", (q, k, *turn))
        yield Case(name, "backward", (m.normal(T, H, E), m.normal(T, K, E), q, k, *turn))
        caches = m.empty(T + 5, K, E), m.empty(T + 5, K, E)
        slots = torch.randperm(T + 5, generator=m.generator)[:T].to(m.device)
        yield Case(name, "store", (q, k, v, *turn, *caches, slots), writes=(9, 10))


def _norms(q_norm: Tensor, k_norm: Tensor) -> tuple[bool, bool]:
    return q_norm.numel() > 0, k_norm.numel() > 0


ROPE = Check(
    rope,
    {
        "forward": Few(
            lambda q, k, p, cos, sin, qn, kn, eps: (*q.shape[1:], k.shape[1], *_norms(qn, kn)),
            rows(0, 1, 2),
        ),
        "backward": Few(
            lambda dq, dk, q, k, p, cos, sin, qn, kn, eps: (*dq.shape[1:], dk.shape[1], *_norms(qn, kn)),
            rows(0, 1, 2, 3, 4),
        ),
        "store": Few(
            lambda q, k, v, p, cos, sin, qn, kn, *rest: (*q.shape[1:], k.shape[1], *_norms(qn, kn)),
            lambda args: cut_store(args),
            writes=(9, 10),
        ),
    },
)


def cut_store(args: Arguments) -> Arguments:
    """The first rows, stored to caches of their own: the caller's may be all of the device's memory."""
    q, k, v, positions = map(first_rows, args[:4])
    cache = args[9]
    new = [torch.full((2 * ROWS, *cache.shape[1:]), torch.nan).to(cache) for _ in range(2)]
    slots = torch.arange(len(positions), device=cache.device) * 2
    return (q, k, v, positions, *args[4:9], *new, slots)


# --- swiglu -----------------------------------------------------------------------------------------
def swiglu(m: Make) -> Iterator[Case]:
    for T, F in product(m.sizes.T, widths((7, 130) if m.small else MODEL_F, m.widths.F)):
        x = m.normal(T, 2 * F, scale=2.0)
        yield Case(f"T={T} F={F}", "forward", (x,))
        yield Case(f"T={T} F={F}", "backward", (m.normal(T, F), x))


SWIGLU = Check(
    swiglu,
    {
        "forward": Few(lambda x: x.shape[-1], rows(0)),
        "backward": Few(lambda dy, x: x.shape[-1], rows(0, 1)),
    },
)


# --- linear -----------------------------------------------------------------------------------------
FRONT = 1024  # rows of the weight in a first launch
PRODUCTS = ((7, 5), (130, 64), (64, 1000))  # N, K


def _products(m: Make) -> tuple[tuple[int, int], ...]:
    if not m.dots:
        return ()
    own, fixed = m.widths.D, ((7, 5), (64, 70)) if m.small else PRODUCTS
    return (*fixed, (own, own)) if own else fixed


def linear(m: Make) -> Iterator[Case]:
    for T, (N, K), biased in product(m.sizes.T, _products(m), (False, True)):
        name = f"T={T} N={N} K={K}{' bias' * biased}"
        x, w = m.normal(T, K), m.normal(N, K, scale=K**-0.5)
        bias = m.normal(N) if biased else m.normal(0)
        floor = 2e-6 if m.dtype == torch.float32 else 0.0
        yield Case(name, "forward", (x, w, bias), floor=floor)
        out = torch.zeros(T, N, device=m.device)  # logits, wider than their operands
        yield Case(name, "into", (out, x, w, bias), writes=(0,), floor=2e-6)


def _product(x: Tensor, w: Tensor, bias: Tensor) -> tuple[int, int, bool]:
    return w.shape[0] % 16, w.shape[1], bias.numel() > 0


def _cut_product(x: Tensor, w: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A few rows, and the front of the weight's."""
    front = FRONT + w.shape[0] % 16
    return x[:ROWS], w[:front], bias[:front]


def _cut_into(args: Arguments) -> Arguments:
    x, w, bias = _cut_product(*args[1:])
    return args[0][:ROWS, : w.shape[0]], x, w, bias


LINEAR = Check(
    linear,
    {
        "forward": Few(_product, lambda args: _cut_product(*args)),
        "into": Few(lambda out, x, w, bias: (*_product(x, w, bias), out.dtype), _cut_into, writes=(0,)),
    },
)


# --- decode_attention -------------------------------------------------------------------------------
class _Paged(NamedTuple):
    k_cache: Tensor
    v_cache: Tensor
    table: Tensor
    lengths: Tensor


def _paged(m: Make, lengths: list[int], page: int, K: int, E: int) -> _Paged:
    """Sequences on shuffled pages; what no sequence uses is NaN, or no page at all."""
    counts = [-(-n // page) for n in lengths]
    free = torch.randperm(sum(counts) + 2, generator=m.generator).tolist()
    caches = m.empty(len(free), page, K, E), m.empty(len(free), page, K, E)
    table = torch.full((len(lengths), max(counts) + 1), -7, dtype=torch.int32)
    for i, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        for p in range(count):
            table[i, p] = at = free.pop()
            used = min(page, n - p * page)
            for cache in caches:
                cache[at, :used] = m.normal(used, K, E)
    return _Paged(*caches, table.to(m.device), m.tensor(lengths, torch.int32))


def decode_attention(m: Make) -> Iterator[Case]:
    pages = widths((16,) if m.small else PAGES, m.widths.page)
    batches = ([1], [5, 0, 17]) if m.small else ([1], [5, 0, 64], [300, 17, 1, 600])
    for (H, K, E), page, lengths in product(heads(m), pages, batches) if m.dots else ():
        k, v, table, ends = _paged(m, lengths, page, K, E)
        q, scale = m.normal(len(lengths), H, E), E**-0.5
        name = f"lengths={'+'.join(map(str, lengths))} H={H} K={K} E={E} page={page}"
        yield Case(name, "forward", (q, k, v, table, ends, None, scale))
        several = m.tensor([i for i in range(len(lengths)) for _ in range(2)])
        fewer = (ends[several] - several.new_tensor([0, 1]).repeat(len(lengths))).clamp(min=0).int()
        q = m.normal(len(several), H, E)
        yield Case(f"{name} rows", "forward", (q, k, v, table, fewer, several, scale))


def _cut_paged(args: Arguments) -> Arguments:
    """The first queries, over copies of the pages that they use."""
    q, k, v, table, lengths, of, scale = args
    q, lengths = q[:ROWS], lengths[:ROWS]
    wanted = table[:ROWS] if of is None else table[of[:ROWS].long()]
    page = k.shape[1]
    count = max(1, -(-int(lengths.max()) // page)) if q.shape[0] else 1
    wanted = wanted[:, :count].clamp(0, k.shape[0] - 1).long()
    table = torch.arange(wanted.numel(), device=q.device, dtype=torch.int32).view(wanted.shape)
    at = wanted.flatten()
    of = None if of is None else torch.arange(q.shape[0], device=q.device)
    return q, k[at], v[at], table, lengths, of, scale


DECODE_ATTENTION = Check(
    decode_attention,
    {
        "forward": Few(
            lambda q, k, v, table, lengths, of, scale: (
                *q.shape[1:],
                k.shape[2],
                k.shape[1],
                of is None,
            ),
            _cut_paged,
        )
    },
)


# --- decoder_layer ----------------------------------------------------------------------------------
def decoder_layer(m: Make) -> Iterator[Case]:
    """A layer with a bias and one with head norms; rows for tiles of every size."""
    batches = ([5, 1, 17],) if m.small else ([1], [300, 17, 1, 600], [9] * 40, [3] * 150)
    D, F = (
        widths((24,) if m.small else (896,), m.widths.D)[-1],
        widths((20,) if m.small else (1000,), m.widths.F)[-1],
    )
    for (H, K, E), lengths, normed in product(heads(m), batches, (False, True)) if m.dots else ():
        page, N = m.widths.page or 16, POSITIONS if m.small else 640
        k, v, table, ends = _paged(m, lengths, page, K, E)
        position = ends.long() - 1
        slots = table.gather(1, (position // page)[:, None])[:, 0].long() * page + position % page
        head_norm = 1 + m.normal(E, scale=0.2) if normed else None
        weights = LayerWeights(
            1 + m.normal(D, scale=0.2),
            m.normal((H + 2 * K) * E, D, scale=D**-0.5),
            None if normed else m.normal((H + 2 * K) * E),
            head_norm,
            head_norm,
            m.normal(D, H * E, scale=(H * E) ** -0.5),
            1 + m.normal(D, scale=0.2),
            m.normal(2 * F, D, scale=D**-0.5),
            m.normal(D, F, scale=F**-0.5),
        )
        angle = m.single(N, E // 2)
        x, stream = m.normal(len(lengths), D), m.normal(len(lengths), D)
        args = (x, stream, weights, position, angle.cos(), angle.sin(), k, v, slots, table, ends, EPS)
        name = f"rows={len(lengths)} D={D} F={F} H={H} K={K} E={E}{' normed' * normed}"
        # ten ops in a row: where the reference is lucky, another order of sums need not be
        yield Case(name, "summed", args, writes=(6, 7), floor=8 * ULP[m.dtype])


DECODER_LAYER = Check(decoder_layer)

CHECKS = {
    "decoder_layer": DECODER_LAYER,
    "rms_norm": RMS_NORM,
    "rope": ROPE,
    "swiglu": SWIGLU,
    "linear": LINEAR,
    "decode_attention": DECODE_ATTENTION,
}
