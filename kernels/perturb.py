"""Adversarial perturbations of embeddings: a start inside a ball, and one step of projected gradient ascent.

    delta <- project(delta + step_size u)        u: the direction that raises the loss most per unit of norm

    norm   ball                 u                                     project
    l2     |delta|_2 <= radius  g / |g|_2                             delta min(1, radius / |delta|_2)
    linf   |delta_i| <= radius  sign g                                clamp to +- radius
    l1     |delta|_1 <= radius  sign g where |g| is largest, else 0,  soft threshold,
                                shared among ties                     the Euclidean projection

A ball holds the live elements of one token, of one sequence, or of the whole batch: the scope.  Masked-out
tokens are exactly 0.  A token whose gradient is not finite moves as if its gradient were 0.  A targeted
attack passes the negated gradient.

`out=` receives embeds + delta, formed in fp32, in the same launch: the input of the next forward pass.

The start is (2 u - 1) radius / c with Philox uniforms u, n live elements in the ball, and c = sqrt(n), 1, n
for l2, linf, l1: a cube that fits inside the ball (FreeLB's start), so no sum is needed and the bits are the
same on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.kernels._backend import pick, register, register_triton, unbuilt
from fastrl.kernels._check import FLOATS, INTS, compute_dtype, dims, ends, one_of, same_device
from fastrl.kernels._contexts import ignore_autocast
from fastrl.kernels._native import perturb as native
from fastrl.kernels._perturb import TINY
from fastrl.kernels._philox import interleave, philox, split, uniform

SCOPES = ("token", "sequence", "batch")
_OWNER = 0x70657274  # this op's part of the counter space
_NEWTON_STEPS = 48


class _Balls(NamedTuple):
    """Sums and maxima over the tokens of a ball, repeated for each; without offsets each token is a ball."""

    offsets: Tensor | None
    of: Tensor | None

    def total(self, x: Tensor) -> Tensor:
        return self._reduce(x, "sum")

    def largest(self, x: Tensor) -> Tensor:
        return self._reduce(x, "max")

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        if self.offsets is None:
            return x
        return torch.segment_reduce(x, how, offsets=self.offsets, unsafe=True)[self.of]


# --- the norms --------------------------------------------------------------------------------------
def _length(x: Tensor, balls: _Balls) -> Tensor:
    return balls.total(torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).square()).sqrt()


def _l2_direction(g: Tensor, balls: _Balls) -> Tensor:
    length = _length(g, balls)
    return g * torch.where(length > TINY, 1 / length, 0).to(g.dtype)[:, None]


def _l2_project(delta: Tensor, radius: float, balls: _Balls) -> Tensor:
    length = _length(delta, balls)
    return delta * torch.where(length > radius, radius / length, 1).to(delta.dtype)[:, None]


def _l1_direction(g: Tensor, balls: _Balls) -> Tensor:
    size = g.abs()
    top = balls.largest(size.amax(1))
    chosen = (size == top[:, None]) & (top > TINY)[:, None]
    return torch.where(chosen, g.sign() / balls.total(chosen.sum(1).to(g.dtype))[:, None], 0)


def _l1_project(delta: Tensor, radius: float, balls: _Balls) -> Tensor:
    """Soft threshold at the root of f(x) = sum max(|delta| - x, 0) - radius, convex and piecewise linear.

    Newton's steps from 0 never overshoot, and each divides f times the number of elements above x by 4 or
    more: 48 steps divide it by 10^28.  Nothing is sorted, so the bits are the same in every run.
    """
    size = delta.abs().double()
    total = balls.total(size.sum(1))
    threshold = torch.zeros_like(total)
    for _ in range(_NEWTON_STEPS if delta.numel() else 0):
        above = size > threshold[:, None]
        f = balls.total(torch.where(above, size - threshold[:, None], 0).sum(1)) - radius
        step = torch.where(f > 0, f / balls.total(above.sum(1).double()), 0)
        threshold = threshold + step
        # reading a value is free on CPU, and usually 5 steps suffice
        if delta.device.type == "cpu" and not bool((step > threshold * 1e-15).any()):
            break
    shrunk = delta.sign() * (size - threshold[:, None]).clamp_(min=0)
    return torch.where((total > radius)[:, None], shrunk, delta).to(delta.dtype)


class _Norm(NamedTuple):
    direction: Callable[[Tensor, _Balls], Tensor]  # of the gradient
    project: Callable[[Tensor, float, _Balls], Tensor]
    cube: Callable[[Tensor], Tensor]  # n -> c


NORMS = {
    "l2": _Norm(_l2_direction, _l2_project, torch.sqrt),
    "linf": _Norm(
        lambda g, balls: g.sign(), lambda delta, radius, balls: delta.clamp(-radius, radius), torch.ones_like
    ),
    "l1": _Norm(_l1_direction, _l1_project, lambda n: n),
}


# --- reference --------------------------------------------------------------------------------------
def reference_init(
    embeds: Tensor, cu_seqlens: Tensor, mask: Tensor, radius: float, norm: str, scope: str, seed: int
) -> Tensor:
    """The definition: a start shaped like `embeds`; `cu_seqlens` and `mask` are empty when absent."""
    shape, D = embeds.shape, embeds.shape[-1]
    live = _live(embeds, mask)
    n = _balls(embeds, cu_seqlens, scope).total(live.double() * D)
    index = torch.arange((embeds.numel() + 3) // 4, device=embeds.device)
    low, high = split(index)
    words = interleave(philox((low, high, 0, _OWNER), split(seed)), embeds.numel())
    edge = torch.full_like(n, radius) / NORMS[norm].cube(n.clamp(min=1))  # a number / tensor rounds twice
    start = (uniform(words).view(-1, D) * 2 - 1) * edge[:, None]
    return torch.where(live[:, None], start, 0).to(compute_dtype(embeds)).view(shape)


def reference_step(
    delta: Tensor,
    grad: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor,
    step_size: float,
    radius: float,
    norm: str,
    scope: str,
    embeds: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    """The definition: move `delta` in place, then write embeds + delta to `out` where they are given."""
    D = delta.shape[-1]
    live, balls = _live(delta, mask), _balls(delta, cu_seqlens, scope)
    g = grad.reshape(-1, D).to(delta.dtype)
    g = torch.where((live & g.isfinite().all(1))[:, None], g, 0)
    moved = delta.reshape(-1, D) + step_size * NORMS[norm].direction(g, balls)
    moved = torch.where(live[:, None], moved, 0)
    delta.copy_(NORMS[norm].project(moved, radius, balls).view(delta.shape))
    if embeds is not None and out is not None:
        out.copy_(embeds.to(delta.dtype) + delta)


def _live(x: Tensor, mask: Tensor) -> Tensor:
    if mask.numel():
        return mask.reshape(-1)
    return torch.ones(x.shape[:-1].numel(), dtype=torch.bool, device=x.device)


def _balls(x: Tensor, cu_seqlens: Tensor, scope: str) -> _Balls:
    if scope == "token":
        return _Balls(None, None)
    T = x.shape[:-1].numel()
    if cu_seqlens.numel():
        offsets = cu_seqlens.long()
    else:
        length = T if scope == "batch" else x.shape[-2]  # the rows of (B, L, D)
        offsets = torch.arange(0, T + 1, max(length, 1), device=x.device)
    return _Balls(offsets, torch.searchsorted(offsets[1:], torch.arange(T, device=x.device), right=True))


register("perturb_init", "reference", forward=reference_init)
register("perturb_step", "reference", forward=reference_step)
_MISSING = unbuilt("perturb_step_cpu")
register(
    "perturb_init",
    "cpu",
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    missing=_MISSING,
    forward=native.init,
)
register("perturb_step", "cpu", dtypes=(torch.float32,), missing=_MISSING, forward=native.step)
register_triton("perturb_init", "perturb_init", "forward")
register_triton("perturb_step", "perturb_step", "forward")


# --- registration -----------------------------------------------------------------------------------
@torch.library.custom_op("fastrl::perturb_init", mutates_args=())
def init_op(
    embeds: Tensor, cu_seqlens: Tensor, mask: Tensor, radius: float, norm: str, scope: str, seed: int
) -> Tensor:
    _check_ends(embeds, cu_seqlens)
    return pick("perturb_init", embeds, "forward")(embeds, cu_seqlens, mask, radius, norm, scope, seed)


@init_op.register_fake
def _(embeds, cu_seqlens, mask, radius, norm, scope, seed):  # type: ignore[no-untyped-def]
    return embeds.new_empty(embeds.shape, dtype=compute_dtype(embeds))


@torch.library.custom_op("fastrl::perturb_step", mutates_args=("delta", "out"))
def step_op(
    delta: Tensor,
    grad: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor,
    step_size: float,
    radius: float,
    norm: str,
    scope: str,
    embeds: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    _check_ends(delta, cu_seqlens)
    pick("perturb_step", delta, "forward")(
        delta, grad, cu_seqlens, mask, step_size, radius, norm, scope, embeds, out
    )


@step_op.register_fake
def _(delta, grad, cu_seqlens, mask, step_size, radius, norm, scope, embeds=None, out=None):  # type: ignore[no-untyped-def]
    return None


def _check_ends(x: Tensor, cu_seqlens: Tensor) -> None:
    if cu_seqlens.numel():  # in the op: torch.compile cannot trace code that reads values
        ends("cu_seqlens", cu_seqlens, x.shape[0])


ignore_autocast("perturb_init", "perturb_step")


# --- public -----------------------------------------------------------------------------------------
def perturb_init(
    embeds: Tensor,
    *,
    radius: float,
    norm: str,
    scope: str,
    seed: int,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """A random start inside the ball, in embedding units: a function of `seed` and the shape.

    Not differentiable.

    Shapes:  embeds (T, D) or (B, L, D), read for its shape, dtype and device only;  cu_seqlens (S+1,) int32
             with (T, D) and scope="sequence" (the rows of (B, L, D) are sequences);  mask (T,) or (B, L)
             bool, the tokens that may move
             ->  delta shaped like embeds, fp32 (fp64 for fp64 embeds).
    Raises:  ValueError or TypeError naming the argument.
    Source:  Zhu et al. 2020, "FreeLB".
    """
    ends_, live = _arguments("embeds", embeds, FLOATS, cu_seqlens, mask, radius, norm, scope)
    return init_op(embeds.detach(), ends_, live, float(radius), norm, scope, seed)


def perturb_step(
    delta: Tensor,
    grad: Tensor,
    *,
    step_size: float,
    radius: float,
    norm: str = "l2",
    scope: str = "token",
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    embeds: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`delta` after one ascent step and projection, in embedding units; changed in place, and returned.

    `delta` may be the leaf of which `grad` is the gradient.  With `embeds` and `out`, embeds + delta is also
    written to `out`, which may be `embeds`.  Keep delta in fp32: bf16 drops what is below 2^-9 of an
    embedding.  Not differentiable.

    Shapes:  delta (T, D) or (B, L, D) fp32|fp64;  grad, embeds, out like delta, any float;  cu_seqlens, mask
             as in `perturb_init`.
    Memory:  T bytes and a few numbers per token; the reference (float64) a few (T, D) temporaries.
    Raises:  ValueError or TypeError naming the argument.
    Source:  Madry et al. 2018 (PGD); Duchi et al. 2008 and Michelot 1986 (projection onto the l1 ball).
    """
    ends_, live = _arguments(
        "delta", delta, (torch.float32, torch.float64), cu_seqlens, mask, radius, norm, scope
    )
    if (embeds is None) != (out is None):
        raise ValueError(
            f"{'out' if out is None else 'embeds'}: expected a tensor like delta, got None; "
            "embeds and out go together"
        )
    for name, x in {"grad": grad, "embeds": embeds, "out": out}.items():
        if x is not None and (x.shape != delta.shape or x.dtype not in FLOATS):
            raise ValueError(
                f"{name}: expected floats in the shape of delta {tuple(delta.shape)}, "
                f"got {x.dtype} {tuple(x.shape)}"
            )
    same_device(delta=delta, grad=grad, embeds=embeds, out=out)
    tensors = (delta.detach(), grad.detach(), ends_, live)
    numbers = (float(step_size), float(radius), norm, scope)
    if embeds is None or out is None:
        step_op(*tensors, *numbers, None, None)
    else:
        step_op(*tensors, *numbers, embeds.detach(), out.detach())
    return delta


