"""Cases of the ops over the vocabulary: token_logp, linear_logp, linear_cross_entropy and sample."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from fastrl.kernels._registry import registered
from fastrl.kernels._verdicts.case import ROWS, Arguments, Case, Check, Few, Make, replaced, rows

HEAD = 4096  # rows of the head's weight in a first launch
LOGP = 1e-5  # nats: what a log-prob from logits may be off
OFFSET = 300.0  # of the logits of one row: z - lse would lose five digits there


def shapes(m: Make) -> Iterator[tuple[int, int]]:
    """(T, V) of the fixed cases, and of the caller's vocabulary."""
    yield from product(m.sizes.T, m.sizes.V)
    if m.widths.V:
        yield 3, m.widths.V


def logits(m: Make, T: int, V: int, dtype: torch.dtype | None = None) -> Tensor:
    """(T, V), rows padded to 16 elements; the last row has an offset, and the first a logit of -inf."""
    x = m.normal(T, V + -V % 16, dtype=dtype, scale=3.0)[:, :V]
    x[-1] += OFFSET
    x[0, V // 2] = -torch.inf
    return x


def targets(m: Make, T: int, V: int) -> Tensor:
    """(T,) tokens that differ from -inf; with more than two rows, one outside the vocabulary."""
    y = m.ints(0, V, T)
    y[0] = V - 1
    if T > 2:
        y[1] = -100
    return y


def temperatures(m: Make, T: int) -> Tensor:
    return 0.5 + m.single(T).abs()


def with_lse(outputs: list[Tensor]) -> list[Tensor]:
    """m and log s added up, in float64: log s is relative to the rounded m, so neither is defined alone."""
    logp, entropy, m, log_s, *rest = outputs
    return [logp, entropy, m.double() + log_s.double(), *rest]


# --- token_logp -------------------------------------------------------------------------------------
def token_logp(m: Make) -> Iterator[Case]:
    reference = registered("token_logp")["reference"].parts["forward"]
    for (T, V), entropy in product(shapes(m), (True, False)):
        name = f"T={T} V={V}{' entropy' * entropy}"
        x, y, tau = logits(m, T, V), targets(m, T, V), temperatures(m, T)
        yield Case(name, "forward", (x, y, tau, entropy), floor=LOGP, defined=with_lse)

        _, h, top, log_s = (s.float() for s in reference(x.double(), y, tau.double(), entropy))
        up = m.single(T), m.single(T if entropy else 0)
        rest = (*up, x, y, tau, h, top, log_s)
        yield Case(name, "backward", rest)
        yield Case(name, "backward_into", (torch.zeros_like(x), *rest), writes=(0,), over=(0, 3))
        fused = Case(
            name,
            "fused_into",
            (torch.zeros_like(x), x, y, tau, *up),
            writes=(0,),
            over=(0, 1),
            floor=LOGP,
            defined=with_lse,
        )
        yield fused
        if m.dtype == torch.float32:
            narrow = torch.zeros_like(x, dtype=torch.bfloat16)
            yield replaced(fused, name=f"{name} narrow", args=(narrow, *fused.args[1:]))


def _vocabulary(x: Tensor) -> tuple[int, int]:
    return x.shape[-1], x.ndim


TOKEN_LOGP = Check(
    token_logp,
    {
        "forward": Few(lambda x, y, tau, entropy: (*_vocabulary(x), entropy), rows(0, 1, 2)),
        "backward": Few(
            lambda dp, dh, x, *rest: (*_vocabulary(x), dh.numel() > 0), rows(0, 1, 2, 3, 4, 5, 6, 7)
        ),
        "backward_into": Few(
            lambda out, dp, dh, x, *rest: (*_vocabulary(x), dh.numel() > 0, out.dtype),
            rows(0, 1, 2, 3, 4, 5, 6, 7, 8),
            writes=(0,),
        ),
        "fused_into": Few(
            lambda out, x, y, tau, dp, dh: (*_vocabulary(x), dh.numel() > 0, out.dtype),
            rows(0, 1, 2, 3, 4, 5),
            writes=(0,),
        ),
    },
)


# --- linear_logp ------------------------------------------------------------------------------------
def linear_logp(m: Make) -> Iterator[Case]:
    for (T, V), (entropy, biased) in product(shapes(m), ((True, False), (False, True))):
        D = m.widths.D or 64
        x, w = m.normal(T, D, scale=2.0), m.normal(V, D, scale=D**-0.5)
        bias = m.normal(V) if biased else m.normal(0)
        args = (x, w, bias, targets(m, T, V), temperatures(m, T), entropy, torch.float32, 4096)
        name = f"T={T} V={V} D={D}{' entropy' * entropy}{' bias' * biased}"
        yield Case(
            name, "forward_chunks", args, floor=1e-3 if m.dtype != torch.float32 else 1e-4, defined=with_lse
        )


def _cut_head(args: Arguments) -> Arguments:
    """A few rows over the front of the vocabulary: float64 copies of all of it would not fit everywhere."""
    x, w, bias, y, tau, *rest = args
    front = HEAD + w.shape[0] % 16
    return (x[:ROWS], w[:front], bias[:front], y[:ROWS] % w[:front].shape[0], tau[:ROWS], *rest)


LINEAR_LOGP = Check(
    linear_logp,
    {
        "forward_chunks": Few(
            lambda x, w, bias, y, tau, entropy, dtype, chunk: (
                x.shape[1],
                w.shape[0] % 16,
                bias.numel() > 0,
                entropy,
                dtype,
            ),
            _cut_head,
        )
    },
)


# --- linear_cross_entropy ---------------------------------------------------------------------------
def linear_cross_entropy(m: Make) -> Iterator[Case]:
    for (T, V), (smoothing, cap, z) in product(
        shapes(m), ((0.1, 0.0, 0.0), (0.0, 20.0, 1e-4), (0.1, 30.0, 0.0))
    ):
        name = f"T={T} V={V} smoothing={smoothing:g} softcap={cap:g} z_loss={z:g}"
        x = m.normal(T, V + -V % 16, scale=3.0)[:, :V]
        y, options = targets(m, T, V), (smoothing, cap, z)
        yield Case(name, "forward", (x, y, *options), floor=LOGP)
        args = (torch.zeros_like(x), x, y, m.single(T), *options)
        yield Case(name, "fused_into", args, writes=(0,), scratch=(1,), over=(0, 1), floor=LOGP)


LINEAR_CROSS_ENTROPY = Check(
    linear_cross_entropy,
    {
        "forward": Few(lambda x, y, smoothing, cap, z: (x.shape[-1], smoothing > 0, cap > 0), rows(0, 1)),
        "fused_into": Few(
            lambda out, x, y, up, smoothing, cap, z: (x.shape[-1], smoothing > 0, cap > 0, out.dtype),
            rows(0, 1, 2, 3),
            writes=(0,),
        ),
    },
)


# --- sample -----------------------------------------------------------------------------------------
FILTERS = ((0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.9, 0.0), (20, 0.8, 0.05))  # top_k, top_p, min_p
LEAD = 0.25  # by which the logit of the drawn token is raised: rounding cannot hand the race to another


def sample(m: Make) -> Iterator[Case]:
    draw = registered("sample")["reference"].parts["forward"]
    for (T, V), filters in product(shapes(m), FILTERS):
        if m.small and (V, filters) not in ((m.sizes.V[0], filters), (V, FILTERS[0])):
            continue
        x = m.normal(T, V + -V % 16, scale=3.0)[:, :V]
        keys = m.ints(0, 1 << 40, T), m.ints(0, 1 << 40, T), m.ints(0, 4096, T)
        tau = temperatures(m, T)
        if T > 2:
            tau[2] = 0.0
        token = draw(x.double(), *keys, tau.double(), *filters)[0]
        x[torch.arange(T, device=x.device), token] += LEAD
        name = f"T={T} V={V} top_k={filters[0]} top_p={filters[1]:g} min_p={filters[2]:g}"
        yield Case(name, "forward", (x, *keys, tau, *filters), floor=LOGP)


SAMPLE = Check(
    sample,
    {
        "forward": Few(
            lambda x, seed, sequence, position, tau, k, p, least: (x.shape[-1], k > 0, p < 1, least > 0),
            rows(0, 1, 2, 3, 4),
        )
    },
)

CHECKS = {
    "token_logp": TOKEN_LOGP,
    "linear_logp": LINEAR_LOGP,
    "linear_cross_entropy": LINEAR_CROSS_ENTROPY,
    "sample": SAMPLE,
}