def _arguments(
    name: str,
    x: Tensor,
    dtypes: tuple[torch.dtype, ...],
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    radius: float,
    norm: str,
    scope: str,
) -> tuple[Tensor, Tensor]:
    """Check the arguments that both ops take; returns the sequence ends and the mask, empty where absent."""
    padded = isinstance(x, Tensor) and x.ndim == 3
    dims(name, x, "B L D" if padded else "T D", dtypes)
    one_of("norm", norm, NORMS)
    one_of("scope", scope, SCOPES)
    if not radius >= 0:
        raise ValueError(f"radius: expected 0 or a positive number, got {radius}")
    if padded and cu_seqlens is not None:
        raise ValueError(f"cu_seqlens: expected None with {name} (B, L, D), whose rows are the sequences")
    if scope == "sequence" and not padded and cu_seqlens is None:
        raise ValueError(
            f'cu_seqlens: expected (S+1,) ends, got None; scope="sequence" needs them for {name} (T, D)'
        )
    if cu_seqlens is not None:
        dims("cu_seqlens", cu_seqlens, "S+1", INTS)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
        raise ValueError(f"mask: expected bool {tuple(x.shape[:-1])}, got {mask.dtype} {tuple(mask.shape)}")
    same_device(**{name: x}, cu_seqlens=cu_seqlens, mask=mask)

    if scope != "sequence" or cu_seqlens is None:
        cu_seqlens = torch.empty(0, dtype=torch.int32, device=x.device)
    if mask is None:
        mask = torch.empty(0, dtype=torch.bool, device=x.device)
    return cu_seqlens, mask
